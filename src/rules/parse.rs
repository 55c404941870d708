// SPDX-License-Identifier: Apache-2.0
//! The text of one rule: lines `key=value`, values quoted or not, blank lines and `#` comments between them.

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;

use super::{After, Kind};

/// What is wrong with a rule, and in which of its lines (from 1; 0 is the rule as a whole).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    pub line: usize,
    pub reason: String,
}

struct Value<'a> {
    line: usize,
    text: &'a str,
}

pub fn rule(text: &str) -> Result<Kind, Wrong> {
    let mut values: BTreeMap<&str, Value<'_>> = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let (number, line) = (index + 1, line.trim());
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |reason| Err(Wrong { line: number, reason });
        let Some((key, value)) = line.split_once('=') else {
            return wrong(format!("`{line}`: expected a line like key=value"));
        };
        let (key, value) = (key.trim(), unquoted(value.trim()));
        if !["type", "name", "value", "from", "to", "reverse", "after"].contains(&key) {
            return wrong(format!(
                "`{key}` is no key of a rule: expected type, name, value, from, to, reverse or after"
            ));
        }
        if values.insert(key, Value { line: number, text: value }).is_some() {
            return wrong(format!("`{key}` is given twice: leave one of them out"));
        }
    }
    let Some(kind) = values.remove("type") else {
        return Err(Wrong {
            line: 0,
            reason: "has no `type`: expected a line type=cidr, type=podLabel or type=containerLabel".into(),
        });
    };
    match kind.text {
        "cidr" => cidr(values),
        "podLabel" => label(values, kind.text).map(|(name, value)| Kind::PodLabel { name, value }),
        "containerLabel" => {
            label(values, kind.text).map(|(name, value)| Kind::ContainerLabel { name, value })
        }
        other => Err(Wrong {
            line: kind.line,
            reason: format!("type `{other}` is not known: expected cidr, podLabel or containerLabel"),
        }),
    }
}

fn unquoted(value: &str) -> &str {
    ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value)
}

fn cidr(mut values: BTreeMap<&str, Value<'_>>) -> Result<Kind, Wrong> {
    let mut network = |key: &str| -> Result<Option<IpNetwork>, Wrong> {
        let Some(value) = values.remove(key) else { return Ok(None) };
        let reason =
            format!("{key}={}: expected an address range such as 10.244.0.0/16 or fd00::/64", value.text);
        value.text.parse().map(Some).map_err(|_| Wrong { line: value.line, reason })
    };
    let (from, to) = (network("from")?, network("to")?);
    let reverse = match values.remove("reverse") {
        None => false,
        Some(value) if value.text.eq_ignore_ascii_case("true") => true,
        Some(value) if value.text.eq_ignore_ascii_case("false") => false,
        Some(value) => {
            let reason = format!("reverse={}: expected true or false", value.text);
            return Err(Wrong { line: value.line, reason });
        }
    };
    let after = values.remove("after").map(after).transpose()?;
    values.remove("name");
    nothing_else(values, "cidr", "name, from, to, reverse and after")?;
    Ok(Kind::Cidr { from, to, reverse, after })
}

fn after(value: Value<'_>) -> Result<After, Wrong> {
    let reason = format!(
        "after={}: expected 0, a time such as 20ms or 5s, or a size such as 64KiB or 1MiB",
        value.text
    );
    value.text.parse().map_err(|()| Wrong { line: value.line, reason })
}

fn label(mut values: BTreeMap<&str, Value<'_>>, kind: &str) -> Result<(String, String), Wrong> {
    let mut take = |key: &str| match values.remove(key) {
        Some(value) if !value.text.is_empty() => Ok(value.text.to_owned()),
        Some(value) => {
            Err(Wrong { line: value.line, reason: format!("`{key}` is empty: expected text after the =") })
        }
        None => {
            Err(Wrong { line: 0, reason: format!("type={kind} has no `{key}`: expected a line {key}=...") })
        }
    };
    let pair = (take("name")?, take("value")?);
    nothing_else(values, kind, "name and value")?;
    Ok(pair)
}

fn nothing_else(values: BTreeMap<&str, Value<'_>>, kind: &str, expected: &str) -> Result<(), Wrong> {
    match values.into_iter().next() {
        None => Ok(()),
        Some((key, value)) => Err(Wrong {
            line: value.line,
            reason: format!("`{key}` does not belong to type={kind}, which has {expected}"),
        }),
    }
}
