//! What the source knows of writes: as the engine's trackers report them.

use std::collections::BTreeSet;

use crate::program::{Memory, Op, Page, Pages};

/// Follows the source's memory. What cannot be followed is dirty; what vanished is found by comparison.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    dirty: BTreeSet<Page>,
    reported: Pages,
}

/// What is to be sent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    pub(crate) dirty: Pages,
    /// Known to hold only zeros without being read.
    pub(crate) zero: Pages,
    pub(crate) absent: Pages,
}

impl Found {
    /// Adds what an earlier scan found and nobody has sent, as far as it still holds. When the policy stops the rounds,
    /// what it looked at has not been sent.
    pub(crate) fn add_unsent(&mut self, unsent: Self, memory: &Memory) {
        let there =
            |space: i32, address: u64| memory.get(&space).is_some_and(|pages| pages.contains_key(&address));
        let pages = |set: Pages| {
            set.into_iter().flat_map(|(space, pages)| pages.into_iter().map(move |address| (space, address)))
        };
        for (space, address) in pages(unsent.dirty).filter(|page| there(page.0, page.1)) {
            if !self.zero.get(&space).is_some_and(|pages| pages.contains(&address)) {
                self.dirty.entry(space).or_default().insert(address);
            }
        }
        for (space, address) in pages(unsent.zero).filter(|page| there(page.0, page.1)) {
            if !self.dirty.get(&space).is_some_and(|pages| pages.contains(&address)) {
                self.zero.entry(space).or_default().insert(address);
            }
        }
        for (space, address) in pages(unsent.absent).filter(|page| !there(page.0, page.1)) {
            self.absent.entry(space).or_default().insert(address);
        }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.dirty.values().map(|pages| pages.len() as u64).sum()
    }
}

impl Tracker {
    /// Hears what a program did to `memory`, afterwards.
    pub(crate) fn note(&mut self, memory: &Memory, op: &Op) {
        match op {
            Op::Write(page, _) => drop(self.dirty.insert(*page)),
            Op::Move(space, moves) => self.dirty.extend(moves.iter().map(|(_, to)| (*space, *to))),
            Op::Fork(_, child) => {
                let pages = memory.get(child).into_iter().flat_map(|pages| pages.keys());
                self.dirty.extend(pages.map(|address| (*child, *address)));
            }
            Op::Read(_) | Op::Drop(..) | Op::Exit(_) => {}
        }
    }

    /// Returns what changed since the last time. `is_known_zero` says of which zeros the kernel can tell.
    pub(crate) fn collect(&mut self, memory: &Memory, mut is_known_zero: impl FnMut() -> bool) -> Found {
        let mut found = Found::default();
        let mut reported = Pages::new();
        for (space, pages) in memory {
            for (address, content) in pages {
                reported.entry(*space).or_default().insert(*address);
                if self.dirty.contains(&(*space, *address)) {
                    let known_zero = *content == 0 && is_known_zero();
                    let set = if known_zero { &mut found.zero } else { &mut found.dirty };
                    set.entry(*space).or_default().insert(*address);
                }
            }
        }
        for (space, pages) in std::mem::replace(&mut self.reported, reported) {
            let there = self.reported.get(&space).cloned().unwrap_or_default();
            found.absent.insert(space, pages.difference(&there).copied().collect());
        }
        self.dirty.clear();
        found
    }
}
