// SPDX-License-Identifier: Apache-2.0
//! Whose turn it is: forms batches, joins those of others, and takes them to their end.

use std::{
    collections::HashSet,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use forwarder_api::{ConnId, Direction, Frame, Manner, Outcome, Refusal};

use super::{Book, Job, Letter, Session, Stage, Waiter, Word, spawn};
use crate::{
    child,
    mover::{Finished, Mailbox, Member, Over, Remote, Said, Told, run_local},
    process::Tgid,
    site::{Reserved, locked, reset},
    transaction,
    turns::{MAX_BATCH, Waiting, next_batch},
};

/// How long a connection waits for its turn, smaller batches included, and how long the decider of a batch, whose own
/// processes are reserved by then, for that of the follower.
const TURN: Duration = Duration::from_secs(5);
const JOINING: Duration = Duration::from_secs(1);
/// Transactions that this forwarder leads at once, for each CPU: more would only take the CPUs from each other, and from
/// the processes that stand still. (How many it follows is up to others.)
const LED_BY_CPU: usize = 4;
const MOST_LED: usize = 32;
/// Between two looks at who has waited for too long.
const LOOK: Duration = Duration::from_millis(500);

/// A batch that its decider has formed.
pub struct Join {
    number: u64,
    conns: Vec<ConnId>,
    by: Instant,
    /// What was said in it since.
    said: Vec<Said>,
}

/// A batch whose turn it is.
struct Batch {
    number: u64,
    /// The same order as at the other end.
    conns: Vec<ConnId>,
    waiters: Vec<Waiter>,
    reserved: Reserved,
    mailbox: Arc<Mailbox>,
}

/// What a batch was made of, while it is moved.
struct Moving {
    number: u64,
    job: Job,
    since: Instant,
    conns: Vec<ConnId>,
}

impl Session {
    pub fn give_turns(self: Arc<Self>) {
        // Asked once: it reads files.
        let most_led = most_led();
        let (mut rung, mut looked) = (0, Instant::now());
        while self.is_open() {
            while let Some(batch) = self.join_next().or_else(|| self.form_next(most_led)) {
                self.start_moving(batch);
            }
            if looked.elapsed() > LOOK {
                self.give_up_on_late_ones();
                looked = Instant::now();
            }
            let before = rung;
            rung = self.site.bell.wait(before, LOOK);
            if rung == before {
                self.site.tidy();
            }
        }
    }

    /// A batch of others whose turn it is here as well.
    fn join_next(&self) -> Option<Batch> {
        let mut book = locked(&self.book);
        let mut refused = Vec::new();
        let mut place = 0;
        let mut batch = None;
        while place < book.joins.len() && batch.is_none() {
            let join = &book.joins[place];
            let tgids = book.tgids_of_all(&join.conns);
            let is_late = Instant::now() >= join.by;
            let reserved = match &tgids {
                Ok(Some(tgids)) => self.site.reserve(tgids.clone()),
                Ok(None) | Err(_) => None,
            };
            match (reserved, Mailbox::new()) {
                (Some(reserved), Ok(mailbox)) => {
                    let Join { number, conns, said, .. } = book.joins.remove(place);
                    said.into_iter().for_each(|said| mailbox.put(Told::FromPeer(said)));
                    batch = book.take(number, conns, reserved, mailbox);
                }
                _ if is_late || tgids.is_err() => refused.push(book.joins.remove(place)),
                _ => place += 1,
            }
        }
        drop(book);
        for join in refused {
            let reason = Refusal::HolderBusy;
            self.say(join.number, join.conns[0], transaction::Message::Abort { reason }.into());
        }
        batch
    }

    /// A batch of our own.
    fn form_next(&self, most_led: usize) -> Option<Batch> {
        let mut book = locked(&self.book);
        if book.led >= most_led {
            return None;
        }
        // Without those that were given up.
        let mut line = std::mem::take(&mut book.line);
        line.retain(|conn| book.waiter(*conn).is_some());
        book.line = line;
        let mut reserved = None;
        let waiting: Vec<Waiting<'_>> =
            book.line.iter().filter_map(|conn| book.waiter(*conn)).map(Waiter::waiting).collect();
        let places = next_batch(&waiting, book.pace, |tgids| {
            reserved = self.site.reserve(tgids.to_vec());
            reserved.is_some()
        })?;
        let places: HashSet<usize> = places.into_iter().collect();
        let mailbox = Mailbox::new().ok()?;
        let (mut conns, mut line) = (Vec::new(), std::collections::VecDeque::new());
        for (place, conn) in std::mem::take(&mut book.line).into_iter().enumerate() {
            if places.contains(&place) { conns.push(conn) } else { line.push_back(conn) }
        }
        book.line = line;
        book.led += 1;
        book.take(self.site.next_batch(), conns, reserved?, mailbox)
    }

    fn start_moving(self: &Arc<Self>, batch: Batch) {
        let Batch { number, conns, waiters, reserved, mailbox } = batch;
        let Some(job) = waiters.first().map(|waiter| waiter.job) else { return };
        let since = waiters.iter().map(|waiter| waiter.since).min().unwrap_or_else(Instant::now);
        let members: Vec<Member> = waiters.into_iter().map(|waiter| waiter.member).collect();
        let lead = conns[0];
        if let Job::Remote(..) = job
            && !job.follows()
        {
            self.write(lead, &Letter { batch: number, word: Word::Join(conns.clone()) });
        }
        let moving = Moving { number, job, since, conns: conns.clone() };
        let (session, site) = (Arc::clone(self), Arc::clone(&self.site));
        let run = move || {
            let finished = child::run(|| match job {
                Job::Remote(task, _) => {
                    let teller = Arc::clone(&session);
                    let tell = Box::new(move |said| teller.say(number, lead, said));
                    Remote { site, members, task, mailbox, tell }.run()
                }
                Job::Local { budget } => run_local(&site, members, budget),
            });
            match finished {
                Ok(finished) => session.finished(moving, finished),
                Err(error) => session.cannot_move(&moving.conns, &error),
            }
            session.no_longer_led(job);
            drop(reserved);
        };
        if let Err(error) = spawn("move", run) {
            self.cannot_move(&conns, &error);
            self.no_longer_led(job);
        }
    }

    fn cannot_move(&self, conns: &[ConnId], error: &io::Error) {
        log::error!("no thread or process to move: {error}");
        conns.iter().for_each(|conn| self.not_started(*conn, Refusal::Exhausted));
    }

    fn no_longer_led(&self, job: Job) {
        if !job.follows() {
            locked(&self.book).led -= 1;
        }
    }

    fn finished(&self, moving: Moving, finished: Finished) {
        match finished {
            Finished::Moved(all) => {
                let pause = all.iter().map(|over| over.moved.pause_us).max();
                self.learn_pace(all.len(), pause.unwrap_or(0));
                all.into_iter().for_each(|over| self.moved(over));
            }
            Finished::Aborted { members, reason, pause_us, afresh } => {
                // A peer that has fallen silent says nothing in smaller ones, either.
                let again = afresh && members.len() > 1 && reason != Refusal::PeerGone;
                self.learn_pace(members.len(), pause_us);
                for member in members {
                    if again {
                        self.put_back_in_line(&moving, member);
                    } else {
                        close_unused(&member);
                    }
                }
                self.not_moved(&moving, reason, pause_us);
            }
        }
    }

    fn learn_pace(&self, together: usize, pause_us: u64) {
        locked(&self.book).pace.learn(together, Duration::from_micros(pause_us));
    }

    fn moved(&self, Over { prepared, moved, parked }: Over) {
        let conn = prepared.conn;
        if let Some(parked) = parked {
            self.site.park(conn, parked);
        }
        drop(prepared);
        log::info!(
            "{conn}: moved with {} others, pause {} us (freeze {}, settle {}, install {}), {} bytes unread, {} threads",
            moved.together - 1,
            moved.pause_us,
            moved.freeze_us,
            moved.settle_us,
            moved.install_us,
            moved.unread_bytes,
            moved.threads
        );
        self.ended(conn, Outcome::Moved(moved));
    }

    /// For a smaller batch, unless it was given up meanwhile.
    fn put_back_in_line(&self, moving: &Moving, member: Member) {
        let conn = member.prepared.conn;
        let mut book = locked(&self.book);
        let is_wanted = |connection: &super::Connection| connection.cancelled.is_none();
        if !self.is_open() || !book.connections.get(&conn).is_some_and(is_wanted) {
            drop(book);
            return close_unused(&member);
        }
        // Those with which nothing is the matter are soon by themselves.
        let most = (moving.conns.len() / 4).max(1);
        book.wait(conn, Waiter::new(member, moving.job, most, moving.since));
    }

    /// Those that are not in line again.
    fn not_moved(&self, moving: &Moving, reason: Refusal, pause_us: u64) {
        let ended: Vec<(ConnId, Refusal)> = {
            let book = locked(&self.book);
            let is_ours =
                |stage: &Stage| matches!(stage, Stage::Moving { batch, .. } if *batch == moving.number);
            let ours = moving.conns.iter().filter_map(|conn| Some((*conn, book.connections.get(conn)?)));
            ours.filter(|(_, connection)| is_ours(&connection.stage))
                .map(|(conn, connection)| (conn, connection.cancelled.unwrap_or(reason)))
                .collect()
        };
        for (conn, reason) in ended {
            log::info!("{conn}: not moved: {reason} ({}), pause {pause_us} us", reason.label());
            if moving.conns.len() > 1 {
                self.write(conn, &Letter { batch: moving.number, word: Word::Leave });
            }
            self.ended(conn, Outcome::Aborted { reason, pause_us });
        }
    }

    /// Whose turn did not come.
    fn give_up_on_late_ones(&self) {
        let late: Vec<(ConnId, Refusal)> = {
            let book = locked(&self.book);
            let late = |conn: &ConnId| {
                let waiter = book.waiter(*conn).filter(|waiter| waiter.since.elapsed() > TURN)?;
                Some((*conn, if waiter.job.follows() { Refusal::PeerGone } else { Refusal::HolderBusy }))
            };
            book.connections.keys().filter_map(late).collect()
        };
        late.into_iter().for_each(|(conn, reason)| self.not_started(conn, reason));
    }

    pub fn hear_peer(&self, conn: ConnId, message: &[u8]) {
        match Letter::parse(message) {
            Some(Letter { batch, word: Word::Join(conns) }) => self.asked_to_join(batch, conn, conns),
            Some(Letter { batch, word: Word::Said(said) }) => self.hear(batch, conn, said),
            Some(Letter { word: Word::Leave, .. }) => self.left_by_peer(conn),
            None => {
                log::warn!("{conn}: its peer said something that is no message");
                self.cancel(conn, Refusal::PeerAborted);
            }
        }
    }

    fn asked_to_join(&self, number: u64, lead: ConnId, conns: Vec<ConnId>) {
        let distinct: HashSet<ConnId> = conns.iter().copied().collect();
        if conns.first() != Some(&lead) || distinct.len() != conns.len() || conns.len() > MAX_BATCH {
            log::warn!("{lead}: its peer named {} connections that cannot be a batch", conns.len());
            let reason = Refusal::PeerAborted;
            return self.say(number, lead, transaction::Message::Abort { reason }.into());
        }
        let join = Join { number, conns, by: Instant::now() + JOINING, said: Vec::new() };
        locked(&self.book).joins.push(join);
        self.site.bell.ring();
    }

    fn hear(&self, batch: u64, conn: ConnId, said: Said) {
        let mut book = locked(&self.book);
        if let Some(place) = book.joins.iter().position(|join| join.number == batch && join.conns[0] == conn)
        {
            if let transaction::Message::Abort { .. } = said.message {
                book.joins.remove(place);
            } else {
                book.joins[place].said.push(said);
            }
            return;
        }
        // Of another batch: said late.
        if let Some(Stage::Moving { batch: now, mailbox }) = book.connections.get(&conn).map(|of| &of.stage)
            && *now == batch
        {
            mailbox.put(Told::FromPeer(said));
        }
    }

    fn left_by_peer(&self, conn: ConnId) {
        let reason = Refusal::PeerAborted;
        let mut book = locked(&self.book);
        let Some(connection) = book.connections.get_mut(&conn) else { return };
        connection.cancelled = Some(reason);
        if let Stage::Waiting(_) = connection.stage {
            drop(book);
            self.ended(conn, Outcome::Aborted { reason, pause_us: 0 });
        }
    }

    fn say(&self, batch: u64, lead: ConnId, said: Said) {
        self.write(lead, &Letter { batch, word: Word::Said(said) });
    }

    pub(super) fn write(&self, conn: ConnId, letter: &Letter) {
        match Frame::encode(letter) {
            Ok(message) => self.send(&forwarder_api::Event::ToPeer { conn, message }),
            Err(error) => log::error!("{conn}: {error}"),
        }
    }
}

fn most_led() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    (LED_BY_CPU * cpus).min(MOST_LED)
}

/// Host connections that were made for nothing: neither host is to remember them (TIME_WAIT).
fn close_unused(member: &Member) {
    if member.prepared.direction == Direction::ToHost {
        member.new.iter().for_each(reset);
    }
}

impl Waiter {
    fn waiting(&self) -> Waiting<'_> {
        let (manner, other_end) = match self.job {
            Job::Remote(task, other_end) => (task.manner, other_end),
            Job::Local { .. } => (Manner::Settle, None),
        };
        let direction = self.member.prepared.direction;
        Waiting { tgids: &self.tgids, direction, manner, other_end, most: self.most }
    }
}

impl Book {
    /// All the processes of a batch to be joined. None: not all of it waits yet. An error: they never will, or are not
    /// of one kind.
    fn tgids_of_all(&self, conns: &[ConnId]) -> Result<Option<Vec<Tgid>>, ()> {
        let (mut tgids, mut kinds, mut all_wait) = (Vec::new(), HashSet::new(), true);
        for conn in conns {
            let connection = self.connections.get(conn).ok_or(())?;
            match &connection.stage {
                Stage::Waiting(waiter) if waiter.job.follows() => {
                    tgids.extend(&waiter.tgids);
                    let Waiting { direction, manner, other_end, .. } = waiter.waiting();
                    kinds.insert((direction, manner, other_end.map(|other| other.host)));
                }
                // In an earlier batch, of which the decider knows the end already.
                Stage::Moving { .. } => all_wait = false,
                Stage::Asked | Stage::Prepared(_) | Stage::Waiting(_) => return Err(()),
            }
        }
        tgids.sort_unstable();
        tgids.dedup();
        if kinds.len() > 1 { Err(()) } else { Ok(all_wait.then_some(tgids)) }
    }

    /// Out of the line, and into a transaction.
    fn take(
        &mut self,
        number: u64,
        conns: Vec<ConnId>,
        reserved: Reserved,
        mailbox: Arc<Mailbox>,
    ) -> Option<Batch> {
        let mut waiters = Vec::with_capacity(conns.len());
        for conn in &conns {
            let connection = self.connections.get_mut(conn)?;
            let moving = Stage::Moving { batch: number, mailbox: Arc::clone(&mailbox) };
            match std::mem::replace(&mut connection.stage, moving) {
                Stage::Waiting(waiter) => waiters.push(*waiter),
                other => connection.stage = other,
            }
        }
        Some(Batch { number, conns, waiters, reserved, mailbox })
    }
}
