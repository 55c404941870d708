// SPDX-License-Identifier: Apache-2.0
//! Carries the ledger's actions out.

use std::{io, net::SocketAddr, os::fd::OwnedFd, time::Instant};

use forwarder_api::{ConnId, Direction, Moved, Refusal, Request};

use super::{
    Coordinator, Lines,
    host_path::{Family, HostPath},
    ledger::{Action, Event},
    session,
    wire::{Message, Tuple},
};
use crate::{forwarder::Sent, identity::Names, peers::PeerAddress};

impl Coordinator {
    pub(super) async fn act(&mut self, action: Action) {
        match action {
            Action::Forwarder(Request::Prepare { conn, direction: Direction::ToOverlay, .. })
                if !self.is_translated_still(conn) =>
            {
                log::warn!("{conn}: it cannot go back: the translation of its addresses is lost");
                Box::pin(self.handle(Event::Refused(conn, Refusal::NotParked))).await;
            }
            Action::Forwarder(request) => self.ask(request, vec![]),
            Action::Move { conn, role, manner, names, with } => {
                let fds = self.named(conn, &[names]);
                let budget_us = self.budget_us();
                self.ask(Request::Move { conn, role, manner, budget_us, with }, fds);
            }
            Action::MoveLocal { conn, names, alone } => {
                let fds = self.named(conn, &names);
                let budget_us = self.budget_us();
                self.ask(Request::MoveLocal { conn, budget_us, alone }, fds);
            }
            Action::Connect { conn, family, peer, rendezvous } => {
                let address = self.parts.host_address;
                if let Some((to, _)) = &rendezvous.host {
                    self.contacts.note_host(peer, to.ip().to_canonical(), Instant::now());
                }
                let control = SocketAddr::new(peer, self.parts.settings.router_port);
                let host = async move {
                    match rendezvous.host {
                        Some((to, token)) => {
                            HostPath::connect(address, family == Family::V6, to, token).await.map(Some)
                        }
                        None => Ok(None),
                    }
                };
                let witness = session::open_witness(control, rendezvous.witness);
                self.make(conn, async move {
                    let (host, witness) = tokio::try_join!(host, witness)?;
                    let host: Vec<OwnedFd> = host.into_iter().collect();
                    Ok(Lines { hosts_wanted: host.len(), host, witness: Some(witness) })
                });
            }
            Action::ConnectLocal { conn, v6 } => self.make(conn, async move {
                let host = HostPath::within_host(v6).await?.into();
                Ok(Lines { host, hosts_wanted: 2, witness: None })
            }),
            Action::Accept { attempted, host, peer, holder } => {
                match self.host_path.expect(attempted.conn, host) {
                    Ok(rendezvous) => {
                        let hosts_wanted = usize::from(host.is_some());
                        self.lines.insert(attempted.conn, Lines { hosts_wanted, ..Lines::default() });
                        self.tell(peer, Message::Accept { attempted, rendezvous, holder });
                    }
                    // Nobody will come, and the negotiation ends by itself.
                    Err(error) => log::error!("{}: no token can be made: {error}", attempted.conn),
                }
            }
            Action::DropPath(conn) => {
                self.host_path.forget(conn);
                self.lines.remove(&conn);
            }
            Action::Tell(peer, message) => self.tell(peer, message),
            Action::Reach(peer) => {
                let to = SocketAddr::new(peer, self.parts.settings.router_port);
                tokio::spawn(session::reach(to, self.parts.trust.clone(), self.to_sessions.clone()));
            }
            Action::Answer(tuple, result) => {
                for waiting in self.waiting.remove(&tuple).unwrap_or_default() {
                    let _ = waiting.send(Some(result));
                }
            }
            Action::ReportStall { conn, tuple, unacknowledged_bytes } => log::warn!(
                "{conn} {} - {}: the host network stopped carrying it, {unacknowledged_bytes} bytes unacknowledged; it goes back to the overlay",
                tuple.local,
                tuple.remote
            ),
            Action::ReportFalseClaim { node, tuple, home } => log::warn!(
                "peer {node} speaks about {} - {}, whose other end is {home}: not believed",
                tuple.local,
                tuple.remote
            ),
            Action::Report { conn, tuple, direction, result } => {
                report(conn, self.workload(tuple), tuple, direction, &result);
            }
            Action::ReportRefusal { conn, tuple, reason } => {
                report_refusal(conn, self.workload(tuple), tuple, reason);
            }
        }
    }

    fn is_translated_still(&mut self, conn: ConnId) -> bool {
        let flow = self.ledger.of(conn);
        flow.is_none_or(|flow| self.parts.lookup.is_translated_still(flow))
    }

    /// Send to the forwarder. Without one, the ledger learns that it is lost, and asks again when it is back.
    pub(super) fn ask(&self, request: Request, fds: Vec<OwnedFd>) {
        if let Some((_, requests)) = &self.forwarder {
            let sent: Sent = (request, fds);
            let _ = requests.send(sent);
        }
    }

    fn tell(&mut self, peer: PeerAddress, message: Message) {
        let Some(session) = self.sessions.get(&peer) else { return };
        if session.try_send(message).is_err() {
            // Dropping the queue ends the session: better none than one with a gap.
            log::warn!("peer {peer} takes no more messages");
            self.sessions.remove(&peer);
        }
    }

    fn make(&self, conn: ConnId, connecting: impl Future<Output = io::Result<Lines>> + Send + 'static) {
        let made = self.to_made.clone();
        tokio::spawn(async move { made.send((conn, connecting.await)).await });
    }

    /// The host sockets of `conn`, if any, each with its overlay addresses, and its witness. None after an error: then
    /// the forwarder finds one missing and refuses.
    fn named(&mut self, conn: ConnId, names: &[Names]) -> Vec<OwnedFd> {
        let lines = self.lines.remove(&conn).unwrap_or_default();
        self.parts.watch.expect_more();
        for (socket, names) in lines.host.iter().zip(names) {
            if let Err(error) = self.parts.identity.set(socket, names) {
                log::error!("{conn}: {error}");
                return vec![];
            }
        }
        lines.host.into_iter().chain(lines.witness).collect()
    }

    fn workload(&self, tuple: Tuple) -> &str {
        self.ledger.get(tuple).map_or("", |flow| &flow.workload.name)
    }

    fn budget_us(&self) -> u32 {
        self.parts.settings.freeze_budget_ms * 1000
    }
}

fn report(conn: ConnId, workload: &str, tuple: Tuple, direction: Direction, result: &Result<Moved, Refusal>) {
    let Tuple { local, remote } = tuple;
    let (decision, to) = match direction {
        Direction::ToHost => ("swapped", "the host network"),
        Direction::ToOverlay => ("swapped back", "the overlay"),
    };
    match result {
        Ok(moved) => log::info!(
            decision = decision, conn:% = conn, workload = workload, local:% = local, remote:% = remote,
            pause_us = moved.pause_us, freeze_us = moved.freeze_us, settle_us = moved.settle_us,
            install_us = moved.install_us, unread_bytes = moved.unread_bytes, together = moved.together;
            "{conn} {local} - {remote}: moved to {to}, pause {} us (freeze {}, settle {}, install {}), {} bytes unread, of {workload}",
            moved.pause_us,
            moved.freeze_us,
            moved.settle_us,
            moved.install_us,
            moved.unread_bytes
        ),
        // It is tried again.
        Err(reason) if reason.is_passing() => {
            log::debug!("{conn} {local} - {remote}: not moved to {to} now: {reason}");
        }
        Err(reason) => log::info!(
            decision = "refused", conn:% = conn, workload = workload, local:% = local, remote:% = remote,
            reason = reason.label();
            "{conn} {local} - {remote}: not moved to {to}: {reason} ({}), of {workload}", reason.label()
        ),
    }
}

/// Nobody asked for what no rule, no overlay and no other host is there for, and most connections of a host may be such:
/// that is no decision to tell of. Nor is what passes.
fn report_refusal(conn: ConnId, workload: &str, tuple: Tuple, reason: Refusal) {
    let Tuple { local, remote } = tuple;
    let not_asked_for =
        [Refusal::NoRuleMatches, Refusal::NoPeerHost, Refusal::HostAddress, Refusal::SameNetwork];
    let level = if reason.is_passing() || not_asked_for.contains(&reason) {
        log::Level::Debug
    } else {
        log::Level::Info
    };
    log::log!(
        level,
        decision = "refused", conn:% = conn, workload = workload, local:% = local, remote:% = remote,
        reason = reason.label();
        "{conn} {local} - {remote}: refused: {reason} ({}), of {workload}", reason.label()
    );
}
