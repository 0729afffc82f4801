//! Which pages were written, while the tasks run.
//!
//! ```text
//!            ┌────────── processes, anew each time (new, exec'd and vanished ones among them)
//! arm ──► collect ──► read the dirty pages ──► collect ──► … ──► freeze ──► collect ──► read ──► done
//! ```
//! What a receiver must do with a [`Collection`]: forget the processes in `gone`; of each [`Delta`] read and
//! keep the pages in `dirty`, keep `zero` as zeros, forget `absent`. Pages named in none of them are as they
//! were. The promise: when nothing runs between a collection and the reading of its pages, the receiver then
//! holds exactly the private anonymous memory of the processes, however many collections came before and
//! whatever the processes did meanwhile.
//!
//! It follows from two rules. *What cannot be tracked is dirty*: a process that cannot be injected, a mapping
//! made since, one that moved, a range some other userfaultfd holds, is reported whole, every time until it
//! can be tracked. And *absent is found by comparison*: pages that were reported and are not there now.
//!
//! Two trackers keep it: [`WpAsyncTracker`] (kernel 6.7 and later; stops nothing but for the injection) and
//! [`SoftDirtyTracker`] (`CONFIG_MEM_SOFT_DIRTY`; a short halt per collection). Shared memory, memory of files
//! and private copies of file pages are not followed: CRIU restores none of them lazily, see [`crate::maps`].

mod soft_dirty;
mod wp_async;

use std::time::{Duration, Instant};

use godwit_sys::SysError;
use nix::errno::Errno;

use crate::{MemoryError, PageSet, Result};

pub use soft_dirty::{Procfs, SoftDirtyKernel, SoftDirtyTracker};
pub use wp_async::WpAsyncTracker;

/// Follows the memory of processes.
pub trait DirtyTracker {
    /// Begins to follow `processes`; not needed before [`DirtyTracker::collect`], which arms what it finds
    /// new, but then a running process is armed ahead of the first round.
    ///
    /// # Errors
    /// [`crate::MemoryError`] for what is nobody's state but the system's; a process that ended, or cannot be
    /// tracked, is none.
    fn arm(&mut self, processes: &[i32]) -> Result<Armed>;

    /// What changed since the last collection; for processes not seen before, all they have.
    ///
    /// # Errors
    /// As [`DirtyTracker::arm`]. A failed collection loses what it had found: start over with a new tracker.
    fn collect(&mut self, processes: &[i32]) -> Result<Collection>;

    /// The last collection, with every process frozen. What is new is not armed, for a frozen process cannot be, and
    /// would be waited for in vain: it is reported whole.
    ///
    /// # Errors
    /// As [`DirtyTracker::collect`].
    fn collect_frozen(&mut self, processes: &[i32]) -> Result<Collection>;
}

/// All that processes have, for whom nothing follows them; they should stand still.
///
/// # Errors
/// [`crate::MemoryError`]; a process that has ended is none.
pub fn everything(processes: &[i32]) -> Result<Collection> {
    let mut collection = Collection::default();
    let begin = Instant::now();
    for pid in processes {
        let found = match wp_async::everything(*pid) {
            // The kernel has no PAGEMAP_SCAN.
            Err(MemoryError::Sys(SysError::Call { errno: Errno::ENOTTY | Errno::EINVAL, .. })) => {
                soft_dirty::everything(*pid)
            }
            found => found,
        };
        match found {
            Ok(found) => collection.deltas.push(found.into_delta(*pid, &mut PageSet::new())),
            Err(MemoryError::Sys(SysError::NoProcess { .. })) => {}
            Err(error) => return Err(error),
        }
    }
    collection.scan = begin.elapsed();
    Ok(collection)
}

/// What came of arming.
#[derive(Debug, Default)]
pub struct Armed {
    /// How long each process armed now stood still.
    pub stopped: Vec<(i32, Duration)>,
    /// Processes that will be reported whole every time, and why.
    pub untracked: Vec<(i32, String)>,
}

/// What changed in all processes.
#[derive(Debug, Default)]
pub struct Collection {
    /// One per process that is alive, in the caller's order.
    pub deltas: Vec<Delta>,
    /// Processes that were followed and have ended, or are no longer asked for.
    pub gone: Vec<i32>,
    /// What came of arming processes that were new.
    pub armed: Armed,
    /// Time spent in scans.
    pub scan: Duration,
}

/// What changed in one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// The process.
    pub pid: i32,
    /// Written, or not known to be unwritten.
    pub dirty: PageSet,
    /// As `dirty`, but known to be zeros without reading.
    pub zero: PageSet,
    /// Reported before, and no longer there.
    pub absent: PageSet,
    /// How many pages were reported only because they could not be tracked.
    pub untracked_pages: u64,
}

/// What a scan of one process found.
#[derive(Debug, Default)]
struct Found {
    dirty: PageSet,
    zero: PageSet,
    present: PageSet,
    untracked_pages: u64,
}

impl Found {
    /// Closes a collection: `reported` is what earlier ones found there, and becomes what this one did.
    fn into_delta(self, pid: i32, reported: &mut PageSet) -> Delta {
        let absent = reported.difference(&self.present);
        *reported = self.present;
        Delta { pid, dirty: self.dirty, zero: self.zero, absent, untracked_pages: self.untracked_pages }
    }
}

#[cfg(test)]
mod tests {
    use godwit_sys::arena::Arena;
    use godwit_sys::page_range::PAGE_BYTES;
    use godwit_sys::seccomp_deny::{self, Denial};

    use super::*;

    #[test]
    fn everything_is_found_by_a_kernel_that_cannot_scan_as_well() {
        let arena = Arena::map(8 * PAGE_BYTES).unwrap();
        for page in [0, 3, 4] {
            arena.store(page * 512, 1);
        }
        let within = || -> PageSet {
            let own = i32::try_from(std::process::id()).unwrap();
            let found = everything(&[own, i32::MAX]).unwrap();
            let [delta] = &found.deltas[..] else { panic!("{found:?}") };
            delta.dirty.intersection(&[arena.range()].into_iter().collect())
        };
        let scanned = within();
        assert_eq!(scanned.pages(), 3);
        // In a thread of its own, which takes the denial along.
        let read = || match seccomp_deny::deny(&[Denial::PAGEMAP_SCAN]) {
            Ok(()) => Some(within()),
            Err(error) => {
                eprintln!("SKIP: a filter without no_new_privs needs CAP_SYS_ADMIN ({error})");
                None
            }
        };
        let read = std::thread::scope(|scope| scope.spawn(read).join().unwrap());
        assert!(read.is_none_or(|read| read == scanned));
    }
}
