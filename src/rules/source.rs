// SPDX-License-Identifier: Apache-2.0
//! Where rules come from: a ConfigMap mounted as a directory, one file a rule, or a ConfigMap's manifest.

use std::path::{Path, PathBuf};

use serde_yaml::Value;

use super::{Rule, RuleError, RuleSet, parse};

impl RuleSet {
    /// Read all rules at `path`. One that is wrong makes the whole set wrong: half a set could swap too much.
    pub fn load(path: &Path) -> Result<RuleSet, RuleError> {
        let unreadable = |source| RuleError::Unreadable { path: path.to_owned(), source };
        let rules = if std::fs::metadata(path).map_err(unreadable)?.is_dir() {
            directory(path)?
        } else {
            manifest(path, &std::fs::read_to_string(path).map_err(unreadable)?)?
        };
        Ok(RuleSet { rules })
    }
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
        let kind = parse::rule(&text).map_err(|wrong| RuleError::Rule {
            path: file.clone(),
            line: wrong.line.max(1),
            key: key.clone(),
            reason: wrong.reason,
        })?;
        rules.push(Rule { key, kind });
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
        let (Some(key), Some(value)) = (key.as_str(), value.as_str()) else {
            return Err(wrong(format!("data.{key:?}: expected text, `{key:?}: |` and a rule under it")));
        };
        let kind = parse::rule(value).map_err(|wrong| RuleError::Rule {
            path: path.to_owned(),
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
