// SPDX-License-Identifier: Apache-2.0
//! x86_64: the code that runs inside other processes, and what a thread's registers mean when it is stopped.
//!
//! # The injected code
//! The *foothold* is a few hundred bytes of code and data that the forwarder writes into the unused end of a
//! process's vDSO: executable in every process, private to it once written (through `/proc/PID/mem`). The pieces:
//!
//! * **block**: runs a table of system calls (a [`Call`] each) that lies in a page of scratch memory, then waits a
//!   moment for the tracer, then restores the signal mask and every register *by itself* and jumps to where the
//!   thread was. Once started it needs nobody: if the forwarder dies, the thread still comes back as it was.
//!   It never touches the stack, so a signal handler may run on top of it, nor any FPU or vector register.
//! * **hold**: a few more bytes for each other thread of the process, in memory of its own. The thread has them as its
//!   registers from before the gate until the block is over, but runs them only if its tracer dies in between: it then
//!   waits until the block says that it is over, and restores itself in the same way.
//! * **resume**: finishes a `write` or `read` that the freeze cut short: calls again for the rest and returns the
//!   sum. And calls again, with the time that was left, what ends after a time; where the time belongs to the socket,
//!   `ppoll` waits for it. Its few values lie in a frame below the red zone of the thread's own stack.
//!
//! # Stopped threads
//! A thread stopped by PTRACE_INTERRUPT stands inside the kernel's `get_signal`. When it goes on, the kernel itself
//! repeats a system call that ended in -ERESTART*, with all the rules about handlers and SA_RESTART. So threads that
//! we do not touch need nothing. See `arch_do_signal_or_restart` in arch/x86/kernel/signal.c.

use std::{arch::global_asm, time::Duration};

pub type Regs = libc::user_regs_struct;

/// Bytes of scratch memory a process is given, once: see [`scratch`].
pub const SCRATCH_LEN: usize = 256 << 10;

/// Where things are in the scratch memory.
pub mod scratch {
    /// Two descriptors of a socket pair.
    pub const PAIR: u64 = 0;
    /// A byte to receive into.
    pub const BYTE: u64 = 8;
    /// Two bytes to send: the words on the witness.
    pub const WORDS: u64 = 12;
    pub const IOVEC: u64 = 16;
    /// Descriptors arrive in parts, because a control message takes 253 (SCM_MAX_FD): a `struct msghdr` for each.
    pub const MSGHDRS: u64 = 32;
    pub const MSGHDR_LEN: u64 = 56;
    /// The control message of each part: a head, and its descriptors, `i32` each.
    pub const CONTROLS: u64 = 512;
    pub const CONTROL_LEN: u64 = CONTROL_HEAD + 4 * PART_FDS as u64;
    pub const CONTROL_HEAD: u64 = 16;
    pub const PART_FDS: usize = 252;
    pub const MAX_FDS: usize = 4 * PART_FDS;
    /// `struct epoll_event`s, 12 bytes each (packed on x86_64).
    pub const EVENTS: u64 = fd(MAX_FDS - 1) + 4;
    pub const MAX_EVENTS: usize = 1024;
    pub const CALLS: u64 = (EVENTS + 12 * MAX_EVENTS as u64).next_multiple_of(16);
    pub const MAX_CALLS: usize = (super::SCRATCH_LEN - CALLS as usize) / size_of::<super::Call>();

    /// Where the descriptor of this number, in the order of their arrival, is.
    pub const fn fd(index: usize) -> u64 {
        let (part, at) = (index / PART_FDS, index % PART_FDS);
        CONTROLS + part as u64 * CONTROL_LEN + CONTROL_HEAD + 4 * at as u64
    }
}

/// One system call of the block. Layout known to the assembly below.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// System call number plus one; zero ends the table.
    pub number_plus_one: u32,
    /// Bit N: argument N is an offset into the scratch memory, where the real argument is, an `i32`.
    pub indirect: u16,
    /// Index plus one of the call that follows when this one fails; zero: the next.
    pub on_failure: u16,
    /// The call fails when its result is less.
    pub least: i64,
    pub args: [u64; 6],
    /// Filled in by the block.
    pub result: i64,
    /// Index plus one of the call that follows when this one succeeds; zero: the next.
    pub on_success: u16,
    pub padding: [u8; 6],
}

const _: () = assert!(size_of::<Call>() == 80);

impl Call {
    /// A call whose result does not matter for what comes next.
    pub fn new(number: libc::c_long, args: &[u64]) -> Call {
        let mut call = Call { number_plus_one: number as u32 + 1, least: i64::MIN, ..Call::default() };
        call.args[..args.len()].copy_from_slice(args);
        call
    }

    /// Argument `index` is found at `offset` in the scratch memory when the call is made.
    pub fn indirect(mut self, index: usize, offset: u64) -> Call {
        self.indirect |= 1 << index;
        self.args[index] = offset;
        self
    }

    /// The call fails when its result is less than this.
    pub fn at_least(mut self, least: i64) -> Call {
        self.least = least;
        self
    }
}

global_asm!(
    r#"
    // The thread's own signal mask and registers; rbp and rsp were never changed.
    .macro restore_thread of
    mov eax, 14                               // rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8)
    mov edi, 2
    lea rsi, [rip + \of\()_mask]
    xor edx, edx
    mov r10d, 8
    syscall
    mov rbx, [rip + \of\()_regs + 8]
    mov rcx, [rip + \of\()_regs + 16]
    mov rdx, [rip + \of\()_regs + 24]
    mov rsi, [rip + \of\()_regs + 32]
    mov rdi, [rip + \of\()_regs + 40]
    mov r8,  [rip + \of\()_regs + 64]
    mov r9,  [rip + \of\()_regs + 72]
    mov r10, [rip + \of\()_regs + 80]
    mov r11, [rip + \of\()_regs + 88]
    mov r12, [rip + \of\()_regs + 96]
    mov r13, [rip + \of\()_regs + 104]
    mov r14, [rip + \of\()_regs + 112]
    mov r15, [rip + \of\()_regs + 120]
    cmp byte ptr [rip + \of\()_flag_direction], 0
    je 8f
    std
8:  mov al, [rip + \of\()_flag_overflow]
    add al, 0x7f                              // OF := overflow
    mov ah, [rip + \of\()_flag_low]
    sahf
    mov rax, [rip + \of\()_regs]
    jmp qword ptr [rip + \of\()_rip]
    .endm

    // What the thread goes on with, in the order of `own_state`.
    .macro thread_state of
\of\()_regs:           .fill 16, 8, 0       // rax rbx rcx rdx rsi rdi rbp rsp r8..r15
\of\()_rip:            .quad 0
\of\()_mask:           .quad 0              // signal mask
\of\()_flag_overflow:  .byte 0              // 1 if OF
\of\()_flag_low:       .byte 0              // SF ZF AF PF CF
\of\()_flag_direction: .byte 0              // 1 if DF
    .balign 8
    .endm

    .pushsection .rodata.foothold, "a"
    .balign 16
    .globl ebpf_router_foothold_start
ebpf_router_foothold_start:
    .ascii "ebpfrtr4"                         // FOOTHOLD_MAGIC
foothold_scratch:        .quad 0
foothold_shelter:        .quad 0, 0           // address and length
    thread_state foothold
foothold_wait:           .quad 0, 200000000   // struct timespec: 200 ms

    .globl ebpf_router_foothold_block
ebpf_router_foothold_block:
    mov rbx, [rip + foothold_scratch]
    test rbx, rbx
    jnz 2f
    mov eax, 9                                // mmap(NULL, SCRATCH_LEN, RW, PRIVATE|ANONYMOUS, -1, 0)
    xor edi, edi
    mov esi, {scratch_len}
    mov edx, 3
    mov r10d, 0x22
    mov r8, -1
    xor r9d, r9d
    syscall
    cmp rax, -4095
    jae 9f
    mov rbx, rax
2:  lea r12, [rbx + {calls}]
3:  mov eax, [r12]
    test eax, eax
    jz 9f
    movzx r13d, word ptr [r12 + 4]
    mov rdi, [r12 + 16]
    test r13d, 1
    jz 4f
    movsxd rdi, dword ptr [rbx + rdi]
4:  mov rsi, [r12 + 24]
    test r13d, 2
    jz 4f
    movsxd rsi, dword ptr [rbx + rsi]
4:  mov rdx, [r12 + 32]
    test r13d, 4
    jz 4f
    movsxd rdx, dword ptr [rbx + rdx]
4:  mov r10, [r12 + 40]
    mov r8, [r12 + 48]
    mov r9, [r12 + 56]
    dec eax
    syscall
    mov [r12 + 64], rax
    cmp rax, [r12 + 8]
    jl 5f
    movzx eax, word ptr [r12 + 72]
    jmp 6f
5:  movzx eax, word ptr [r12 + 6]
6:  test eax, eax
    jz 7f
    dec eax
    imul eax, eax, 80
    lea r12, [rbx + rax + {calls}]
    jmp 3b
7:  add r12, 80
    jmp 3b

    // The tracer stops the thread in this wait and puts the registers back itself, as the kernel's own restart of an
    // interrupted call needs them. If the tracer is dead, the wait ends and the code below does it.
9:  mov eax, 270                              // pselect6(0, NULL, NULL, NULL, &wait, NULL)
    xor edi, edi
    xor esi, esi
    xor edx, edx
    xor r10d, r10d
    lea r8, [rip + foothold_wait]
    xor r9d, r9d
    syscall
    .globl ebpf_router_foothold_waited
ebpf_router_foothold_waited:
    restore_thread foothold

    .globl ebpf_router_foothold_resume
ebpf_router_foothold_resume:
    syscall
    .globl ebpf_router_foothold_resumed
ebpf_router_foothold_resumed:
    test rax, rax
    jns 8f
    cmp qword ptr [rsp + 0], 0
    je 9f
    xor eax, eax                              // what had been moved before is the result; the error comes again
8:  add rax, [rsp + 0]
9:  mov rsi, [rsp + 8]
    mov rdx, [rsp + 16]
    mov r10, [rsp + 24]
    mov rcx, [rsp + 32]
    push r11                                  // the flags, as `syscall` left them there
    popfq
    mov rsp, [rsp + 40]
    jmp rcx
    syscall                                   // ppoll
    .globl ebpf_router_foothold_polled
ebpf_router_foothold_polled:
    mov rdi, [rsp + 48]
    cmp rax, {eintr}
    je 9b
    test rax, rax
    mov rax, {eagain}
    jz 9b
    mov rax, [rsp + 56]                       // ready, or it cannot be told: the thread's own call, where it made it
    sub qword ptr [rsp + 32], 2
    jmp 9b
    .globl ebpf_router_foothold_end
ebpf_router_foothold_end:

    .balign 16
    .globl ebpf_router_hold_start
ebpf_router_hold_start:
hold_over:               .quad 0              // address of the word that the block sets when it is over
    thread_state hold
    .globl ebpf_router_hold_wait
ebpf_router_hold_wait:
    mov rdi, [rip + hold_over]
    cmp dword ptr [rdi], 0
    jne 2f
    mov eax, 202                              // futex(over, FUTEX_WAIT_PRIVATE, 0, NULL)
    mov esi, 128
    xor edx, edx
    xor r10d, r10d
    syscall
    jmp ebpf_router_hold_wait
2:  restore_thread hold
    .globl ebpf_router_hold_end
ebpf_router_hold_end:
    .popsection
    "#,
    scratch_len = const SCRATCH_LEN,
    calls = const scratch::CALLS,
    eintr = const -libc::EINTR,
    eagain = const -libc::EAGAIN,
);

unsafe extern "C" {
    static ebpf_router_foothold_start: u8;
    static ebpf_router_foothold_block: u8;
    static ebpf_router_foothold_waited: u8;
    static ebpf_router_foothold_resume: u8;
    static ebpf_router_foothold_resumed: u8;
    static ebpf_router_foothold_polled: u8;
    static ebpf_router_foothold_end: u8;
    static ebpf_router_hold_start: u8;
    static ebpf_router_hold_wait: u8;
    static ebpf_router_hold_end: u8;
}

/// First bytes of a foothold: code of another layout must have another one.
pub const FOOTHOLD_MAGIC: [u8; 8] = *b"ebpfrtr4";

fn offset_of_symbol(symbol: *const u8) -> u64 {
    symbol as u64 - &raw const ebpf_router_foothold_start as u64
}

/// Offsets in the foothold.
pub fn block_offset() -> u64 {
    offset_of_symbol(&raw const ebpf_router_foothold_block)
}

/// Where the block stands after its wait for the tracer.
pub fn waited_offset() -> u64 {
    offset_of_symbol(&raw const ebpf_router_foothold_waited)
}

pub fn resume_offset() -> u64 {
    offset_of_symbol(&raw const ebpf_router_foothold_resume)
}

pub fn resumed_offset() -> u64 {
    offset_of_symbol(&raw const ebpf_router_foothold_resumed)
}

fn polled_offset() -> u64 {
    offset_of_symbol(&raw const ebpf_router_foothold_polled)
}

pub fn foothold_len() -> usize {
    offset_of_symbol(&raw const ebpf_router_foothold_end) as usize
}

/// The bytes of the foothold, its data all zero.
pub fn foothold() -> &'static [u8] {
    // SAFETY: start and end delimit one read-only object in .rodata.foothold, defined by the assembly above.
    unsafe { std::slice::from_raw_parts(&raw const ebpf_router_foothold_start, foothold_len()) }
}

/// The foothold's data: scratch memory, shelter (address and length), and what the block restores when it ends by
/// itself.
pub fn foothold_data(scratch: u64, shelter: (u64, u64), regs: &Regs, mask: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(256);
    data.extend_from_slice(&FOOTHOLD_MAGIC);
    for word in [scratch, shelter.0, shelter.1] {
        data.extend_from_slice(&word.to_le_bytes());
    }
    data.extend(own_state(regs, mask));
    data
}

/// What a thread goes on with, as `thread_state` of the assembly has it.
fn own_state(regs: &Regs, mask: u64) -> Vec<u8> {
    let regs = &after_restart(regs);
    let words = [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15, regs.rip, mask,
    ];
    let mut state: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    state.push((regs.eflags >> 11 & 1) as u8);
    state.push(regs.eflags as u8);
    state.push((regs.eflags >> 10 & 1) as u8);
    state
}

/// Bytes of a hold, and where in it a thread waits.
pub fn hold_len() -> usize {
    let (start, end) = (&raw const ebpf_router_hold_start as usize, &raw const ebpf_router_hold_end as usize);
    (end - start).next_multiple_of(16)
}

fn hold_wait_offset() -> u64 {
    &raw const ebpf_router_hold_wait as u64 - &raw const ebpf_router_hold_start as u64
}

/// A hold: the thread that has it waits until the word at `over` is not zero, and goes on with its own state.
pub fn hold(regs: &Regs, mask: u64, over: u64) -> Vec<u8> {
    let (start, end) = (&raw const ebpf_router_hold_start, &raw const ebpf_router_hold_end);
    // SAFETY: start and end delimit one read-only object in .rodata.foothold, defined by the assembly above.
    let mut hold = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }.to_vec();
    hold.resize(hold_len(), 0);
    let state = own_state(regs, mask);
    hold[..8].copy_from_slice(&over.to_le_bytes());
    hold[8..8 + state.len()].copy_from_slice(&state);
    hold
}

/// The registers of a thread that waits in the hold at `hold`.
pub fn enter_hold(regs: &Regs, hold: u64) -> Regs {
    start_at(regs, hold + hold_wait_offset())
}

// Of include/linux/errno.h: never seen by a program, only by its tracer.
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

/// Is the thread inside a system call, about to return?
pub fn in_syscall(regs: &Regs) -> bool {
    regs.orig_rax as i64 >= 0
}

/// 64-bit code; a 32-bit program runs in another code segment (__USER_CS is 0x33).
pub fn is_64_bit(regs: &Regs) -> bool {
    regs.cs == 0x33
}

/// The registers with which the thread would go on in user mode if no signal came: what the kernel makes of them.
fn after_restart(regs: &Regs) -> Regs {
    let mut regs = *regs;
    if in_syscall(&regs) {
        match -(regs.rax as i64) {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
                regs.rax = regs.orig_rax;
                regs.rip -= 2;
            }
            ERESTART_RESTARTBLOCK => {
                regs.rax = libc::SYS_restart_syscall as u64;
                regs.rip -= 2;
            }
            _ => {}
        }
    }
    regs
}

/// Will the kernel go on with the thread's call, which has a time-out, by restart_syscall(2)? Repeated by
/// [`repeat_call`] it waits for its whole time again.
pub fn goes_on_by_another_call(regs: &Regs) -> bool {
    in_syscall(regs) && regs.rax as i64 == -ERESTART_RESTARTBLOCK
}

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

/// A call that moved part of its bytes before it was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    pub fd: i32,
    /// Bytes moved until now.
    pub moved: u64,
    /// Which argument says how many bytes, and which one points to them (if any moves along).
    length: Argument,
    pointer: Option<Argument>,
    /// The call is one that waits for all of its bytes only on a blocking descriptor, and these flags (of send(2) or
    /// recv(2)) forbid it to wait.
    pub dont_wait: bool,
}

/// A call with a `struct iovec` array, or a `struct msghdr` that points to one, that moved some bytes before it was
/// stopped: perhaps all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector {
    pub fd: i32,
    pub moved: u64,
    pub dont_wait: bool,
    message: bool,
}

/// Bytes of a `struct iovec` and of a `struct msghdr`.
pub const IOVEC_LEN: usize = 16;
pub const MSGHDR_LEN: usize = 56;

impl Vector {
    /// Where its `struct msghdr` is, if it has one.
    pub fn header_at(&self, regs: &Regs) -> Option<u64> {
        self.message.then_some(regs.rsi)
    }

    /// Address and length of its array of `struct iovec`s. `header`: the bytes at [`Vector::header_at`].
    pub fn array(&self, regs: &Regs, header: &[u8; MSGHDR_LEN]) -> (u64, u64) {
        let word = |at: usize| header[at..].first_chunk().copied().map_or(0, u64::from_le_bytes);
        if self.message { (word(16), word(24)) } else { (regs.rsi, regs.rdx) }
    }
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

/// What has to be done so that a stopped thread goes on as if it had not been stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// Nothing: the kernel does it.
    No,
    /// It would see an EINTR that nobody sent: repeat the call.
    Call,
    /// It would see less moved than asked for. Matters only on a blocking descriptor.
    Transfer(Partial),
    /// The same, in a call whose bytes are in several places: see [`Vector`].
    Vector(Vector),
}

/// Was the thread stopped again right after the kernel had gone back to its call (see [`after_restart`]), and before it
/// has made it? What looks like the result is the call's number then. `next`: the bytes at its instruction pointer.
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
    let moved = result as u64;
    let partial = |fd: u64, length, asked: u64, pointer, dont_wait| {
        if moved < asked {
            Interrupted::Transfer(Partial { fd: fd as i32, moved, length, pointer, dont_wait })
        } else {
            Interrupted::No
        }
    };
    let vector = |flags: Option<u64>| {
        let dont_wait = flags.is_some_and(|flags| flags & (libc::MSG_DONTWAIT | libc::MSG_PEEK) as u64 != 0);
        Interrupted::Vector(Vector { fd: regs.rdi as i32, moved, message: flags.is_some(), dont_wait })
    };
    let (rsi, rdx) = (Some(Argument::Rsi), Argument::Rdx);
    match number {
        libc::SYS_write => partial(regs.rdi, rdx, regs.rdx, rsi, false),
        libc::SYS_sendto => partial(regs.rdi, rdx, regs.rdx, rsi, regs.r10 & libc::MSG_DONTWAIT as u64 != 0),
        libc::SYS_recvfrom if regs.r10 & libc::MSG_WAITALL as u64 != 0 => {
            let dont_wait = regs.r10 & (libc::MSG_DONTWAIT | libc::MSG_PEEK) as u64 != 0;
            partial(regs.rdi, rdx, regs.rdx, rsi, dont_wait)
        }
        libc::SYS_sendfile => partial(regs.rdi, Argument::R10, regs.r10, None, false),
        libc::SYS_writev => vector(None),
        libc::SYS_sendmsg => vector(Some(regs.rdx)),
        libc::SYS_recvmsg if regs.rdx & libc::MSG_WAITALL as u64 != 0 => vector(Some(regs.rdx)),
        _ => Interrupted::No,
    }
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

/// A frame of the resume code, and how far below the stack pointer it may begin: after the red zone. In words: bytes
/// moved before; rsi, rdx, r10, rip, rsp, rdi and number of the thread's own call; alarm; `struct timespec`, two of
/// them; `struct pollfd`.
pub const RESUME_FRAME_LEN: usize = 96;
const FRAME_ALARM: usize = 64;
const FRAME_TIME: usize = 72;
const FRAME_POLL: usize = 88;
const RED_ZONE: u64 = 128;

/// When the call must end that goes on with this frame: what [`resume_until`] was given.
pub fn alarm_of(frame: &[u8; RESUME_FRAME_LEN]) -> Option<u64> {
    frame[FRAME_ALARM..].first_chunk().copied().map(u64::from_le_bytes).filter(|alarm| *alarm != 0)
}

/// Repeat an interrupted call (see [`Interrupted::Call`]).
pub fn repeat_call(regs: &Regs) -> Regs {
    let mut regs = *regs;
    restart(&mut regs);
    regs
}

/// A thread that finishes its call in the resume code: where its frame goes, what is in it, and its registers.
pub struct Resume {
    pub frame_at: u64,
    pub frame: Vec<u8>,
    pub regs: Regs,
}

/// As [`resume`], for a call that goes on with these pieces, as (address, length).
pub fn resume_vector(
    regs: &Regs,
    vector: &Vector,
    left: &[(u64, u64)],
    foothold: u64,
    frame: Option<[u8; RESUME_FRAME_LEN]>,
) -> Resume {
    // Frame, message header, array: all below the thread's own stack. A second time there is less left, and room enough.
    let header = if vector.message { MSGHDR_LEN } else { 0 };
    let (frame_at, words) = frame_of(regs, vector.moved, frame, header + left.len() * IOVEC_LEN);
    let mut regs = *regs;
    let array_at = frame_at + (RESUME_FRAME_LEN + header) as u64;
    let mut bytes = words;
    if vector.message {
        regs.rsi = frame_at + RESUME_FRAME_LEN as u64;
        // No name and no control message: they went with what was moved already.
        for word in [0, 0, array_at, left.len() as u64, 0, 0, 0u64] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    } else {
        (regs.rsi, regs.rdx) = (array_at, left.len() as u64);
    }
    for (at, length) in left {
        bytes.extend_from_slice(&at.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
    }
    enter_resume(regs, frame_at, bytes, foothold)
}

/// What a call that moved some bytes has left of its pieces.
pub fn pieces_left(pieces: &[(u64, u64)], mut moved: u64) -> Vec<(u64, u64)> {
    let mut left = Vec::with_capacity(pieces.len());
    for (at, length) in pieces {
        let done = moved.min(*length);
        moved -= done;
        if done < *length {
            left.push((at + done, length - done));
        }
    }
    left
}

/// Where a frame of the resume code begins, with `more` bytes after it, and its bytes: `moved` and what to restore.
fn frame_of(regs: &Regs, moved: u64, frame: Option<[u8; RESUME_FRAME_LEN]>, more: usize) -> (u64, Vec<u8>) {
    match frame {
        Some(frame) => {
            let before = frame.first_chunk().copied().map_or(0, u64::from_le_bytes);
            let mut bytes = frame.to_vec();
            bytes[..8].copy_from_slice(&(before + moved).to_le_bytes());
            (regs.rsp, bytes)
        }
        None => {
            let frame_at = (regs.rsp - RED_ZONE - (RESUME_FRAME_LEN + more) as u64) & !15;
            let (rip, rsp, number) = (regs.rip, regs.rsp, regs.orig_rax);
            let words = [moved, regs.rsi, regs.rdx, regs.r10, rip, rsp, regs.rdi, number];
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.resize(RESUME_FRAME_LEN, 0);
            (frame_at, bytes)
        }
    }
}

fn enter_resume(mut regs: Regs, frame_at: u64, frame: Vec<u8>, foothold: u64) -> Resume {
    regs.rsp = frame_at;
    regs.rip = foothold + resumed_offset();
    // The kernel goes back two bytes, to the `syscall` of the resume code, and calls again.
    restart(&mut regs);
    Resume { frame_at, frame, regs }
}

/// Let the thread finish a transfer in the resume code of the foothold at `foothold`. A thread that stood in the
/// resume code already (`frame`: what its frame holds) goes on there with what is left.
pub fn resume(
    regs: &Regs,
    partial: &Partial,
    foothold: u64,
    frame: Option<[u8; RESUME_FRAME_LEN]>,
) -> Resume {
    let (frame_at, bytes) = frame_of(regs, partial.moved, frame, 0);
    let mut regs = *regs;
    *partial.length.of(&mut regs) -= partial.moved;
    if let Some(pointer) = partial.pointer {
        *pointer.of(&mut regs) += partial.moved;
    }
    enter_resume(regs, frame_at, bytes, foothold)
}

/// Let the thread wait on in the resume code for the time that is left of its call. `alarm` stays in the frame, for the
/// next time that the thread is stopped.
pub fn resume_until(
    regs: &Regs,
    timed: Timed,
    alarm: u64,
    left: Duration,
    foothold: u64,
    frame: Option<[u8; RESUME_FRAME_LEN]>,
) -> Resume {
    let (frame_at, mut bytes) = frame_of(regs, 0, frame, 0);
    let mut regs = *regs;
    let mut put = |at: usize, word: u64| bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    put(FRAME_ALARM, alarm);
    put(FRAME_TIME, left.as_secs());
    put(FRAME_TIME + 8, u64::from(left.subsec_nanos()));
    let mut position = resumed_offset();
    match timed {
        Timed::Milliseconds(argument) => *argument.of(&mut regs) = left.as_nanos().div_ceil(1_000_000) as u64,
        Timed::Time(argument) => *argument.of(&mut regs) = frame_at + FRAME_TIME as u64,
        Timed::Receive => {
            put(FRAME_POLL, u64::from(regs.rdi as u32) | (libc::POLLIN as u64) << 32);
            regs.orig_rax = libc::SYS_ppoll as u64;
            (regs.rdi, regs.rsi) = (frame_at + FRAME_POLL as u64, 1);
            (regs.rdx, regs.r10) = (frame_at + FRAME_TIME as u64, 0);
            position = polled_offset();
        }
        Timed::InResume => position = polled_offset(),
    }
    let resume = enter_resume(regs, frame_at, bytes, foothold);
    Resume { regs: continue_at(&resume.regs, foothold + position), ..resume }
}

/// Start the block of the foothold at `foothold`.
pub fn start_block(regs: &Regs, foothold: u64) -> Regs {
    start_at(regs, foothold + block_offset())
}

/// Our code instead of the thread's: outside of any system call, as far as the kernel's restart goes.
fn start_at(regs: &Regs, rip: u64) -> Regs {
    let mut regs = *regs;
    regs.rip = rip;
    regs.orig_rax = u64::MAX;
    regs.eflags &= !(1 << 10);
    regs
}

/// The thread goes on at another place.
pub fn continue_at(regs: &Regs, rip: u64) -> Regs {
    Regs { rip, ..*regs }
}

/// Where a thread stands that is not in a system call.
pub fn user_position(regs: &Regs) -> Option<u64> {
    (!in_syscall(regs)).then_some(regs.rip)
}

/// A system call's result, in a syscall-exit stop.
pub fn syscall_result(regs: &Regs) -> i64 {
    regs.rax as i64
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_foothold_fits_into_a_kilobyte() {
        assert!(foothold_len() <= 1024, "{} bytes", foothold_len());
        assert_eq!(&foothold()[..8], &FOOTHOLD_MAGIC);
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
        let mut regs = regs_in(libc::SYS_write, 1000);
        (regs.rsi, regs.rdx) = (0x5000, 4000);
        let Interrupted::Transfer(partial) = interrupted(&regs) else { panic!("not seen as cut short") };
        let first = resume(&regs, &partial, 0x10_0000, None);
        assert_eq!((first.regs.rsi, first.regs.rdx), (0x5000 + 1000, 3000));
        assert_eq!(first.regs.rsp, first.frame_at);
        assert!(first.frame_at + RESUME_FRAME_LEN as u64 <= regs.rsp - RED_ZONE);

        // Stopped again after 500 more.
        let mut again = first.regs;
        again.rax = 500;
        let Interrupted::Transfer(partial) = interrupted(&again) else { panic!("not seen as cut short") };
        let second = resume(&again, &partial, 0x10_0000, first.frame.first_chunk().copied());
        assert_eq!((second.regs.rsi, second.regs.rdx), (0x5000 + 1500, 2500));
        assert_eq!(second.frame[..8], 1500u64.to_le_bytes());
        assert_eq!(second.frame[8..], first.frame[8..]);
    }

    #[test]
    fn an_epoll_wait_goes_on_with_the_time_that_is_left() {
        let mut regs = regs_in(libc::SYS_epoll_wait, -4);
        regs.r10 = 2000;
        let wait = |regs: &Regs, left, frame: Option<&Resume>| {
            let frame = frame.and_then(|resume| resume.frame.first_chunk().copied());
            let timed = timed(regs, frame.is_some()).unwrap();
            resume_until(regs, timed, 77, Duration::from_micros(left), 0x10_0000, frame)
        };
        let first = wait(&regs, 1_200_100, None);
        assert_eq!(first.regs.r10, 1201);
        assert_eq!(first.frame.first_chunk().and_then(alarm_of), Some(77));
        let second = wait(&first.regs, 300_000, Some(&first));
        assert_eq!((second.regs.r10, second.frame_at), (300, first.frame_at));
        assert_eq!(second.frame[8..64], first.frame[8..64]);
    }

    #[test]
    fn a_recv_with_a_time_out_waits_in_ppoll() {
        let mut regs = regs_in(libc::SYS_recvfrom, -4);
        regs.rdi = 7;
        let first = resume_until(&regs, Timed::Receive, 77, Duration::from_millis(1500), 0x10_0000, None);
        assert_eq!(first.regs.orig_rax, libc::SYS_ppoll as u64);
        assert_eq!(first.frame[FRAME_POLL..], [7, 0, 0, 0, libc::POLLIN as u8, 0, 0, 0]);
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
        assert_eq!(interrupted(&regs), Interrupted::No);
    }
}
