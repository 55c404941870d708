// SPDX-License-Identifier: Apache-2.0
//! `router explain`

use std::{fmt::Write, net::SocketAddr, path::Path, str::FromStr};

use anyhow::{Result, bail};
use forwarder_api::SocketInode;

use crate::{
    control::{self, Question},
    coordinator::{Explanation, Says, Subject},
    settings::Conn,
};

/// More sockets of a process than these are not named to the router.
const MAX_SOCKETS: usize = 1 << 15;

/// What the command line asks about.
#[derive(Clone, Debug)]
pub struct Asked(Subject);

impl FromStr for Asked {
    type Err = String;

    fn from_str(text: &str) -> Result<Asked, String> {
        if let Ok(Conn(conn)) = text.parse() {
            return Ok(Asked(Subject::Conn(conn)));
        }
        if let Ok(tgid) = text.parse() {
            return Ok(Asked(Subject::Process { tgid, sockets: vec![] }));
        }
        let addresses = text.split_once('-').and_then(|(local, remote)| {
            let address = |text: &str| text.trim().parse::<SocketAddr>().ok();
            Some(Subject::Addresses { local: address(local)?, remote: address(remote)? })
        });
        addresses.map(Asked).ok_or_else(|| {
            "expected a connection as `router flows` names it, its addresses as 10.244.1.9:4000-10.244.2.9:80, or a \
             process id"
                .into()
        })
    }
}

pub fn explain(Asked(subject): Asked, json: bool, control: &Path) -> Result<()> {
    let subject = match subject {
        Subject::Process { tgid, .. } => Subject::Process { tgid, sockets: sockets_of(tgid) },
        Subject::Conn(_) | Subject::Addresses { .. } => subject,
    };
    let explained: Vec<Explanation> = control::ask(control, &Question::Explain(subject.clone()))?;
    if json {
        super::show_json(&explained)?;
    } else {
        let texts: Vec<String> = explained.iter().map(text).collect();
        super::show(&texts.join("\n"))?;
    }
    match subject {
        _ if !explained.is_empty() => Ok(()),
        Subject::Conn(conn) => bail!(super::unknown(conn)),
        Subject::Addresses { local, remote } => bail!(
            "{local}-{remote}: no container of this host has such a connection, or it is over; is this the right host, and \
             are the addresses those that the container sees?"
        ),
        Subject::Process { tgid, .. } => bail!("{tgid}: nothing is known of this process"),
    }
}

/// By its descriptors, as far as they may be seen: with its threads and other processes it may share them.
fn sockets_of(tgid: u32) -> Vec<SocketInode> {
    let descriptors = std::fs::read_dir(format!("/proc/{tgid}/fd")).into_iter().flatten().flatten();
    let inode = |descriptor: std::fs::DirEntry| {
        let target = std::fs::read_link(descriptor.path()).ok()?;
        let number = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        number.parse().ok().map(SocketInode)
    };
    descriptors.filter_map(inode).take(MAX_SOCKETS).collect()
}

fn text(explanation: &Explanation) -> String {
    let mut text = format!("{}\n{}\n\n", explanation.about, explanation.conclusion);
    let width = explanation.steps.iter().map(|step| step.step.len()).max().unwrap_or_default();
    for step in &explanation.steps {
        let says = match step.says {
            Says::Yes => "yes",
            Says::No => "NO",
            Says::Wait => "wait",
            Says::Note => "",
        };
        // Writing to a String does not fail.
        let _ = writeln!(text, "  {says:<4}  {:<width$}  {}", step.step, step.because);
        if let Some(way_out) = &step.way_out {
            let _ = writeln!(text, "  {:<4}  {:<width$}  -> {way_out}", "", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let found = match text.parse::<Asked>() {
            Ok(Asked(subject)) => format!("{subject:?}"),
            Err(error) => error,
        };
        assert!(found.contains(expected), "{text}: {found}");
    }

    #[test]
    fn a_connection_its_addresses_or_a_process_can_be_asked_about() {
        check("0123456789abcdef", "Conn(0123456789abcdef)");
        check("1234", "Process { tgid: 1234");
        check("10.244.1.9:4000-10.244.2.9:80", "remote: 10.244.2.9:80");
        check("[fd00::1]:1-[fd00::2]:2", "local: [fd00::1]:1");
        check("web", "expected a connection as `router flows` names it");
    }
}
