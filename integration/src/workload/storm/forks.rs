//! Children that come and go.

use std::io;
use std::thread;
use std::time::Duration;

use godwit_sys::arena::Backing;
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::field::Field;
use super::{Subject, fork};

/// A parent that writes, and children that each check the pages as they were when they were born.
#[derive(Debug)]
pub(super) struct Forks {
    field: Field,
    children: u64,
}

impl Forks {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        Ok(Self { field: Field::on(Backing::Private, 0, pages)?.fill(), children: 0 })
    }

    /// Counts the children that have ended otherwise than well.
    fn reap(&mut self) -> io::Result<u64> {
        let mut bad = 0;
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(bad),
                Ok(status) => {
                    self.children = self.children.saturating_sub(1);
                    bad += u64::from(!matches!(status, WaitStatus::Exited(_, 0)));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// What a child does: its copy is its own, however its parent goes on.
    fn live(&mut self) -> io::Result<()> {
        let mut bad = self.field.wrong_pages();
        for _ in 0..CHILD_TURNS {
            (0..CHILD_WRITES).for_each(|_| bad += self.field.touch());
            thread::sleep(CHILD_REST);
        }
        bad += self.field.wrong_pages();
        if bad == 0 { Ok(()) } else { Err(io::Error::other(format!("{bad} pages are wrong in a child"))) }
    }
}

impl Subject for Forks {
    fn pages(&self) -> u64 {
        self.field.pages()
    }

    fn step(&mut self) -> io::Result<u64> {
        let mut bad = (0..8).map(|_| self.field.touch()).sum::<u64>() + self.reap()?;
        if self.children < CHILDREN_MAX {
            self.children += 1;
            // The closure runs in the child alone, and so does what it changes.
            let own = &mut *self;
            fork(|| own.live())?;
        }
        bad += self.field.touch();
        Ok(bad)
    }

    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(self.field.wrong_pages()))
    }

    fn batch(&self) -> u32 {
        2
    }
}

const CHILDREN_MAX: u64 = 4;
const CHILD_TURNS: u32 = 3;
const CHILD_WRITES: u32 = 16;
const CHILD_REST: Duration = Duration::from_millis(5);
