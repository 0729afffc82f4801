//! Who sends a page: whoever claims it first, once.
//!
//! One bit a page, set by the claim and never cleared: what was claimed and not sent ends the migration.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use godwit_memory::{PAGE_BYTES, PageRange, PageSet};

use super::SpaceWork;

/// The claims on all pages that are to be served.
#[derive(Debug)]
pub(super) struct Claims {
    spaces: BTreeMap<i32, SpaceClaims>,
}

#[derive(Debug)]
struct SpaceClaims {
    pid: i32,
    /// Each range with the number of its first page.
    ranges: Vec<(PageRange, u64)>,
    words: Vec<AtomicU64>,
}

impl Claims {
    pub(super) fn of(work: &[SpaceWork]) -> Self {
        Self { spaces: work.iter().map(|work| (work.space, SpaceClaims::of(work))).collect() }
    }

    /// Claims those of `wanted` that nobody has; returns them and the process that has them.
    pub(super) fn claim(&self, space: i32, wanted: PageRange) -> Option<(i32, PageSet)> {
        let space = self.spaces.get(&space)?;
        let claimed = space.claim(wanted);
        (!claimed.is_empty()).then_some((space.pid, claimed))
    }
}

impl SpaceClaims {
    fn of(work: &SpaceWork) -> Self {
        let mut pages = 0;
        let ranges = work
            .dirty
            .ranges()
            .iter()
            .map(|range| {
                let first = pages;
                pages += range.pages();
                (*range, first)
            })
            .collect();
        let words = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { pid: work.pid, ranges, words }
    }

    fn claim(&self, wanted: PageRange) -> PageSet {
        let begin = self.ranges.partition_point(|(range, _)| range.end() <= wanted.start());
        let mut claimed = PageSet::new();
        for (range, first) in &self.ranges[begin..] {
            let Some(pages) = range.intersection(wanted) else { break };
            for page in pages.chunks(1) {
                let number = first + (page.start() - range.start()) / PAGE_BYTES;
                if self.take(number) {
                    claimed.insert(page);
                }
            }
        }
        claimed
    }

    /// Sets the bit of one page; whether it was clear.
    fn take(&self, number: u64) -> bool {
        let word = usize::try_from(number / 64).ok().and_then(|index| self.words.get(index));
        let bit = 1 << (number % 64);
        // Nothing else is published by it: contents come from a process that stands still.
        word.is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(start: u64, count: u64) -> PageRange {
        PageRange::new(start * PAGE_BYTES, (start + count) * PAGE_BYTES).unwrap()
    }

    #[test]
    fn each_page_is_claimed_once_and_others_never() {
        let dirty: PageSet = [pages(10, 100), pages(200, 3), pages(1000, 70)].into_iter().collect();
        let work = SpaceWork { space: 7, pid: 42, dirty: dirty.clone(), ..SpaceWork::default() };
        let claims = Claims::of(&[work]);
        assert_eq!(claims.claim(8, pages(10, 1)), None);
        assert_eq!(claims.claim(7, pages(0, 10)), None);
        let (pid, first) = claims.claim(7, pages(50, 155)).unwrap();
        assert_eq!((pid, first.ranges()), (42, &[pages(50, 60), pages(200, 3)][..]));
        let (_, rest) = claims.claim(7, pages(0, 1 << 30)).unwrap();
        assert!(rest.intersection(&first).is_empty());
        assert_eq!(rest.union(&first), dirty);
        assert_eq!(claims.claim(7, pages(0, 1 << 30)), None);
    }
}
