// SPDX-License-Identifier: Apache-2.0
//! The machine that runs is the machine that is checked: both ends, the new connection between them, and routers that
//! carry their messages, in every order, with forwarders that are killed at every step.

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
    Looking,
    Arming,
    Installing,
}

/// One end: its forwarder and its application.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Side {
    machine: End,
    alive: bool,
    doing: Doing,
    frozen: bool,
    /// Nothing is in flight towards or from this end any more.
    settled: bool,
    path: Path,
    armed: bool,
    /// Who holds this end of the new connection.
    forwarder_holds_new: bool,
    application_holds_new: bool,
    awaiting_mark: bool,
    awaiting_peer: bool,
    /// On the new connection, from the other end, not read yet.
    incoming: Vec<Item>,
    /// What the block sends after the gate.
    loaded: Vec<Item>,
    result: Option<Result<(), Refusal>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Item {
    Mark(Mark),
    /// A byte that the other application had not read from the old connection.
    Carried(u8),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    sides: [Side; 2],
    /// Messages on their way to each side.
    messages: [Vec<Message>; 2],
    routers_work: bool,
    kills_left: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Finish { side: usize, well: bool },
    Deliver { side: usize },
    ReadMark { side: usize },
    SeeEnd { side: usize },
    BudgetOver { side: usize },
    Cancel { side: usize },
    Silence { side: usize },
    CutRouters,
    Kill { side: usize },
}

struct Transaction {
    direction: Direction,
    kills: u8,
}

fn peer(side: usize) -> usize {
    1 - side
}

/// What each application had not read when it was frozen.
fn unread(side: usize) -> Vec<u8> {
    vec![side as u8 + 1]
}

impl Transaction {
    fn look(side: usize, settled: bool) -> Look {
        // 100 written by side 0, 200 by side 1; the last byte may still be on its way.
        let late = u32::from(!settled);
        let (mine, theirs) = if side == 0 { (100, 200) } else { (200, 100) };
        Look { write_seq: mine, rcv_nxt: theirs - late, unread: settled.then(|| unread(side)) }
    }

    fn feed(&self, world: &mut World, side: usize, event: Event) {
        for action in world.sides[side].machine.step(event) {
            self.act(world, side, action);
        }
    }

    fn act(&self, world: &mut World, side: usize, action: Action) {
        let single_use = self.direction == Direction::ToHost;
        match action {
            Action::Tell(message) => {
                if world.routers_work {
                    world.messages[peer(side)].push(message);
                }
            }
            Action::MakeShallow => world.sides[side].doing = Doing::Calming,
            Action::Freeze => world.sides[side].doing = Doing::Freezing,
            Action::LookAgain { .. } => world.sides[side].doing = Doing::Looking,
            Action::Arm { mark, carry } => {
                let items = mark.map(Item::Mark).into_iter().chain(carry.into_iter().map(Item::Carried));
                world.sides[side].loaded = items.collect();
                world.sides[side].doing = Doing::Arming;
            }
            Action::OpenGate => {
                // The block goes through to its end without us.
                let here = &mut world.sides[side];
                here.armed = false;
                here.path = Path::New;
                here.application_holds_new = true;
                here.doing = Doing::Installing;
                let items = std::mem::take(&mut here.loaded);
                world.sides[peer(side)].incoming.extend(items);
            }
            Action::CloseGate => world.sides[side].armed = false,
            Action::AwaitMark => world.sides[side].awaiting_mark = true,
            Action::AwaitPeer => world.sides[side].awaiting_peer = true,
            Action::SendAbortMark => world.sides[peer(side)].incoming.push(Item::Mark(Mark::Abort)),
            Action::Reverse => {
                world.sides[side].path = Path::Old;
                world.sides[side].application_holds_new = false;
            }
            Action::CloseNew => world.sides[side].forwarder_holds_new = false,
            Action::Thaw => world.sides[side].frozen = false,
            Action::End(result) => {
                let here = &mut world.sides[side];
                // What was not needed is closed, or parked again.
                if result.is_ok() || single_use {
                    here.forwarder_holds_new = false;
                }
                here.result = Some(result);
            }
        }
    }

    fn new_is_held_by_peer(world: &World, side: usize) -> bool {
        let there = &world.sides[peer(side)];
        there.forwarder_holds_new || there.application_holds_new
    }
}

impl Model for Transaction {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let side = |role| Side {
            machine: End::new(role, self.direction),
            alive: true,
            doing: Doing::Nothing,
            frozen: false,
            settled: false,
            path: Path::Old,
            armed: false,
            forwarder_holds_new: true,
            application_holds_new: false,
            awaiting_mark: false,
            awaiting_peer: false,
            incoming: vec![],
            loaded: vec![],
            result: None,
        };
        let mut world = World {
            sides: [side(Role::Decider), side(Role::Follower)],
            messages: [vec![], vec![]],
            routers_work: true,
            kills_left: self.kills,
        };
        for side in [0, 1] {
            self.feed(&mut world, side, Event::Start);
        }
        vec![world]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        for (side, here) in world.sides.iter().enumerate().filter(|(_, here)| here.alive) {
            if here.result.is_some() {
                continue;
            }
            if world.kills_left > 0 {
                steps.push(Step::Kill { side });
            }
            if here.doing != Doing::Nothing {
                steps.push(Step::Finish { side, well: true });
                if matches!(here.doing, Doing::Freezing | Doing::Arming) {
                    steps.push(Step::Finish { side, well: false });
                }
            }
            // The others are one call each, during which nothing else is seen.
            if !matches!(here.doing, Doing::Nothing | Doing::Calming | Doing::Looking) {
                continue;
            }
            if !world.messages[side].is_empty() {
                steps.push(Step::Deliver { side });
            }
            if here.awaiting_mark && matches!(here.incoming.first(), Some(Item::Mark(_))) {
                steps.push(Step::ReadMark { side });
            }
            let ended = !Transaction::new_is_held_by_peer(world, side);
            if ended && ((here.awaiting_mark && here.incoming.is_empty()) || here.awaiting_peer) {
                steps.push(Step::SeeEnd { side });
            }
            if !here.awaiting_mark && !here.awaiting_peer {
                if here.frozen {
                    steps.push(Step::BudgetOver { side });
                }
                steps.push(Step::Cancel { side });
                if !here.frozen && side == 1 {
                    steps.push(Step::Silence { side });
                }
            }
            // An installed decider gives up waiting for word only where none is to come, and long after a live
            // follower has seen its mark; a follower only where no mark is to come. (Times are so set, in
            // crate::mover.)
            let there = &world.sides[peer(side)];
            let follower_acts = there.alive && there.result.is_none();
            let no_word =
                world.messages[side].is_empty() && (!world.routers_work || !there.alive) && !follower_acts;
            if here.awaiting_peer && !ended && no_word {
                steps.push(Step::Silence { side });
            }
            let decider = &world.sides[0];
            let no_mark = here.incoming.is_empty() && !decider.alive;
            let no_abort =
                decider.result.is_some() && here.incoming.is_empty() && world.messages[side].is_empty();
            if here.awaiting_mark && (no_mark || no_abort) {
                steps.push(Step::Silence { side });
            }
        }
        if world.routers_work {
            steps.push(Step::CutRouters);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        match step {
            Step::Finish { side, well } => {
                let doing = std::mem::replace(&mut next.sides[side].doing, Doing::Nothing);
                if next.sides[side].result.is_some() {
                    return None;
                }
                let event = match (doing, well) {
                    (Doing::Nothing, _) => return None,
                    (Doing::Calming, _) => Event::Calm,
                    (Doing::Freezing, true) => {
                        next.sides[side].frozen = true;
                        Event::Frozen(Self::look(side, next.sides[side].settled))
                    }
                    (Doing::Freezing, false) => Event::FreezeFailed(Refusal::FreezeBudget),
                    (Doing::Looking, _) => {
                        next.sides[side].settled = true;
                        Event::Looked(Self::look(side, true))
                    }
                    (Doing::Arming, true) => {
                        next.sides[side].armed = true;
                        Event::Armed
                    }
                    (Doing::Arming, false) => Event::ArmFailed(Refusal::InjectionFailed),
                    (Doing::Installing, _) => Event::Installed,
                };
                self.feed(&mut next, side, event);
            }
            Step::Deliver { side } => {
                let message = next.messages[side].remove(0);
                self.feed(&mut next, side, Event::Peer(message));
            }
            Step::ReadMark { side } => {
                let Item::Mark(mark) = next.sides[side].incoming.remove(0) else { return None };
                next.sides[side].awaiting_mark = false;
                self.feed(&mut next, side, Event::Mark(mark));
            }
            Step::SeeEnd { side } => {
                let here = &mut next.sides[side];
                let sent = here.awaiting_peer && !here.incoming.is_empty();
                (here.awaiting_mark, here.awaiting_peer) = (false, false);
                let event = if sent { Event::Peer(Message::Installed) } else { Event::NewEnded };
                self.feed(&mut next, side, event);
            }
            Step::BudgetOver { side } => self.feed(&mut next, side, Event::BudgetOver),
            Step::Cancel { side } => self.feed(&mut next, side, Event::Cancel(Refusal::Stopping)),
            Step::Silence { side } => self.feed(&mut next, side, Event::SilenceOver),
            Step::CutRouters => {
                next.routers_work = false;
                next.messages = [vec![], vec![]];
            }
            Step::Kill { side } => {
                // The kernel detaches every thread; a block before the gate turns back, one after it is through.
                let here = &mut next.sides[side];
                here.alive = false;
                here.frozen = false;
                here.armed = false;
                here.forwarder_holds_new = false;
                here.doing = Doing::Nothing;
                next.messages[side].clear();
                next.kills_left -= 1;
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn over(world: &World) -> bool {
            world.sides.iter().all(|side| !side.alive || side.result.is_some())
        }
        vec![
            Property::always("no two applications run on different paths", |_, world: &World| {
                let running = |side: &Side| !side.frozen;
                let [a, b] = &world.sides;
                !(running(a) && running(b) && a.path != b.path)
                    // A block that is through its gate runs ahead of a peer that is bound to follow, or has not begun.
                    || [a, b].iter().any(|side| !side.alive && side.path == Path::New) && !over(world)
            }),
            Property::always("the new socket is held where it is used", |_, world: &World| {
                world.sides.iter().all(|side| side.path == Path::Old || side.application_holds_new)
            }),
            Property::always("no application reads a mark", |_, world: &World| {
                world.sides.iter().all(|side| {
                    side.frozen
                        || side.path == Path::Old
                        || !side.incoming.iter().any(|i| matches!(i, Item::Mark(_)))
                })
            }),
            Property::always(
                "no mark is left on a connection that is used again",
                |model: &Transaction, world: &World| {
                    let kept = |side: &Side| side.alive && side.forwarder_holds_new && side.path == Path::Old;
                    let both = world.sides.iter().all(kept) && over(world);
                    model.direction == Direction::ToHost
                        || !both
                        || world.sides.iter().all(|side| side.incoming.is_empty())
                },
            ),
            Property::always("unread bytes are carried once, to whom they belong", |_, world: &World| {
                world.sides.iter().enumerate().all(|(side, here)| {
                    let carried: Vec<u8> = here
                        .incoming
                        .iter()
                        .filter_map(|item| match item {
                            Item::Carried(byte) => Some(*byte),
                            Item::Mark(_) => None,
                        })
                        .collect();
                    let moved = over(world) && world.sides.iter().all(|side| side.path == Path::New);
                    if moved {
                        carried == unread(side)
                    } else {
                        carried.is_empty() || carried == unread(side)
                    }
                })
            }),
            Property::always("both ends agree when it is over", |_, world: &World| {
                let [a, b] = &world.sides;
                !over(world) || a.path == b.path
            }),
            Property::always("nothing stays frozen when it is over", |_, world: &World| {
                !over(world) || world.sides.iter().all(|side| !side.frozen)
            }),
            Property::eventually("it comes to an end", |_, world: &World| over(world)),
            Property::sometimes("both ends move", |_, world: &World| {
                world.sides.iter().all(|side| side.result == Some(Ok(())))
            }),
            Property::sometimes("a killed decider's connection still moves", |_, world: &World| {
                !world.sides[0].alive && over(world) && world.sides.iter().all(|side| side.path == Path::New)
            }),
            Property::sometimes("it is given up", |_, world: &World| {
                world.sides.iter().all(|side| matches!(side.result, Some(Err(_))))
            }),
        ]
    }
}

fn check(direction: Direction) {
    let model = Transaction { direction, kills: 1 };
    let checker = model.checker().threads(2).timeout(std::time::Duration::from_secs(120)).spawn_bfs().join();
    println!(
        "{direction:?}: {} states, {} of them different, depth {}, one forwarder killed at any step, routers cut at any step",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
}

#[test]
fn a_swap_is_safe_in_every_order_of_messages_and_kills() {
    check(Direction::ToHost);
}

#[test]
fn a_swap_back_is_safe_in_every_order_of_messages_and_kills() {
    check(Direction::ToOverlay);
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
