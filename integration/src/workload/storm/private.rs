//! Private memory: small pages, huge ones, and little in much.

use std::io;

use godwit_sys::arena::{Advice, Backing};

use super::Subject;
use super::field::Field;

/// Pages chosen at random, checked and rewritten.
#[derive(Debug)]
pub(super) struct Private(Field);

impl Private {
    pub(super) fn new(writer: u64, pages: u64) -> io::Result<Self> {
        Ok(Self(Field::on(Backing::Private, writer, pages)?.fill()))
    }

    /// Out of the pool of huge pages.
    pub(super) fn huge(pages: u64) -> io::Result<Self> {
        Ok(Self(Field::on(Backing::Huge, 0, pages)?.fill()))
    }
}

impl Subject for Private {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        Ok(self.0.touch())
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.0.wrong_pages()))
    }
}

/// As [`Private`], in small batches, so that pauses between them are somebody else's.
#[derive(Debug)]
pub(super) struct Beat(Private);

impl Beat {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        Ok(Self(Private::new(0, pages)?))
    }
}

impl Subject for Beat {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        self.0.step()
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        self.0.check()
    }

    fn batch(&self) -> u32 {
        2
    }

    fn pass(&self) -> u32 {
        256
    }
}

/// Transparent huge pages; single pages are given back now and then, which breaks a huge one up.
#[derive(Debug)]
pub(super) struct Thp(Field);

impl Thp {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let field = Field::on(Backing::Private, 0, pages)?;
        field.advise(Advice::HugePage)?;
        Ok(Self(field.fill()))
    }
}

impl Subject for Thp {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        let bad = self.0.touch();
        let pages = self.0.pages();
        if self.0.choose(64) == 0 {
            let page = self.0.choose(pages);
            self.0.discard(page, 1)?;
        }
        Ok(bad)
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.0.wrong_pages()))
    }
}

/// One mapping whose flags change with every page that is written.
#[derive(Debug)]
pub(super) struct Flags {
    field: Field,
    flipped: bool,
}

impl Flags {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let field = Field::on(Backing::Private, 0, pages)?;
        // From here on its flags are those of no neighbour, so it is merged with none.
        field.advise(Advice::NoHugePage)?;
        Ok(Self { field: field.fill(), flipped: false })
    }
}

impl Subject for Flags {
    fn pages(&self) -> u64 {
        self.field.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        self.flipped = !self.flipped;
        self.field.advise(if self.flipped { Advice::HugePage } else { Advice::NoHugePage })?;
        Ok(self.field.touch())
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.field.wrong_pages()))
    }

    fn batch(&self) -> u32 {
        1
    }
}

/// One page in [`EVERY`] has contents, some have zeros, the others were never written.
#[derive(Debug)]
pub(super) struct Sparse(Field);

impl Sparse {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let mut field = Field::on(Backing::Private, 0, pages)?;
        for page in (0..pages).step_by(EVERY) {
            field.rewrite(page);
            field.blank((page + 7).min(pages - 1));
        }
        Ok(Self(field))
    }
}

impl Subject for Sparse {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        let pages = self.0.pages();
        let page = self.0.choose(pages / EVERY as u64) * EVERY as u64;
        let bad = self.0.wrong([page]);
        // What had contents becomes zero, and the reverse.
        match self.0.choose(4) {
            0 => self.0.blank(page),
            _ => self.0.rewrite(page),
        }
        Ok(bad)
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.0.wrong_pages()))
    }

    fn pass(&self) -> u32 {
        64
    }
}

const EVERY: usize = 64;
