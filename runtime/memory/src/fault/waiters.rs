//! Which threads of restored tasks wait for pages.
//!
//! A fault does not say whose it is, since CRIU makes the descriptors without `UFFD_FEATURE_THREAD_ID`. But the kernel
//! says of a thread that sleeps in which of its functions it does (`/proc/PID/task/TID/wchan`, proc(5)), and a fault
//! sleeps in one of its own. So the threads are looked at every few milliseconds, and one that waits at that moment is
//! taken to have waited since the look before. Where the kernel does not say (without `CONFIG_KALLSYMS`), none does.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use crate::maps;

/// The threads seen waiting so far.
#[derive(Debug)]
pub struct Waiters {
    looked: Instant,
    /// By the ids of process and thread on this host.
    waits: BTreeMap<(i32, i32), ThreadWaited>,
}

/// How long a thread was seen waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadWaited {
    /// Its process, by the id inside the container.
    pub pid: i32,
    /// The thread, by the id inside the container.
    pub tid: i32,
    /// How long.
    pub waited: Duration,
}

impl Waiters {
    /// Nobody has waited before this.
    #[must_use]
    pub fn begin() -> Self {
        Self { looked: Instant::now(), waits: BTreeMap::new() }
    }

    /// Looks at every thread of `processes`, by their ids on this host, and returns after what time to look again. What
    /// has ended meanwhile is passed over.
    pub fn look(&mut self, processes: &[i32]) -> Duration {
        let begin = Instant::now();
        let since = begin - self.looked;
        self.looked = begin;
        for pid in processes {
            for tid in threads(*pid) {
                if is_waiting(*pid, tid)
                    && let Some(thread) = self.of(*pid, tid)
                {
                    thread.waited += since;
                }
            }
        }
        PAUSE.max(begin.elapsed() * PAUSE_PER_LOOK)
    }

    /// Returns up to `most` threads, those that waited longest first.
    #[must_use]
    pub fn longest(&self, most: usize) -> Vec<ThreadWaited> {
        let mut threads: Vec<ThreadWaited> = self.waits.values().copied().collect();
        threads.sort_by_key(|thread| std::cmp::Reverse(thread.waited));
        threads.truncate(most);
        threads
    }

    /// The thread's entry; none if it has ended before its ids in the container were known.
    fn of(&mut self, pid: i32, tid: i32) -> Option<&mut ThreadWaited> {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.waits.entry((pid, tid)) {
            let (inner_pid, inner_tid) = (maps::space(pid).ok()?, maps::space(tid).ok()?);
            entry.insert(ThreadWaited { pid: inner_pid, tid: inner_tid, waited: Duration::ZERO });
        }
        self.waits.get_mut(&(pid, tid))
    }
}

fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn is_waiting(pid: i32, tid: i32) -> bool {
    fs::read(format!("/proc/{pid}/task/{tid}/wchan")).is_ok_and(|function| function == WAITS_IN)
}

/// The function of the kernel in which a thread waits for a page (fs/userfaultfd.c).
const WAITS_IN: &[u8] = b"handle_userfault";
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);
/// So many times as long as the looks themselves: they take 2 % of a processor at most, however many threads there are.
const PAUSE_PER_LOOK: u32 = 50;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};
    use std::thread;

    use godwit_sys::arena::Arena;
    use godwit_sys::page_range::PAGE_BYTES;
    use godwit_sys::userfaultfd::{Features, Mode, Userfaultfd};

    use super::*;

    /// Goal: of the threads of a process, the one that waits for a page is found, and for about how long. Method: one of
    /// this process's own touches a page that comes late, and others sleep.
    #[test]
    fn the_thread_that_waits_for_a_page_is_told_from_those_that_sleep() {
        let arena = Arena::map(PAGE_BYTES).unwrap();
        let faults = match Userfaultfd::for_arena(&arena) {
            Ok(faults) => faults,
            Err(error) => return eprintln!("SKIP: {error}"),
        };
        faults.enable(Features::default()).unwrap();
        let faults = faults.register(Mode::Missing).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let tid = AtomicI32::new(0);
        let mut waiters = Waiters::begin();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                tid.store(nix::unistd::gettid().as_raw(), Ordering::Release);
                arena.load(0)
            });
            while !is_waiting(own, tid.load(Ordering::Acquire)) {
                thread::yield_now();
            }
            waiters.look(&[own]);
            let begin = Instant::now();
            for _ in 0..4 {
                thread::sleep(Duration::from_millis(20));
                assert!(waiters.look(&[own, i32::MAX]) >= PAUSE);
            }
            let waited = begin.elapsed();
            faults.zero(arena.range()).unwrap();
            assert_eq!(waiter.join().unwrap(), 0);
            let [thread] = waiters.longest(8)[..] else { panic!("{waiters:?}") };
            assert_eq!((thread.pid, thread.tid), (maps::space(own).unwrap(), tid.load(Ordering::Acquire)));
            assert!(thread.waited >= Duration::from_millis(80) && thread.waited <= waited * 2, "{thread:?}");
        });
        assert!(waiters.longest(0).is_empty());
    }
}
