//! Which pages of a set travel on which stream.

use godwit_memory::{PageRange, PageSet};
use godwit_protocol::wire::pages::{CHUNK_BYTES, RUNS_MAX, Run, StreamId};

/// The pages of `set` whose stream is number `stream` of `streams`.
pub(super) fn share(space: i32, set: &PageSet, stream: u8, streams: u8) -> PageSet {
    if streams <= 1 {
        return set.clone();
    }
    let pieces = set.ranges().iter().flat_map(|range| chunks(*range));
    pieces.filter(|piece| StreamId::of_page(space, piece.start(), streams) == stream).collect()
}

/// The first page of `range` that does not travel on this stream.
pub(super) fn stranger(space: i32, range: PageRange, stream: StreamId, streams: u8) -> Option<u64> {
    let StreamId::Bulk(stream) = stream else { return None };
    if streams <= 1 {
        return None;
    }
    let starts = chunks(range).map(PageRange::start);
    starts.into_iter().find(|start| StreamId::of_page(space, *start, streams) != stream)
}

/// The range cut where pages may change streams.
pub(super) fn chunks(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut start = range.start();
    std::iter::from_fn(move || {
        let boundary = (start / CHUNK_BYTES + 1) * CHUNK_BYTES;
        let piece = PageRange::new(start, boundary.min(range.end()))?;
        start = piece.end();
        Some(piece)
    })
}

/// What of `set` lies in `window`.
pub(super) fn within(set: &PageSet, window: PageRange) -> impl Iterator<Item = PageRange> {
    let ranges = set.ranges();
    let first = ranges.partition_point(|range| range.end() <= window.start());
    ranges[first..].iter().map_while(move |range| range.intersection(window))
}

/// The set as lists of runs that fit a frame each.
pub(crate) fn frames(set: &PageSet) -> impl Iterator<Item = Vec<Run>> {
    set.ranges().chunks(RUNS_MAX / 2).flat_map(|ranges| {
        // A range of more pages than a run can name is some runs; two lists of runs per chunk of ranges are more
        // than enough for all that a process can have.
        let runs: Vec<Run> = ranges.iter().flat_map(|range| runs(*range)).collect();
        runs.chunks(RUNS_MAX).map(<[Run]>::to_vec).collect::<Vec<_>>()
    })
}

/// The range as runs.
pub(super) fn runs(range: PageRange) -> impl Iterator<Item = Run> {
    range.chunks(u64::from(u32::MAX)).map(|piece| Run {
        start: piece.start(),
        // The cut above makes it fit.
        pages: u32::try_from(piece.pages()).unwrap_or(u32::MAX),
    })
}

/// The pages of a run; none of one that decoding would have refused.
pub(crate) fn range(run: Run) -> Option<PageRange> {
    PageRange::new(run.start, run.start.checked_add(u64::from(run.pages) * godwit_memory::PAGE_BYTES)?)
}

/// The set of ranges that are in no order.
pub(crate) fn sorted(mut ranges: Vec<PageRange>) -> PageSet {
    ranges.sort_unstable_by_key(|range| range.start());
    ranges.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use godwit_memory::PAGE_BYTES;
    use proptest::prelude::*;

    use super::*;

    fn sets() -> impl Strategy<Value = PageSet> {
        let range = |(start, pages): (u64, u64)| {
            let start = start * PAGE_BYTES;
            PageRange::new(start, start + pages * PAGE_BYTES).unwrap()
        };
        prop::collection::vec((0_u64..1 << 20, 1_u64..3000), 0..12)
            .prop_map(move |parts| parts.into_iter().map(range).collect())
    }

    proptest! {
        /// Goal: what a page's stream is depends on nothing but its address, so that no version of it can overtake
        /// another: not on the set it is in, nor on its neighbours.
        #[test]
        fn shares_are_a_partition_that_only_the_address_decides(
            one in sets(), two in sets(), space in 1_i32..1 << 22, streams in 1_u8..=64,
        ) {
            let mut whole = PageSet::new();
            let mut pages = 0;
            for stream in 0..streams {
                let first = share(space, &one, stream, streams);
                for range in first.ranges() {
                    prop_assert_eq!(stranger(space, *range, StreamId::Bulk(stream), streams), None);
                }
                let both = share(space, &one.union(&two), stream, streams);
                prop_assert_eq!(&first.union(&share(space, &two, stream, streams)), &both);
                pages += first.pages();
                whole = whole.union(&first);
            }
            prop_assert_eq!(pages, one.pages());
            prop_assert_eq!(whole, one);
        }

        #[test]
        fn a_window_shows_what_the_intersection_has(set in sets(), start in 0_u64..1 << 20, pages in 1_u64..5000) {
            let window = PageRange::new(start * PAGE_BYTES, (start + pages) * PAGE_BYTES).unwrap();
            let expected = set.intersection(&[window].into_iter().collect());
            prop_assert_eq!(within(&set, window).collect::<PageSet>(), expected);
        }
    }

    #[test]
    fn a_range_that_no_run_can_name_is_several() {
        let huge = PageRange::new(PAGE_BYTES, 1 << 55).unwrap();
        let set: PageSet = [huge].into_iter().collect();
        let back: PageSet = frames(&set).flatten().filter_map(range).collect();
        assert_eq!(back, set);
        assert!(frames(&set).all(|runs| runs.len() <= RUNS_MAX));
    }
}
