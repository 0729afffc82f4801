//! Ranges of pages in some address space.
//!
//! An address here is a number, never a pointer: it means something only together with the process it belongs
//! to, which is mostly another one.

use std::fmt;

/// Size of a page. Every range is a multiple of it.
pub const PAGE_BYTES: u64 = 4096;

/// The pages `[start, end)`, never empty, both ends on a page boundary.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// The range `[start, end)`; `None` when it is empty or not on page boundaries.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start < end && start.is_multiple_of(PAGE_BYTES) && end.is_multiple_of(PAGE_BYTES) {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// The one page that `address` lies in.
    pub const fn page_at(address: u64) -> Self {
        // The last page of the address space is never a user's, so the addition cannot overflow for an address
        // the kernel reported; for any other it saturates one page lower.
        let top = u64::MAX - 2 * PAGE_BYTES + 1;
        let start = address - address % PAGE_BYTES;
        let start = if start > top { top } else { start };
        Self { start, end: start + PAGE_BYTES }
    }

    /// First address.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First address behind the range.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes.
    pub const fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// Length in pages.
    pub const fn pages(self) -> u64 {
        self.bytes() / PAGE_BYTES
    }

    /// Whether `address` lies in the range.
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// What both ranges cover.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The range cut into pieces of at most `pages_max` pages, in order.
    ///
    /// # Panics
    /// When `pages_max` is 0.
    pub fn chunks(self, pages_max: u64) -> impl Iterator<Item = Self> {
        assert!(pages_max > 0, "a chunk has at least one page");
        let step = pages_max.saturating_mul(PAGE_BYTES);
        let mut start = self.start;
        std::iter::from_fn(move || {
            let chunk = Self::new(start, self.end.min(start.saturating_add(step)))?;
            start = chunk.end;
            Some(chunk)
        })
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:x}-{:x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_in_order_make_a_range() {
        assert_eq!(PageRange::new(0x1000, 0x1000), None);
        assert_eq!(PageRange::new(0x2000, 0x1000), None);
        assert_eq!(PageRange::new(0x1001, 0x3000), None);
        assert_eq!(PageRange::new(0x1000, 0x3000).unwrap().pages(), 2);
        assert_eq!(PageRange::page_at(0x1fff), PageRange::new(0x1000, 0x2000).unwrap());
        assert_eq!(PageRange::page_at(u64::MAX).pages(), 1);
    }

    #[test]
    fn chunks_cover_the_range_in_order() {
        let range = PageRange::new(0x1000, 0x8000).unwrap();
        let chunks: Vec<_> = range.chunks(3).collect();
        assert_eq!(format!("{chunks:?}"), "[1000-4000, 4000-7000, 7000-8000]");
    }
}
