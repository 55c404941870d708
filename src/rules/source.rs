// SPDX-License-Identifier: Apache-2.0
//! Where rules come from: a ConfigMap itself, one mounted as a directory, one file a rule, or a ConfigMap's manifest.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_yaml::Value;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::{Origin, Reading, Rule, RuleError, RuleSet, parse};

/// Between two looks at files that may have changed. Whoever mounts a ConfigMap takes up to a minute to change them.
const LOOK: Duration = Duration::from_secs(2);

/// Reads the rules at `path` again and again, for ever; what differs from before is told.
pub async fn watch_path(path: PathBuf, readings: mpsc::Sender<Reading>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = None;
    loop {
        ticks.tick().await;
        let rules = RuleSet::load(&path);
        let now = rules.as_ref().map_err(ToString::to_string).cloned();
        if before.as_ref() == Some(&now) {
            continue;
        }
        before = Some(now);
        if readings.send(Reading { origin: Origin::Path, rules }).await.is_err() {
            return;
        }
    }
}

impl RuleSet {
    /// Read all rules at `path`. One that is wrong makes the whole set wrong: half a set could swap too much.
    pub fn load(path: &Path) -> Result<RuleSet, RuleError> {
        let unreadable = |source| RuleError::Unreadable { path: path.to_owned(), source };
        let rules = if std::fs::metadata(path).map_err(unreadable)?.is_dir() {
            directory(path)?
        } else {
            manifest(path, &std::fs::read_to_string(path).map_err(unreadable)?)?
        };
        Ok(RuleSet { rules, awaited: false })
    }

    /// The rules in a ConfigMap's data; `name` is what errors call it.
    pub fn of_config_map<'a>(
        name: &str,
        data: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<RuleSet, RuleError> {
        let rules = data
            .map(|(key, text)| rule(key, text, format!("{name}, key {key}")))
            .collect::<Result<_, _>>()?;
        Ok(RuleSet { rules, awaited: false })
    }
}

fn rule(key: &str, text: &str, place: String) -> Result<Rule, RuleError> {
    let kind = parse::rule(text).map_err(|wrong| RuleError::Rule {
        place,
        line: wrong.line.max(1),
        key: key.to_owned(),
        reason: wrong.reason,
    })?;
    Ok(Rule { key: key.to_owned(), kind })
}

/// A mounted ConfigMap: `..data` points to the present version, each key is a link into it. Names with a dot in
/// front are Kubernetes' own.
fn directory(path: &Path) -> Result<Vec<Rule>, RuleError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| RuleError::Unreadable { path, source }
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable(path))? {
        let entry = entry.map_err(unreadable(path))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            files.push(entry.path());
        }
    }
    files.sort();
    let mut rules = Vec::new();
    for file in files.into_iter().filter(|file| file.is_file()) {
        let key = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).map_err(unreadable(&file))?;
        rules.push(rule(&key, &text, file.display().to_string())?);
    }
    Ok(rules)
}

pub fn manifest(path: &Path, text: &str) -> Result<Vec<Rule>, RuleError> {
    let wrong = |reason: String| RuleError::Manifest { path: path.to_owned(), reason };
    let document: Value = serde_yaml::from_str(text).map_err(|error| wrong(error.to_string()))?;
    match document.get("kind").and_then(Value::as_str) {
        Some("ConfigMap") => {}
        Some(other) => return Err(wrong(format!("kind is {other}, ConfigMap expected"))),
        None => return Err(wrong("it has no kind, `kind: ConfigMap` expected".into())),
    }
    let data = match document.get("data") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Mapping(data)) => data,
        Some(_) => return Err(wrong("data is no mapping: expected one rule a key".into())),
    };
    let mut rules = Vec::new();
    for (key, value) in data {
        let Some(key) = key.as_str() else {
            return Err(wrong("data has a key that is no text: expected the name of a rule".into()));
        };
        let Some(value) = value.as_str() else {
            return Err(wrong(format!("data.{key}: expected text, `{key}: |` and a rule under it")));
        };
        let kind = parse::rule(value).map_err(|wrong| RuleError::Rule {
            place: path.display().to_string(),
            line: line_of_key(text, key) + wrong.line,
            key: key.to_owned(),
            reason: wrong.reason,
        })?;
        rules.push(Rule { key: key.to_owned(), kind });
    }
    Ok(rules)
}

/// The line of the manifest in which a rule's block begins.
fn line_of_key(text: &str, key: &str) -> usize {
    let is_key = |line: &str| {
        let line = line.trim_start().trim_start_matches(['"', '\'']);
        line.strip_prefix(key).is_some_and(|rest| rest.trim_start_matches(['"', '\'']).starts_with(':'))
    };
    text.lines().position(is_key).map_or(1, |index| index + 1)
}
