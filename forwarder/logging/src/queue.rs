// SPDX-License-Identifier: Apache-2.0
//! Lines on their way to standard error.

use std::{
    io::{self, Write},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use crate::Format;

/// Lines that may wait. At 300 bytes each that is 5 MB where nobody reads; more are lost, counted.
const LINES: usize = 1 << 14;

static LOST: AtomicU64 = AtomicU64::new(0);
static QUEUE: OnceLock<Mutex<SyncSender<Item>>> = OnceLock::new();

enum Item {
    Line(Vec<u8>),
    /// Everything before it is written: say so.
    Flush(SyncSender<()>),
}

/// Takes whole lines, and never waits.
pub struct Writer(SyncSender<Item>);

pub fn open(format: Format) -> io::Result<Writer> {
    let (sender, receiver) = sync_channel(LINES);
    std::thread::Builder::new().name("log".into()).spawn(move || write_all(&receiver, format))?;
    let _ = QUEUE.set(Mutex::new(sender.clone()));
    Ok(Writer(sender))
}

pub fn flush(time: Duration) {
    let Some(queue) = QUEUE.get() else { return };
    let Ok(sender) = queue.lock().map(|sender| sender.clone()) else { return };
    let (done, is_done) = sync_channel(1);
    if sender.try_send(Item::Flush(done)).is_ok() {
        let _: Result<(), RecvTimeoutError> = is_done.recv_timeout(time);
    }
}

pub fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

impl Write for Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.try_send(Item::Line(line.to_vec())).is_err() {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Until nobody logs any more. A disk that is full, or a reader that has gone, is no reason to stop.
fn write_all(lines: &Receiver<Item>, format: Format) {
    let mut told = 0;
    for item in lines {
        let mut out = io::stderr().lock();
        match item {
            Item::Line(line) => drop(out.write_all(&line)),
            Item::Flush(done) => drop(done.try_send(())),
        }
        let lost = lost_lines();
        if lost > told {
            let _ = out.write_all(lost_line(lost - told, format).as_bytes());
            told = lost;
        }
    }
}

fn lost_line(lost: u64, format: Format) -> String {
    let message = format!("{lost} lines of the log are lost: they were not read as fast as they came");
    match format {
        Format::Text => format!("[WARN] {message}\n"),
        Format::Json => {
            let line = serde_json::json!({ "level": "WARN", "lost_lines": lost, "message": message });
            format!("{line}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::mpsc::sync_channel};

    use super::{Writer, lost_lines};

    #[test]
    fn where_nobody_reads_lines_are_lost_and_nobody_waits() {
        let (sender, _receiver) = sync_channel(2);
        let mut writer = Writer(sender);
        let before = lost_lines();
        for _ in 0..5 {
            writer.write_all(b"line\n").unwrap();
        }
        assert_eq!(lost_lines() - before, 3);
    }
}
