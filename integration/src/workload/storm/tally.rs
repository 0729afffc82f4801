//! What a runner found, and where it is written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Counts of one runner. As a line: `pages=N bad=N steps=N passes=N pause_us=N`.
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    writer: u64,
    /// Pages that a pass checks.
    pub pages: u64,
    /// What was found wrong so far.
    pub bad: u64,
    /// Changes so far.
    pub steps: u64,
    /// Checks of everything so far.
    pub passes: u64,
    /// Longest time between two batches of steps so far, in microseconds.
    pub pause_us: u64,
    last_batch: Instant,
    written: Instant,
}

impl Tally {
    pub(in crate::workload) fn of(writer: u64, pages: u64) -> Self {
        let now = Instant::now();
        Self { writer, pages, bad: 0, steps: 0, passes: 0, pause_us: 0, last_batch: now, written: now }
    }

    pub(in crate::workload) fn step(&mut self, bad: u64) {
        self.steps += 1;
        self.bad += bad;
    }

    /// Ends a batch: takes the time, and rests a little, since a test machine has few processors.
    pub(in crate::workload) fn rest(&mut self) -> io::Result<()> {
        let pause = self.last_batch.elapsed().as_micros();
        self.pause_us = self.pause_us.max(u64::try_from(pause).unwrap_or(u64::MAX));
        self.last_batch = Instant::now();
        if self.written.elapsed() >= WRITTEN_EVERY {
            self.write()?;
        }
        thread::sleep(REST);
        Ok(())
    }

    pub(in crate::workload) fn pass(&mut self, bad: u64) -> io::Result<()> {
        self.bad += bad;
        self.passes += 1;
        self.write()?;
        // A check of everything is no pause.
        self.last_batch = Instant::now();
        Ok(())
    }

    /// Writes the line under another name first, so that readers get all of it.
    fn write(&mut self) -> io::Result<()> {
        self.written = Instant::now();
        fs::create_dir_all(REPORTS)?;
        let path = Path::new(REPORTS).join(self.writer.to_string());
        let next = PathBuf::from(format!("{}.next", path.display()));
        let Self { pages, bad, steps, passes, pause_us, .. } = self;
        fs::write(
            &next,
            format!("pages={pages} bad={bad} steps={steps} passes={passes} pause_us={pause_us}\n"),
        )?;
        fs::rename(&next, &path)
    }
}

/// Reads a line of a report: pages, bad, steps, passes, and the longest pause in microseconds.
#[must_use]
pub fn parse(line: &str) -> Option<[u64; 5]> {
    let mut numbers = [0; 5];
    let mut words = line.split_whitespace();
    for (number, name) in numbers.iter_mut().zip(["pages", "bad", "steps", "passes", "pause_us"]) {
        *number = words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse().ok()?;
    }
    Some(numbers)
}

/// Where runners write: a file for each, a tmpfs in most containers.
pub const REPORTS: &str = "/run/storm";
const REST: Duration = Duration::from_millis(2);
const WRITTEN_EVERY: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_back_and_others_are_not() {
        assert_eq!(parse("pages=4 bad=0 steps=7 passes=2 pause_us=9\n"), Some([4, 0, 7, 2, 9]));
        assert_eq!(parse("pages=4 bad=0"), None);
        assert_eq!(parse(""), None);
    }
}
