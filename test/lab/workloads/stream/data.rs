// SPDX-License-Identifier: Apache-2.0
//! The bytes of one direction: frames of a `u32` length and so many pseudo-random bytes, each byte given by its
//! place in the stream, so that the receiver knows what must come and can say where it went wrong. No I/O here.
//!
//! The last frame has length 0 and carries the number of payload bytes and the hash of everything before it.

use xxhash_rust::xxh3::Xxh3;

pub const LONGEST: usize = 256 << 10;
/// Not a power of two: a stream that lost a page or a segment does not fit its table any more.
const TABLE: usize = (1 << 20) + 7;
const TRAILER: usize = 4 + 8 + 8;

/// splitmix64: enough to look random, nothing to depend on.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between 1 and [`LONGEST`], small sizes as likely as large ones.
    pub fn size(&mut self) -> usize {
        let bits = self.next() % 19;
        let top = 1 << bits;
        (top + self.next() as usize % top).min(LONGEST)
    }
}

/// The payload of a direction as a repeated table, lengthened so that each frame is one slice of it.
fn table(server: bool) -> Vec<u8> {
    let mut random = Random::new(if server { 0x5e17e5 } else { 0xc11e47 });
    let mut table: Vec<u8> = (0..TABLE.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    table.truncate(TABLE);
    table.extend_from_within(..LONGEST);
    table
}

/// What one side sends.
pub struct Source {
    table: Vec<u8>,
    random: Random,
    frame: Vec<u8>,
    written: usize,
    digest: Xxh3,
    pub total: u64,
    ended: bool,
}

impl Source {
    pub fn new(server: bool) -> Self {
        let seed = u64::from(std::process::id()) << 1 | u64::from(server);
        Source {
            table: table(server),
            random: Random::new(seed),
            frame: Vec::with_capacity(LONGEST + TRAILER),
            written: 0,
            digest: Xxh3::new(),
            total: 0,
            ended: false,
        }
    }

    /// The bytes to write next; none when the last frame has been written. A new frame is made when the old one is
    /// done: the last one if `ending`.
    pub fn pending(&mut self, ending: bool) -> Option<&[u8]> {
        if self.written == self.frame.len() {
            if self.ended {
                return None;
            }
            self.frame.clear();
            self.written = 0;
            if ending {
                self.ended = true;
                self.frame.extend_from_slice(&0u32.to_le_bytes());
                self.frame.extend_from_slice(&self.total.to_le_bytes());
                self.frame.extend_from_slice(&self.digest.digest().to_le_bytes());
            } else {
                let size = self.random.size();
                let at = (self.total % TABLE as u64) as usize;
                self.frame.extend_from_slice(&(size as u32).to_le_bytes());
                self.frame.extend_from_slice(&self.table[at..at + size]);
                self.digest.update(&self.frame);
                self.total += size as u64;
            }
        }
        Some(&self.frame[self.written..])
    }

    pub fn wrote(&mut self, bytes: usize) {
        self.written += bytes;
    }

    /// The last frame made has been written in full.
    pub fn is_between_frames(&self) -> bool {
        self.written == self.frame.len()
    }

    pub fn digest(&self) -> u64 {
        self.digest.digest()
    }
}

/// What one side receives.
pub struct Sink {
    table: Vec<u8>,
    digest: Xxh3,
    /// A length, or the trailer, of which not all bytes have come.
    head: Vec<u8>,
    /// Payload bytes of the present frame still to come.
    rest: usize,
    pub total: u64,
    pub ended: bool,
}

impl Sink {
    pub fn new(server: bool) -> Self {
        Sink {
            table: table(!server),
            digest: Xxh3::new(),
            head: Vec::with_capacity(TRAILER),
            rest: 0,
            total: 0,
            ended: false,
        }
    }

    pub fn digest(&self) -> u64 {
        self.digest.digest()
    }

    /// Checks what was read.
    pub fn take(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.ended {
                return Err(format!("{} bytes after the last frame", bytes.len()));
            }
            if self.rest > 0 {
                let n = self.rest.min(bytes.len());
                self.check(&bytes[..n])?;
                self.digest.update(&bytes[..n]);
                self.rest -= n;
                bytes = &bytes[n..];
                continue;
            }
            let last = self.head.len() >= 4 && self.head[..4] == [0; 4];
            let wanted = if last { TRAILER } else { 4 };
            let n = (wanted - self.head.len()).min(bytes.len());
            self.head.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.head.len() == wanted {
                if last { self.end()? } else { self.begin()? }
            }
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), String> {
        let length = u32::from_le_bytes([self.head[0], self.head[1], self.head[2], self.head[3]]) as usize;
        if length > LONGEST {
            return Err(format!(
                "after {} bytes: frame of {length} bytes, at most {LONGEST} expected",
                self.total
            ));
        }
        if length > 0 {
            self.digest.update(&self.head);
            self.head.clear();
            self.rest = length;
        }
        Ok(())
    }

    fn check(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let at = (self.total % TABLE as u64) as usize;
            let n = bytes.len().min(TABLE - at);
            let expected = &self.table[at..at + n];
            if bytes[..n] != *expected {
                let first = bytes[..n].iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
                return Err(format!("wrong byte at {} of the stream", self.total + first as u64));
            }
            self.total += n as u64;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), String> {
        let number = |at: usize| {
            u64::from_le_bytes(
                self.head[at..at + 8].try_into().unwrap_or_else(|_| unreachable!("eight bytes")),
            )
        };
        let (total, digest) = (number(4), number(12));
        if total != self.total || digest != self.digest.digest() {
            return Err(format!(
                "{} bytes with digest {:016x} received, {total} with {digest:016x} expected",
                self.total,
                self.digest.digest()
            ));
        }
        self.ended = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_stream(bytes: u64) -> Vec<u8> {
        let mut source = Source::new(true);
        let mut stream = Vec::new();
        loop {
            let ending = source.total >= bytes;
            let Some(pending) = source.pending(ending) else { return stream };
            let n = pending.len();
            stream.extend_from_slice(pending);
            source.wrote(n);
        }
    }

    fn receive(stream: &[u8]) -> Result<bool, String> {
        let mut sink = Sink::new(false);
        let mut random = Random::new(3);
        let mut rest = stream;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(random.size().min(rest.len()));
            sink.take(now)?;
            rest = later;
        }
        Ok(sink.ended)
    }

    #[test]
    fn a_stream_is_accepted_in_whatever_pieces_it_comes() {
        assert_eq!(receive(&some_stream(5 << 20)), Ok(true));
    }

    #[test]
    fn a_lost_a_repeated_and_a_changed_byte_are_noticed() {
        let good = some_stream(3 << 20);
        let middle = good.len() / 2;
        let mut lost = good.clone();
        lost.remove(middle);
        let mut repeated = good.clone();
        repeated.insert(middle, good[middle]);
        let mut changed = good.clone();
        changed[middle] ^= 1;
        for bad in [lost, repeated, changed] {
            assert!(receive(&bad) != Ok(true));
        }
    }
}
