//! Mappings that come, go, move, lose pages, and are very many.

use std::io;

use godwit_sys::arena::Backing;

use super::Subject;
use super::field::Field;

/// Mappings of all sizes, unmapped and replaced by others.
#[derive(Debug)]
pub(super) struct Maps {
    fields: Vec<Field>,
    made: u64,
}

impl Maps {
    pub(super) fn new(count: u64) -> io::Result<Self> {
        let fields = (0..count).map(fresh).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { fields, made: count })
    }
}

/// Returns mapping `number`, which is zero before it is filled.
fn fresh(number: u64) -> io::Result<Field> {
    Ok(Field::on(Backing::Private, number, 1 + number * 7 % 63)?.fill())
}

impl Subject for Maps {
    fn pages(&self) -> u64 {
        self.fields.len() as u64
    }

    fn step(&mut self) -> io::Result<u64> {
        let number = self.made;
        self.made += 1;
        let count = self.fields.len() as u64;
        let Some(place) = self.fields.first_mut().map(|field| field.choose(count)) else { return Ok(0) };
        let place = usize::try_from(place).unwrap_or_default();
        let fresh = Field::on(Backing::Private, number, 1 + number * 7 % 63)?;
        let unused = fresh.wrong_pages();
        let old = std::mem::replace(&mut self.fields[place], fresh.fill());
        Ok(unused + old.wrong_pages())
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.fields.iter().map(Field::wrong_pages).sum()))
    }

    fn batch(&self) -> u32 {
        4
    }
}

/// Pages given back in runs, and written again.
#[derive(Debug)]
pub(super) struct Discards(Field);

impl Discards {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        Ok(Self(Field::on(Backing::Private, 0, pages)?.fill()))
    }
}

impl Subject for Discards {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        let pages = self.0.pages();
        let (page, count) = (self.0.choose(pages), 1 + self.0.choose(32));
        let run = page..(page + count).min(pages);
        let mut bad = self.0.wrong(run.clone());
        self.0.discard(page, count)?;
        bad += self.0.wrong(run.clone());
        // Some stay zero until chance comes by again.
        run.filter(|page| page % 3 != 0).for_each(|page| self.0.rewrite(page));
        Ok(bad)
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.0.wrong_pages()))
    }

    fn batch(&self) -> u32 {
        4
    }
}

/// Mappings that move.
#[derive(Debug)]
pub(super) struct Moves {
    fields: Vec<Option<Field>>,
    turn: usize,
}

impl Moves {
    pub(super) fn new(pages: u64, count: u64) -> io::Result<Self> {
        let make = |writer| Ok(Some(Field::on(Backing::Private, writer, pages)?.fill()));
        Ok(Self { fields: (0..count).map(make).collect::<io::Result<_>>()?, turn: 0 })
    }
}

impl Subject for Moves {
    fn pages(&self) -> u64 {
        self.fields.iter().flatten().map(Field::pages).sum()
    }

    fn step(&mut self) -> io::Result<u64> {
        self.turn += 1;
        let count = self.fields.len();
        let Some(place) = self.fields.get_mut(self.turn % count.max(1)) else { return Ok(0) };
        let Some(field) = place.take() else { return Ok(0) };
        let mut field = field.relocate()?;
        let bad = field.touch() + field.touch();
        *place = Some(field);
        Ok(bad)
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.fields.iter().flatten().map(Field::wrong_pages).sum()))
    }
}

/// One mapping cut into as many as it has pages: access to every other page is forbidden. Those have contents too.
#[derive(Debug)]
pub(super) struct Vmas(Field);

impl Vmas {
    pub(super) fn new(count: u64) -> io::Result<Self> {
        let field = Field::on(Backing::Private, 0, count)?.fill();
        (1..count).step_by(2).try_for_each(|page| field.forbid(page, true))?;
        Ok(Self(field))
    }
}

impl Subject for Vmas {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        let pages = self.0.pages();
        let page = self.0.choose(pages / 2) * 2;
        let bad = self.0.wrong([page]);
        self.0.rewrite(page);
        Ok(bad)
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        let mut bad = 0;
        for page in 0..self.0.pages() {
            let is_forbidden = page % 2 == 1;
            if is_forbidden {
                self.0.forbid(page, false)?;
            }
            bad += self.0.wrong([page]);
            if is_forbidden {
                self.0.forbid(page, true)?;
            }
        }
        Ok(Some(bad))
    }
}
