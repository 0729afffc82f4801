//! What scans found of the tasks' memory and no round has sent yet.
//!
//! ```text
//! scan ──note──► Pending ──take_round──► work of a round        (hot pages stay, if they are to be held back)
//!                        ──take_rest───► work of the freeze     (all of it, cut to what CRIU restores lazily)
//! ```
//! A page is *hot* that each of the last scans found written, as many as the threshold says: it would be written again
//! before it matters.
//!
//! A page stands in at most one of `dirty` and `zero`, as the newest scan says, and what is absent in neither.

use std::collections::{BTreeMap, VecDeque};

use godwit_memory::PageSet;
use godwit_memory::tracker::Delta;

use crate::pages::SpaceWork;

/// See the module.
#[derive(Debug)]
pub(super) struct Pending {
    /// In so many scans running a page has to be found written to be hot; 0: none ever is.
    hot_scans: usize,
    spaces: BTreeMap<i32, Space>,
}

/// One address space, by the process id inside the container.
#[derive(Debug, Default)]
struct Space {
    pid: i32,
    dirty: PageSet,
    zero: PageSet,
    absent: PageSet,
    /// What the last scans found written, the newest last; no more than `hot_scans`.
    written: VecDeque<PageSet>,
}

impl Pending {
    /// Nothing yet; see [`godwit_protocol::request::Limits::hot_threshold`].
    pub(super) fn of(hot_threshold: u32) -> Self {
        Self { hot_scans: usize::try_from(hot_threshold).unwrap_or(usize::MAX), spaces: BTreeMap::new() }
    }

    /// Takes what a scan found of `space`, which process `pid` has; `stored` is what the target has of it.
    pub(super) fn note(&mut self, space: i32, delta: &Delta, stored: Option<&PageSet>) {
        let entry = self.spaces.entry(space).or_default();
        if entry.pid != delta.pid {
            // A new process with the name of one that ended: nothing of the old one holds.
            *entry = Space { absent: stored.cloned().unwrap_or_default(), ..Space::default() };
            entry.pid = delta.pid;
        }
        let newer = delta.dirty.union(&delta.zero).union(&delta.absent);
        entry.dirty = entry.dirty.difference(&newer).union(&delta.dirty);
        entry.zero = entry.zero.difference(&newer).union(&delta.zero);
        entry.absent = entry.absent.difference(&newer).union(&delta.absent);
        if self.hot_scans > 0 {
            if entry.written.len() == self.hot_scans {
                entry.written.pop_front();
            }
            entry.written.push_back(delta.dirty.clone());
        }
    }

    /// Takes that the process of a space has ended; `stored` is what the target has of it.
    pub(super) fn forget(&mut self, pid: i32, stored: &BTreeMap<i32, PageSet>) {
        for (space, entry) in self.spaces.iter_mut().filter(|(_, entry)| entry.pid == pid) {
            let absent = stored.get(space).cloned().unwrap_or_default();
            *entry = Space { pid: 0, absent, ..Space::default() };
        }
    }

    /// Number of pages to be sent with contents.
    pub(super) fn pages(&self) -> u64 {
        self.spaces.values().map(|space| space.dirty.pages()).sum()
    }

    /// Number of those of them that are hot.
    pub(super) fn hot_pages(&self) -> u64 {
        self.spaces.values().map(|space| space.hot(self.hot_scans).pages()).sum()
    }

    /// Takes what a round is to send: all that is left, but for hot pages if those are held back.
    pub(super) fn take_round(&mut self, hold_back: bool) -> Vec<SpaceWork> {
        let mut work = Vec::new();
        for (space, entry) in &mut self.spaces {
            let left = if hold_back { entry.hot(self.hot_scans) } else { PageSet::new() };
            let dirty = std::mem::replace(&mut entry.dirty, left);
            work.push(SpaceWork {
                space: *space,
                pid: entry.pid,
                dirty: dirty.difference(&entry.dirty),
                zero: std::mem::take(&mut entry.zero),
                absent: std::mem::take(&mut entry.absent),
            });
        }
        self.spaces.retain(|_, entry| entry.pid != 0);
        work
    }

    /// Takes all that is left.
    pub(super) fn take_rest(&mut self) -> Vec<SpaceWork> {
        self.take_round(false)
    }
}

impl Space {
    fn hot(&self, scans: usize) -> PageSet {
        if scans == 0 || self.written.len() < scans {
            return PageSet::new();
        }
        self.written.iter().fold(self.dirty.clone(), |hot, scan| hot.intersection(scan))
    }
}

#[cfg(test)]
mod tests {
    use godwit_memory::{PAGE_BYTES, PageRange};

    use super::*;

    fn pages(numbers: &[u64]) -> PageSet {
        numbers.iter().map(|page| PageRange::page_at(page * PAGE_BYTES)).collect()
    }

    fn delta(pid: i32, dirty: &[u64], zero: &[u64], absent: &[u64]) -> Delta {
        let (dirty, zero, absent) = (pages(dirty), pages(zero), pages(absent));
        Delta { pid, dirty, zero, absent, untracked_pages: 0 }
    }

    #[test]
    fn the_newest_scan_decides_what_a_page_is() {
        let mut pending = Pending::of(0);
        pending.note(1, &delta(10, &[1, 2, 3, 4], &[5], &[]), None);
        pending.note(1, &delta(10, &[5], &[1], &[2]), None);
        let [work] = &pending.take_round(true)[..] else { panic!() };
        assert_eq!((work.space, work.pid), (1, 10));
        assert_eq!((&work.dirty, &work.zero, &work.absent), (&pages(&[3, 4, 5]), &pages(&[1]), &pages(&[2])));
        assert_eq!(pending.pages(), 0);
    }

    #[test]
    fn pages_written_all_the_time_wait_for_the_freeze() {
        let mut pending = Pending::of(2);
        pending.note(1, &delta(10, &[1, 2, 3], &[], &[]), None);
        assert_eq!(pending.hot_pages(), 0, "once is not all the time");
        assert_eq!(pending.take_round(true)[0].dirty, pages(&[1, 2, 3]));
        pending.note(1, &delta(10, &[1, 3], &[], &[]), None);
        assert_eq!((pending.pages(), pending.hot_pages()), (2, 2));
        assert_eq!(pending.take_round(true)[0].dirty, pages(&[]));
        pending.note(1, &delta(10, &[3], &[], &[]), None);
        assert_eq!((pending.pages(), pending.hot_pages()), (2, 1));
        assert_eq!(pending.take_round(true)[0].dirty, pages(&[1]), "it has cooled down");
        pending.note(1, &delta(10, &[], &[], &[]), None);
        assert_eq!(pending.take_rest()[0].dirty, pages(&[3]));
    }

    #[test]
    fn a_round_that_holds_nothing_back_sends_hot_pages_and_forgets_nothing_of_their_past() {
        let mut pending = Pending::of(2);
        for _ in 0..3 {
            pending.note(1, &delta(10, &[1, 2], &[], &[]), None);
            assert_eq!(pending.take_round(false)[0].dirty, pages(&[1, 2]));
        }
        pending.note(1, &delta(10, &[1, 4], &[], &[]), None);
        assert_eq!(pending.hot_pages(), 1);
        assert_eq!(pending.take_round(true)[0].dirty, pages(&[4]));
        let mut never = Pending::of(0);
        for _ in 0..3 {
            never.note(1, &delta(10, &[1, 2], &[], &[]), None);
            assert_eq!(never.hot_pages(), 0);
            assert_eq!(never.take_round(true)[0].dirty, pages(&[1, 2]));
        }
    }

    #[test]
    fn what_an_ended_process_had_is_forgotten_and_its_name_may_be_taken_again() {
        let mut pending = Pending::of(0);
        let stored = BTreeMap::from([(1, pages(&[1, 2]))]);
        pending.note(1, &delta(10, &[1, 2], &[], &[]), None);
        pending.take_round(true);
        pending.forget(10, &stored);
        let work = pending.take_round(true);
        assert_eq!((&work[0].absent, work[0].dirty.is_empty()), (&pages(&[1, 2]), true));
        assert!(pending.take_round(true).is_empty());
        pending.note(1, &delta(10, &[1], &[], &[]), stored.get(&1));
        pending.take_round(true);
        pending.note(1, &delta(11, &[2], &[], &[]), stored.get(&1));
        let work = pending.take_round(true);
        assert_eq!((work[0].pid, &work[0].absent, &work[0].dirty), (11, &pages(&[1]), &pages(&[2])));
    }
}
