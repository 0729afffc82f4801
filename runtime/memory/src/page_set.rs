//! Sets of pages, as sorted ranges.
//!
//! Invariant: ranges are in order, disjoint, and never adjacent, so equal sets are equal values. Every
//! operation is linear in the number of ranges; nothing depends on the number of pages.

use godwit_sys::page_range::PageRange;

/// A set of pages of one address space.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    ranges: Vec<PageRange>,
}

impl PageSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// Adds a range. At the end it costs nothing; anywhere else it costs a pass over the set.
    pub fn insert(&mut self, range: PageRange) {
        match self.ranges.last_mut() {
            Some(last) if range.start() < last.start() => *self = self.union(&Self { ranges: vec![range] }),
            Some(last) if range.start() <= last.end() => {
                if let Some(longer) = PageRange::new(last.start(), last.end().max(range.end())) {
                    *last = longer;
                }
            }
            _ => self.ranges.push(range),
        }
    }

    /// The ranges in order.
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.pages()).sum()
    }

    /// Whether it has no page.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether the page at `address` is in it.
    pub fn contains(&self, address: u64) -> bool {
        let index = self.ranges.partition_point(|range| range.end() <= address);
        self.ranges.get(index).is_some_and(|range| range.contains(address))
    }

    /// Pages in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut all: Vec<PageRange> = self.ranges.iter().chain(&other.ranges).copied().collect();
        all.sort_unstable_by_key(|range| range.start());
        all.into_iter().collect()
    }

    /// Pages in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let mut found = Self::new();
        let (mut left, mut right) = (self.ranges.iter().peekable(), other.ranges.iter().peekable());
        while let (Some(one), Some(two)) = (left.peek(), right.peek()) {
            if let Some(both) = one.intersection(**two) {
                found.insert(both);
            }
            if one.end() <= two.end() {
                left.next()
            } else {
                right.next()
            };
        }
        found
    }

    /// Pages in `self` and not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut found = Self::new();
        let mut cuts = other.ranges.iter().peekable();
        for range in &self.ranges {
            let mut start = range.start();
            while let Some(cut) = cuts.peek() {
                if cut.end() <= start {
                    cuts.next();
                    continue;
                }
                if cut.start() >= range.end() {
                    break;
                }
                found.extend(PageRange::new(start, cut.start()));
                start = cut.end();
                // A cut that reaches beyond this range may cut the next as well.
                if cut.end() > range.end() {
                    break;
                }
            }
            found.extend(PageRange::new(start, range.end()));
        }
        found
    }
}

impl Extend<PageRange> for PageSet {
    fn extend<T: IntoIterator<Item = PageRange>>(&mut self, ranges: T) {
        for range in ranges {
            self.insert(range);
        }
    }
}

impl FromIterator<PageRange> for PageSet {
    fn from_iter<T: IntoIterator<Item = PageRange>>(ranges: T) -> Self {
        let mut set = Self::new();
        set.extend(ranges);
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::PAGE_BYTES;

    fn build(parts: &[(u64, u64)]) -> (PageSet, BTreeSet<u64>) {
        let range = |(start, length): &(u64, u64)| {
            PageRange::new(start * PAGE_BYTES, (start + length) * PAGE_BYTES).unwrap()
        };
        let oracle = parts.iter().flat_map(|(start, length)| *start..start + length).collect();
        (parts.iter().map(range).collect(), oracle)
    }

    fn pages(set: &PageSet) -> BTreeSet<u64> {
        for pair in set.ranges().windows(2) {
            assert!(pair[0].end() < pair[1].start(), "{set:?}");
        }
        set.ranges().iter().flat_map(|range| range.start() / PAGE_BYTES..range.end() / PAGE_BYTES).collect()
    }

    fn parts() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0_u64..60, 1_u64..8), 0..12)
    }

    proptest! {
        #[test]
        fn operations_agree_with_sets_of_single_pages(left in parts(), right in parts(), page in 0_u64..70) {
            let ((one, one_pages), (two, two_pages)) = (build(&left), build(&right));
            prop_assert_eq!(&pages(&one), &one_pages);
            prop_assert_eq!(one.pages(), one_pages.len() as u64);
            prop_assert_eq!(one.contains(page * PAGE_BYTES + 5), one_pages.contains(&page));
            prop_assert_eq!(pages(&one.union(&two)), &one_pages | &two_pages);
            prop_assert_eq!(pages(&one.intersection(&two)), &one_pages & &two_pages);
            prop_assert_eq!(pages(&one.difference(&two)), &one_pages - &two_pages);
        }
    }
}
