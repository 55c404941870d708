// SPDX-License-Identifier: Apache-2.0
//! The transaction that moves a connection between two hosts: one end of it, as a pure state machine.
//!
//! Both ends run this machine, one as decider, one as follower. It does no I/O and knows no clock: [`End::step`]
//! takes what happened and says what to do. *Old* is the socket that the application has, *new* the one that is to
//! take its place. The same machine swaps (old is the overlay) and swaps back (old is the host connection).
//!
//! ```text
//!              decider                                follower
//!   Start ──► Calming ◄───────────── Calm ─ Start ──► Waiting
//!                │ both calm: tell Freeze               │ Freeze
//!                ▼                                      ▼
//!             Frozen ◄──────── looks, both ways ────► Frozen
//!                │ settled, bytes to carry known        │ the same: arm
//!                ▼                                      ▼
//!             Armed ◄────────────────── Armed ────── Promised        from here on only the decider aborts
//!                │ open gate                            │
//!                ▼      on the new connection:          │
//!            Installed ── commit mark + bytes ────────► │ open gate: bytes go out
//!                │ ◄─────────────────── Installed ──────┤
//!                ▼                                      ▼
//!              Ended: moved                          Ended: moved
//! ```
//! Ways to fail, each ending with both ends on the old connection:
//! * before `Promised`/the gate: either end thaws and tells the other;
//! * a promised follower goes back when the decider says so (`Abort`, or the abort mark), or when the new connection
//!   ends, which a dead decider that has not installed makes it do;
//! * an installed decider goes back when the new connection ends: the follower's forwarder died before it let its
//!   gate go.
//!
//! The commit mark is sent by the block inside the decider's processes, after the descriptors are in place, and the
//! block goes to its end without its forwarder: so the mark says "installed" as truly as the socket itself. Nothing
//! is marked in the other direction: were the decider's forwarder dead by then, the application would read the mark.
//! A decider that hears nothing while the new connection lives thaws there: the commit mark waits for a follower that
//! is going to see it, and one that cannot any more has closed the new connection.

use forwarder_api::{Direction, Refusal, Role};
use serde::{Deserialize, Serialize};

/// Sequence numbers and unread bytes of an end, seen while it is frozen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Look {
    pub write_seq: u32,
    pub rcv_nxt: u32,
    /// What the application has not read yet, if it was taken along with this look.
    #[serde(with = "serde_bytes")]
    pub unread: Option<Vec<u8>>,
}

/// What one end tells the other, through the routers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message {
    /// The follower's end of the old connection carries little enough, or has had its time to.
    Calm,
    Freeze,
    Look(Look),
    /// The follower has promised to move when it sees the commit mark.
    Armed,
    /// The follower has moved.
    Installed,
    /// The sender is thawing on its old connection. `marked`: the abort mark was sent too, and must be taken out of
    /// the new connection.
    Abort {
        reason: Refusal,
        marked: bool,
    },
}

/// First byte from decider to follower on a new connection, taken out before the application sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mark {
    Commit,
    Abort,
}

impl Mark {
    pub fn byte(self) -> u8 {
        match self {
            Mark::Commit => b'C',
            Mark::Abort => b'A',
        }
    }

    pub fn of(byte: u8) -> Option<Mark> {
        [Mark::Commit, Mark::Abort].into_iter().find(|mark| mark.byte() == byte)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Start,
    /// The old connection carries little enough now, or has had its time to.
    Calm,
    Frozen(Look),
    FreezeFailed(Refusal),
    Looked(Look),
    Peer(Message),
    Armed,
    ArmFailed(Refusal),
    Installed,
    InstallFailed(Refusal),
    Mark(Mark),
    /// The new connection ended or failed.
    NewEnded,
    /// The time that this end may be frozen without a promise is over.
    BudgetOver,
    /// The new connection has been silent for too long.
    SilenceOver,
    Cancel(Refusal),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Tell(Message),
    MakeShallow,
    Freeze,
    /// Look again soon; take the unread bytes along, if `with_unread`.
    LookAgain {
        with_unread: bool,
    },
    /// Bring the new socket into the processes, up to the gate; the mark and these bytes go out after it.
    Arm {
        mark: Option<Mark>,
        carry: Vec<u8>,
    },
    OpenGate,
    CloseGate,
    /// Take the next byte of the new connection as a mark.
    AwaitMark,
    /// Watch for the end of the new connection, and take nothing out of it.
    AwaitPeer,
    SendAbortMark,
    /// Give the processes their old socket again.
    Reverse,
    CloseNew,
    Thaw,
    End(Result<(), Refusal>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Idle,
    /// Decider: the old connection is made shallow at both ends. Which of them are calm?
    Calming {
        mine: bool,
        theirs: bool,
    },
    /// Follower: until the decider freezes.
    Waiting,
    Freezing {
        theirs: Option<Look>,
    },
    Frozen {
        mine: Look,
        theirs: Option<Look>,
    },
    /// Being armed. `peer_armed`: the follower's promise came already.
    Arming {
        peer_armed: bool,
    },
    /// Decider: waits for the follower's promise.
    Armed,
    /// Follower: waits for the decider's mark. `aborted`: only to take an abort mark out of the new connection.
    Promised {
        aborted: Option<Refusal>,
    },
    /// The gate is open.
    Opened,
    /// Decider: waits for the follower to say the same.
    Installed,
    Ended,
}

/// One end of a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct End {
    role: Role,
    direction: Direction,
    stage: Stage,
}

impl End {
    pub fn new(role: Role, direction: Direction) -> End {
        End { role, direction, stage: Stage::Idle }
    }

    pub fn is_over(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// What to do about `event`, in this order.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        let (stage, actions) = self.next(stage, event);
        self.stage = stage;
        actions
    }

    fn next(&self, stage: Stage, event: Event) -> (Stage, Vec<Action>) {
        match stage {
            Stage::Idle => self.idle(event),
            Stage::Calming { mine, theirs } => self.calming(mine, theirs, event),
            Stage::Waiting => self.waiting(event),
            Stage::Freezing { theirs } => self.freezing(theirs, event),
            Stage::Frozen { mine, theirs } => self.frozen(mine, theirs, event),
            Stage::Arming { peer_armed } => self.arming(peer_armed, event),
            Stage::Armed => self.armed(event),
            Stage::Promised { aborted } => self.promised(aborted, event),
            Stage::Opened => self.opened(event),
            Stage::Installed => self.installed(event),
            Stage::Ended => (Stage::Ended, vec![]),
        }
    }

    fn idle(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Start => match self.role {
                Role::Decider => (Stage::Calming { mine: false, theirs: false }, vec![Action::MakeShallow]),
                Role::Follower => (Stage::Waiting, vec![Action::MakeShallow]),
            },
            Event::Cancel(reason) => self.abort_unfrozen(reason),
            Event::Calm
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(_)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Mark(_)
            | Event::NewEnded
            | Event::BudgetOver
            | Event::SilenceOver => (Stage::Idle, vec![]),
        }
    }

    fn calming(&self, mine: bool, theirs: bool, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Calm => calmed(true, theirs),
            Event::Peer(Message::Calm) => calmed(mine, true),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::NewEnded => self.abort_unfrozen(Refusal::HostPathFailed),
            Event::Cancel(reason) => self.abort_unfrozen(reason),
            Event::Start
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Freeze | Message::Look(_) | Message::Armed | Message::Installed)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Mark(_)
            | Event::BudgetOver
            | Event::SilenceOver => (Stage::Calming { mine, theirs }, vec![]),
        }
    }

    fn waiting(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Calm => (Stage::Waiting, vec![Action::Tell(Message::Calm)]),
            Event::Peer(Message::Freeze) => (Stage::Freezing { theirs: None }, vec![Action::Freeze]),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::NewEnded => self.abort_unfrozen(Refusal::HostPathFailed),
            Event::SilenceOver => self.abort_unfrozen(Refusal::PeerGone),
            Event::Cancel(reason) => self.abort_unfrozen(reason),
            Event::Start
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Look(_) | Message::Armed | Message::Installed)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Mark(_)
            | Event::BudgetOver => (Stage::Waiting, vec![]),
        }
    }

    fn freezing(&self, theirs: Option<Look>, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Frozen(mine) => {
                let told = Action::Tell(Message::Look(mine.clone()));
                let (stage, mut actions) = self.consider(mine, theirs);
                actions.insert(0, told);
                (stage, actions)
            }
            Event::FreezeFailed(reason) => self.abort(reason),
            Event::Peer(Message::Look(look)) => (Stage::Freezing { theirs: Some(look) }, vec![]),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::NewEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::FreezeBudget),
            Event::Start
            | Event::Calm
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Armed | Message::Installed)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Mark(_)
            | Event::SilenceOver => (Stage::Freezing { theirs }, vec![]),
        }
    }

    fn frozen(&self, mine: Look, theirs: Option<Look>, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Looked(look) => {
                // The peer needs my last look only: the first one told it what I have written.
                let tell = look != mine && theirs.as_ref().is_some_and(|peer| is_last(&look, peer));
                let told = Action::Tell(Message::Look(look.clone()));
                let (stage, mut actions) = self.consider(look, theirs);
                if tell {
                    actions.insert(0, told);
                }
                (stage, actions)
            }
            Event::Peer(Message::Look(look)) => self.consider(mine, Some(look)),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::NewEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::NotSettled),
            Event::Peer(Message::Armed) => {
                // A follower arms only when it has seen everything settled, and its looks came before this.
                self.abort(Refusal::NotTheSameConnection)
            }
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Installed)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Mark(_)
            | Event::SilenceOver => (Stage::Frozen { mine, theirs }, vec![]),
        }
    }

    /// Both looks, as far as known: go on when they show that nothing is in flight.
    fn consider(&self, mine: Look, theirs: Option<Look>) -> (Stage, Vec<Action>) {
        let Some(peer) = &theirs else {
            return (Stage::Frozen { mine, theirs }, vec![]);
        };
        match relation(&mine, peer) {
            Relation::Strangers => self.abort(Refusal::NotTheSameConnection),
            Relation::InFlight if is_last(&mine, peer) => (Stage::Frozen { mine, theirs }, vec![]),
            Relation::InFlight => {
                let with_unread = mine.rcv_nxt == peer.write_seq;
                (Stage::Frozen { mine, theirs }, vec![Action::LookAgain { with_unread }])
            }
            Relation::Settled => match (&mine.unread, &peer.unread) {
                (None, _) => (Stage::Frozen { mine, theirs }, vec![Action::LookAgain { with_unread: true }]),
                (Some(_), None) => (Stage::Frozen { mine, theirs }, vec![]),
                (Some(_), Some(carry)) => {
                    let mark = match self.role {
                        Role::Decider => Some(Mark::Commit),
                        Role::Follower => None,
                    };
                    let arm = Action::Arm { mark, carry: carry.clone() };
                    (Stage::Arming { peer_armed: false }, vec![arm])
                }
            },
        }
    }

    fn arming(&self, peer_armed: bool, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Armed => match self.role {
                Role::Follower => {
                    let actions = vec![Action::AwaitMark, Action::Tell(Message::Armed)];
                    (Stage::Promised { aborted: None }, actions)
                }
                Role::Decider if peer_armed => (Stage::Opened, vec![Action::OpenGate]),
                Role::Decider => (Stage::Armed, vec![]),
            },
            Event::ArmFailed(reason) => self.abort_with(reason, peer_armed),
            Event::Peer(Message::Armed) => (Stage::Arming { peer_armed: true }, vec![]),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort_with(reason, peer_armed),
            Event::NewEnded => self.abort_with(Refusal::HostPathFailed, peer_armed),
            Event::BudgetOver => self.abort_with(Refusal::FreezeBudget, peer_armed),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Look(_) | Message::Installed)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Mark(_)
            | Event::SilenceOver => (Stage::Arming { peer_armed }, vec![]),
        }
    }

    fn armed(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Peer(Message::Armed) => (Stage::Opened, vec![Action::OpenGate]),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::NewEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::FreezeBudget),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Look(_) | Message::Installed)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Mark(_)
            | Event::SilenceOver => (Stage::Armed, vec![]),
        }
    }

    fn promised(&self, aborted: Option<Refusal>, event: Event) -> (Stage, Vec<Action>) {
        let back = |reason, close_new: bool| {
            let mut actions = vec![Action::CloseGate, Action::Thaw];
            if close_new {
                actions.push(Action::CloseNew);
            }
            actions.push(Action::End(Err(reason)));
            (Stage::Ended, actions)
        };
        match event {
            Event::Mark(Mark::Commit) => (Stage::Opened, vec![Action::OpenGate]),
            Event::Mark(Mark::Abort) => {
                back(aborted.unwrap_or(Refusal::PeerAborted), self.new_is_single_use())
            }
            Event::Peer(Message::Abort { reason: _, marked: false }) => {
                back(Refusal::PeerAborted, self.new_is_single_use())
            }
            Event::Peer(Message::Abort { reason: _, marked: true }) => {
                (Stage::Promised { aborted: Some(Refusal::PeerAborted) }, vec![])
            }
            Event::NewEnded => back(aborted.unwrap_or(Refusal::PeerAborted), true),
            // Nobody knows what the decider did: never use this connection again.
            Event::SilenceOver => back(Refusal::HostPathFailed, true),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(
                Message::Calm | Message::Freeze | Message::Look(_) | Message::Armed | Message::Installed,
            )
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::BudgetOver
            | Event::Cancel(_) => (Stage::Promised { aborted }, vec![]),
        }
    }

    fn opened(&self, event: Event) -> (Stage, Vec<Action>) {
        match (event, self.role) {
            (Event::Installed, Role::Decider) => (Stage::Installed, vec![Action::AwaitPeer]),
            (Event::Installed, Role::Follower) => {
                let told = Action::Tell(Message::Installed);
                (Stage::Ended, vec![told, Action::Thaw, Action::End(Ok(()))])
            }
            (Event::InstallFailed(reason), Role::Decider | Role::Follower) => self.reverse(reason),
            (
                Event::Start
                | Event::Calm
                | Event::Frozen(_)
                | Event::FreezeFailed(_)
                | Event::Looked(_)
                | Event::Peer(_)
                | Event::Armed
                | Event::ArmFailed(_)
                | Event::Mark(_)
                | Event::NewEnded
                | Event::BudgetOver
                | Event::SilenceOver
                | Event::Cancel(_),
                Role::Decider | Role::Follower,
            ) => (Stage::Opened, vec![]),
        }
    }

    fn installed(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Peer(Message::Installed) | Event::SilenceOver => {
                (Stage::Ended, vec![Action::Thaw, Action::End(Ok(()))])
            }
            Event::NewEnded => self.reverse(Refusal::PeerAborted),
            Event::Mark(_)
            | Event::Peer(
                Message::Calm | Message::Freeze | Message::Look(_) | Message::Armed | Message::Abort { .. },
            )
            | Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Armed
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::BudgetOver
            | Event::Cancel(_) => (Stage::Installed, vec![]),
        }
    }

    /// A host connection serves one attempt; the overlay connection is kept for another one.
    fn new_is_single_use(&self) -> bool {
        match self.direction {
            Direction::ToHost => true,
            Direction::ToOverlay => false,
        }
    }

    fn reverse(&self, reason: Refusal) -> (Stage, Vec<Action>) {
        (Stage::Ended, vec![Action::Reverse, Action::CloseNew, Action::Thaw, Action::End(Err(reason))])
    }

    /// Nothing is frozen yet: give up and say so.
    fn abort_unfrozen(&self, reason: Refusal) -> (Stage, Vec<Action>) {
        let (stage, mut actions) = self.go_back(reason);
        actions.insert(0, Action::Tell(Message::Abort { reason, marked: false }));
        (stage, actions)
    }

    /// To the old connection, without a word: the peer does, or did, the same.
    fn go_back(&self, reason: Refusal) -> (Stage, Vec<Action>) {
        let mut actions = vec![Action::CloseGate, Action::Thaw];
        if self.new_is_single_use() {
            actions.push(Action::CloseNew);
        }
        actions.push(Action::End(Err(reason)));
        (Stage::Ended, actions)
    }

    fn abort(&self, reason: Refusal) -> (Stage, Vec<Action>) {
        self.abort_with(reason, false)
    }

    /// Give up before the gate. A follower that has promised must also be told on the new connection, if that lives
    /// on: the routers may be gone.
    fn abort_with(&self, reason: Refusal, peer_armed: bool) -> (Stage, Vec<Action>) {
        let marked = peer_armed && !self.new_is_single_use();
        let (stage, mut actions) = self.go_back(reason);
        actions.insert(0, Action::Tell(Message::Abort { reason, marked }));
        if marked {
            actions.insert(0, Action::SendAbortMark);
        }
        (stage, actions)
    }
}

/// The decider freezes when both ends are calm.
fn calmed(mine: bool, theirs: bool) -> (Stage, Vec<Action>) {
    if mine && theirs {
        (Stage::Freezing { theirs: None }, vec![Action::Tell(Message::Freeze), Action::Freeze])
    } else {
        (Stage::Calming { mine, theirs }, vec![])
    }
}

/// How two looks relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// Each end has received all that the other has written, and the numbers say that these are the ends of one
    /// connection. An acknowledgement may still be on its way: it changes nothing for the application, and a delayed
    /// one takes 40 ms.
    Settled,
    /// These may be the ends of one connection, with bytes between them.
    InFlight,
    /// No amount of waiting makes these the ends of one connection.
    Strangers,
}

/// Nothing will change in `mine` any more, and all of it is known: `peer` is frozen and wrote so much.
fn is_last(mine: &Look, peer: &Look) -> bool {
    mine.rcv_nxt == peer.write_seq && mine.unread.is_some()
}

/// More than TCP can have in flight (the largest scaled window is 1 GiB).
const MAX_IN_FLIGHT: u32 = 1 << 30;

pub fn relation(a: &Look, b: &Look) -> Relation {
    // The two looks are not of one moment: an old `rcv_nxt` may lag behind. But nobody has received what was not written.
    let one_way = |from: &Look, to: &Look| match from.write_seq.wrapping_sub(to.rcv_nxt) {
        0 => Relation::Settled,
        1..=MAX_IN_FLIGHT => Relation::InFlight,
        _ => Relation::Strangers,
    };
    match (one_way(a, b), one_way(b, a)) {
        (Relation::Strangers, _) | (_, Relation::Strangers) => Relation::Strangers,
        (Relation::Settled, Relation::Settled) => Relation::Settled,
        (Relation::Settled | Relation::InFlight, Relation::InFlight)
        | (Relation::InFlight, Relation::Settled) => Relation::InFlight,
    }
}

#[cfg(test)]
mod tests;
