// SPDX-License-Identifier: Apache-2.0
//! The steps of an end whose old connection carries nothing any more, from the freeze to the bytes to carry.

use forwarder_api::Refusal;

use super::{Action, End, Event, Look, MAX_IN_FLIGHT, Message, Queue, Stage};

impl End {
    pub(super) fn saving(&self, peer_saved: bool, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Saved(queues) => {
                let mut actions = vec![Action::Tell(Message::Saved)];
                if peer_saved {
                    actions.push(Action::LookAgain { with_unread: true });
                }
                (Stage::Saved { queues, mine: None, theirs: None }, actions)
            }
            Event::FreezeFailed(reason) => self.abort(reason),
            Event::Peer(Message::Saved) => (Stage::Saving { peer_saved: true }, vec![]),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::FreezeBudget),
            Event::Start
            | Event::Calm
            | Event::Pouring
            | Event::Frozen(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Looks(_))
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::SilenceOver => (Stage::Saving { peer_saved }, vec![]),
        }
    }

    pub(super) fn saved(
        &self,
        queues: Vec<Queue>,
        mine: Option<Vec<Look>>,
        theirs: Option<Vec<Look>>,
        event: Event,
    ) -> (Stage, Vec<Action>) {
        match event {
            Event::Peer(Message::Saved) => {
                (Stage::Saved { queues, mine, theirs }, vec![Action::LookAgain { with_unread: true }])
            }
            Event::Looked(looks) if mine.is_none() => {
                let told = Action::Tell(Message::Looks(looks.clone()));
                let (stage, mut actions) = self.compare(queues, Some(looks), theirs);
                actions.insert(0, told);
                (stage, actions)
            }
            Event::Peer(Message::Looks(looks)) => self.compare(queues, mine, Some(looks)),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::FreezeBudget),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::Pouring
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze)
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::SilenceOver => (Stage::Saved { queues, mine, theirs }, vec![]),
        }
    }

    /// The looks of both, if known: go on when they show the two ends of each connection.
    fn compare(
        &self,
        queues: Vec<Queue>,
        mine: Option<Vec<Look>>,
        theirs: Option<Vec<Look>>,
    ) -> (Stage, Vec<Action>) {
        let (Some(looks), Some(peer)) = (&mine, &theirs) else {
            return (Stage::Saved { queues, mine, theirs }, vec![]);
        };
        let pairs = queues.iter().zip(looks).zip(peer);
        let carry: Option<Vec<Vec<u8>>> =
            pairs.map(|((queue, look), peer)| carry(queue, look, peer)).collect();
        match carry.filter(|_| looks.len() == peer.len()) {
            Some(carry) => (Stage::Loading, vec![Action::Arm, Action::Load { carry }]),
            None => self.abort(Refusal::NotTheSameConnection),
        }
    }
}

/// What the peer's application has not read and what it misses. None: these are not the two ends of one connection.
fn carry(queue: &Queue, look: &Look, peer: &Look) -> Option<Vec<u8>> {
    // The other way the peer knows better: it has the queue.
    let may_have_sent = peer.write_seq.wrapping_sub(look.rcv_nxt) <= MAX_IN_FLIGHT;
    let (missing, unread) = (missing(queue, peer)?, peer.unread.as_ref()?);
    (may_have_sent && look.write_seq == queue.write_seq).then(|| [unread, missing].concat())
}

/// The bytes of a queue that the peer has not received. None: the peer expects one that is not in it, which no peer of this
/// connection does.
pub(super) fn missing<'a>(queue: &'a Queue, peer: &Look) -> Option<&'a [u8]> {
    let missing = queue.write_seq.wrapping_sub(peer.rcv_nxt) as usize;
    let at = queue.bytes.len().checked_sub(missing)?;
    Some(&queue.bytes[at..])
}
