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
//! * **resume**: finishes a `write` or `read` that the freeze cut short: calls again for the rest, in a few steps where
//!   it is in several places, and returns the sum. And calls again, with the time that was left, what ends after a time;
//!   where the time belongs to the socket, `ppoll` waits for it. See [`resume`].
//!
//! # Stopped threads
//! A thread stopped by PTRACE_INTERRUPT stands inside the kernel's `get_signal`. When it goes on, the kernel itself
//! repeats a system call that ended in -ERESTART*, with all the rules about handlers and SA_RESTART. So threads that
//! we do not touch need nothing. See `arch_do_signal_or_restart` in arch/x86/kernel/signal.c.

mod resume;

use std::arch::global_asm;

pub use resume::*;

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
    .ascii "ebpfrtr5"                         // FOOTHOLD_MAGIC
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
    js 7f
    mov rcx, [rsp + {step}]                   // this step has moved so much
    mov rdx, [rcx + {sink}]
    add [rdx], rax
    cmp rax, [rcx + {whole}]
    jne 8f
    add rcx, {step_len}                       // all of it: the next one
    mov rax, [rcx + {number}]
    test rax, rax
    js 8f
    mov [rsp + {step}], rcx
    mov rsi, [rcx + {number} + 8]
    mov rdx, [rcx + {number} + 16]
    mov r10, [rcx + {number} + 24]
    push r11                                  // the flags, as `syscall` left them there
    popfq
    jmp ebpf_router_foothold_resume
7:  cmp qword ptr [rsp], 0                    // what had been moved before is the result; the error comes again
    je 9f
8:  mov rax, [rsp]
9:  mov rsi, [rsp + 8]
    mov rdx, [rsp + 16]
    mov r10, [rsp + 24]
    mov rcx, [rsp + 32]
    push r11
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
    step = const resume::FRAME_STEP,
    step_len = const resume::STEP_LEN,
    sink = const resume::STEP_SINK,
    whole = const resume::STEP_WHOLE,
    number = const resume::STEP_NUMBER,
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
pub const FOOTHOLD_MAGIC: [u8; 8] = *b"ebpfrtr5";

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

    #[test]
    fn the_foothold_fits_into_a_kilobyte() {
        assert!(foothold_len() <= 1024, "{} bytes", foothold_len());
        assert_eq!(&foothold()[..8], &FOOTHOLD_MAGIC);
    }
}
