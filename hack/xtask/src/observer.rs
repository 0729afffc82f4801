//! An outside observer: watches the output of a container grow and tells when it stood still.
//!
//! It knows nothing of migrations. The containers it watches write a little every millisecond or so to a file
//! that both nodes append to, so the longest time in which the file did not grow is the blackout as a user of the
//! container sees it, from the last instruction on one node to the first on the other.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use godwit_integration::workload::hold::count_of;

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
    /// The number at the start of its last line whenever it had grown, with the time from the start of the watch.
    counts: Vec<(Duration, u64)>,
}

impl Seen {
    /// How much the number on the last line grew within `time` after the longest gap; `None` if the watch ended before,
    /// or the lines are no numbers.
    ///
    /// It is counted from the first line after the gap: a program that counts millions in a second has counted tens of
    /// thousands between its last line before the gap and the moment when it was stopped.
    pub(crate) fn count_after_longest_gap(&self, time: Duration) -> Option<u64> {
        let gap = self.gaps.first()?;
        let resumed = gap.start + gap.length;
        let count_at = |wanted| self.counts.iter().find(|(seen, _)| *seen >= wanted).map(|(_, count)| *count);
        Some(count_at(resumed + time)?.saturating_sub(count_at(resumed)?))
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
    let (mut last, mut sizes) = (None, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let (now, size) = (begin.elapsed(), fs::metadata(path).map_or(0, |data| data.len()));
        match last {
            Some((since, known)) if size != known => {
                let length = now.saturating_sub(since);
                if length >= GAP_MIN {
                    seen.gaps.push(Gap { start: since, length });
                }
                last = Some((now, size));
                sizes.push((now, size));
            }
            None if size > 0 => last = Some((now, size)),
            _ => {}
        }
        thread::sleep(PERIOD);
    }
    let text = fs::read(path).unwrap_or_default();
    let counts = sizes.into_iter().filter_map(|(time, size)| Some((time, last_number(&text, size)?)));
    seen.counts = counts.collect();
    seen
}

/// The number at the start of the last whole line of the first `size` bytes.
fn last_number(text: &[u8], size: u64) -> Option<u64> {
    let text = text.get(..usize::try_from(size).ok()?)?;
    let line = text.rsplit(|byte| *byte == b'\n').nth(1)?;
    count_of(std::str::from_utf8(line).ok()?)
}

/// How often the observer looks.
const PERIOD: Duration = Duration::from_micros(500);

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

    #[test]
    fn what_was_counted_before_a_gap_is_not_counted_after_it() {
        let at = Duration::from_millis;
        let gaps = vec![Gap { start: at(100), length: at(50) }];
        let counts =
            vec![(at(99), 10), (at(150), 70_000), (at(700), 80_000), (at(1151), 90_000), (at(1200), 99_000)];
        let seen = Seen { gaps, counts };
        assert_eq!(seen.count_after_longest_gap(at(1000)), Some(20_000));
        assert_eq!(seen.count_after_longest_gap(at(550)), Some(10_000));
        assert_eq!(seen.count_after_longest_gap(at(2000)), None);
    }

    #[test]
    fn a_line_counts_when_it_is_whole() {
        let number = |size| last_number(b"12\n345\n6", size);
        assert_eq!(
            [number(2), number(3), number(6), number(7), number(8), number(9)],
            [None, Some(12), Some(12), Some(345), Some(345), None]
        );
    }
}
