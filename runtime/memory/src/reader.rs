//! The contents of pages of another process.
//!
//! Pages are read in batches while their process may run on: what is written meanwhile is dirty again and
//! comes once more. What is gone meanwhile is reported, not an error; the next collection names it absent.
//! Pages of zeros are found by content, so that nothing has to travel for them.

use godwit_sys::SysError;
use godwit_sys::foreign_memory;
use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::pidfd::PidFd;
use std::time::Duration;

use crate::{PageSet, Result};

/// What stood in the pages of one batch.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The pages, in order of address.
    pub ranges: &'a [PageRange],
    /// Their contents, one after the other.
    pub bytes: &'a [u8],
    /// Those of them that hold only zeros.
    pub zero: PageSet,
    /// Those of them that were not there any more. Their bytes are zeros and they are not in `zero`.
    pub gone: PageSet,
}

/// Reads `pages` of the process `pid` in batches of at most the length of `buffer`, handing each to `each`.
///
/// # Errors
/// [`SysError::NoProcess`] when the process has ended, also while it was read: what was handed over last may
/// then be another's and must not be used. [`SysError::Call`] without the right to read. An error of `each`
/// ends the reading.
///
/// # Panics
/// When `buffer` holds no page.
pub fn read<E>(
    pid: i32,
    pages: &PageSet,
    buffer: &mut [u8],
    mut each: impl FnMut(Batch<'_>) -> std::result::Result<(), E>,
) -> std::result::Result<(), E>
where
    E: From<crate::MemoryError>,
{
    let process = PidFd::open(pid).map_err(crate::MemoryError::from)?;
    let mut batch = Vec::new();
    for ranges in Batches::new(pages, buffer.len() as u64 / PAGE_BYTES) {
        batch.clone_from(&ranges);
        let length = usize::try_from(batch.iter().map(|range| range.bytes()).sum::<u64>())
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let bytes = &mut buffer[..length];
        let gone = read_batch(&process, &batch, bytes)?;
        let gone: PageSet = gone.into_iter().collect();
        let zero = zeros(&batch, bytes).difference(&gone);
        each(Batch { ranges: &batch, bytes, zero, gone })?;
    }
    Ok(())
}

fn read_batch(process: &PidFd, ranges: &[PageRange], bytes: &mut [u8]) -> Result<Vec<PageRange>> {
    let gone = foreign_memory::read_pages(process.pid(), ranges, bytes)?;
    if process.wait_exit(Duration::ZERO)? {
        return Err(SysError::NoProcess { pid: process.pid() }.into());
    }
    Ok(gone)
}

/// The pages that hold only zeros.
pub fn zeros(ranges: &[PageRange], bytes: &[u8]) -> PageSet {
    let addresses = ranges.iter().flat_map(|range| range.chunks(1));
    addresses
        .zip(bytes.as_chunks::<PAGE>().0)
        .filter(|(_, page)| is_zero(page))
        .map(|(range, _)| range)
        .collect()
}

/// Whether a page holds only zeros. Most pages that do not show it in their first words.
pub fn is_zero(page: &[u8; PAGE]) -> bool {
    let (lines, _) = page.as_chunks::<64>();
    // A whole line at a time without a branch inside: the compiler makes vector code of it.
    lines.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Cuts a set into lists of ranges of at most so many pages in all.
struct Batches<'a> {
    ranges: std::slice::Iter<'a, PageRange>,
    rest: Option<PageRange>,
    pages_max: u64,
}

impl<'a> Batches<'a> {
    fn new(pages: &'a PageSet, pages_max: u64) -> Self {
        assert!(pages_max > 0, "the buffer holds at least one page");
        Self { ranges: pages.ranges().iter(), rest: None, pages_max }
    }
}

impl Iterator for Batches<'_> {
    type Item = Vec<PageRange>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batch = Vec::new();
        let mut room = self.pages_max * PAGE_BYTES;
        while room > 0 {
            let Some(range) = self.rest.take().or_else(|| self.ranges.next().copied()) else { break };
            let cut = range.end().min(range.start() + room);
            self.rest = PageRange::new(cut, range.end());
            batch.extend(PageRange::new(range.start(), cut));
            room -= cut - range.start();
        }
        (!batch.is_empty()).then_some(batch)
    }
}

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);

#[cfg(test)]
mod tests {
    use godwit_sys::arena::Arena;

    use super::*;
    use crate::MemoryError;

    #[test]
    fn pages_come_in_order_and_zeros_and_holes_are_named() {
        let arena = Arena::map(10 * PAGE_BYTES).unwrap();
        let gone = {
            let gone = Arena::map(PAGE_BYTES).unwrap();
            gone.range()
        };
        let start = arena.range().start();
        for page in [0, 1, 2, 5, 9] {
            arena.store(page * 512 + 511, page + 1);
        }
        let mut set: PageSet = [arena.range(), gone].into_iter().collect();
        set = set.difference(&[PageRange::page_at(start + PAGE_BYTES)].into_iter().collect());
        let (mut seen, mut zero, mut holes) = (Vec::new(), PageSet::new(), PageSet::new());
        let mut buffer = vec![0; 3 * PAGE];
        let own = i32::try_from(std::process::id()).unwrap();
        read(own, &set, &mut buffer, |batch| {
            for (range, page) in
                batch.ranges.iter().flat_map(|range| range.chunks(1)).zip(batch.bytes.chunks(PAGE))
            {
                if arena.range().contains(range.start()) {
                    seen.push(((range.start() - start) / PAGE_BYTES, page[4088]));
                }
            }
            zero = zero.union(&batch.zero);
            holes = holes.union(&batch.gone);
            Ok::<(), MemoryError>(())
        })
        .unwrap();
        assert_eq!(seen, [(0, 1), (2, 3), (3, 0), (4, 0), (5, 6), (6, 0), (7, 0), (8, 0), (9, 10)]);
        assert_eq!(zero.pages(), 5);
        assert_eq!(holes.ranges(), [gone]);
    }

    #[test]
    fn a_single_bit_anywhere_makes_a_page_not_zero() {
        let mut page = [0; PAGE];
        assert!(is_zero(&page));
        for index in [0, 63, 64, 4095] {
            page[index] = 1;
            assert!(!is_zero(&page));
            page[index] = 0;
        }
    }
}
