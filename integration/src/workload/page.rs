//! The content of one page.

/// Bytes of a page.
pub const SIZE: usize = 4096;

/// Which page it is, and how often it has been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The writer that it belongs to.
    pub writer: u64,
    /// Its place among the writer's pages.
    pub index: u64,
    /// How often it has been written; a page that never was holds zeroes.
    pub version: u64,
}

impl Identity {
    /// Writes the page's content.
    pub fn fill(self, page: &mut [u8]) {
        for (chunk, word) in page.chunks_exact_mut(8).zip(self.words()) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Tells whether a page has this content.
    #[must_use]
    pub fn holds(self, page: &[u8]) -> bool {
        page.len() == SIZE
            && page.chunks_exact(8).zip(self.words()).all(|(chunk, word)| chunk == word.to_le_bytes())
    }

    /// The page's content, a word after the other, without end.
    pub(super) fn words(self) -> impl Iterator<Item = u64> {
        let seed = mix(mix(mix(self.writer).wrapping_add(self.index)).wrapping_add(self.version));
        let blank = self.version == 0;
        (1..).map(move |place: u64| if blank { 0 } else { mix(seed.wrapping_add(place)) })
    }
}

/// Returns a number in which every bit depends on every bit of `value` (the finaliser of SplitMix64).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: Identity = Identity { writer: 3, index: 5, version: 7 };

    #[test]
    fn page_holds_what_was_written_and_nothing_else() {
        let mut page = [0; SIZE];
        PAGE.fill(&mut page);
        assert!(PAGE.holds(&page));
        for other in [
            Identity { writer: 4, ..PAGE },
            Identity { index: 6, ..PAGE },
            Identity { version: 6, ..PAGE },
            Identity { version: 0, ..PAGE },
        ] {
            assert!(!other.holds(&page), "{other:?}");
        }
        page[SIZE - 1] ^= 1;
        assert!(!PAGE.holds(&page));
    }

    #[test]
    fn page_that_was_never_written_is_zero() {
        assert!(Identity { version: 0, ..PAGE }.holds(&[0; SIZE]));
    }
}
