// SPDX-License-Identifier: Apache-2.0
//! What a stop does to a thread's system call, and how the thread goes on with it.
//!
//! A call that was cut short, or shall end when it would have ended without us, goes on in the resume code of the
//! foothold. Its values lie in a [`Frame`] below the red zone of the thread's own stack: what to return to, and the
//! *steps* that are left. A step is one system call; when it has moved all that it was to move, the next one follows, and
//! else the thread returns, with the sum of all or the error. A thread that is stopped again in there has its frame
//! rewritten.

use std::time::Duration;

use forwarder_api::Refusal;

use super::{ERESTARTNOHAND, Regs, continue_at, in_syscall, polled_offset, resumed_offset};

/// Make the kernel repeat the call that the thread is in, unless a handler is to run: then EINTR, as without us.
fn restart(regs: &mut Regs) {
    regs.rax = -ERESTARTNOHAND as u64;
}

/// Calls that end with EINTR when a thread is stopped, although no signal came: signal(7), "Interruption of system
/// calls by stop signals" and the calls that are never restarted. Repeating them is what the program expects.
const NEVER_RESTARTED: [libc::c_long; 21] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_semtimedop,
    libc::SYS_semop,
    // Of a blocking socket with SO_SNDTIMEO; made again, it goes on waiting.
    libc::SYS_connect,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    libc::SYS_io_uring_enter,
];

/// What has to be done so that a stopped thread goes on as if it had not been stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// Nothing: the kernel does it.
    No,
    /// It would see an EINTR that nobody sent: repeat the call.
    Call,
    /// It may see less moved than asked for. Matters only on a blocking descriptor.
    Transfer(Transfer),
}

/// A call that moved something before it was stopped: perhaps all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    pub fd: i32,
    /// Flags of send(2) or recv(2) that forbid it to wait.
    pub dont_wait: bool,
    /// Bytes; messages, of [`Shape::Messages`].
    moved: u64,
    shape: Shape,
}

/// Where the bytes of a transfer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// This argument says how many, that one points to them (if any is in memory).
    Bytes { length: Argument, pointer: Option<Argument> },
    /// In an array of `struct iovec`s.
    Pieces,
    /// In that of a `struct msghdr`.
    Message,
    /// In those of an array of `struct mmsghdr`s.
    Messages,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    Rsi,
    Rdx,
    R10,
}

impl Argument {
    fn of(self, regs: &mut Regs) -> &mut u64 {
        match self {
            Argument::Rsi => &mut regs.rsi,
            Argument::Rdx => &mut regs.rdx,
            Argument::R10 => &mut regs.r10,
        }
    }
}

/// Was the thread stopped again right after the kernel had gone back to its call (see [`super::after_restart`]), and
/// before it has made it? What looks like the result is the call's number then. `next`: the bytes at its instruction pointer.
pub fn is_rewound(regs: &Regs, next: impl FnOnce(u64) -> Option<[u8; 2]>) -> bool {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    in_syscall(regs) && regs.rax == regs.orig_rax && next(regs.rip) == Some(SYSCALL)
}

pub fn interrupted(regs: &Regs) -> Interrupted {
    if !in_syscall(regs) {
        return Interrupted::No;
    }
    let (number, result) = (regs.orig_rax as libc::c_long, regs.rax as i64);
    if result == -i64::from(libc::EINTR) && NEVER_RESTARTED.contains(&number) {
        return Interrupted::Call;
    }
    if result <= 0 {
        return Interrupted::No;
    }
    let waits_for_all = |flags: u64| flags & libc::MSG_WAITALL as u64 != 0;
    let bytes = |length| Shape::Bytes { length, pointer: Some(Argument::Rsi) };
    let (shape, flags) = match number {
        libc::SYS_write => (bytes(Argument::Rdx), 0),
        libc::SYS_sendto => (bytes(Argument::Rdx), regs.r10),
        libc::SYS_recvfrom if waits_for_all(regs.r10) => (bytes(Argument::Rdx), regs.r10),
        libc::SYS_sendfile => (Shape::Bytes { length: Argument::R10, pointer: None }, 0),
        libc::SYS_writev => (Shape::Pieces, 0),
        libc::SYS_sendmsg => (Shape::Message, regs.rdx),
        libc::SYS_recvmsg if waits_for_all(regs.rdx) => (Shape::Message, regs.rdx),
        libc::SYS_sendmmsg => (Shape::Messages, regs.r10),
        _ => return Interrupted::No,
    };
    let dont_wait = flags & (libc::MSG_DONTWAIT | libc::MSG_PEEK) as u64 != 0;
    Interrupted::Transfer(Transfer { fd: regs.rdi as i32, dont_wait, moved: result as u64, shape })
}

/// A call that ends after a time, and would wait for all of it again when it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// In milliseconds.
    Milliseconds(Argument),
    /// In a `struct timespec` that this argument points to.
    Time(Argument),
    /// The time-out for receiving of the socket that is its first argument.
    Receive,
    /// The resume code waits, instead of a call of the kind before.
    InResume,
}

/// The call that a stop has ended. `in_resume`: it is the resume code's.
pub fn timed(regs: &Regs, in_resume: bool) -> Option<Timed> {
    const EINTR: i64 = libc::EINTR as i64;
    if !in_syscall(regs) || !matches!(-(regs.rax as i64), EINTR | ERESTARTNOHAND) {
        return None;
    }
    match regs.orig_rax as libc::c_long {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => {
            (regs.r10 as i32 > 0).then_some(Timed::Milliseconds(Argument::R10))
        }
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => {
            (regs.r10 != 0).then_some(Timed::Time(Argument::R10))
        }
        libc::SYS_rt_sigtimedwait => (regs.rdx != 0).then_some(Timed::Time(Argument::Rdx)),
        libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_accept
        | libc::SYS_accept4 => Some(Timed::Receive),
        libc::SYS_ppoll => in_resume.then_some(Timed::InResume),
        _ => None,
    }
}

/// The first argument of a call, if that is a descriptor.
pub fn descriptor(regs: &Regs) -> i32 {
    regs.rdi as i32
}

/// Words of a frame, from the stack pointer of the resume code on.
mod word {
    /// What is returned in the end.
    pub const SUM: usize = 0;
    /// rsi, rdx, r10, rip and rsp of the thread's own call; then rdi and number.
    pub const OWN: usize = 1;
    pub const ALARM: usize = 8;
    /// A `struct timespec`.
    pub const TIME: usize = 9;
    /// A `struct pollfd`.
    pub const POLL: usize = 11;
    /// Address of the step under way.
    pub const STEP: usize = 12;
    pub const STEPS: usize = 13;
    /// A `struct iovec`, and two `struct msghdr`s: for the steps.
    pub const PIECE: usize = STEPS + super::MAX_STEPS * super::STEP_WORDS + super::END_WORDS;
    pub const HEADERS: usize = PIECE + 2;
    pub const LENGTH: usize = HEADERS + 2 * super::HEADER_WORDS;
}

/// The rest of a piece, the pieces after it, the messages after it.
const MAX_STEPS: usize = 3;
/// Where its result is added, how much it is to move, number, rsi, rdx, r10. The first three of one that is none end them.
const STEP_WORDS: usize = 6;
const END_WORDS: usize = 3;
const NO_STEP: u64 = u64::MAX;
/// In bytes, for the assembly.
pub(super) const FRAME_STEP: usize = 8 * word::STEP;
pub(super) const STEP_LEN: usize = 8 * STEP_WORDS;
pub(super) const STEP_SINK: usize = 0;
pub(super) const STEP_WHOLE: usize = 8;
pub(super) const STEP_NUMBER: usize = 16;
const RED_ZONE: u64 = 128;

/// Words of a `struct iovec`, of a `struct msghdr`, and of a `struct mmsghdr`: the same one and then a length.
const PIECE_WORDS: usize = 2;
const HEADER_WORDS: usize = 7;
const MESSAGE_WORDS: usize = 8;

/// Bytes of a [`Frame`].
pub const FRAME_LEN: usize = 8 * word::LENGTH;

/// The values of a thread in the resume code.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Where it lies.
    at: u64,
    words: [u64; word::LENGTH],
}

/// How a thread goes on: what is to be written into its memory, as (address, words), and its registers.
#[derive(Debug)]
pub struct Resume {
    pub writes: Vec<(u64, Vec<u64>)>,
    pub regs: Regs,
}

#[derive(Clone, Copy)]
struct Step {
    /// Where its result is added.
    sink: u64,
    whole: u64,
    number: libc::c_long,
    rsi: u64,
    rdx: u64,
    r10: u64,
}

impl Frame {
    /// For a thread that makes its own call.
    fn new(regs: &Regs) -> Frame {
        let mut frame =
            Frame { at: (regs.rsp - RED_ZONE - FRAME_LEN as u64) & !15, words: [0; word::LENGTH] };
        let own = [regs.rsi, regs.rdx, regs.r10, regs.rip, regs.rsp, regs.rdi, regs.orig_rax];
        frame.words[word::OWN..][..own.len()].copy_from_slice(&own);
        let nothing_more =
            Step { sink: frame.address(word::SUM), whole: u64::MAX, number: 0, rsi: 0, rdx: 0, r10: 0 };
        frame.set_steps(&[nothing_more]);
        frame
    }

    /// Of a thread that stands in the resume code already: what is at its stack pointer.
    pub fn read(at: u64, words: &[u64]) -> Option<Frame> {
        Some(Frame { at, words: words.try_into().ok()? })
    }

    /// When the call must end that goes on with this frame: what [`resume_until`] was given.
    pub fn alarm(&self) -> Option<u64> {
        Some(self.words[word::ALARM]).filter(|alarm| *alarm != 0)
    }

    fn address(&self, word: usize) -> u64 {
        self.at + 8 * word as u64
    }

    /// Where the result of the step under way is added.
    fn sink(&self) -> u64 {
        self.words[self.step_under_way()]
    }

    fn step_under_way(&self) -> usize {
        let word = (self.words[word::STEP].wrapping_sub(self.at) / 8) as usize;
        word.clamp(word::STEPS, word::PIECE - END_WORDS)
    }

    fn steps_after(&self) -> Vec<Step> {
        let steps = &self.words[self.step_under_way() + STEP_WORDS..word::PIECE];
        let step = |words: &[u64]| match *words {
            [sink, whole, number, rsi, rdx, r10] if number != NO_STEP => {
                Some(Step { sink, whole, number: number as libc::c_long, rsi, rdx, r10 })
            }
            _ => None,
        };
        steps.chunks(STEP_WORDS).map_while(step).collect()
    }

    /// The first of them is under way.
    fn set_steps(&mut self, steps: &[Step]) {
        self.words[word::STEP] = self.address(word::STEPS);
        let mut at = word::STEPS;
        for step in steps {
            let words = [step.sink, step.whole, step.number as u64, step.rsi, step.rdx, step.r10];
            self.words[at..][..STEP_WORDS].copy_from_slice(&words);
            at += STEP_WORDS;
        }
        self.words[at + END_WORDS - 1] = NO_STEP;
    }

    /// The kernel goes back two bytes, to the `syscall` before `position` in the foothold, and calls with these registers.
    fn enter(self, mut regs: Regs, position: u64) -> Resume {
        regs.rsp = self.at;
        restart(&mut regs);
        Resume { writes: vec![(self.at, self.words.to_vec())], regs: continue_at(&regs, position) }
    }
}

/// Reads so many words of a process's memory, from an address on.
pub type ReadWords<'a> = dyn Fn(u64, usize) -> Result<Vec<u64>, Refusal> + 'a;

impl Transfer {
    /// Let the thread finish it in the resume code of the foothold at `foothold`; `None` if nothing is left to be moved.
    /// `frame`: of a thread that stood there already.
    pub fn resume(
        &self,
        regs: &Regs,
        foothold: u64,
        frame: Option<Frame>,
        read: &ReadWords<'_>,
    ) -> Result<Option<Resume>, Refusal> {
        let (sink, after) = match &frame {
            Some(frame) => (Some(frame.sink()), frame.steps_after()),
            None => (None, Vec::new()),
        };
        let mut frame = frame.unwrap_or_else(|| Frame::new(regs));
        let sum = frame.address(word::SUM);
        let sink = sink.unwrap_or(sum);
        let mut steps = self.steps_left(regs, &mut frame, sink, read)?;
        if steps.is_empty() {
            return Ok(None);
        }
        steps.extend(after);
        frame.set_steps(&steps);
        let mut writes = Vec::new();
        if sink == sum {
            frame.words[word::SUM] += self.moved;
        } else {
            let before = read(sink, 1)?.first().copied().unwrap_or_default();
            writes.push((sink, vec![before + self.moved]));
        }
        let [Step { number, rsi, rdx, r10, .. }, ..] = steps[..] else { return Ok(None) };
        let regs = Regs { orig_rax: number as u64, rsi, rdx, r10, ..*regs };
        let resume = frame.enter(regs, foothold + resumed_offset());
        writes.extend(resume.writes);
        Ok(Some(Resume { writes, ..resume }))
    }

    fn steps_left(
        &self,
        regs: &Regs,
        frame: &mut Frame,
        sink: u64,
        read: &ReadWords<'_>,
    ) -> Result<Vec<Step>, Refusal> {
        let number = regs.orig_rax as libc::c_long;
        match self.shape {
            Shape::Bytes { length, pointer } => {
                let mut left = *regs;
                let whole = length.of(&mut left).saturating_sub(self.moved);
                *length.of(&mut left) = whole;
                if let Some(pointer) = pointer {
                    *pointer.of(&mut left) += self.moved;
                }
                let step = Step { sink, whole, number, rsi: left.rsi, rdx: left.rdx, r10: left.r10 };
                Ok(if whole == 0 { vec![] } else { vec![step] })
            }
            Shape::Pieces => {
                let left = Left::of(regs.rsi, regs.rdx, self.moved, read)?;
                Ok(left.steps(frame, sink, number, None))
            }
            Shape::Message => {
                let header = read(regs.rsi, HEADER_WORDS)?;
                let left = Left::of(header[2], header[3], self.moved, read)?;
                Ok(left.steps(frame, sink, number, Some(regs.rdx)))
            }
            Shape::Messages => {
                let (flags, last) = (regs.r10, regs.rsi + 8 * (MESSAGE_WORDS as u64) * (self.moved - 1));
                let message = read(last, MESSAGE_WORDS)?;
                let left = Left::of(message[2], message[3], message[HEADER_WORDS] as u32 as u64, read)?;
                let length_at = last + 8 * HEADER_WORDS as u64;
                let mut steps = left.steps(frame, length_at, libc::SYS_sendmsg, Some(flags));
                let messages = regs.rdx.saturating_sub(self.moved);
                if messages > 0 {
                    let rsi = last + 8 * MESSAGE_WORDS as u64;
                    steps.push(Step { sink, whole: messages, number, rsi, rdx: messages, r10: flags });
                }
                Ok(steps)
            }
        }
    }
}

/// What a call has left of its array of `struct iovec`s.
struct Left {
    /// The rest of a piece, as (address, length).
    piece: Option<(u64, u64)>,
    /// The pieces after it: where they begin, how many, and how long they are together.
    after: (u64, u64),
    length: u64,
}

impl Left {
    fn of(array: u64, count: u64, mut moved: u64, read: &ReadWords<'_>) -> Result<Left, Refusal> {
        // The kernel takes no more.
        let count = count.min(libc::UIO_MAXIOV as u64);
        let pieces = read(array, PIECE_WORDS * count as usize)?;
        let mut left = Left { piece: None, after: (array + 8 * PIECE_WORDS as u64 * count, 0), length: 0 };
        for (index, piece) in pieces.chunks_exact(PIECE_WORDS).enumerate() {
            let (at, length) = (piece[0], piece[1]);
            if moved >= length {
                moved -= length;
                continue;
            }
            if moved > 0 {
                left.piece = Some((at + moved, length - moved));
                moved = 0;
                continue;
            }
            if left.after.1 == 0 {
                left.after.0 = array + 8 * (PIECE_WORDS * index) as u64;
                left.after.1 = count - index as u64;
            }
            left.length += length;
        }
        Ok(left)
    }

    /// By that call; with these flags if it takes a message, and each has its header in the frame then: no name and no
    /// control message, they went with what was moved already.
    fn steps(self, frame: &mut Frame, sink: u64, number: libc::c_long, flags: Option<u64>) -> Vec<Step> {
        let mut parts = Vec::with_capacity(MAX_STEPS);
        if let Some((at, length)) = self.piece {
            frame.words[word::PIECE..][..PIECE_WORDS].copy_from_slice(&[at, length]);
            parts.push((frame.address(word::PIECE), 1, length));
        }
        if self.after.1 > 0 {
            parts.push((self.after.0, self.after.1, self.length));
        }
        let step = |(index, (array, count, whole)): (usize, (u64, u64, u64))| match flags {
            None => Step { sink, whole, number, rsi: array, rdx: count, r10: 0 },
            Some(flags) => {
                let header = word::HEADERS + index * HEADER_WORDS;
                frame.words[header..][..HEADER_WORDS].copy_from_slice(&[0, 0, array, count, 0, 0, 0]);
                Step { sink, whole, number, rsi: frame.address(header), rdx: flags, r10: 0 }
            }
        };
        parts.into_iter().enumerate().map(step).collect()
    }
}

/// Repeat an interrupted call (see [`Interrupted::Call`]).
pub fn repeat_call(regs: &Regs) -> Regs {
    let mut regs = *regs;
    restart(&mut regs);
    regs
}

/// Let the thread wait on in the resume code for the time that is left of its call. `alarm` stays in the frame, for the
/// next time that the thread is stopped.
pub fn resume_until(
    regs: &Regs,
    timed: Timed,
    alarm: u64,
    left: Duration,
    foothold: u64,
    frame: Option<Frame>,
) -> Resume {
    let mut frame = frame.unwrap_or_else(|| Frame::new(regs));
    frame.words[word::ALARM] = alarm;
    frame.words[word::TIME..][..2].copy_from_slice(&[left.as_secs(), u64::from(left.subsec_nanos())]);
    let mut regs = *regs;
    let mut position = resumed_offset();
    match timed {
        Timed::Milliseconds(argument) => *argument.of(&mut regs) = left.as_nanos().div_ceil(1_000_000) as u64,
        Timed::Time(argument) => *argument.of(&mut regs) = frame.address(word::TIME),
        Timed::Receive => {
            frame.words[word::POLL] = u64::from(regs.rdi as u32) | (libc::POLLIN as u64) << 32;
            regs.orig_rax = libc::SYS_ppoll as u64;
            (regs.rdi, regs.rsi) = (frame.address(word::POLL), 1);
            (regs.rdx, regs.r10) = (frame.address(word::TIME), 0);
            position = polled_offset();
        }
        Timed::InResume => position = polled_offset(),
    }
    frame.enter(regs, foothold + position)
}

#[cfg(test)]
mod tests {
    use super::{super::after_restart, *};

    const FOOTHOLD: u64 = 0x10_0000;

    /// The memory of a process: what is written is there, everything else is zero.
    #[derive(Default)]
    struct Words(std::collections::HashMap<u64, u64>);

    impl Words {
        fn write(&mut self, at: u64, words: &[u64]) {
            self.0.extend((at..).step_by(8).zip(words.iter().copied()));
        }

        fn read(&self, at: u64, count: usize) -> Vec<u64> {
            let word = |at| self.0.get(&at).copied().unwrap_or_default();
            (at..).step_by(8).take(count).map(word).collect()
        }

        /// A thread with these registers is stopped: it goes on with what comes back.
        fn stop(&mut self, regs: &Regs, in_resume: bool) -> Option<Regs> {
            let Interrupted::Transfer(transfer) = interrupted(regs) else { panic!("nothing was moved") };
            let frame = in_resume.then(|| Frame::read(regs.rsp, &self.read(regs.rsp, word::LENGTH)).unwrap());
            let resume = transfer.resume(regs, FOOTHOLD, frame, &|at, count| Ok(self.read(at, count)));
            let resume = resume.unwrap()?;
            resume.writes.iter().for_each(|(at, words)| self.write(*at, words));
            Some(resume.regs)
        }

        fn frame(&self, regs: &Regs) -> Frame {
            Frame::read(regs.rsp, &self.read(regs.rsp, word::LENGTH)).unwrap()
        }

        /// What the resume code does when a call has moved so much: the registers of the next step, or what is returned.
        fn moves(&mut self, regs: &Regs, moved: u64) -> Result<Regs, u64> {
            let mut frame = self.frame(regs);
            let step = frame.step_under_way();
            let [sink, whole] = [frame.words[step], frame.words[step + 1]];
            self.write(sink, &[self.read(sink, 1)[0] + moved]);
            let next = frame.steps_after();
            match next.first() {
                Some(next) if moved == whole => {
                    frame = self.frame(regs);
                    frame.words[word::STEP] += STEP_LEN as u64;
                    self.write(frame.at, &frame.words);
                    let (rsi, rdx, r10) = (next.rsi, next.rdx, next.r10);
                    Ok(Regs { orig_rax: next.number as u64, rsi, rdx, r10, ..*regs })
                }
                _ => Err(self.frame(regs).words[word::SUM]),
            }
        }
    }

    fn regs_in(number: libc::c_long, result: i64) -> Regs {
        // SAFETY: integers only: zero is a value.
        let mut regs: Regs = unsafe { std::mem::zeroed() };
        regs.orig_rax = number as u64;
        regs.rax = result as u64;
        regs.rip = 0x1002;
        regs.rsp = 0x7fff_0000;
        regs
    }

    #[test]
    fn an_epoll_wait_that_was_only_stopped_is_repeated() {
        assert_eq!(interrupted(&regs_in(libc::SYS_epoll_wait, -4)), Interrupted::Call);
    }

    #[test]
    fn a_call_that_the_kernel_repeats_is_left_to_it() {
        assert_eq!(interrupted(&regs_in(libc::SYS_read, -512)), Interrupted::No);
        assert_eq!(after_restart(&regs_in(libc::SYS_read, -512)).rip, 0x1000);
        assert_eq!(after_restart(&regs_in(libc::SYS_poll, -516)).rax, libc::SYS_restart_syscall as u64);
    }

    #[test]
    fn a_write_cut_short_goes_on_with_the_rest() {
        let (mut words, mut regs) = (Words::default(), regs_in(libc::SYS_write, 1000));
        (regs.rsi, regs.rdx) = (0x5000, 4000);
        let first = words.stop(&regs, false).unwrap();
        assert_eq!((first.rsi, first.rdx), (0x5000 + 1000, 3000));
        assert!(first.rsp + FRAME_LEN as u64 <= regs.rsp - RED_ZONE);
        let second = words.stop(&Regs { rax: 500, ..first }, true).unwrap();
        assert_eq!((second.rsi, second.rdx, second.rsp), (0x5000 + 1500, 2500, first.rsp));
        assert_eq!(words.moves(&second, 2500).unwrap_err(), 4000);
    }

    #[test]
    fn a_writev_cut_short_goes_on_with_the_rest_of_a_piece_and_those_after_it() {
        let (mut words, mut regs) = (Words::default(), regs_in(libc::SYS_writev, 150));
        (regs.rsi, regs.rdx) = (0x5000, 4);
        words.write(0x5000, &[0xa000, 100, 0xb000, 100, 0xc000, 100, 0xd000, 100]);
        let first = words.stop(&regs, false).unwrap();
        assert_eq!((first.rdx, words.read(first.rsi, 2)), (1, vec![0xb000 + 50, 50]));
        let again = words.stop(&Regs { rax: 20, ..first }, true).unwrap();
        assert_eq!((again.rdx, words.read(again.rsi, 2)), (1, vec![0xb000 + 70, 30]));
        let after = words.moves(&again, 30).unwrap();
        assert_eq!((after.rsi, after.rdx), (0x5000 + 32, 2));
        let last = words.stop(&Regs { rax: 100, ..after }, true).unwrap();
        assert_eq!((last.rsi, last.rdx), (0x5000 + 48, 1));
        assert_eq!(words.moves(&last, 100).unwrap_err(), 400);
    }

    #[test]
    fn a_sendmsg_of_a_thousand_pieces_goes_on_from_its_own_array() {
        let (mut words, mut regs) = (Words::default(), regs_in(libc::SYS_sendmsg, 15));
        (regs.rsi, regs.rdx) = (0x4000, libc::MSG_NOSIGNAL as u64);
        words.write(0x4000, &[0, 0, 0x5000, 1024, 0x7000, 64, 0]);
        words.write(0x5000, &(0..1024).flat_map(|index| [0x10_0000 + 10 * index, 10]).collect::<Vec<_>>());
        let first = words.stop(&regs, false).unwrap();
        let header = words.read(first.rsi, HEADER_WORDS);
        assert_eq!((&header[..2], &header[3..]), (&[0, 0][..], &[1, 0, 0, 0][..]));
        assert_eq!(words.read(header[2], 2), [0x10_0000 + 15, 5]);
        let after = words.moves(&first, 5).unwrap();
        assert_eq!(words.read(after.rsi, HEADER_WORDS), [0, 0, 0x5000 + 32, 1022, 0, 0, 0]);
        assert_eq!(after.rdx, libc::MSG_NOSIGNAL as u64);
        assert_eq!(words.moves(&after, 10_220).unwrap_err(), 10_240);
    }

    #[test]
    fn a_sendmmsg_goes_on_with_the_message_that_was_cut_short_and_those_after_it() {
        let (mut words, mut regs) = (Words::default(), regs_in(libc::SYS_sendmmsg, 2));
        (regs.rsi, regs.rdx, regs.r10) = (0x4000, 3, libc::MSG_NOSIGNAL as u64);
        let (second, third) = (0x4000 + 64, 0x4000 + 128);
        words.write(second, &[0, 0, 0x5000, 2, 0, 0, 0, 0xabcd << 32 | 30]);
        words.write(0x5000, &[0xa000, 20, 0xb000, 20]);
        let first = words.stop(&regs, false).unwrap();
        assert_eq!(first.orig_rax, libc::SYS_sendmsg as u64);
        let again = words.stop(&Regs { rax: 4, ..first }, true).unwrap();
        let messages = words.moves(&again, 6).unwrap();
        assert_eq!(words.read(second + 56, 1), [0xabcd << 32 | 40]);
        assert_eq!(messages.orig_rax, libc::SYS_sendmmsg as u64);
        assert_eq!((messages.rsi, messages.rdx, messages.r10), (third, 1, libc::MSG_NOSIGNAL as u64));
        assert_eq!(words.moves(&messages, 1).unwrap_err(), 3);
    }

    #[test]
    fn a_vector_that_was_moved_to_its_end_has_nothing_left() {
        let (mut words, mut regs) = (Words::default(), regs_in(libc::SYS_writev, 100));
        (regs.rsi, regs.rdx) = (0x5000, 2);
        words.write(0x5000, &[0xa000, 100, 0xb000, 0]);
        assert!(words.stop(&regs, false).is_none());
    }

    #[test]
    fn an_epoll_wait_goes_on_with_the_time_that_is_left() {
        let (mut words, mut regs) = (Words::default(), regs_in(libc::SYS_epoll_wait, -4));
        regs.r10 = 2000;
        let mut wait = |regs: &Regs, left, in_resume: bool| {
            let frame = in_resume.then(|| words.frame(regs));
            let timed = timed(regs, in_resume).unwrap();
            let resume = resume_until(regs, timed, 77, Duration::from_micros(left), FOOTHOLD, frame);
            resume.writes.iter().for_each(|(at, frame)| words.write(*at, frame));
            (resume.regs, words.frame(&resume.regs))
        };
        let (first, frame) = wait(&regs, 1_200_100, false);
        assert_eq!((first.r10, frame.alarm()), (1201, Some(77)));
        let (second, after) = wait(&first, 300_000, true);
        assert_eq!((second.r10, second.rsp), (300, first.rsp));
        assert_eq!(after.words[word::OWN..word::ALARM], frame.words[word::OWN..word::ALARM]);
        assert_eq!(words.moves(&second, 1).unwrap_err(), 1);
    }

    #[test]
    fn a_recv_with_a_time_out_waits_in_ppoll() {
        let mut regs = regs_in(libc::SYS_recvfrom, -4);
        regs.rdi = 7;
        let first = resume_until(&regs, Timed::Receive, 77, Duration::from_millis(1500), FOOTHOLD, None);
        assert_eq!(first.regs.orig_rax, libc::SYS_ppoll as u64);
        assert_eq!(first.writes[0].1[word::POLL], (libc::POLLIN as u64) << 32 | 7);
        assert_eq!(timed(&first.regs, true), Some(Timed::InResume));
        assert_eq!(timed(&first.regs, false), None);
    }

    #[test]
    fn a_call_without_time_out_is_not_timed() {
        let mut regs = regs_in(libc::SYS_epoll_wait, -4);
        regs.r10 = u64::from(u32::MAX);
        assert_eq!(timed(&regs, false), None);
        assert_eq!(timed(&regs_in(libc::SYS_semtimedop, -4), false), None);
    }

    #[test]
    fn a_write_that_is_about_to_be_repeated_has_moved_nothing() {
        let rewound = after_restart(&regs_in(libc::SYS_write, -512));
        assert!(is_rewound(&rewound, |at| (at == 0x1000).then_some([0x0f, 0x05])));
        let moved_a_byte = regs_in(libc::SYS_write, 1);
        assert!(!is_rewound(&moved_a_byte, |_| Some([0x48, 0x3d])));
    }

    #[test]
    fn a_complete_write_is_no_matter() {
        let mut regs = regs_in(libc::SYS_write, 4000);
        regs.rdx = 4000;
        assert!(Words::default().stop(&regs, false).is_none());
    }
}
