// SPDX-License-Identifier: Apache-2.0
//! The room at the end of a process's vDSO, and the code that we keep there (see [`crate::arch`]).
//!
//! The kernel maps the same vDSO image into every 64-bit process and rounds it up to whole pages. What follows the
//! image is zero, executable, and becomes private to the process once written through /proc/PID/mem. A foothold stays
//! until the process ends or calls execve(2), and is inherited by fork(2): it begins with a magic number and the
//! address of the scratch memory, so that another forwarder finds both again.

use std::{io, sync::OnceLock};

use forwarder_api::Refusal;

use crate::{
    arch::{self, Regs},
    process::{Memory, RemoteAddr},
};

/// Kept free between the image and the foothold.
const MARGIN: usize = 64;
const PAGE: usize = 4096;

/// A process's foothold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foothold {
    pub at: RemoteAddr,
    /// Scratch memory, once the block has made it.
    pub scratch: Option<RemoteAddr>,
    /// Memory for the holds of all threads but one, if there were ever more than one.
    pub shelter: Option<Shelter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shelter {
    pub at: RemoteAddr,
    pub length: usize,
}

impl Foothold {
    /// Find or make the foothold in the process whose vDSO is at `vdso`.
    pub fn establish(memory: &Memory, vdso: RemoteAddr) -> Result<Foothold, Refusal> {
        let room = room().ok_or(Refusal::NoInjectionRoom)?;
        let at = RemoteAddr(vdso.0 + room as u64);
        let mut there = vec![0; arch::foothold_len()];
        memory.read(at, &mut there).map_err(|_| Refusal::HolderVanished)?;
        if there.starts_with(&arch::FOOTHOLD_MAGIC) {
            let word = |index: usize| {
                let bytes = there[8 * index..].first_chunk().copied();
                bytes.map_or(0, u64::from_le_bytes)
            };
            let (scratch, shelter, length) = (word(1), word(2), word(3) as usize);
            return Ok(Foothold {
                at,
                scratch: (scratch != 0).then_some(RemoteAddr(scratch)),
                shelter: (shelter != 0).then_some(Shelter { at: RemoteAddr(shelter), length }),
            });
        }
        if there.iter().any(|byte| *byte != 0) {
            return Err(Refusal::NoInjectionRoom);
        }
        memory.write(at, arch::foothold()).map_err(|_| Refusal::NoInjectionRoom)?;
        Ok(Foothold { at, scratch: None, shelter: None })
    }

    /// What stands at the beginning of the foothold while a thread with these registers and this signal mask runs the
    /// block.
    pub fn data(&self, regs: &Regs, mask: u64) -> Vec<u8> {
        let shelter = self.shelter.map_or((0, 0), |shelter| (shelter.at.0, shelter.length as u64));
        arch::foothold_data(self.scratch.map_or(0, |at| at.0), shelter, regs, mask)
    }

    /// Bytes of shelter to be made for `threads` more threads than the one that runs the block; zero if they have room.
    pub fn shelter_missing(&self, threads: usize) -> usize {
        let needed = threads * arch::hold_len();
        let room = self.shelter.map_or(0, |shelter| shelter.length);
        if needed <= room { 0 } else { needed.next_power_of_two().next_multiple_of(PAGE) }
    }

    /// Does the instruction pointer stand in the block or in a hold? Then a forwarder died while the block ran, and it
    /// is not over yet.
    pub fn is_in_block(&self, rip: u64) -> bool {
        let sheltered =
            |shelter: Shelter| (shelter.at.0..shelter.at.0 + shelter.length as u64).contains(&rip);
        self.shelter.is_some_and(sheltered)
            || (self.at.0 + arch::block_offset()..self.at.0 + arch::resume_offset()).contains(&rip)
    }

    pub fn is_in_resume(&self, rip: u64) -> bool {
        (self.at.0 + arch::resume_offset()..self.at.0 + arch::foothold_len() as u64).contains(&rip)
    }
}

/// Offset of the room in the vDSO, the same in every process; `None` if there is not enough.
pub fn room() -> Option<usize> {
    static ROOM: OnceLock<Option<usize>> = OnceLock::new();
    *ROOM.get_or_init(|| measure_room().ok().flatten())
}

fn measure_room() -> io::Result<Option<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let Some((start, end)) = maps
        .lines()
        .find(|line| line.ends_with("[vdso]"))
        .and_then(|line| line.split_whitespace().next()?.split_once('-'))
        .and_then(|(start, end)| {
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        })
    else {
        return Ok(None);
    };
    let mut image = vec![0; (end - start) as usize];
    Memory::open(crate::process::Tgid(std::process::id() as i32))?.read(RemoteAddr(start), &mut image)?;
    // A foothold that this process inherited, or was given by another forwarder, is not part of the image.
    let image = match image.windows(8).position(|word| word == arch::FOOTHOLD_MAGIC) {
        Some(foothold) => &image[..foothold],
        None => &image[..],
    };
    let used = image.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let room = (used + MARGIN).next_multiple_of(MARGIN);
    let mapped = (end - start) as usize;
    Ok((room + arch::foothold_len() <= mapped.next_multiple_of(PAGE)).then_some(room))
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_kernel_leaves_room_at_the_end_of_the_vdso() {
        assert!(super::room().is_some());
    }
}
