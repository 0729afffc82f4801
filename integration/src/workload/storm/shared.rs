//! Memory that two processes share.
//!
//! Each writes and checks a half of its own. Behind the halves is a page by which they answer each other: a pass
//! is over only when the other has seen this one's last number, so memory that is not shared any more ends all
//! passes.

use std::io;
use std::sync::Arc;

use godwit_sys::arena::{Arena, Backing};
use godwit_sys::memfd;
use godwit_sys::page_range::PAGE_BYTES;

use super::field::Field;
use super::{Subject, drive, fork};

/// Runs two processes with `pages` pages of each kind, for ever.
pub(super) fn run(pages: u64) -> io::Result<()> {
    let half = pages / 2;
    let bytes = (2 * half + 1) * PAGE_BYTES;
    let file = memfd::create(c"storm").map_err(io::Error::other)?;
    file.set_len(bytes)?;
    let map = |backing| Arena::map_on(backing, bytes).map(Arc::new).map_err(io::Error::other);
    let arenas = [map(Backing::Shared)?, map(Backing::File(&file))?, map(Backing::SystemV)?];
    // The mapping keeps it; a program seldom keeps the descriptor as well.
    drop(file);
    let side = |number: u64| Side {
        number,
        half,
        fields: arenas.iter().map(|arena| Field::part(arena, number, number * half, half)).collect(),
        arenas: arenas.to_vec(),
        said: 0,
        heard: vec![0; arenas.len()],
    };
    let (mut one, mut other) = (side(0), side(1));
    fork(|| {
        other.fields = other.fields.into_iter().map(Field::fill).collect();
        drive(1, other)
    })?;
    one.fields = one.fields.into_iter().map(Field::fill).collect();
    drive(0, one)
}

/// One of the two processes.
#[derive(Debug)]
struct Side {
    number: u64,
    half: u64,
    arenas: Vec<Arc<Arena>>,
    fields: Vec<Field>,
    /// The last number that this side said.
    said: u64,
    /// The last that it heard, by arena.
    heard: Vec<u64>,
}

impl Side {
    /// Repeats what the other side says, and counts where it said less than before.
    fn answer(&mut self) -> u64 {
        let mut bad = 0;
        for (arena, heard) in self.arenas.iter().zip(&mut self.heard) {
            let said = arena.load(self.half * 2 * WORDS + SAID + 1 - self.number);
            bad += u64::from(said < *heard);
            *heard = said;
            arena.store(self.half * 2 * WORDS + HEARD + self.number, said);
        }
        bad
    }

    /// Tells whether the other side has repeated this side's last number everywhere.
    fn is_heard(&self) -> bool {
        let heard = |arena: &Arc<Arena>| arena.load(self.half * 2 * WORDS + HEARD + 1 - self.number);
        self.arenas.iter().all(|arena| heard(arena) == self.said)
    }
}

impl Subject for Side {
    fn pages(&self) -> u64 {
        self.fields.iter().map(Field::pages).sum()
    }

    fn step(&mut self) -> io::Result<u64> {
        Ok(self.answer() + self.fields.iter_mut().map(Field::touch).sum::<u64>())
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        let bad = self.fields.iter().map(Field::wrong_pages).sum();
        if !self.is_heard() {
            // What was found wrong is so still when the pass ends.
            return Ok(None);
        }
        self.said += 1;
        for arena in &self.arenas {
            arena.store(self.half * 2 * WORDS + SAID + self.number, self.said);
        }
        Ok(Some(bad))
    }

    fn batch(&self) -> u32 {
        4
    }
}

const WORDS: u64 = PAGE_BYTES / 8;
/// Words of the last page: what each side said, and what each heard.
const SAID: u64 = 0;
const HEARD: u64 = 2;
