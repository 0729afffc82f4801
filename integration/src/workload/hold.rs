//! Memory of a chosen content, written at a chosen pace, and a tick for those who watch from outside.
//!
//! What benchmarks move. [`run`] holds the memory itself; [`beside`] ticks next to another program, so that one
//! which writes nothing, or nothing regular, can be watched as well. A tick is a line on standard output about
//! once a millisecond: how many pages have been written or read since the start, and the time in microseconds since 1970.

use std::fs;
use std::io::{self, Read, Write};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use nix::fcntl::{FcntlArg, fcntl};

use super::page::{Identity, SIZE, mix};

/// What is in the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Content {
    /// One byte all over, as memhog writes it.
    Byte,
    /// Numbers that look random, different in each page.
    Random,
    /// By turns: zeros, one byte, a line of text over and over, random numbers.
    Mixed,
}

/// How pages are written once all hold their content.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Never.
    Idle,
    /// So many pages a second, chosen at random.
    Rate(u64),
    /// One page chosen at random after so many turns of a calculation, without rest.
    Busy(u64),
}

/// Fills `megabytes` with `content` and writes to it at `pace`, for ever.
///
/// # Errors
/// When standard output is closed.
pub fn run(megabytes: usize, content: Content, pace: Pace) -> io::Result<()> {
    let mut memory = vec![0; megabytes << 20];
    for (index, page) in (0..).zip(memory.chunks_exact_mut(SIZE)) {
        content.fill(index, page);
    }
    let written = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&written);
    thread::spawn(move || write_pages(&mut memory, pace, &counter));
    tick(&written)
}

/// Runs `command` and ticks beside it, for ever. With `room`, nobody reads what the program writes, and after so
/// many bytes (less than a page) it waits for ever: a program that has filled its memory and now does nothing.
///
/// # Errors
/// When the program cannot be started, or standard output is closed.
pub fn beside(command: &[String], room: Option<usize>) -> io::Result<()> {
    let [program, arguments @ ..] = command else { return Err(io::ErrorKind::InvalidInput.into()) };
    let (mut reader, mut writer) = io::pipe()?;
    if let Some(room) = room {
        let size = i32::try_from(SIZE).map_err(io::Error::other)?;
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(size))?;
        writer.write_all(&vec![0; SIZE.saturating_sub(room)])?;
    }
    let child = Command::new(program).args(arguments).stdout(writer).spawn()?;
    let lines = Arc::new(AtomicU64::new(0));
    let (counter, pid) = (Arc::clone(&lines), child.id());
    thread::spawn(move || {
        if room.is_some() {
            await_rest(pid);
            counter.store(1, Ordering::Relaxed);
            loop {
                // The other end of the pipe stays open.
                thread::park();
            }
        }
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            let seen = buffer[..count].iter().filter(|byte| **byte == b'\n').count();
            counter.fetch_add(seen as u64, Ordering::Relaxed);
        }
    });
    tick(&lines)
}

/// Waits until a process uses no processor time any more.
fn await_rest(pid: u32) {
    let used = || {
        // Fields 14 and 15 of stat(5), counted from the 3rd on, after the name in parentheses.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
        let is_waiting = stat.contains(") S");
        (is_waiting, fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum::<u64>())
    };
    let mut last = used();
    loop {
        thread::sleep(REST);
        let now = used();
        if now.0 && now == last {
            return;
        }
        last = now;
    }
}

/// Returns what a tick has counted.
#[must_use]
pub fn count_of(tick: &str) -> Option<u64> {
    tick.split(' ').next()?.parse().ok()
}

/// Writes a line about once a millisecond.
fn tick(count: &AtomicU64) -> io::Result<()> {
    let mut output = io::stdout().lock();
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        // In one write, so that a line is whole or not there.
        output.write_all(format!("{} {now}\n", count.load(Ordering::Relaxed)).as_bytes())?;
        output.flush()?;
        thread::sleep(TICK);
    }
}

fn write_pages(memory: &mut [u8], pace: Pace, written: &AtomicU64) {
    let pages = memory.len() / SIZE;
    let (begin, mut state, mut count) = (Instant::now(), 1, 0_u64);
    let mut write = |state: u64, count: &mut u64| {
        let index = usize::try_from(state).unwrap_or_default() % pages.max(1);
        if let Some(word) = memory.get_mut(index * SIZE..index * SIZE + 8) {
            word.copy_from_slice(&state.to_le_bytes());
        }
        *count += 1;
        written.store(*count, Ordering::Relaxed);
    };
    match pace {
        Pace::Idle => loop {
            thread::park();
        },
        Pace::Rate(rate) => loop {
            // By the clock of the machine it runs on: a page is not owed for the time of a move.
            let due = rate * u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX) / 1000;
            let most = due.min(count + rate / 10 + 1);
            while count < most {
                state = mix(state);
                write(state, &mut count);
            }
            thread::sleep(TICK);
        },
        Pace::Busy(turns) => loop {
            for _ in 0..=turns {
                state = mix(state);
            }
            write(state, &mut count);
        },
    }
}

impl Content {
    fn fill(self, index: u64, page: &mut [u8]) {
        let random = Identity { writer: 0, index, version: 1 };
        match (self, index % 4) {
            (Self::Byte, _) | (Self::Mixed, 1) => page.fill(0xff),
            (Self::Random, _) | (Self::Mixed, 3) => random.fill(page),
            (Self::Mixed, 0) => {}
            (Self::Mixed, _) => {
                page.iter_mut().zip(TEXT.bytes().cycle()).for_each(|(byte, letter)| *byte = letter);
            }
        }
    }
}

const TICK: Duration = Duration::from_millis(1);
const REST: Duration = Duration::from_millis(200);
const TEXT: &str = "2026-01-01T00:00:00Z info request served in 3 ms, 200 OK, 5123 bytes\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_what_their_names_say() {
        let fill = |content: Content, index| {
            let mut page = [0; SIZE];
            content.fill(index, &mut page);
            page
        };
        assert_eq!(fill(Content::Byte, 7), [0xff; SIZE]);
        assert_ne!(fill(Content::Random, 1), fill(Content::Random, 2));
        assert_eq!(fill(Content::Mixed, 4), [0; SIZE]);
        assert_eq!(fill(Content::Mixed, 3), fill(Content::Random, 3));
        assert!(fill(Content::Mixed, 2).starts_with(b"2026"));
    }

    #[test]
    fn pages_written_are_counted() {
        let written = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&written);
        thread::spawn(move || write_pages(&mut vec![0; 8 * SIZE], Pace::Rate(10_000), &counter));
        assert!(crate::process::wait_until(Duration::from_secs(10), || written.load(Ordering::Relaxed) > 100));
    }
}
