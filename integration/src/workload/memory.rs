//! The pages of one writer.

use super::page::{Identity, SIZE, mix};

/// What a check of pages found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Pages that were checked at the end, which is all there are.
    pub pages: u64,
    /// Checks, then or before a rewrite, that found something else than was written.
    pub bad: u64,
    /// Pages written so far.
    pub rewrites: u64,
}

impl Findings {
    /// Returns both taken together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            bad: self.bad + other.bad,
            rewrites: self.rewrites + other.rewrites,
        }
    }
}

/// Pages, and the versions that they must have.
#[derive(Debug)]
pub struct Memory {
    writer: u64,
    bytes: Vec<u8>,
    versions: Vec<u64>,
    /// State of the choice of pages.
    random: u64,
    bad: u64,
    rewrites: u64,
}

impl Memory {
    /// Returns `pages` pages. One in eight is left as it came from the kernel until chance chooses it.
    #[must_use]
    pub fn new(writer: u64, pages: usize) -> Self {
        let mut memory = Self {
            writer,
            bytes: vec![0; pages * SIZE],
            versions: vec![0; pages],
            random: writer,
            bad: 0,
            rewrites: 0,
        };
        (0..pages).filter(|index| index % 8 != 7).for_each(|index| memory.rewrite(index));
        memory
    }

    /// Checks a page chosen at random and writes its next version.
    pub fn step(&mut self) {
        if self.versions.is_empty() {
            return;
        }
        self.random = mix(self.random);
        let index = usize::try_from(self.random).unwrap_or_default() % self.versions.len();
        if !self.holds(index) {
            self.bad += 1;
        }
        self.rewrite(index);
    }

    /// Checks every page.
    #[must_use]
    pub fn check(&self) -> Findings {
        let wrong = (0..self.versions.len()).filter(|index| !self.holds(*index)).count();
        Findings { pages: self.versions.len() as u64, bad: self.bad + wrong as u64, rewrites: self.rewrites }
    }

    fn rewrite(&mut self, index: usize) {
        self.versions[index] += 1;
        self.rewrites += 1;
        self.identity(index).fill(&mut self.bytes[index * SIZE..][..SIZE]);
    }

    fn holds(&self, index: usize) -> bool {
        self.identity(index).holds(&self.bytes[index * SIZE..][..SIZE])
    }

    fn identity(&self, index: usize) -> Identity {
        Identity { writer: self.writer, index: index as u64, version: self.versions[index] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_left_alone_is_found_whole() {
        let mut memory = Memory::new(1, 64);
        (0..1000).for_each(|_| memory.step());
        assert_eq!(memory.check(), Findings { pages: 64, bad: 0, rewrites: 1056 });
    }

    #[test]
    fn one_wrong_byte_is_found_before_a_rewrite_and_at_the_end() {
        let mut memory = Memory::new(1, 8);
        memory.bytes[5 * SIZE + 17] ^= 0x40;
        assert_eq!(memory.check().bad, 1);
        (0..100).for_each(|_| memory.step());
        assert_eq!(
            memory.check().bad,
            1,
            "the check before the rewrite counted it, and the rewrite healed it"
        );
    }
}
