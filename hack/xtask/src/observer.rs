//! An outside observer: watches the output of a container grow and tells when it stood still.
//!
//! It knows nothing of migrations. The containers it watches write a little every millisecond or so to a file
//! that both nodes append to, so the longest time in which the file did not grow is the blackout as a user of the
//! container sees it, from the last instruction on one node to the first on the other.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A stretch in which the watched file did not grow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gap {
    /// When it began, from the start of the watch.
    pub(crate) start: Duration,
    /// How long it was.
    pub(crate) length: Duration,
}

/// What was seen of a file.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Stretches of at least [`GAP_MIN`] in which it did not grow, longest first.
    pub(crate) gaps: Vec<Gap>,
    /// The number on its last line, every [`SAMPLE`] or so, with the time from the start of the watch.
    counts: Vec<(Duration, u64)>,
}

impl Seen {
    /// How much the number on the last line grew in the second after the longest gap; `None` if the watch ended
    /// before, or the lines are no numbers.
    pub(crate) fn count_after_longest_gap(&self) -> Option<u64> {
        let gap = self.gaps.first()?;
        let resumed = gap.start + gap.length;
        let (_, before) = self.counts.iter().rev().find(|(time, _)| *time <= gap.start + SAMPLE)?;
        let (_, after) = self.counts.iter().find(|(time, _)| *time >= resumed + Duration::from_secs(1))?;
        Some(after.saturating_sub(*before))
    }
}

/// A thread that watches one file.
#[derive(Debug)]
pub(crate) struct Observer {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Seen>,
}

impl Observer {
    /// Starts to watch `path`, which need not exist yet.
    pub(crate) fn watch(path: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (path, flag) = (path.to_owned(), Arc::clone(&stop));
        Self { stop, thread: thread::spawn(move || watch(&path, &flag)) }
    }

    /// Ends the watch and returns what was seen.
    pub(crate) fn finish(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let mut seen = self.thread.join().unwrap_or_default();
        seen.gaps.sort_by_key(|gap| std::cmp::Reverse(gap.length));
        seen
    }
}

fn watch(path: &Path, stop: &AtomicBool) -> Seen {
    let (begin, mut seen) = (Instant::now(), Seen::default());
    let (mut last, mut sampled) = (None, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let (now, size) = (begin.elapsed(), fs::metadata(path).map_or(0, |data| data.len()));
        match last {
            Some((since, known)) if size != known => {
                let length = now.saturating_sub(since);
                if length >= GAP_MIN {
                    seen.gaps.push(Gap { start: since, length });
                }
                last = Some((now, size));
                if now >= sampled + SAMPLE {
                    seen.counts.extend(last_number(path, size).map(|count| (now, count)));
                    sampled = now;
                }
            }
            None if size > 0 => last = Some((now, size)),
            _ => {}
        }
        thread::sleep(PERIOD);
    }
    seen
}

/// The number on the last whole line of a file of at least `size` bytes.
fn last_number(path: &Path, size: u64) -> Option<u64> {
    let mut tail = [0; 64];
    let file = File::open(path).ok()?;
    let count = file.read_at(&mut tail, size.saturating_sub(64)).ok()?;
    let text = std::str::from_utf8(&tail[..count]).ok()?;
    text.rsplit('\n').nth(1)?.parse().ok()
}

/// How often the observer looks.
const PERIOD: Duration = Duration::from_micros(500);

/// How often it reads what is written.
const SAMPLE: Duration = Duration::from_millis(20);

/// Shorter gaps are the scheduler's.
const GAP_MIN: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_as_long_as_the_file_stood_still() {
        let path = std::env::temp_dir().join(format!("godwit-observer-{}", std::process::id()));
        let observer = Observer::watch(&path);
        fs::write(&path, "a").unwrap();
        thread::sleep(Duration::from_millis(60));
        fs::write(&path, "ab").unwrap();
        thread::sleep(Duration::from_millis(20));
        let gaps = observer.finish().gaps;
        fs::remove_file(&path).unwrap();
        assert!(gaps.first().is_some_and(|gap| gap.length >= Duration::from_millis(40)), "{gaps:?}");
    }
}
