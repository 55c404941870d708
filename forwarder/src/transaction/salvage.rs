// SPDX-License-Identifier: Apache-2.0
//! The steps of an end whose old connection carries nothing any more, from the freeze to the bytes to carry.

use forwarder_api::Refusal;

use super::{Action, End, Event, Look, MAX_IN_FLIGHT, Message, Queue, Stage};

impl End {
    pub(super) fn saving(&self, peer_saved: bool, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Saved(queue) => {
                let mut actions = vec![Action::Tell(Message::Saved)];
                if peer_saved {
                    actions.push(Action::LookAgain { with_unread: true });
                }
                (Stage::Saved { queue, mine: None, theirs: None }, actions)
            }
            Event::FreezeFailed(reason) => self.abort(reason),
            Event::Peer(Message::Saved) => (Stage::Saving { peer_saved: true }, vec![]),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::FreezeBudget),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Look(_) | Message::Armed)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Commit
            | Event::SilenceOver => (Stage::Saving { peer_saved }, vec![]),
        }
    }

    pub(super) fn saved(
        &self,
        queue: Queue,
        mine: Option<Look>,
        theirs: Option<Look>,
        event: Event,
    ) -> (Stage, Vec<Action>) {
        match event {
            Event::Peer(Message::Saved) => {
                (Stage::Saved { queue, mine, theirs }, vec![Action::LookAgain { with_unread: true }])
            }
            Event::Looked(look) if mine.is_none() => {
                let told = Action::Tell(Message::Look(look.clone()));
                let (stage, mut actions) = self.compare(queue, Some(look), theirs);
                actions.insert(0, told);
                (stage, actions)
            }
            Event::Peer(Message::Look(look)) => self.compare(queue, mine, Some(look)),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::FreezeBudget),
            // A follower arms only when it has both looks, and its own came before this.
            Event::Peer(Message::Armed) => self.abort(Refusal::NotTheSameConnection),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Commit
            | Event::SilenceOver => (Stage::Saved { queue, mine, theirs }, vec![]),
        }
    }

    /// Both looks, if known: go on when they show the two ends of one connection.
    fn compare(&self, queue: Queue, mine: Option<Look>, theirs: Option<Look>) -> (Stage, Vec<Action>) {
        let (Some(look), Some(peer)) = (&mine, &theirs) else {
            return (Stage::Saved { queue, mine, theirs }, vec![]);
        };
        // The other way the peer knows better: it has the queue.
        let may_have_sent = peer.write_seq.wrapping_sub(look.rcv_nxt) <= MAX_IN_FLIGHT;
        match (missing(&queue, peer), &peer.unread) {
            (Some(missing), Some(unread)) if may_have_sent && look.write_seq == queue.write_seq => {
                let carry = [unread, missing].concat();
                (Stage::Arming { peer_armed: false }, vec![Action::Arm { carry }])
            }
            (_, _) => self.abort(Refusal::NotTheSameConnection),
        }
    }
}

/// The bytes of a queue that the peer has not received. None: the peer expects one that is not in it, which no peer of this
/// connection does.
pub(super) fn missing<'a>(queue: &'a Queue, peer: &Look) -> Option<&'a [u8]> {
    let missing = queue.write_seq.wrapping_sub(peer.rcv_nxt) as usize;
    let at = queue.bytes.len().checked_sub(missing)?;
    Some(&queue.bytes[at..])
}
