//! An outside observer: watches the output of a container grow and tells when it stood still.
//!
//! It knows nothing of migrations. The containers it watches write a little every millisecond or so to a file
//! that both nodes append to, so the longest time in which the file did not grow is the blackout as a user of the
//! container sees it, from the last instruction on one node to the first on the other.

use std::fs;
use std::path::{Path, PathBuf};
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

/// A thread that watches one file.
#[derive(Debug)]
pub(crate) struct Observer {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Vec<Gap>>,
}

impl Observer {
    /// Starts to watch `path`, which need not exist yet.
    pub(crate) fn watch(path: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (path, flag) = (path.to_owned(), Arc::clone(&stop));
        Self { stop, thread: thread::spawn(move || gaps(&path, &flag)) }
    }

    /// Ends the watch and returns the gaps longer than [`GAP_MIN`], longest first.
    pub(crate) fn finish(self) -> Vec<Gap> {
        self.stop.store(true, Ordering::Relaxed);
        let mut gaps = self.thread.join().unwrap_or_default();
        gaps.sort_by_key(|gap| std::cmp::Reverse(gap.length));
        gaps
    }
}

fn gaps(path: &PathBuf, stop: &AtomicBool) -> Vec<Gap> {
    let (begin, mut gaps) = (Instant::now(), Vec::new());
    let mut seen = None;
    while !stop.load(Ordering::Relaxed) {
        let (now, size) = (begin.elapsed(), fs::metadata(path).map_or(0, |data| data.len()));
        match seen {
            Some((since, last)) if size != last => {
                let length = now.saturating_sub(since);
                if length >= GAP_MIN {
                    gaps.push(Gap { start: since, length });
                }
                seen = Some((now, size));
            }
            None if size > 0 => seen = Some((now, size)),
            _ => {}
        }
        thread::sleep(PERIOD);
    }
    gaps
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
        let gaps = observer.finish();
        fs::remove_file(&path).unwrap();
        assert!(gaps.first().is_some_and(|gap| gap.length >= Duration::from_millis(40)), "{gaps:?}");
    }
}
