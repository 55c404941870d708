// SPDX-License-Identifier: Apache-2.0
//! test/TRANSPARENCY.md: each test of `test/lab/tests/transparency` writes its row down, and the table is made of them.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// In the order of the table.
pub const GROUPS: [&str; 7] =
    ["Calls in progress", "Readiness", "Sharing", "Processes", "Socket state", "Namespaces", "Addresses"];

const HEAD: &str = "# What an application can tell

A row for each behaviour, written by the test that has just run it (`./test/run.sh transparency`). In each, a connection
is brought into a state, moved between overlay and host network several times while it is there, and used to its end;
both programs check every byte and every result.

* **kept**: it moves, and the programs see what they would have seen without that.
* **refused**: it stays on the overlay, with this reason in `router flows`, and the programs see nothing.

";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    pub group: String,
    pub behaviour: String,
    /// What the test does.
    pub test: String,
    /// Of the test, in its file: the order of the rows of a group.
    pub line: u32,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Kept,
    /// The label of the refusal.
    Refused(String),
}

/// Where the tests leave their rows: beside what was built of them.
fn directory() -> Result<PathBuf> {
    let us = std::env::current_exe().context("where this program is")?;
    let target = us.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
    Ok(target.context("this program is not in a target directory")?.join("transparency"))
}

pub fn record(row: &Row) -> Result<()> {
    ensure!(GROUPS.contains(&row.group.as_str()), "there is no group {}", row.group);
    let directory = directory()?;
    std::fs::create_dir_all(&directory)?;
    let name: String = row.behaviour.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    let path = directory.join(format!("{}-{name}.json", row.group.replace(' ', "-")));
    std::fs::write(&path, serde_json::to_vec(row)?).with_context(|| format!("writing {}", path.display()))
}

/// Forgets what earlier runs have recorded.
pub fn clear() -> Result<()> {
    match std::fs::remove_dir_all(directory()?) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Makes the table of all recorded rows.
pub fn write_table(to: &Path) -> Result<()> {
    let mut rows = Vec::new();
    for entry in std::fs::read_dir(directory()?).context("no test of the matrix has run")? {
        rows.push(serde_json::from_slice(&std::fs::read(entry?.path())?)?);
    }
    std::fs::write(to, table(rows)).with_context(|| format!("writing {}", to.display()))
}

fn table(mut rows: Vec<Row>) -> String {
    let group = |row: &Row| GROUPS.iter().position(|group| *group == row.group);
    rows.sort_by_key(|row| (group(row), row.line));
    let mut text = HEAD.to_owned();
    let kept = rows.iter().filter(|row| row.outcome == Outcome::Kept).count();
    let _ = writeln!(text, "{kept} kept, {} refused.", rows.len() - kept);
    for group in GROUPS {
        let _ = writeln!(text, "\n## {group}\n\n| behaviour | outcome | what the test does |\n|---|---|---|");
        for row in rows.iter().filter(|row| row.group == group) {
            let _ = writeln!(text, "| {} | {} | {} |", row.behaviour, row.outcome.text(), row.test);
        }
    }
    text
}

impl Outcome {
    fn text(&self) -> String {
        match self {
            Outcome::Kept => "kept".to_owned(),
            Outcome::Refused(label) => format!("refused: `{label}`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(behaviour: &str, line: u32, outcome: Outcome) -> Row {
        let (group, test) = (GROUPS[0].to_owned(), "does it".to_owned());
        Row { group, behaviour: behaviour.to_owned(), test, line, outcome }
    }

    #[test]
    fn rows_stand_in_the_order_of_their_tests() {
        let rows = vec![row("b", 9, Outcome::Kept), row("a", 20, Outcome::Refused("why".into()))];
        let text = table(rows);
        assert!(text.contains("1 kept, 1 refused."), "{text}");
        assert!(text.contains("| b | kept | does it |\n| a | refused: `why` | does it |\n"), "{text}");
    }
}
