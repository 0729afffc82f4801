//! Pages of memory that the kernel may change behind the program's back, and the versions they must have.

use std::io;
use std::sync::Arc;

use godwit_sys::arena::{Advice, Arena, Backing};
use godwit_sys::page_range::{PAGE_BYTES, PageRange};

use super::super::page::{Identity, mix};

/// Pages of one writer.
#[derive(Debug)]
pub(super) struct Field {
    writer: u64,
    arena: Arc<Arena>,
    /// Where its pages begin in the arena.
    first: u64,
    versions: Vec<u64>,
    /// State of the choice of pages.
    random: u64,
}

impl Field {
    /// Returns `pages` pages as they come from the kernel.
    pub(super) fn on(backing: Backing<'_>, writer: u64, pages: u64) -> io::Result<Self> {
        let arena = Arena::map_on(backing, pages * PAGE_BYTES).map_err(io::Error::other)?;
        Ok(Self::part(&Arc::new(arena), writer, 0, pages))
    }

    /// Returns pages of an arena that has others as well; they must be as they came from the kernel.
    pub(super) fn part(arena: &Arc<Arena>, writer: u64, first: u64, pages: u64) -> Self {
        let versions = (0..pages).map(|_| 0).collect();
        Self { writer, arena: Arc::clone(arena), first, versions, random: mix(writer + 1) }
    }

    pub(super) fn pages(&self) -> u64 {
        self.versions.len() as u64
    }

    /// Returns a number chosen at random, below `limit`.
    pub(super) fn choose(&mut self, limit: u64) -> u64 {
        self.random = mix(self.random);
        self.random % limit.max(1)
    }

    /// Writes the first version of every page.
    pub(super) fn fill(mut self) -> Self {
        (0..self.pages()).for_each(|page| self.rewrite(page));
        self
    }

    /// Writes the next version of a page.
    pub(super) fn rewrite(&mut self, page: u64) {
        if let Some(version) = self.version(page) {
            *version += 1;
        }
        self.put(page);
    }

    /// Writes zeros to a page.
    pub(super) fn blank(&mut self, page: u64) {
        if let Some(version) = self.version(page) {
            *version = 0;
        }
        self.put(page);
    }

    /// Tells how many of some pages hold something else than was written to them.
    pub(super) fn wrong(&self, pages: impl IntoIterator<Item = u64>) -> u64 {
        pages.into_iter().filter(|page| !self.holds(*page)).count() as u64
    }

    /// Tells how many pages hold something else than was written to them.
    pub(super) fn wrong_pages(&self) -> u64 {
        self.wrong(0..self.pages())
    }

    /// Checks a page chosen at random, writes its next version, and tells how many pages were wrong.
    pub(super) fn touch(&mut self) -> u64 {
        let pages = self.pages();
        let page = self.choose(pages);
        let bad = self.wrong([page]);
        self.rewrite(page);
        bad
    }

    /// Gives pages back to the kernel: they are zero from then on.
    pub(super) fn discard(&mut self, page: u64, count: u64) -> io::Result<()> {
        let end = (page + count).min(self.pages());
        for page in page..end {
            if let Some(version) = self.version(page) {
                *version = 0;
            }
        }
        match self.range(page, end) {
            Some(range) => self.arena.discard(range).map_err(io::Error::other),
            None => Ok(()),
        }
    }

    /// Forbids any access to a page, or allows it again.
    pub(super) fn forbid(&self, page: u64, on: bool) -> io::Result<()> {
        match self.range(page, page + 1) {
            Some(range) => self.arena.forbid(range, on).map_err(io::Error::other),
            None => Ok(()),
        }
    }

    /// Gives the kernel advice on all of it.
    pub(super) fn advise(&self, advice: Advice) -> io::Result<()> {
        self.arena.advise(self.arena.range(), advice).map_err(io::Error::other)
    }

    /// Moves it to another address; it must have its arena for itself.
    pub(super) fn relocate(self) -> io::Result<Self> {
        let Self { writer, arena, first, versions, random } = self;
        let arena =
            Arc::into_inner(arena).ok_or_else(|| io::Error::other("the arena is in use elsewhere"))?;
        let arena = Arc::new(arena.relocate().map_err(io::Error::other)?);
        Ok(Self { writer, arena, first, versions, random })
    }

    fn holds(&self, page: u64) -> bool {
        let words = self.identity(page).words().take(WORDS_A_PAGE);
        let at = (self.first + page) * WORDS;
        (at..).zip(words).all(|(place, word)| self.arena.load(place) == word)
    }

    fn put(&self, page: u64) {
        let words = self.identity(page).words().take(WORDS_A_PAGE);
        let at = (self.first + page) * WORDS;
        (at..).zip(words).for_each(|(place, word)| self.arena.store(place, word));
    }

    fn identity(&self, page: u64) -> Identity {
        let version = usize::try_from(page).ok().and_then(|page| self.versions.get(page)).copied();
        Identity { writer: self.writer, index: page, version: version.unwrap_or_default() }
    }

    fn version(&mut self, page: u64) -> Option<&mut u64> {
        usize::try_from(page).ok().and_then(|page| self.versions.get_mut(page))
    }

    fn range(&self, page: u64, end: u64) -> Option<PageRange> {
        let at = |page: u64| self.arena.range().start() + (self.first + page) * PAGE_BYTES;
        PageRange::new(at(page), at(end))
    }
}

const WORDS_A_PAGE: usize = 512;
const WORDS: u64 = WORDS_A_PAGE as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_found_and_what_was_not_is_counted() {
        let mut field = Field::on(Backing::Private, 3, 16).unwrap().fill();
        (0..100).for_each(|_| assert_eq!(field.touch(), 0));
        field.discard(2, 3).unwrap();
        field.blank(9);
        assert_eq!(field.wrong_pages(), 0);
        // A torn page, and an old one.
        field.arena.store(5 * WORDS + 17, 1);
        field.versions[7] += 1;
        assert_eq!(field.wrong_pages(), 2);
        assert_eq!(field.wrong([5, 6]), 1);
    }

    #[test]
    fn field_keeps_its_pages_when_it_moves() {
        let field = Field::on(Backing::Private, 1, 4).unwrap().fill();
        let before = field.arena.range();
        let field = field.relocate().unwrap();
        assert_ne!(field.arena.range(), before);
        assert_eq!(field.wrong_pages(), 0);
    }

    #[test]
    fn neighbours_in_one_arena_do_not_meet() {
        let arena = Arc::new(Arena::map(8 * PAGE_BYTES).unwrap());
        let mut fields = [Field::part(&arena, 1, 0, 4).fill(), Field::part(&arena, 2, 4, 4).fill()];
        fields[0].discard(3, 9).unwrap();
        assert_eq!(fields.map(|field| field.wrong_pages()), [0, 0]);
    }
}
