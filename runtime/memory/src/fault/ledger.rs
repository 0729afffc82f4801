//! What is known of every page of one address space.
//!
//! ```text
//!             claim            settle
//!   Held ───────────► Busy ───────────► Installed        a page in no segment: Absent
//!    │ ▲                │                   │
//!    │ └──── settle ────┘                   │
//!    └──────────── drop_pages ──────────────┴──► Dropped
//! ```
//! Claiming and settling need the ledger shared, everything that changes addresses needs it exclusively; a
//! claim is settled before its lock is let go, so with the ledger exclusive nothing is `Busy`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use godwit_sys::page_range::{PAGE_BYTES, PageRange};

use super::LEND_BYTES;
use crate::PageSet;

/// State of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Its source has it, the task does not.
    Held = 0,
    /// Somebody installs it now.
    Busy = 1,
    /// The task has it.
    Installed = 2,
    /// The task dropped it: it reads as zero.
    Dropped = 3,
    /// It never had contents: it reads as zero.
    Absent = 4,
}

/// The pages of one address space.
#[derive(Debug, Default)]
pub struct Ledger {
    segments: BTreeMap<u64, Segment>,
    held: AtomicU64,
}

/// Adjacent pages that had adjacent addresses at the source.
#[derive(Debug)]
struct Segment {
    /// Address of the first page at the source.
    origin: u64,
    states: Vec<AtomicU8>,
}

/// Pages that the claimer alone installs. They must be settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "claimed pages are nobody's until they are settled"]
pub struct Claim {
    /// Where they go.
    pub pages: PageRange,
    /// The address of the first at the source.
    pub origin: u64,
}

impl Claim {
    /// Their addresses at the source.
    ///
    /// # Panics
    /// Never: an origin has as many pages behind it as the claim.
    pub fn origin_pages(&self) -> PageRange {
        PageRange::new(self.origin, self.origin + self.pages.bytes()).expect("as many pages as claimed")
    }
}

impl Ledger {
    /// A ledger of pages that are all `Held`.
    pub fn new(held: &PageSet) -> Self {
        let segments = held.ranges().iter().map(|range| {
            let states = (0..range.pages()).map(|_| AtomicU8::new(State::Held as u8)).collect();
            (range.start(), Segment { origin: range.start(), states })
        });
        Self { segments: segments.collect(), held: AtomicU64::new(held.pages()) }
    }

    /// Pages that are `Held` or `Busy`.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Acquire)
    }

    /// State of the page at `address`.
    pub fn state(&self, address: u64) -> State {
        match self.find(address) {
            Some((_, segment, index)) => state(&segment.states[index]),
            None => State::Absent,
        }
    }

    /// Claims held pages from `address` on, at most `pages_max`, if the page there is `Held`.
    pub fn claim_at(&self, address: u64, pages_max: u64) -> Option<Claim> {
        let (start, segment, first) = self.find(address)?;
        let origin = segment.origin + first as u64 * PAGE_BYTES;
        let to_boundary = (LEND_BYTES - origin % LEND_BYTES) / PAGE_BYTES;
        let limit = usize::try_from(pages_max.min(to_boundary)).unwrap_or(usize::MAX);
        let mut count = 0;
        for page in segment.states[first..].iter().take(limit) {
            let (held, busy) = (State::Held as u8, State::Busy as u8);
            if page.compare_exchange(held, busy, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                break;
            }
            count += 1;
        }
        let at = start + first as u64 * PAGE_BYTES;
        Some(Claim { pages: PageRange::new(at, at + count * PAGE_BYTES)?, origin })
    }

    /// Claims the first held pages at or behind `cursor`, or from the start when there are none.
    pub fn claim_next(&self, cursor: u64, pages_max: u64) -> Option<Claim> {
        if self.held() == 0 {
            return None;
        }
        self.claim_from(cursor, u64::MAX, pages_max).or_else(|| self.claim_from(0, cursor, pages_max))
    }

    /// Ends a claim: the first `installed` pages are in the task, the others are held as before.
    pub fn settle(&self, claim: Claim, installed: u64) {
        let Some((_, segment, first)) = self.find(claim.pages.start()) else { return };
        let count = usize::try_from(claim.pages.pages()).unwrap_or(usize::MAX);
        for (index, page) in (0_u64..).zip(segment.states[first..].iter().take(count)) {
            let next = if index < installed { State::Installed } else { State::Held };
            page.store(next as u8, Ordering::Release);
        }
        self.held.fetch_sub(installed.min(claim.pages.pages()), Ordering::AcqRel);
    }

    /// The task dropped these pages; returns where those that were held are at the source.
    pub fn drop_pages(&mut self, pages: PageRange) -> Vec<PageRange> {
        self.split(pages.start());
        self.split(pages.end());
        let mut released = Vec::new();
        for segment in self.segments.range_mut(pages.start()..pages.end()).map(|(_, segment)| segment) {
            let origins = (segment.origin..).step_by(PAGE_STEP);
            for (page, origin) in segment.states.iter_mut().zip(origins) {
                if *page.get_mut() == State::Held as u8 {
                    released.push(PageRange::page_at(origin));
                }
                *page.get_mut() = State::Dropped as u8;
            }
        }
        *self.held.get_mut() -= released.len() as u64;
        released
    }

    /// The task unmapped these pages; returns as [`Ledger::drop_pages`].
    pub fn unmap(&mut self, pages: PageRange) -> Vec<PageRange> {
        let released = self.drop_pages(pages);
        self.segments.retain(|start, _| !pages.contains(*start));
        released
    }

    /// The task moved these pages to `to`; returns where held ones that stood there before are at the source.
    pub fn remap(&mut self, from: PageRange, to: u64) -> Vec<PageRange> {
        self.split(from.start());
        self.split(from.end());
        let starts: Vec<u64> =
            self.segments.range(from.start()..from.end()).map(|(start, _)| *start).collect();
        let moved: Vec<(u64, Segment)> =
            starts.into_iter().filter_map(|start| Some((start, self.segments.remove(&start)?))).collect();
        let target = to.checked_add(from.bytes()).and_then(|end| PageRange::new(to, end));
        let released = target.map_or_else(Vec::new, |target| self.unmap(target));
        for (start, segment) in moved {
            self.segments.insert(to.saturating_add(start - from.start()), segment);
        }
        released
    }

    /// The ledger of a child that was forked now.
    pub fn fork(&mut self) -> Self {
        let copy = |segment: &Segment| Segment {
            origin: segment.origin,
            states: segment.states.iter().map(|page| AtomicU8::new(page.load(Ordering::Acquire))).collect(),
        };
        let segments = self.segments.iter().map(|(start, segment)| (*start, copy(segment))).collect();
        Self { segments, held: AtomicU64::new(self.held()) }
    }

    fn claim_from(&self, from: u64, to: u64, pages_max: u64) -> Option<Claim> {
        let first = self.segments.range(..=from).next_back().map_or(from, |(start, _)| *start);
        for (start, segment) in self.segments.range(first..to) {
            let skip = usize::try_from(from.saturating_sub(*start) / PAGE_BYTES).unwrap_or(usize::MAX);
            let pages = segment.states.iter().enumerate().skip(skip);
            for (index, page) in pages {
                if state(page) == State::Held
                    && let Some(claim) = self.claim_at(start + index as u64 * PAGE_BYTES, pages_max)
                {
                    return Some(claim);
                }
            }
        }
        None
    }

    fn find(&self, address: u64) -> Option<(u64, &Segment, usize)> {
        let (start, segment) = self.segments.range(..=address).next_back()?;
        let index = usize::try_from((address - start) / PAGE_BYTES).ok()?;
        (index < segment.states.len()).then_some((*start, segment, index))
    }

    /// Makes `address` the start of a segment, if it lies inside one.
    fn split(&mut self, address: u64) {
        let Some((start, segment)) = self.segments.range_mut(..address).next_back() else { return };
        let Ok(index) = usize::try_from((address - start) / PAGE_BYTES) else { return };
        if index < segment.states.len() {
            let states = segment.states.split_off(index);
            let origin = segment.origin + index as u64 * PAGE_BYTES;
            self.segments.insert(address, Segment { origin, states });
        }
    }
}

fn state(page: &AtomicU8) -> State {
    match page.load(Ordering::Acquire) {
        0 => State::Held,
        1 => State::Busy,
        2 => State::Installed,
        _ => State::Dropped,
    }
}

const PAGE_STEP: usize = 4096;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap as Oracle;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Claim { page: u64, count: u64, installed: u64 },
        Next { cursor: u64, count: u64 },
        Drop { page: u64, count: u64 },
        Unmap { page: u64, count: u64 },
        Remap { page: u64, count: u64, to: u64 },
        Fork,
    }

    fn step() -> impl Strategy<Value = Step> {
        let (page, count) = (0_u64..80, 1_u64..12);
        prop_oneof![
            3 => (page.clone(), count.clone(), 0_u64..12)
                .prop_map(|(page, count, installed)| Step::Claim { page, count, installed }),
            3 => (page.clone(), count.clone()).prop_map(|(cursor, count)| Step::Next { cursor, count }),
            1 => (page.clone(), count.clone()).prop_map(|(page, count)| Step::Drop { page, count }),
            1 => (page.clone(), count.clone()).prop_map(|(page, count)| Step::Unmap { page, count }),
            2 => (page, count, 100_u64..140).prop_map(|(page, count, to)| Step::Remap { page, count, to }),
            1 => Just(Step::Fork),
        ]
    }

    fn pages(page: u64, count: u64) -> PageRange {
        PageRange::new(page * PAGE_BYTES, (page + count) * PAGE_BYTES).unwrap()
    }

    /// Per page: where it is at the source, and its state.
    type Naive = Oracle<u64, (u64, State)>;

    fn held(naive: &Naive) -> u64 {
        naive.values().filter(|(_, state)| *state == State::Held).count() as u64
    }

    fn release(naive: &mut Naive, page: u64, count: u64) -> Vec<u64> {
        let gone = (page..page + count).filter_map(|page| naive.get(&page));
        gone.filter(|(_, state)| *state == State::Held).map(|(origin, _)| *origin).collect()
    }

    fn settle(ledger: &Ledger, naive: &mut Naive, claim: Option<Claim>, installed: u64, required: bool) {
        let Some(claim) = claim else {
            assert!(!required);
            return;
        };
        let first = claim.pages.start() / PAGE_BYTES;
        for index in 0..claim.pages.pages() {
            let (origin, state) = naive[&(first + index)];
            assert_eq!((origin, state), (claim.origin / PAGE_BYTES + index, State::Held));
            assert_eq!(ledger.state(claim.pages.start() + index * PAGE_BYTES), State::Busy);
            if index < installed {
                naive.insert(first + index, (origin, State::Installed));
            }
        }
        ledger.settle(claim, installed.min(claim.pages.pages()));
    }

    fn apply(ledger: &mut Ledger, naive: &mut Naive, step: &Step) {
        let numbers = |released: Vec<PageRange>| -> Vec<u64> {
            released.iter().map(|page| page.start() / PAGE_BYTES).collect()
        };
        match *step {
            Step::Claim { page, count, installed } => {
                let required = naive.get(&page).is_some_and(|(_, state)| *state == State::Held);
                let claim = ledger.claim_at(page * PAGE_BYTES, count);
                settle(ledger, naive, claim, installed, required);
            }
            Step::Next { cursor, count } => {
                let required = held(naive) > 0;
                let claim = ledger.claim_next(cursor * PAGE_BYTES, count);
                settle(ledger, naive, claim, count, required);
            }
            Step::Drop { page, count } => {
                assert_eq!(numbers(ledger.drop_pages(pages(page, count))), release(naive, page, count));
                naive.range_mut(page..page + count).for_each(|(_, entry)| entry.1 = State::Dropped);
            }
            Step::Unmap { page, count } => {
                assert_eq!(numbers(ledger.unmap(pages(page, count))), release(naive, page, count));
                naive.retain(|key, _| !(page..page + count).contains(key));
            }
            Step::Remap { page, count, to } => {
                let moved: Naive =
                    naive.range(page..page + count).map(|(key, entry)| (*key, *entry)).collect();
                naive.retain(|key, _| !(page..page + count).contains(key));
                let released = numbers(ledger.remap(pages(page, count), to * PAGE_BYTES));
                assert_eq!(released, release(naive, to, count));
                naive.retain(|key, _| !(to..to + count).contains(key));
                naive.extend(moved.into_iter().map(|(key, entry)| (key - page + to, entry)));
            }
            Step::Fork => *ledger = ledger.fork(),
        }
    }

    proptest! {
        #[test]
        fn a_ledger_agrees_with_a_list_of_single_pages(steps in prop::collection::vec(step(), 0..60)) {
            let planned: PageSet = [pages(2, 20), pages(30, 5), pages(40, 30)].into_iter().collect();
            let mut naive: Naive = planned
                .ranges()
                .iter()
                .flat_map(|range| range.chunks(1))
                .map(|page| (page.start() / PAGE_BYTES, (page.start() / PAGE_BYTES, State::Held)))
                .collect();
            let mut ledger = Ledger::new(&planned);
            for step in &steps {
                apply(&mut ledger, &mut naive, step);
                prop_assert_eq!(ledger.held(), held(&naive));
                for page in 0..160 {
                    let expected = naive.get(&page).map_or(State::Absent, |(_, state)| *state);
                    prop_assert_eq!(ledger.state(page * PAGE_BYTES), expected);
                }
            }
        }
    }

    #[test]
    fn a_claim_ends_where_lending_must() {
        let start = LEND_BYTES - 2 * PAGE_BYTES;
        let held = PageRange::new(start, start + 8 * PAGE_BYTES).unwrap();
        let ledger = Ledger::new(&[held].into_iter().collect());
        assert_eq!(ledger.claim_next(0, 100).unwrap().pages.pages(), 2);
        assert_eq!(ledger.claim_next(0, 100).unwrap().pages.pages(), 6);
        assert_eq!(ledger.claim_next(0, 100), None);
    }
}
