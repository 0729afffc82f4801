//! Programs that do to their memory whatever programs do, and know what must be in it.
//!
//! ```text
//! Subject: step, step, step … check everything ──► Tally ──► /run/storm/WRITER, one line
//! ```
//! Each *kind* is one way to treat memory. Every page holds a function of its writer, place and version, and the
//! versions are kept elsewhere; so a page that is old, missing, torn or another's is found, before it is written
//! again or by the check of all pages that ends a *pass*. Whoever moves such a program reads the lines before and
//! afterwards: no error, and passes that go on, say that every page is what it was.
//!
//! Processes that fork have one thread, so each runner writes its own line and none is asked.

mod field;
mod forks;
mod mappings;
mod private;
mod shared;
mod stacks;
mod tally;

use std::io;
use std::thread;

use clap::ValueEnum;

pub use tally::{REPORTS, Tally, parse};

/// A way to treat memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// One writer of pages.
    Single,
    /// A writer in each of many threads.
    Threads,
    /// A writer in each of many processes.
    Processes,
    /// Children that check what they inherited, change it for themselves and end, while their parent writes on.
    Forks,
    /// Mappings made and unmapped.
    Maps,
    /// Pages given back (`MADV_DONTNEED`).
    Discards,
    /// Mappings moved to other addresses (`mremap`).
    Moves,
    /// Memory shared by two processes: anonymous, of a memfd, of System V.
    Shared,
    /// Memory out of the pool of huge pages.
    Huge,
    /// Transparent huge pages, broken up now and then.
    Thp,
    /// A mapping whose flags change (`madvise`), and nothing else of it.
    Flags,
    /// A great many mappings.
    Vmas,
    /// Much memory with little in it, and pages of zeros.
    Sparse,
    /// Threads whose memory is their stack.
    Stacks,
    /// One writer that never rests for long, and takes the time of its longest pause.
    Beat,
}

/// How large a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Pages of each writer.
    pub pages: u64,
    /// Writers; mappings where the kind is about those.
    pub count: u64,
}

/// Treats memory in one way, for ever.
///
/// # Errors
/// When the memory cannot be had, or a report not be written.
pub fn run(kind: Kind, size: Size) -> io::Result<()> {
    let Size { pages, count } = size;
    match kind {
        Kind::Single => drive(0, private::Private::new(0, pages)?),
        Kind::Beat => drive(0, private::Beat::new(pages)?),
        Kind::Threads => threads(pages, count),
        Kind::Processes => processes(pages, count),
        Kind::Forks => drive(0, forks::Forks::new(pages)?),
        Kind::Maps => drive(0, mappings::Maps::new(count)?),
        Kind::Discards => drive(0, mappings::Discards::new(pages)?),
        Kind::Moves => drive(0, mappings::Moves::new(pages, count)?),
        Kind::Shared => shared::run(pages),
        Kind::Huge => drive(0, private::Private::huge(pages)?),
        Kind::Thp => drive(0, private::Thp::new(pages)?),
        Kind::Flags => drive(0, private::Flags::new(pages)?),
        Kind::Vmas => drive(0, mappings::Vmas::new(count)?),
        Kind::Sparse => drive(0, private::Sparse::new(pages)?),
        Kind::Stacks => stacks::run(pages, count),
    }
}

/// What a runner does again and again.
trait Subject {
    /// Pages that a check looks at.
    fn pages(&self) -> u64;

    /// Changes something; returns how much was found wrong meanwhile.
    fn step(&mut self) -> io::Result<u64>;

    /// Checks everything; returns how much is wrong, or `None` when a pass is not over yet.
    fn check(&mut self) -> io::Result<Option<u64>>;

    /// Steps between two rests.
    fn batch(&self) -> u32 {
        16
    }

    /// Batches between two checks of everything.
    fn pass(&self) -> u32 {
        16
    }
}

/// Runs a subject for ever and writes down what it finds.
fn drive(writer: u64, mut subject: impl Subject) -> io::Result<()> {
    let mut tally = Tally::of(writer, subject.pages());
    loop {
        for _ in 0..subject.pass() {
            for _ in 0..subject.batch() {
                let bad = subject.step()?;
                tally.step(bad);
            }
            tally.rest()?;
        }
        if let Some(bad) = subject.check()? {
            tally.pass(bad)?;
        }
    }
}

fn threads(pages: u64, count: u64) -> io::Result<()> {
    let start =
        |writer| thread::Builder::new().spawn(move || drive(writer, private::Private::new(writer, pages)?));
    let threads = (1..count).map(start).collect::<io::Result<Vec<_>>>()?;
    drive(0, private::Private::new(0, pages)?)?;
    drop(threads);
    Ok(())
}

fn processes(pages: u64, count: u64) -> io::Result<()> {
    for writer in 1..count {
        fork(move || drive(writer, private::Private::new(writer, pages)?))?;
    }
    drive(0, private::Private::new(0, pages)?)
}

/// Runs `child` in a child process; its failure goes to standard error. Returns the child's id.
fn fork(child: impl FnOnce() -> io::Result<()>) -> io::Result<i32> {
    let body = || match child() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("storm: {error}");
            1
        }
    };
    godwit_sys::fork::run(body).map_err(io::Error::other)
}
