// SPDX-License-Identifier: Apache-2.0
//! The witness as the line between two forwarders: their words, and the unread bytes of their looks where these are many.
//!
//! By way of both routers such bytes are copied a dozen times while processes stand still. What they belong to is told by
//! way of the routers all the same, where it is believed: how many there are, and the sequence numbers. On the line they
//! follow a byte that says so. Both ends may have megabytes to send at once, so that nobody waits in here.

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, BorrowedFd},
};

use forwarder_api::{MAX_UNREAD_BYTES, Refusal};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags},
    sys::socket::{MsgFlags, recv, send},
};

use crate::transaction::{Event, Look, Message, Word};

/// Unread bytes follow.
const UNREAD: u8 = b'U';

/// So many unread bytes go with the looks themselves.
const FEW: usize = 4 << 10;

pub struct Line<'a> {
    witness: BorrowedFd<'a>,
    /// To be sent; of the first, so many bytes are.
    out: VecDeque<Vec<u8>>,
    sent: usize,
    coming: Option<Coming>,
    /// The byte that unread bytes follow was read. They wait for their looks.
    announced: bool,
    has_carried: bool,
}

/// Looks whose unread bytes are not all there yet.
struct Coming {
    looks: Vec<Look>,
    lengths: Vec<u32>,
    bytes: Vec<u8>,
    came: usize,
}

impl<'a> Line<'a> {
    pub fn new(witness: BorrowedFd<'a>) -> Line<'a> {
        Line { witness, out: VecDeque::new(), sent: 0, coming: None, announced: false, has_carried: false }
    }

    /// After what is on its way already. An event: the line is dead.
    pub fn say(&mut self, word: Word) -> Option<Event> {
        self.out.push_back(vec![word.byte()]);
        self.flush()
    }

    /// Take the unread bytes out of looks that are about to be told, if they are many. Returns how many of each go over the
    /// line; none: all of them go with their looks.
    pub fn load(&mut self, looks: &mut [Look]) -> Vec<u32> {
        let length = |look: &Look| look.unread.as_ref().map_or(0, Vec::len);
        if looks.iter().map(length).sum::<usize>() <= FEW {
            return Vec::new();
        }
        let lengths = looks.iter().map(|look| length(look) as u32).collect();
        self.out.push_back(vec![UNREAD]);
        self.out
            .extend(looks.iter_mut().filter(|look| length(look) > 0).filter_map(|look| look.unread.take()));
        self.has_carried = true;
        lengths
    }

    /// The peer has told these looks, and so many unread bytes of each are on the line.
    pub fn expect(&mut self, looks: Vec<Look>, lengths: Vec<u32>) -> Result<(), Refusal> {
        let total: usize = lengths.iter().map(|length| *length as usize).sum();
        if lengths.len() != looks.len() || !(1..=MAX_UNREAD_BYTES).contains(&total) {
            return Err(Refusal::PeerAborted);
        }
        self.has_carried = true;
        self.coming = Some(Coming { looks, lengths, bytes: vec![0; total], came: 0 });
        Ok(())
    }

    /// Looks that were told are not complete: what comes after them waits.
    pub fn is_expecting(&self) -> bool {
        self.coming.is_some()
    }

    /// Unread bytes went over it, or were to: if this attempt fails, some may be left on it.
    pub fn has_carried(&self) -> bool {
        self.has_carried
    }

    /// What to wait for, if anything; `listening`: for words, too.
    pub fn awaited(&self, listening: bool) -> Option<PollFd<'a>> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLOUT, !self.out.is_empty());
        flags.set(PollFlags::POLLIN, self.reads(listening));
        (!flags.is_empty()).then(|| PollFd::new(self.witness, flags))
    }

    fn reads(&self, listening: bool) -> bool {
        self.coming.is_some() || listening && !self.announced
    }

    /// Send and read what can be. An event: what was heard, or that the line is dead.
    pub fn go_on(&mut self, listening: bool) -> Option<Event> {
        if let Some(dead) = self.flush() {
            return Some(dead);
        }
        while self.reads(listening) {
            if self.announced {
                return self.fill();
            }
            let mut byte = [0];
            match self.receive(&mut byte) {
                Ok(0) => return None,
                Ok(_) if byte == [UNREAD] => self.announced = true,
                Ok(_) => return Some(Word::of(byte[0]).map_or(Event::WitnessEnded, Event::Heard)),
                Err(dead) => return Some(dead),
            }
        }
        None
    }

    /// Looks, once they are complete.
    fn fill(&mut self) -> Option<Event> {
        let mut coming = self.coming.take()?;
        while coming.came < coming.bytes.len() {
            match self.receive(&mut coming.bytes[coming.came..]) {
                Ok(0) => {
                    self.coming = Some(coming);
                    return None;
                }
                Ok(count) => coming.came += count,
                Err(dead) => return Some(dead),
            }
        }
        self.announced = false;
        let Coming { mut looks, lengths, mut bytes, .. } = coming;
        for (look, length) in looks.iter_mut().zip(lengths).rev().filter(|(_, length)| *length > 0) {
            look.unread = Some(bytes.split_off(bytes.len() - length as usize));
        }
        Some(Event::Peer(Message::Looks(looks)))
    }

    /// Zero: nothing is there now.
    fn receive(&self, bytes: &mut [u8]) -> Result<usize, Event> {
        match recv(self.witness.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Err(Event::WitnessEnded),
            Ok(count) => Ok(count),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(_) => Err(Event::WitnessEnded),
        }
    }

    /// Send what can be. An event: the line is dead.
    pub fn flush(&mut self) -> Option<Event> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while let Some(first) = self.out.front() {
            match send(self.witness.as_raw_fd(), &first[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::EAGAIN | Errno::EINTR) => return None,
                Err(_) => return Some(Event::WitnessEnded),
            }
            if self.sent == first.len() {
                self.out.pop_front();
                self.sent = 0;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    fn witness() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0)
    }

    fn look(unread: Option<usize>) -> Look {
        Look { write_seq: 1, rcv_nxt: 2, unread: unread.map(|length| vec![length as u8; length]) }
    }

    /// What one end hears within this time, while the other end goes on as well.
    fn heard_within(time: Duration, line: &mut Line<'_>, other: &mut Line<'_>) -> Option<Event> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            assert_eq!(other.flush(), None);
            if let Some(event) = line.go_on(true) {
                return Some(event);
            }
            thread::yield_now();
        }
        None
    }

    /// What one end hears next: megabytes may wait for an acknowledgement that TCP delays.
    fn next(line: &mut Line<'_>, other: &mut Line<'_>) -> Option<Event> {
        heard_within(Duration::from_secs(30), line, other)
    }

    #[test]
    fn few_unread_bytes_stay_with_their_looks() {
        let (ours, _theirs) = witness();
        let mut looks = [look(Some(100)), look(None)];
        assert!(Line::new(ours.as_fd()).load(&mut looks).is_empty());
        assert_eq!(looks, [look(Some(100)), look(None)]);
    }

    #[test]
    fn many_come_over_the_line_both_ways_at_once_between_the_words() {
        let (ours, theirs) = witness();
        let (mut ours, mut theirs) = (Line::new(ours.as_fd()), Line::new(theirs.as_fd()));
        let looks = || vec![look(Some(7 << 20)), look(Some(0)), look(None), look(Some(3 << 20))];
        for line in [&mut ours, &mut theirs] {
            assert_eq!(line.say(Word::Freezing), None);
            let mut told = looks();
            let lengths = line.load(&mut told);
            assert_eq!(lengths, [7 << 20, 0, 0, 3 << 20]);
            assert_eq!(told, [look(None), look(Some(0)), look(None), look(None)]);
            assert_eq!(line.say(Word::Promise), None);
        }
        let told = || vec![look(None), look(Some(0)), look(None), look(None)];
        ours.expect(told(), vec![7 << 20, 0, 0, 3 << 20]).unwrap();
        theirs.expect(told(), vec![7 << 20, 0, 0, 3 << 20]).unwrap();
        for event in
            [Event::Heard(Word::Freezing), Event::Peer(Message::Looks(looks())), Event::Heard(Word::Promise)]
        {
            assert_eq!(next(&mut ours, &mut theirs).as_ref(), Some(&event));
            assert_eq!(next(&mut theirs, &mut ours).as_ref(), Some(&event));
        }
    }

    #[test]
    fn bytes_whose_looks_are_late_are_taken_for_no_words() {
        let (ours, theirs) = witness();
        let (mut ours, mut theirs) = (Line::new(ours.as_fd()), Line::new(theirs.as_fd()));
        let mut told = [look(Some(8000))];
        let lengths = theirs.load(&mut told);
        theirs.say(Word::Promise);
        assert_eq!(heard_within(Duration::from_millis(100), &mut ours, &mut theirs), None);
        ours.expect(told.to_vec(), lengths).unwrap();
        assert_eq!(next(&mut ours, &mut theirs), Some(Event::Peer(Message::Looks(vec![look(Some(8000))]))));
        assert_eq!(next(&mut ours, &mut theirs), Some(Event::Heard(Word::Promise)));
    }

    #[test]
    fn a_line_that_ends_amid_them_is_dead() {
        let (ours, theirs) = witness();
        let mut ours = Line::new(ours.as_fd());
        ours.expect(vec![look(None)], vec![8000]).unwrap();
        send(theirs.as_raw_fd(), b"Uabc", MsgFlags::empty()).unwrap();
        drop(theirs);
        let mut heard = None;
        while heard.is_none() {
            heard = ours.go_on(false);
        }
        assert_eq!(heard, Some(Event::WitnessEnded));
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let (ours, _theirs) = witness();
        let mut line = Line::new(ours.as_fd());
        for lengths in [vec![], vec![1, 1], vec![0], vec![MAX_UNREAD_BYTES as u32 + 1]] {
            assert_eq!(line.expect(vec![look(None)], lengths), Err(Refusal::PeerAborted));
        }
        assert!(!line.has_carried());
    }
}
