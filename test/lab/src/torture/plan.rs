// SPDX-License-Identifier: Apache-2.0
//! What a run does, from its seed alone: the same seed makes the same decisions in the same order, each actor with
//! random numbers of its own. When a decision takes effect depends on the machine. No I/O, no clock.

use std::time::Duration;

use fastrand::Rng;
use lab::Family;

/// Pods of each host. Numbers 0 and 1 are on h1, 2 and 3 on h2.
pub const PODS_OF_A_HOST: usize = 2;
const PODS: usize = 2 * PODS_OF_A_HOST;

/// A stream server and its client.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// For both sides.
    pub arguments: String,
    pub family: Family,
    /// Numbers of pods.
    pub client: usize,
    pub server: usize,
    pub life: Duration,
    pub end: End,
}

/// How a pair comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it should.
    Finish,
    ClientKilled,
    ServerKilled,
}

/// Where one pair follows the other.
#[derive(Debug)]
pub struct Slot {
    random: Rng,
    short_lived: bool,
    connections: usize,
}

/// Ways to use a socket. Those that come twice are twice as likely.
const KINDS: [&str; 16] = [
    "--io blocking",
    "--io blocking",
    "--io poll",
    "--io select",
    "--io epoll",
    "--io epoll",
    "--io epoll-et",
    "--io epoll-et",
    "--io epoll-oneshot",
    "--io epoll --threads 8",
    "--io blocking --fork 2 --dup 1 --threads 5",
    "--io blocking --fork-reader",
    "--io poll --dup 2",
    "--io blocking --names",
    "--io epoll --dup 1 --fork 1 --names",
    "--odd filter",
];
/// The moves are to take the CPUs, not the streams.
const PAUSES_MS: [u32; 6] = [50, 100, 200, 400, 600, 800];
/// One pair in so many is as fast as it can be.
const SATURATED: u32 = 60;

impl Slot {
    /// So many that all connections together are `connections`: one slot in eight has six.
    pub fn all(seed: u64, connections: usize) -> Vec<Slot> {
        let mut slots = Vec::new();
        let mut left = connections;
        while left > 0 {
            let index = slots.len();
            let connections = if index % 8 == 7 { left.min(6) } else { 1 };
            left -= connections;
            slots.push(Slot {
                random: random(seed, "slot", index),
                short_lived: index % 2 == 0,
                connections,
            });
        }
        slots
    }

    pub fn connections(&self) -> usize {
        self.connections
    }

    pub fn next_pair(&mut self) -> Pair {
        let random = &mut self.random;
        let mut arguments = match random.u32(0..20) {
            0..2 => "--idle --threads 4".to_owned(),
            2..5 => format!("--pings --interval-us {}", random.u32(2_000..50_000)),
            _ => {
                let pause = PAUSES_MS[random.usize(0..PAUSES_MS.len())];
                let saturated = self.connections == 1 && random.u32(0..SATURATED) == 0;
                let kind = KINDS[random.usize(0..KINDS.len())];
                format!("{kind} --pause-ms {}", if saturated { 0 } else { pause })
            }
        };
        arguments += if arguments.contains("--threads") { " --idle-threads" } else { " --threads 1" };
        if self.connections > 1 {
            arguments += &format!(" --connections {}", self.connections);
        }
        let family = match random.u32(0..5) {
            0..3 => Family::V4,
            3 => Family::V6,
            _ => Family::Mapped,
        };
        let client = random.usize(0..PODS);
        let (host, pod) = (client / PODS_OF_A_HOST, client % PODS_OF_A_HOST);
        let server = match random.u32(0..40) {
            // Refused: one network.
            0 => client,
            1..7 => host * PODS_OF_A_HOST + 1 - pod,
            _ => (1 - host) * PODS_OF_A_HOST + random.usize(0..PODS_OF_A_HOST),
        };
        let life_ms = if self.short_lived { random.u64(50..8_000) } else { random.u64(20_000..90_000) };
        let end = match random.u32(0..10) {
            0 => End::ClientKilled,
            1 => End::ServerKilled,
            _ => End::Finish,
        };
        Pair { arguments, family, client, server, life: Duration::from_millis(life_ms), end }
    }
}

/// One who orders moves.
#[derive(Debug)]
pub struct Mover {
    random: Rng,
    mean: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    pub pause: Duration,
    /// 0 or 1.
    pub host: usize,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The connection at this place of all, the remainder taken: to the other network.
    One(usize),
    /// `swap-back --all`
    AllBack,
}

impl Mover {
    pub fn all(seed: u64, movers: usize, mean: Duration) -> Vec<Mover> {
        (0..movers).map(|index| Mover { random: random(seed, "mover", index), mean }).collect()
    }

    pub fn next_move(&mut self) -> Move {
        let random = &mut self.random;
        let pause = self.mean.mul_f64(2.0 * random.f64());
        let what = if random.u32(0..800) == 0 { What::AllBack } else { What::One(random.usize(0..1 << 30)) };
        Move { pause, host: random.usize(0..2), what }
    }
}

/// What befalls the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL, and a new one.
    KillRouter(usize),
    KillForwarder(usize),
    KillBoth(usize),
    KillEverything,
    /// SIGTERM: all connections go back. Then a new one.
    RestartRouter(usize),
    Rules(usize, Rules),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    AllPods,
    /// Only IPv4, and only clients in one pod.
    Few,
    Nothing,
}

#[derive(Debug)]
pub struct Fate {
    random: Rng,
    /// What each host's rules are.
    rules: [Rules; 2],
}

impl Fate {
    pub fn new(seed: u64) -> Fate {
        Fate { random: random(seed, "fate", 0), rules: [Rules::AllPods; 2] }
    }

    /// What comes next, after a pause.
    pub fn next_blow(&mut self) -> (Duration, Blow) {
        let random = &mut self.random;
        let pause = Duration::from_millis(random.u64(100..1_500));
        let host = random.usize(0..2);
        let blow = match random.u32(0..12) {
            0..4 => Blow::KillRouter(host),
            4..7 => Blow::KillForwarder(host),
            7..9 => Blow::KillBoth(host),
            9 => Blow::KillEverything,
            10 => Blow::RestartRouter(host),
            _ => return (pause, self.other_rules(host)),
        };
        (pause, blow)
    }

    /// Rules only.
    pub fn next_rules(&mut self) -> (Duration, Blow) {
        let pause = Duration::from_millis(self.random.u64(2_000..8_000));
        let host = self.random.usize(0..2);
        (pause, self.other_rules(host))
    }

    /// Narrow ones are soon wide again: without rules, nothing is swapped.
    fn other_rules(&mut self, host: usize) -> Blow {
        let rules = match self.rules {
            [Rules::AllPods, Rules::AllPods] if self.random.bool() => (host, Rules::Few),
            [Rules::AllPods, Rules::AllPods] => (host, Rules::Nothing),
            [Rules::AllPods, _] => (1, Rules::AllPods),
            _ => (0, Rules::AllPods),
        };
        self.rules[rules.0] = rules.1;
        Blow::Rules(rules.0, rules.1)
    }
}

/// Random numbers that are an actor's own.
fn random(seed: u64, actor: &str, index: usize) -> Rng {
    let words = format!("{seed} {actor} {index}");
    Rng::with_seed(xxhash_rust::xxh3::xxh3_64(words.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_decisions() {
        let decisions = |seed| {
            let mut slots = Slot::all(seed, 20);
            let pairs: Vec<Pair> =
                slots.iter_mut().flat_map(|slot| [slot.next_pair(), slot.next_pair()]).collect();
            let mut fate = Fate::new(seed);
            let blows: Vec<Blow> = (0..50).map(|_| fate.next_blow().1).collect();
            let mut mover = Mover::all(seed, 1, Duration::from_millis(10)).remove(0);
            let moves: Vec<Move> = (0..50).map(|_| mover.next_move()).collect();
            (pairs, blows, moves)
        };
        assert_eq!(decisions(7), decisions(7));
        assert_ne!(decisions(7), decisions(8));
    }

    #[test]
    fn slots_have_as_many_connections_as_asked_for_and_half_are_short_lived() {
        for connections in [1, 8, 60, 200] {
            let slots = Slot::all(1, connections);
            assert_eq!(slots.iter().map(Slot::connections).sum::<usize>(), connections);
            assert_eq!(slots.iter().filter(|slot| slot.short_lived).count(), slots.len().div_ceil(2));
        }
    }

    #[test]
    fn rules_become_wide_again_after_each_change() {
        let mut fate = Fate::new(3);
        for _ in 0..20 {
            let narrow = fate.next_rules().1;
            let Blow::Rules(host, Rules::Few | Rules::Nothing) = narrow else { panic!("{narrow:?}") };
            assert_eq!(fate.next_rules().1, Blow::Rules(host, Rules::AllPods));
        }
    }

    #[test]
    fn every_kind_of_pair_comes_up() {
        let mut slots = Slot::all(5, 200);
        let pairs: Vec<Pair> =
            (0..20).flat_map(|_| slots.iter_mut().map(Slot::next_pair).collect::<Vec<_>>()).collect();
        for kind in KINDS.iter().chain(&["--pings", "--idle", "--connections 6", "--pause-ms 0"]) {
            assert!(pairs.iter().any(|pair| pair.arguments.contains(kind)), "{kind}");
        }
        let hosts = |pair: &Pair| (pair.client / PODS_OF_A_HOST, pair.server / PODS_OF_A_HOST);
        for wanted in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            assert!(pairs.iter().any(|pair| hosts(pair) == wanted), "{wanted:?}");
        }
    }
}
