// SPDX-License-Identifier: Apache-2.0
//! The machine that runs is the machine that is checked: both ends with their blocks, the witness and the new connection
//! between them, and routers that carry their messages, in every order, with forwarders that are killed at every step.

use stateright::{Checker, Model, Property};

use super::*;

/// Which socket an application has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Path {
    Old,
    New,
}

/// Something that this end's forwarder is doing, whose result is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Doing {
    Nothing,
    Calming,
    Freezing,
    Saving,
    Looking,
    Arming,
    Loading,
    Installing,
}

/// The code in the processes of an end (see `crate::table`). While it is between arming and its end, no thread of the
/// application runs, whether the forwarder lives or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Block {
    None,
    AtGate,
    /// Through the gate.
    Replacing,
    /// The new socket is in place; what is said next depends on the role.
    Replaced,
    /// Decider: `C` is said.
    Waiting,
    Over {
        kept: bool,
    },
}

impl Block {
    fn is_active(self) -> bool {
        !matches!(self, Block::None | Block::Over { .. })
    }
}

/// One end: its forwarder and its application.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Side {
    machine: End,
    alive: bool,
    doing: Doing,
    /// Something may be on its way to the peer.
    weighing: bool,
    frozen: bool,
    /// The byte that was on its way to this end has arrived; its sender knows.
    landed: bool,
    acknowledged: bool,
    path: Path,
    block: Block,
    /// The forwarder has its copies.
    holds_new: bool,
    holds_witness: bool,
    awaiting_word: bool,
    promised: bool,
    /// On the witness, from the other end.
    words: Vec<Word>,
    /// On the new connection, from the other end, not read yet.
    incoming: Vec<u8>,
    /// What the block sends after the gate.
    loaded: Vec<u8>,
    result: Option<Result<(), Refusal>>,
}

impl Side {
    fn is_running(&self) -> bool {
        !self.frozen && !self.block.is_active()
    }

    fn is_over(&self) -> bool {
        (!self.alive || self.result.is_some()) && !self.block.is_active()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    sides: [Side; 2],
    /// Messages on their way to each side.
    messages: [Vec<Message>; 2],
    routers_work: bool,
    /// shutdown(2) was called at one of its ends.
    witness_shut: bool,
    kills_left: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Finish {
        side: usize,
        well: bool,
    },
    /// The old connection carries something after all.
    Land {
        side: usize,
    },
    Acknowledge {
        side: usize,
    },
    Weigh {
        side: usize,
        pours: bool,
    },
    Deliver {
        side: usize,
    },
    ReadWord {
        side: usize,
    },
    SeeEnd {
        side: usize,
    },
    BudgetOver {
        side: usize,
    },
    Cancel {
        side: usize,
    },
    Silence {
        side: usize,
    },
    Block {
        side: usize,
        well: bool,
    },
    CutRouters,
    Kill {
        side: usize,
    },
}

struct Transaction {
    direction: Direction,
    manner: Manner,
    kills: u8,
}

fn peer(side: usize) -> usize {
    1 - side
}

/// What was written for each application and not read by it: the last byte is on its way when it is frozen.
fn unread(side: usize) -> Vec<u8> {
    vec![side as u8 + 1, side as u8 + 11]
}

/// 100 was written by side 0, 200 by side 1.
fn write_seq(side: usize) -> u32 {
    [100, 200][side]
}

impl Transaction {
    fn look(&self, world: &World, side: usize) -> Look {
        let landed = world.sides[side].landed;
        let mut unread = unread(side);
        unread.truncate(1 + usize::from(landed));
        let with_unread = landed || self.manner == Manner::Salvage;
        Look {
            write_seq: write_seq(side),
            rcv_nxt: write_seq(peer(side)) - u32::from(!landed),
            unread: with_unread.then_some(unread),
        }
    }

    /// What is for the other end and not acknowledged by it.
    fn queue(world: &World, side: usize) -> Queue {
        let acknowledged = usize::from(world.sides[peer(side)].acknowledged);
        Queue { write_seq: write_seq(side), bytes: unread(peer(side))[1 + acknowledged..].to_vec() }
    }

    fn feed(&self, world: &mut World, side: usize, event: Event) {
        for action in world.sides[side].machine.step(event) {
            self.act(world, side, action);
        }
    }

    fn act(&self, world: &mut World, side: usize, action: Action) {
        let here = &mut world.sides[side];
        match action {
            Action::Tell(message) => {
                if world.routers_work {
                    world.messages[peer(side)].push(message);
                }
            }
            Action::MakeShallow => here.doing = Doing::Calming,
            Action::Weigh => here.weighing = true,
            Action::Freeze => {
                here.awaiting_word = false;
                here.doing = Doing::Freezing;
            }
            Action::FreezeAndSave => {
                here.awaiting_word = false;
                here.doing = Doing::Saving;
            }
            Action::LookAgain { .. } => here.doing = Doing::Looking,
            Action::Arm => here.doing = Doing::Arming,
            Action::Load { carry } => {
                here.loaded = carry.concat();
                here.doing = Doing::Loading;
            }
            Action::OpenGate => {
                here.block = Block::Replacing;
                here.doing = Doing::Installing;
            }
            Action::CloseGate => {
                if here.block == Block::AtGate {
                    here.block = Block::Over { kept: false };
                }
            }
            Action::Say(word) => {
                here.promised |= word == Word::Promise;
                world.sides[peer(side)].words.push(word);
            }
            Action::AwaitWord => here.awaiting_word = true,
            Action::CloseNew => here.holds_new = false,
            Action::CloseWitness => here.holds_witness = false,
            Action::Thaw => here.frozen = false,
            Action::End(result) => {
                // For another attempt, if nobody had opened a gate.
                here.holds_new &= result.is_err();
                here.holds_witness &= result.is_err();
                here.awaiting_word = false;
                here.result = Some(result);
            }
        }
    }

    /// Can this side still hear a word on the witness?
    fn witness_has_ended(world: &World, side: usize) -> bool {
        let there = &world.sides[peer(side)];
        world.witness_shut || !(there.holds_witness || there.block.is_active())
    }

    fn block_step(world: &mut World, side: usize, well: bool) {
        let ended = Self::witness_has_ended(world, side);
        let [decider, follower] = &mut world.sides;
        let (here, there) = if side == 0 { (decider, follower) } else { (follower, decider) };
        match (here.block, well) {
            (Block::Replacing, true) => {
                here.path = Path::New;
                here.block = Block::Replaced;
            }
            (Block::Replaced, true) => {
                there.incoming.append(&mut here.loaded);
                if side == 0 {
                    there.words.push(Word::Commit);
                    here.block = Block::Waiting;
                } else {
                    there.words.push(Word::Installed);
                    here.block = Block::Over { kept: true };
                }
            }
            (Block::Waiting, _) if !here.words.is_empty() => here.block = Block::Over { kept: true },
            (Block::Waiting, _) if !ended => {}
            (Block::Replacing | Block::Replaced, false) | (Block::Waiting, _) => {
                world.witness_shut = true;
                here.path = Path::Old;
                here.block = Block::Over { kept: false };
            }
            (Block::None | Block::AtGate | Block::Over { .. }, _) => {}
        }
    }
}

impl Model for Transaction {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let side = |role| Side {
            machine: End::new(role, self.direction, self.manner),
            alive: true,
            doing: Doing::Nothing,
            weighing: false,
            frozen: false,
            landed: false,
            acknowledged: false,
            path: Path::Old,
            block: Block::None,
            holds_new: true,
            holds_witness: true,
            awaiting_word: false,
            promised: false,
            words: vec![],
            incoming: vec![],
            loaded: vec![],
            result: None,
        };
        let mut world = World {
            sides: [side(Role::Decider), side(Role::Follower)],
            messages: [vec![], vec![]],
            routers_work: true,
            witness_shut: false,
            kills_left: self.kills,
        };
        for side in [0, 1] {
            self.feed(&mut world, side, Event::Start);
        }
        vec![world]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        for (side, here) in world.sides.iter().enumerate() {
            let over = world.sides.iter().all(Side::is_over);
            if self.manner == Manner::Salvage && !over {
                match (here.landed, here.acknowledged) {
                    (false, _) => steps.push(Step::Land { side }),
                    (true, false) => steps.push(Step::Acknowledge { side }),
                    (true, true) => {}
                }
            }
            if here.block.is_active() && here.block != Block::AtGate {
                steps.push(Step::Block { side, well: true });
                if here.block != Block::Waiting {
                    steps.push(Step::Block { side, well: false });
                }
            }
            if !here.alive || here.result.is_some() {
                continue;
            }
            if world.kills_left > 0 {
                steps.push(Step::Kill { side });
            }
            match here.doing {
                Doing::Nothing => {}
                Doing::Installing if here.block.is_active() => {}
                Doing::Calming | Doing::Looking | Doing::Installing => {
                    steps.push(Step::Finish { side, well: true });
                }
                Doing::Freezing | Doing::Saving | Doing::Arming | Doing::Loading => {
                    steps.extend([true, false].map(|well| Step::Finish { side, well }));
                }
            }
            // The others are one call each, during which nothing else is seen.
            if !matches!(here.doing, Doing::Nothing | Doing::Calming | Doing::Looking) {
                continue;
            }
            if here.weighing {
                steps.extend([true, false].map(|pours| Step::Weigh { side, pours }));
                continue;
            }
            if !world.messages[side].is_empty() {
                steps.push(Step::Deliver { side });
            }
            steps.push(Step::Cancel { side });
            steps.push(Step::Silence { side });
            if here.awaiting_word {
                if here.words.is_empty() && Transaction::witness_has_ended(world, side) {
                    steps.push(Step::SeeEnd { side });
                } else if !here.words.is_empty() {
                    steps.push(Step::ReadWord { side });
                }
            }
            if here.frozen && !here.promised {
                steps.push(Step::BudgetOver { side });
            }
        }
        if world.routers_work {
            steps.push(Step::CutRouters);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        match step {
            Step::Land { side } => next.sides[side].landed = true,
            Step::Acknowledge { side } => next.sides[side].acknowledged = true,
            Step::Finish { side, well } => {
                let queue = Self::queue(world, side);
                if world.sides[side].doing == Doing::Looking && self.manner == Manner::Settle {
                    next.sides[side].landed = true;
                }
                let look = self.look(&next, side);
                let here = &mut next.sides[side];
                let event = match (std::mem::replace(&mut here.doing, Doing::Nothing), well) {
                    (Doing::Nothing, _) => return None,
                    (Doing::Calming, _) => Event::Calm,
                    (Doing::Freezing, true) => {
                        here.frozen = true;
                        Event::Frozen(vec![look])
                    }
                    (Doing::Saving, true) => {
                        here.frozen = true;
                        Event::Saved(vec![queue])
                    }
                    (Doing::Freezing | Doing::Saving, false) => Event::FreezeFailed(Refusal::FreezeBudget),
                    (Doing::Looking, _) => Event::Looked(vec![look]),
                    (Doing::Arming, true) => {
                        here.block = Block::AtGate;
                        Event::Armed
                    }
                    (Doing::Loading, true) => {
                        here.block = Block::AtGate;
                        Event::Loaded
                    }
                    (Doing::Arming | Doing::Loading, false) => Event::ArmFailed(Refusal::InjectionFailed),
                    (Doing::Installing, _) if here.block == (Block::Over { kept: true }) => Event::Installed,
                    (Doing::Installing, _) => Event::InstallFailed(Refusal::PeerAborted),
                };
                self.feed(&mut next, side, event);
            }
            Step::Weigh { side, pours } => {
                next.sides[side].weighing = false;
                if pours {
                    self.feed(&mut next, side, Event::Pouring);
                }
            }
            Step::Deliver { side } => {
                let message = next.messages[side].remove(0);
                self.feed(&mut next, side, Event::Peer(message));
            }
            Step::ReadWord { side } => {
                let word = next.sides[side].words.remove(0);
                next.sides[side].awaiting_word = false;
                self.feed(&mut next, side, Event::Heard(word));
            }
            Step::SeeEnd { side } => {
                next.sides[side].awaiting_word = false;
                self.feed(&mut next, side, Event::WitnessEnded);
            }
            Step::BudgetOver { side } => self.feed(&mut next, side, Event::BudgetOver),
            Step::Cancel { side } => self.feed(&mut next, side, Event::Cancel(Refusal::Stopping)),
            Step::Silence { side } => self.feed(&mut next, side, Event::SilenceOver),
            Step::Block { side, well } => Self::block_step(&mut next, side, well),
            Step::CutRouters => {
                next.routers_work = false;
                next.messages = [vec![], vec![]];
            }
            Step::Kill { side } => {
                // The kernel detaches every thread; a block before the gate turns back, one after it goes on.
                let here = &mut next.sides[side];
                here.alive = false;
                here.frozen = false;
                here.holds_new = false;
                here.holds_witness = false;
                here.doing = Doing::Nothing;
                if here.block == Block::AtGate {
                    here.block = Block::Over { kept: false };
                }
                next.messages[side].clear();
                next.kills_left -= 1;
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn over(world: &World) -> bool {
            world.sides.iter().all(Side::is_over)
        }
        fn both_on(world: &World, path: Path) -> bool {
            world.sides.iter().all(|side| side.path == path)
        }
        vec![
            Property::always("no two applications run on different paths", |_, world: &World| {
                let [a, b] = &world.sides;
                !(a.is_running() && b.is_running()) || a.path == b.path
            }),
            Property::always(
                "unread bytes are first, once, and with whom they belong",
                |_, world: &World| {
                    world.sides.iter().enumerate().all(|(side, here)| {
                        // Nobody reads or writes on the new connection before they are there.
                        let there = &world.sides[peer(side)];
                        let used = here.path == Path::New && here.is_running()
                            || there.path == Path::New && there.is_running();
                        if used { here.incoming == unread(side) } else { here.incoming.len() <= 2 }
                    })
                },
            ),
            Property::always(
                "a connection with stray bytes is not kept for another attempt",
                |_, world: &World| {
                    let kept = |side: &Side| side.alive && side.holds_new;
                    let both = over(world) && both_on(world, Path::Old) && world.sides.iter().all(kept);
                    !both || world.sides.iter().all(|side| side.incoming.is_empty())
                },
            ),
            Property::always("both ends agree when it is over", |_, world: &World| {
                !over(world) || both_on(world, world.sides[0].path)
            }),
            Property::always("what is reported is what is", |_, world: &World| {
                world.sides.iter().all(|side| match side.result {
                    Some(Ok(())) => side.path == Path::New,
                    Some(Err(_)) => side.path == Path::Old,
                    None => true,
                })
            }),
            Property::always("the two ends of one connection are no strangers", |_, world: &World| {
                world.sides.iter().all(|side| side.result != Some(Err(Refusal::NotTheSameConnection)))
            }),
            Property::always("nothing stays frozen when it is over", |_, world: &World| {
                !over(world) || world.sides.iter().all(Side::is_running)
            }),
            Property::eventually("it comes to an end", |_, world: &World| over(world)),
            Property::sometimes("both ends move", |_, world: &World| {
                world.sides.iter().all(|side| side.result == Some(Ok(())))
            }),
            Property::sometimes(
                "a connection moves although both forwarders are killed",
                |_, world: &World| {
                    world.sides.iter().all(|side| !side.alive && side.result.is_none())
                        && over(world)
                        && both_on(world, Path::New)
                },
            ),
            Property::sometimes("it is given up", |_, world: &World| {
                world.sides.iter().all(|side| matches!(side.result, Some(Err(_))))
            }),
            Property::sometimes("the decider's processes go back by themselves", |_, world: &World| {
                !world.sides[0].alive
                    && over(world)
                    && world.sides[0].block == (Block::Over { kept: false })
                    && world.sides[1].words.contains(&Word::Commit)
            }),
        ]
    }
}

fn check(direction: Direction, manner: Manner) {
    let model = Transaction { direction, manner, kills: 2 };
    let checker = model.checker().threads(2).timeout(std::time::Duration::from_secs(300)).spawn_bfs().join();
    println!(
        "{direction:?}, {manner:?}: {} states, {} of them different, depth {}, both forwarders killed at any step, routers cut at any step",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    assert!(checker.is_done(), "not all states were seen in time");
    checker.assert_properties();
}

#[test]
fn a_swap_is_safe_in_every_order_of_messages_and_kills() {
    check(Direction::ToHost, Manner::Settle);
}

#[test]
fn a_swap_back_is_safe_in_every_order_of_messages_and_kills() {
    check(Direction::ToOverlay, Manner::Settle);
}

#[test]
fn a_way_back_from_a_dead_path_is_safe_whatever_still_arrives_on_it() {
    check(Direction::ToOverlay, Manner::Salvage);
}

fn missing_is(queue: (u32, &[u8]), rcv_nxt: u32, expected: Option<&[u8]>) {
    let (write_seq, bytes) = queue;
    let queue = Queue { write_seq, bytes: bytes.to_vec() };
    let peer = Look { write_seq: 0, rcv_nxt, unread: None };
    assert_eq!(salvage::missing(&queue, &peer), expected, "{queue:?} {rcv_nxt}");
}

#[test]
fn what_the_peer_has_not_received_is_the_end_of_the_queue() {
    missing_is((100, b"abc"), 97, Some(b"abc"));
    missing_is((100, b"abc"), 99, Some(b"c"));
    missing_is((100, b"abc"), 100, Some(b""));
    missing_is((1, b"abc"), u32::MAX, Some(b"bc"));
}

#[test]
fn a_peer_that_misses_what_is_not_in_the_queue_is_a_stranger() {
    missing_is((100, b"abc"), 96, None);
    missing_is((100, b"abc"), 101, None);
}

fn looks(mine: (u32, u32), theirs: (u32, u32), expected: Relation) {
    let look = |(write_seq, rcv_nxt)| Look { write_seq, rcv_nxt, unread: None };
    assert_eq!(relation(&look(mine), &look(theirs)), expected, "{mine:?} {theirs:?}");
}

#[test]
fn settled_means_that_each_has_received_what_the_other_has_written() {
    looks((100, 200), (200, 100), Relation::Settled);
    looks((100, 200), (200, 90), Relation::InFlight);
    looks((100, 190), (200, 100), Relation::InFlight);
}

#[test]
fn sequence_numbers_may_wrap_around() {
    looks((5, 0), (0, u32::MAX - 3), Relation::InFlight);
    looks((5, 0), (0, 5), Relation::Settled);
}

#[test]
fn a_peer_that_received_more_than_was_written_is_a_stranger() {
    looks((100, 200), (200, 101), Relation::Strangers);
    looks((100, 4_000_000), (200, 100), Relation::Strangers);
}

#[test]
fn a_peer_that_was_let_go_without_our_hearing_of_it_is_no_stranger() {
    let look = |write_seq, rcv_nxt| Look { write_seq, rcv_nxt, unread: None };
    let mut end = End::new(Role::Follower, Direction::ToHost, Manner::Settle);
    end.step(Event::Start);
    end.step(Event::Peer(Message::Freeze));
    end.step(Event::Peer(Message::Looks(vec![look(200, 90)])));
    end.step(Event::Frozen(vec![look(100, 190)]));
    end.step(Event::Armed);
    let actions = end.step(Event::Looked(vec![look(100, 201)]));
    assert!(actions.contains(&Action::End(Err(Refusal::PeerAborted))), "{actions:?}");
}

#[test]
fn a_follower_that_has_frozen_in_another_manner_is_not_followed() {
    for (manner, message) in [(Manner::Settle, Message::Saved), (Manner::Salvage, Message::Looks(vec![]))] {
        let mut end = End::new(Role::Decider, Direction::ToOverlay, manner);
        for event in [Event::Start, Event::Calm, Event::Peer(Message::Calm)] {
            end.step(event);
        }
        assert_eq!(end.stage, Stage::Calling);
        assert_eq!(end.step(Event::Peer(message)), [], "{manner:?}");
        assert_eq!(end.stage, Stage::Calling, "{manner:?}");
    }
}

fn looks_of_batch(mine: &[(u32, u32)], theirs: &[(u32, u32)], expected: Relation) {
    let looks = |all: &[(u32, u32)]| -> Vec<Look> {
        all.iter()
            .map(|(write_seq, rcv_nxt)| Look { write_seq: *write_seq, rcv_nxt: *rcv_nxt, unread: None })
            .collect()
    };
    assert_eq!(relation_of_all(&looks(mine), &looks(theirs)), expected, "{mine:?} {theirs:?}");
}

#[test]
fn a_batch_is_settled_when_each_of_its_connections_is() {
    let (settled, in_flight, strangers) = ((200, 100), (200, 90), (200, 101));
    looks_of_batch(&[(100, 200), (100, 200)], &[settled, settled], Relation::Settled);
    looks_of_batch(&[(100, 200), (100, 200)], &[settled, in_flight], Relation::InFlight);
    looks_of_batch(&[(100, 200), (100, 200)], &[in_flight, strangers], Relation::Strangers);
    looks_of_batch(&[(100, 200), (100, 200)], &[settled], Relation::Strangers);
}
