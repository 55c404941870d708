// SPDX-License-Identifier: Apache-2.0
//! The transaction that moves connections between two hosts: one end of it, as a pure state machine. It moves one, or
//! several together (a *batch*), all or none: both ends list them in the same order.
//!
//! Both ends run this machine, one as decider, one as follower. It does no I/O and knows no clock: [`End::step`]
//! takes what happened and says what to do. *Old* is the socket that the application has, *new* the one that is to
//! take its place. The same machine swaps (old is the overlay) and swaps back (old is the host connection).
//!
//! ```text
//!              decider                                follower
//!   Start ──► Calming ◄───────────── Calm ─ Start ──► Waiting
//!                │ both calm: tell Freeze               │ Freeze
//!                ▼                                      │
//!             Calling ◄────── F on the witness ──────── │
//!                │ freeze (at once, if it pours)        │ freeze
//!                ▼                                      ▼
//!             Arming ◄──────── looks, both ways ────► Arming
//!                │ armed                                │ armed
//!                ▼                                      ▼
//!            Settling ◄─────── looks again ─────────► Settling
//!                │ settled, bytes to carry known: load  │ the same
//!                ▼                                      ▼
//!             Loaded ◄─────── P on the witness ────── Promised
//!                │ open gate: the blocks                │
//!                ▼ replace, carry, say      C           │
//!             Opened ─────── on the witness ──────────► │ open gate: the blocks replace, carry, say
//!                │ ◄────────────────────── I ───────────┤
//!                ▼                                      ▼
//!              Ended: moved                          Ended: moved
//! ```
//! Where the old connection carries nothing any more ([`Manner::Salvage`]) nothing can settle, and nothing needs to:
//! ```text
//!              decider                                follower
//!   Start ──► Calling: tell Freeze               Start ──► Waiting
//!                │ ◄───────── F on the witness ───────  │ Freeze
//!                ▼ freeze, read queue                   ▼ freeze, read queue
//!             Saved ◄───────── Saved, both ways ───── Saving, Saved
//!                │ ◄───────── looks, both ways ───────► │
//!                ▼ bytes to carry known: arm, load      ▼ the same
//!             Loaded                                 Promised        and on as above
//! ```
//! What an end has not got acknowledged is in its own send queue; the peer's look says from where on it is missing. What
//! of it still arrives changes nothing, because the look comes after both ends have read their queues: it tells of no
//! less than was acknowledged by then.
//!
//! The *witness* is a connection between the two hosts that serves one transaction and nothing else. `C` and `I` are said by
//! the blocks themselves, so that no forwarder is needed between the decider's gate and the end: a block goes through to
//! its end without its forwarder. Its end without a word says that there will be none. What forwarders say on it (`F`, `P`)
//! comes sooner than by way of both routers, while processes stand still; so do the unread bytes of looks, where they are many.
//!
//! Ways to fail, each ending with both ends on the old connection:
//! * before `Promised`/the gate: either end thaws and tells the other;
//! * a promised follower goes back when the decider says so, or when the witness ends, which a decider that has not
//!   said `C`, dead or alive, makes it do; and whenever it likes, as long as its own gate is closed, because
//! * the decider's blocks go back by themselves when the witness ends before `I`: the follower's forwarder died, or gave
//!   up, before it let its gate go;
//! * the follower's blocks go back by themselves, and end the witness, when one of its processes cannot follow.

mod salvage;

use forwarder_api::{Direction, Manner, Refusal, Role};
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

/// The last bytes that an end has written, up to `write_seq`: at least those that are not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Queue {
    pub write_seq: u32,
    pub bytes: Vec<u8>,
}

/// What one end tells the other, through the routers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message {
    /// The follower's end of the old connection carries little enough, or has had its time to.
    Calm,
    Freeze,
    /// The sender is frozen and has read its queue: it can give whatever does not arrive from now on.
    Saved,
    /// One for each connection.
    Looks(Vec<Look>),
    /// The sender is thawing on its old connection.
    Abort {
        reason: Refusal,
    },
}

/// What an end says on the witness, in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// The follower's forwarder is about to freeze.
    Freezing,
    /// The follower's forwarder has promised to move when it hears the decider's `Commit`.
    Promise,
    /// The decider's blocks have replaced their sockets.
    Commit,
    /// The follower's blocks have, too.
    Installed,
}

impl Word {
    pub const fn byte(self) -> u8 {
        match self {
            Word::Freezing => b'F',
            Word::Promise => b'P',
            Word::Commit => b'C',
            Word::Installed => b'I',
        }
    }

    pub fn of(byte: u8) -> Option<Word> {
        let words = [Word::Freezing, Word::Promise, Word::Commit, Word::Installed];
        words.into_iter().find(|word| word.byte() == byte)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Start,
    /// The old connection carries little enough now, or has had its time to.
    Calm,
    /// The decider's end has written what is still on its way: the follower may go on reading it.
    Pouring,
    Frozen(Vec<Look>),
    /// Frozen, and the queues read.
    Saved(Vec<Queue>),
    FreezeFailed(Refusal),
    Looked(Vec<Look>),
    Peer(Message),
    Armed,
    Loaded,
    /// The new sockets cannot be brought in, or not be loaded.
    ArmFailed(Refusal),
    Installed,
    /// The processes have gone back by themselves.
    InstallFailed(Refusal),
    /// Heard on the witness.
    Heard(Word),
    /// The witness has ended, or said what is no word.
    WitnessEnded,
    /// The time that this end may be frozen without a promise is over.
    BudgetOver,
    /// The peer has been silent for too long.
    SilenceOver,
    Cancel(Refusal),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Tell(Message),
    MakeShallow,
    /// Say whether something is on its way to the peer.
    Weigh,
    Freeze,
    /// Freeze, and read the send queues.
    FreezeAndSave,
    /// Look again soon; take the unread bytes along, if `with_unread`.
    LookAgain {
        with_unread: bool,
    },
    /// Bring the new sockets into the processes, up to the gate.
    Arm,
    /// These bytes go out after it, on each.
    Load {
        carry: Vec<Vec<u8>>,
    },
    OpenGate,
    CloseGate,
    /// On the witness.
    Say(Word),
    /// Watch the witness for the peer's next word, or its end.
    AwaitWord,
    /// The new connections must not be used any more.
    CloseNew,
    /// The peer may wait for a word, or the end.
    CloseWitness,
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
    /// Decider: until the follower freezes.
    Calling,
    /// Follower: until the decider calls.
    Waiting,
    Freezing {
        theirs: Option<Vec<Look>>,
    },
    /// Being armed, while the first looks are on their way.
    Arming {
        mine: Vec<Look>,
        theirs: Option<Vec<Look>>,
    },
    /// Armed, and something may still be in flight.
    Settling {
        mine: Vec<Look>,
        theirs: Option<Vec<Look>>,
    },
    /// Being frozen and its queues read. `peer_saved`: the peer has done both.
    Saving {
        peer_saved: bool,
    },
    /// The looks, once both are saved.
    Saved {
        queues: Vec<Queue>,
        mine: Option<Vec<Look>>,
        theirs: Option<Vec<Look>>,
    },
    Loading,
    /// Decider: waits for the follower's promise.
    Loaded,
    /// Follower: waits for the decider's word.
    Promised,
    /// The gate is open: the processes come to their end by themselves.
    Opened,
    Ended,
}

/// One end of a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct End {
    role: Role,
    direction: Direction,
    manner: Manner,
    stage: Stage,
}

impl End {
    pub fn new(role: Role, direction: Direction, manner: Manner) -> End {
        End { role, direction, manner, stage: Stage::Idle }
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
            Stage::Calling => self.calling(event),
            Stage::Waiting => self.waiting(event),
            Stage::Freezing { theirs } => self.freezing(theirs, event),
            Stage::Arming { mine, theirs } => self.arming(mine, theirs, event),
            Stage::Settling { mine, theirs } => self.settling(mine, theirs, event),
            Stage::Saving { peer_saved } => self.saving(peer_saved, event),
            Stage::Saved { queues, mine, theirs } => self.saved(queues, mine, theirs, event),
            Stage::Loading => self.loading(event),
            Stage::Loaded => self.loaded(event),
            Stage::Promised => self.promised(event),
            Stage::Opened => self.opened(event),
            Stage::Ended => (Stage::Ended, vec![]),
        }
    }

    fn idle(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Start => match (self.manner, self.role) {
                (Manner::Settle, Role::Decider) => {
                    (Stage::Calming { mine: false, theirs: false }, vec![Action::MakeShallow])
                }
                (Manner::Settle, Role::Follower) => (Stage::Waiting, vec![Action::MakeShallow]),
                (Manner::Salvage, Role::Decider) => self.call(),
                (Manner::Salvage, Role::Follower) => (Stage::Waiting, vec![]),
            },
            Event::Cancel(reason) => self.abort(reason),
            Event::Calm
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::Pouring
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(_)
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::WitnessEnded
            | Event::BudgetOver
            | Event::SilenceOver => (Stage::Idle, vec![]),
        }
    }

    fn calming(&self, mine: bool, theirs: bool, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Calm => self.calmed(true, theirs),
            Event::Peer(Message::Calm) => self.calmed(mine, true),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::SilenceOver => self.abort(Refusal::PeerGone),
            Event::Cancel(reason) => self.abort(reason),
            Event::Start
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::Pouring
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Freeze | Message::Saved | Message::Looks(_))
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::BudgetOver => (Stage::Calming { mine, theirs }, vec![]),
        }
    }

    fn waiting(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Calm => (Stage::Waiting, vec![Action::Tell(Message::Calm)]),
            Event::Peer(Message::Freeze) => {
                let (stage, mut actions) = self.freeze();
                actions.insert(0, Action::Say(Word::Freezing));
                (stage, actions)
            }
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::SilenceOver => self.abort(Refusal::PeerGone),
            Event::Cancel(reason) => self.abort(reason),
            Event::Start
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::Pouring
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Saved | Message::Looks(_))
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::BudgetOver => (Stage::Waiting, vec![]),
        }
    }

    fn calmed(&self, mine: bool, theirs: bool) -> (Stage, Vec<Action>) {
        if mine && theirs { self.call() } else { (Stage::Calming { mine, theirs }, vec![]) }
    }

    /// Neither end stands still while it waits for the other to begin, but for what lands meanwhile.
    fn call(&self) -> (Stage, Vec<Action>) {
        (Stage::Calling, vec![Action::Tell(Message::Freeze), Action::AwaitWord, Action::Weigh])
    }

    fn calling(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Heard(Word::Freezing) | Event::Pouring => self.freeze(),
            // Its word is late.
            Event::Peer(Message::Looks(looks)) if self.manner == Manner::Settle => {
                (Stage::Freezing { theirs: Some(looks) }, vec![Action::Freeze])
            }
            Event::Peer(Message::Saved) if self.manner == Manner::Salvage => {
                (Stage::Saving { peer_saved: true }, vec![Action::FreezeAndSave])
            }
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::SilenceOver => self.abort(Refusal::PeerGone),
            Event::Cancel(reason) => self.abort(reason),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Saved | Message::Looks(_))
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::BudgetOver => (Stage::Calling, vec![]),
        }
    }

    fn freeze(&self) -> (Stage, Vec<Action>) {
        match self.manner {
            Manner::Settle => (Stage::Freezing { theirs: None }, vec![Action::Freeze]),
            Manner::Salvage => (Stage::Saving { peer_saved: false }, vec![Action::FreezeAndSave]),
        }
    }

    fn freezing(&self, theirs: Option<Vec<Look>>, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Frozen(mine) => {
                let told = Action::Tell(Message::Looks(mine.clone()));
                (Stage::Arming { mine, theirs }, vec![told, Action::Arm])
            }
            Event::FreezeFailed(reason) => self.abort(reason),
            Event::Peer(Message::Looks(looks)) => (Stage::Freezing { theirs: Some(looks) }, vec![]),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::FreezeBudget),
            Event::Start
            | Event::Calm
            | Event::Pouring
            | Event::Saved(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Saved)
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::SilenceOver => (Stage::Freezing { theirs }, vec![]),
        }
    }

    fn arming(&self, mine: Vec<Look>, theirs: Option<Vec<Look>>, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Armed => self.consider(mine, theirs),
            Event::ArmFailed(reason) => self.abort(reason),
            Event::Peer(Message::Looks(looks)) => (Stage::Arming { mine, theirs: Some(looks) }, vec![]),
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
            | Event::Peer(Message::Calm | Message::Freeze | Message::Saved)
            | Event::Loaded
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::SilenceOver => (Stage::Arming { mine, theirs }, vec![]),
        }
    }

    fn settling(&self, mine: Vec<Look>, theirs: Option<Vec<Look>>, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Looked(looks) => {
                // The peer needs my last looks only: the first ones told it what I have written.
                let tell = looks != mine && theirs.as_ref().is_some_and(|peer| all(&looks, peer, is_last));
                let told = Action::Tell(Message::Looks(looks.clone()));
                let (stage, mut actions) = self.consider(looks, theirs);
                if tell {
                    actions.insert(0, told);
                }
                (stage, actions)
            }
            Event::Peer(Message::Looks(looks)) => self.consider(mine, Some(looks)),
            Event::Peer(Message::Abort { .. }) => self.go_back(Refusal::PeerAborted),
            Event::Cancel(reason) => self.abort(reason),
            Event::WitnessEnded => self.abort(Refusal::HostPathFailed),
            Event::BudgetOver => self.abort(Refusal::NotSettled),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::Pouring
            | Event::FreezeFailed(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Saved)
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::SilenceOver => (Stage::Settling { mine, theirs }, vec![]),
        }
    }

    /// The looks of both, as far as known: go on when they show that nothing is in flight.
    fn consider(&self, mine: Vec<Look>, theirs: Option<Vec<Look>>) -> (Stage, Vec<Action>) {
        let Some(peer) = &theirs else {
            return (Stage::Settling { mine, theirs }, vec![]);
        };
        match relation_of_all(&mine, peer) {
            Relation::Strangers if all(peer, &mine, went_on) => self.abort(Refusal::PeerAborted),
            Relation::Strangers => self.abort(Refusal::NotTheSameConnection),
            Relation::InFlight if all(&mine, peer, is_last) => (Stage::Settling { mine, theirs }, vec![]),
            Relation::InFlight => {
                let with_unread = all(&mine, peer, has_all);
                (Stage::Settling { mine, theirs }, vec![Action::LookAgain { with_unread }])
            }
            Relation::Settled if mine.iter().any(|look| look.unread.is_none()) => {
                (Stage::Settling { mine, theirs }, vec![Action::LookAgain { with_unread: true }])
            }
            Relation::Settled => {
                match peer.iter().map(|look| look.unread.clone()).collect::<Option<Vec<_>>>() {
                    Some(carry) => (Stage::Loading, vec![Action::Load { carry }]),
                    None => (Stage::Settling { mine, theirs }, vec![]),
                }
            }
        }
    }

    fn loading(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Loaded => match self.role {
                Role::Follower => (Stage::Promised, vec![Action::Say(Word::Promise), Action::AwaitWord]),
                Role::Decider => (Stage::Loaded, vec![Action::AwaitWord]),
            },
            Event::ArmFailed(reason) => self.abort(reason),
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
            | Event::Armed
            | Event::Peer(Message::Calm | Message::Freeze | Message::Saved | Message::Looks(_))
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::Heard(_)
            | Event::SilenceOver => (Stage::Loading, vec![]),
        }
    }

    fn loaded(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Heard(Word::Promise) => (Stage::Opened, vec![Action::OpenGate]),
            // It was late, and the looks came first.
            Event::Heard(_) => (Stage::Loaded, vec![Action::AwaitWord]),
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
            | Event::Peer(Message::Calm | Message::Freeze | Message::Saved | Message::Looks(_))
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::SilenceOver => (Stage::Loaded, vec![]),
        }
    }

    fn promised(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Heard(Word::Commit) => (Stage::Opened, vec![Action::OpenGate]),
            Event::Heard(_) => (Stage::Promised, vec![Action::AwaitWord]),
            Event::WitnessEnded | Event::Peer(Message::Abort { .. }) => {
                self.leave_new(self.go_back(Refusal::PeerAborted))
            }
            Event::SilenceOver => self.leave_new(self.abort(Refusal::PeerGone)),
            Event::Cancel(reason) => self.leave_new(self.abort(reason)),
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::Pouring
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(Message::Calm | Message::Freeze | Message::Saved | Message::Looks(_))
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Installed
            | Event::InstallFailed(_)
            | Event::BudgetOver => (Stage::Promised, vec![]),
        }
    }

    fn opened(&self, event: Event) -> (Stage, Vec<Action>) {
        match event {
            Event::Installed => (Stage::Ended, vec![Action::Thaw, Action::End(Ok(()))]),
            // Carried bytes may have been sent on the new connection: it serves no other attempt, whichever it is.
            Event::InstallFailed(reason) => {
                let close = [Action::CloseNew, Action::CloseWitness];
                (Stage::Ended, [&close[..], &[Action::Thaw, Action::End(Err(reason))]].concat())
            }
            Event::Start
            | Event::Calm
            | Event::Frozen(_)
            | Event::Saved(_)
            | Event::Pouring
            | Event::FreezeFailed(_)
            | Event::Looked(_)
            | Event::Peer(_)
            | Event::Armed
            | Event::Loaded
            | Event::ArmFailed(_)
            | Event::Heard(_)
            | Event::WitnessEnded
            | Event::BudgetOver
            | Event::SilenceOver
            | Event::Cancel(_) => (Stage::Opened, vec![]),
        }
    }

    /// A host connection serves one attempt; the overlay connection is kept for another one.
    fn new_is_single_use(&self) -> bool {
        match self.direction {
            Direction::ToHost => true,
            Direction::ToOverlay => false,
        }
    }

    /// To the old connection, without a word: the peer does, or did, the same.
    fn go_back(&self, reason: Refusal) -> (Stage, Vec<Action>) {
        (Stage::Ended, vec![Action::CloseGate, Action::Thaw, Action::End(Err(reason))])
    }

    /// After a promise: the decider may have gone on, waits for the end of the witness, and asks the new connection if it
    /// hears nothing at all.
    fn leave_new(&self, (stage, mut actions): (Stage, Vec<Action>)) -> (Stage, Vec<Action>) {
        actions.insert(0, Action::CloseWitness);
        if self.new_is_single_use() {
            actions.insert(0, Action::CloseNew);
        }
        (stage, actions)
    }

    /// Give up and say so.
    fn abort(&self, reason: Refusal) -> (Stage, Vec<Action>) {
        let (stage, mut actions) = self.go_back(reason);
        actions.insert(0, Action::Tell(Message::Abort { reason }));
        (stage, actions)
    }
}

/// How two looks relate, from the best to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

/// Is it so for each connection?
fn all(mine: &[Look], theirs: &[Look], is: impl Fn(&Look, &Look) -> bool) -> bool {
    mine.iter().zip(theirs).all(|(mine, theirs)| is(mine, theirs))
}

/// Nothing is on its way to `mine`.
fn has_all(mine: &Look, peer: &Look) -> bool {
    mine.rcv_nxt == peer.write_seq
}

/// Nothing will change in `mine` any more, and all of it is known: `peer` is frozen and wrote so much.
fn is_last(mine: &Look, peer: &Look) -> bool {
    has_all(mine, peer) && mine.unread.is_some()
}

/// These are no strangers, or `mine` has more than `peer` had written: it is not frozen any more, and its word of that is
/// late, or lost with the routers' connection.
fn went_on(peer: &Look, mine: &Look) -> bool {
    if relation(mine, peer) != Relation::Strangers {
        return true;
    }
    let later = mine.rcv_nxt.wrapping_sub(peer.write_seq);
    let on_the_way = mine.write_seq.wrapping_sub(peer.rcv_nxt);
    later <= MAX_IN_FLIGHT && on_the_way <= MAX_IN_FLIGHT
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

/// All are settled, or else the worst of them.
pub fn worst(relations: impl Iterator<Item = Relation>) -> Relation {
    relations.max().unwrap_or(Relation::Settled)
}

fn relation_of_all(mine: &[Look], theirs: &[Look]) -> Relation {
    if mine.len() != theirs.len() {
        return Relation::Strangers;
    }
    worst(mine.iter().zip(theirs).map(|(mine, theirs)| relation(mine, theirs)))
}

#[cfg(test)]
mod tests;
