//! What is known of every page of one address space.
//!
//! ```text
//!   Remote ──────request──────► Requested        a page in no segment: Absent
//!      │                           │
//!      ├──────────arrive───────────┤
//!      │                           ▼
//!      │                         Held ◄──settle─── Busy ──settle──► Installed
//!      │                              └──claim───►   ▲
//!      └──────────claim_arriving─────────────────────┘
//!   any ──────────drop_pages───────► Dropped
//! ```
//! - Requesting, arriving, claiming and settling need the ledger shared, everything that changes addresses needs
//!   it exclusively; a claim is settled before its lock is let go, so with the ledger exclusive nothing is `Busy`.
//! - A page that was dropped before it arrived stays dropped: what arrives has no effect on it.
//! - Source and page are one to one: a segment's source addresses are in no other segment. So what arrives, and is
//!   named as the source names it, is found by one search wherever it has moved.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use godwit_sys::page_range::{PAGE_BYTES, PageRange};

use super::{LEND_BYTES, SpacePlan};
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
    /// It is still at the other machine.
    Remote = 5,
    /// As `Remote`, and asked for.
    Requested = 6,
}

/// The pages of one address space.
#[derive(Debug, Default)]
pub struct Ledger {
    segments: BTreeMap<u64, Segment>,
    /// Address of each segment, by its address at the source.
    origins: BTreeMap<u64, u64>,
    held: AtomicU64,
    remote: AtomicU64,
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

/// Pages of one process that have not come, named as the source names them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Lacking {
    /// All of them.
    pub pages: PageSet,
    /// Those of them that were asked for: somebody waits.
    pub requested: PageSet,
}

impl Lacking {
    /// Adds what another space lacks that came of the same process.
    pub(super) fn join(&mut self, other: &Self) {
        self.pages = self.pages.union(&other.pages);
        self.requested = self.requested.union(&other.requested);
    }
}

/// What became of pages that arrived.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Where those are that are held from now on.
    pub held: Vec<PageRange>,
    /// Source addresses of those nobody needs: dropped meanwhile, or there already.
    pub unneeded: PageSet,
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
    /// A ledger of pages that are all `Held` or `Remote`.
    pub fn new(plan: &SpacePlan) -> Self {
        let all = plan.held.union(&plan.remote);
        let segments = all.ranges().iter().map(|range| {
            let states = (0..range.pages()).map(|_| AtomicU8::new(State::Held as u8)).collect();
            (range.start(), Segment { origin: range.start(), states })
        });
        let ledger = Self {
            segments: segments.collect(),
            origins: all.ranges().iter().map(|range| (range.start(), range.start())).collect(),
            held: AtomicU64::new(all.pages() - plan.remote.pages()),
            remote: AtomicU64::new(plan.remote.pages()),
        };
        for range in plan.remote.ranges() {
            for (_, page) in ledger.located(*range) {
                page.store(State::Remote as u8, Ordering::Relaxed);
            }
        }
        ledger
    }

    /// Pages that are `Held`, or `Busy` and were held before.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Acquire)
    }

    /// Pages that are `Remote` or `Requested`, or `Busy` while they arrive.
    pub fn remote(&self) -> u64 {
        self.remote.load(Ordering::Acquire)
    }

    /// Pages that the task is still to get.
    pub fn outstanding(&self) -> u64 {
        // In this order: a page that arrives is counted as held before it is no longer counted as remote.
        let remote = self.remote();
        remote + self.held()
    }

    /// What has not come. Nothing may arrive meanwhile: what is on its way into the task is in neither set.
    pub fn lacking(&self) -> Lacking {
        let mut lacking = Lacking::default();
        for (origin, start) in &self.origins {
            let states = self.segments.get(start).map_or(&[][..], |segment| &segment.states[..]);
            for (page, address) in states.iter().zip((*origin..).step_by(PAGE_STEP)) {
                let state = state(page);
                if matches!(state, State::Remote | State::Requested) {
                    lacking.pages.insert(PageRange::page_at(address));
                }
                if state == State::Requested {
                    lacking.requested.insert(PageRange::page_at(address));
                }
            }
        }
        lacking
    }

    /// State of the page at `address`.
    pub fn state(&self, address: u64) -> State {
        match self.find(address) {
            Some((_, segment, index)) => state(&segment.states[index]),
            None => State::Absent,
        }
    }

    /// Turns the `Remote` pages around `address` into `Requested` ones and returns where they are at the source.
    ///
    /// "Around" is the block of `window_pages` pages that the page lies in, as far as it has been adjacent to it
    /// at the source.
    pub fn request(&self, address: u64, window_pages: u64) -> Vec<PageRange> {
        let Some((_, segment, index)) = self.find(address) else { return Vec::new() };
        let window = usize::try_from(window_pages.max(1)).unwrap_or(usize::MAX);
        // Blocks of the source's addresses, so that requests for neighbours do not overlap.
        let number = usize::try_from(segment.origin / PAGE_BYTES).unwrap_or(0) + index;
        let first = index.saturating_sub(number % window);
        let end = segment.states.len().min(index + (window - number % window));
        let mut wanted = PageSet::new();
        for (offset, page) in (first..end).zip(&segment.states[first..end]) {
            if replace(page, State::Remote, State::Requested) {
                wanted.insert(PageRange::page_at(segment.origin + offset as u64 * PAGE_BYTES));
            }
        }
        wanted.ranges().to_vec()
    }

    /// Turns those of `origin` (addresses at the source) that are `Remote` into `Requested`: somebody else asked.
    pub fn mark_requested(&self, origin: PageRange) {
        for (_, page) in self.located(origin) {
            replace(page, State::Remote, State::Requested);
        }
    }

    /// The contents of `origin` (addresses at the source) have come.
    pub fn arrive(&self, origin: PageRange) -> Arrived {
        let (mut held, mut needed) = (PageSet::new(), PageSet::new());
        for ((from, address), page) in self.located(origin) {
            // Counted first: once it is held, others may install it and count it off.
            self.held.fetch_add(1, Ordering::AcqRel);
            let came = leave_remote(page, State::Held);
            if came {
                self.remote.fetch_sub(1, Ordering::AcqRel);
                held.insert(PageRange::page_at(address));
            } else {
                self.held.fetch_sub(1, Ordering::AcqRel);
            }
            // One that came before and waits must not lose its contents.
            if came || matches!(state(page), State::Held | State::Busy) {
                needed.insert(PageRange::page_at(from));
            }
        }
        let all: PageSet = [origin].into_iter().collect();
        Arrived { held: held.ranges().to_vec(), unneeded: all.difference(&needed) }
    }

    /// Claims those of `origin` (addresses at the source) that are still to come: whoever claims them has their
    /// contents, and puts into the page source what of them is not installed before settling the claims, with
    /// [`Ledger::settle_arriving`]. They count as remote until then: there is nothing to fill in.
    pub fn claim_arriving(&self, origin: PageRange) -> Vec<Claim> {
        let mut claims: Vec<Claim> = Vec::new();
        for ((from, address), page) in self.located(origin) {
            if !leave_remote(page, State::Busy) {
                continue;
            }
            match claims.last_mut() {
                Some(last) if last.origin_pages().end() == from && last.pages.end() == address => {
                    let longer = PageRange::new(last.pages.start(), address + PAGE_BYTES);
                    last.pages = longer.unwrap_or(last.pages);
                }
                _ => claims.push(Claim { pages: PageRange::page_at(address), origin: from }),
            }
        }
        claims
    }

    /// Claims held pages from `address` on, at most `pages_max`, if the page there is `Held`.
    pub fn claim_at(&self, address: u64, pages_max: u64) -> Option<Claim> {
        let (start, segment, first) = self.find(address)?;
        let origin = segment.origin + first as u64 * PAGE_BYTES;
        let to_boundary = (LEND_BYTES - origin % LEND_BYTES) / PAGE_BYTES;
        let limit = usize::try_from(pages_max.min(to_boundary)).unwrap_or(usize::MAX);
        let mut count = 0;
        for page in segment.states[first..].iter().take(limit) {
            if !replace(page, State::Held, State::Busy) {
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
        self.mark(claim, installed);
        self.held.fetch_sub(installed.min(claim.pages.pages()), Ordering::AcqRel);
    }

    /// Ends a claim of arriving pages: the first `installed` are in the task, the others are held from here on.
    pub fn settle_arriving(&self, claim: Claim, installed: u64) {
        // Counted first: once they are held, others may install them and count them off.
        self.held.fetch_add(claim.pages.pages().saturating_sub(installed), Ordering::AcqRel);
        self.mark(claim, installed);
        self.remote.fetch_sub(claim.pages.pages(), Ordering::AcqRel);
    }

    /// A claim of arriving pages may lie in several segments that are neighbours.
    fn mark(&self, claim: Claim, installed: u64) {
        for (index, (_, page)) in (0_u64..).zip(self.located(claim.origin_pages())) {
            let next = if index < installed { State::Installed } else { State::Held };
            page.store(next as u8, Ordering::Release);
        }
    }

    /// The task dropped these pages; returns where those that were held are at the source.
    pub fn drop_pages(&mut self, pages: PageRange) -> Vec<PageRange> {
        self.split(pages.start());
        self.split(pages.end());
        let (mut released, mut remote) = (Vec::new(), 0);
        for segment in self.segments.range_mut(pages.start()..pages.end()).map(|(_, segment)| segment) {
            let origins = (segment.origin..).step_by(PAGE_STEP);
            for (page, origin) in segment.states.iter_mut().zip(origins) {
                match state(page) {
                    State::Held => released.push(PageRange::page_at(origin)),
                    State::Remote | State::Requested => remote += 1,
                    _ => {}
                }
                *page.get_mut() = State::Dropped as u8;
            }
        }
        *self.held.get_mut() -= released.len() as u64;
        *self.remote.get_mut() -= remote;
        released
    }

    /// The task unmapped these pages; returns as [`Ledger::drop_pages`].
    pub fn unmap(&mut self, pages: PageRange) -> Vec<PageRange> {
        let released = self.drop_pages(pages);
        self.take(pages);
        released
    }

    /// The task moved these pages to `to`; returns where held ones that stood there before are at the source.
    pub fn remap(&mut self, from: PageRange, to: u64) -> Vec<PageRange> {
        self.split(from.start());
        self.split(from.end());
        let moved = self.take(from);
        let target = to.checked_add(from.bytes()).and_then(|end| PageRange::new(to, end));
        let released = target.map_or_else(Vec::new, |target| self.unmap(target));
        for (start, segment) in moved {
            self.insert(to.saturating_add(start - from.start()), segment);
        }
        released
    }

    /// The ledger of a child that was forked now.
    pub fn fork(&mut self) -> Self {
        let copy = |segment: &Segment| Segment {
            origin: segment.origin,
            states: segment.states.iter().map(|page| AtomicU8::new(page.load(Ordering::Acquire))).collect(),
        };
        Self {
            segments: self.segments.iter().map(|(start, segment)| (*start, copy(segment))).collect(),
            origins: self.origins.clone(),
            held: AtomicU64::new(self.held()),
            remote: AtomicU64::new(self.remote()),
        }
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
            self.insert(address, Segment { origin, states });
        }
    }

    fn insert(&mut self, start: u64, segment: Segment) {
        self.origins.insert(segment.origin, start);
        self.segments.insert(start, segment);
    }

    /// Takes the segments out that start in `pages`.
    fn take(&mut self, pages: PageRange) -> Vec<(u64, Segment)> {
        let starts: Vec<u64> =
            self.segments.range(pages.start()..pages.end()).map(|(start, _)| *start).collect();
        let mut taken = Vec::with_capacity(starts.len());
        for start in starts {
            let Some(segment) = self.segments.remove(&start) else { continue };
            self.origins.remove(&segment.origin);
            taken.push((start, segment));
        }
        taken
    }

    /// The pages that were at `origin` at the source: the address there and here, and the state of each.
    fn located(&self, origin: PageRange) -> impl Iterator<Item = ((u64, u64), &AtomicU8)> {
        let before = self.origins.range(..=origin.start()).next_back();
        let before = before.map_or_else(|| origin.start(), |(from, _)| *from);
        self.origins.range(before..origin.end()).flat_map(move |(from, start)| {
            let states = self.segments.get(start).map_or(&[][..], |segment| &segment.states[..]);
            let skip = usize::try_from(origin.start().saturating_sub(*from) / PAGE_BYTES);
            let first = skip.unwrap_or(usize::MAX).min(states.len());
            let end = usize::try_from((origin.end() - from) / PAGE_BYTES).unwrap_or(usize::MAX);
            let end = end.min(states.len()).max(first);
            let pages = (first..end).map(|index| index as u64 * PAGE_BYTES);
            pages.map(move |offset| (from + offset, start + offset)).zip(&states[first..end])
        })
    }
}

fn state(page: &AtomicU8) -> State {
    match page.load(Ordering::Acquire) {
        0 => State::Held,
        1 => State::Busy,
        2 => State::Installed,
        5 => State::Remote,
        6 => State::Requested,
        _ => State::Dropped,
    }
}

/// Puts a page that is `Remote` or `Requested` into another state; whether it was one of them. In this order: somebody
/// may ask for it between the two looks, and nobody takes a request back.
fn leave_remote(page: &AtomicU8, to: State) -> bool {
    replace(page, State::Remote, to) || replace(page, State::Requested, to)
}

/// Replaces one state by another; whether it was that one.
fn replace(page: &AtomicU8, from: State, to: State) -> bool {
    page.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Relaxed).is_ok()
}

const PAGE_STEP: usize = 4096;

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
