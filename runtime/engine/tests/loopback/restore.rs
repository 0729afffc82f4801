//! A CRIU that reads files.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use godwit_engine::Cause;
use godwit_engine::target::{Restorer, Word};

use crate::pretend::{Side, Tasks};

#[derive(Debug, Clone)]
pub(crate) struct PretendedRestorer {
    pub(crate) tasks: Side,
    pub(crate) fails: bool,
    /// Does not hold the container before these run again.
    pub(crate) awaited: Option<Side>,
    pub(crate) got: Arc<Mutex<Vec<u8>>>,
}

impl Restorer for PretendedRestorer {
    fn work_path(&self) -> &Path {
        unreachable!("only a server of page faults is looked for there")
    }

    fn warden(&self) -> Option<Command> {
        None
    }

    fn restore(
        &self,
        images: &Path,
        lazy_pages: bool,
        begin: impl FnOnce() -> bool,
        decide: impl FnOnce() -> Word,
    ) -> Result<i32, Cause> {
        if !begin() {
            return Err("no images came".into());
        }
        assert!(!lazy_pages, "the pages are in the images");
        *self.got.lock().expect("no thread panicked") = fs::read(images.join("pages-1.img"))?;
        assert_eq!(fs::read(images.join("inventory.img"))?, b"inventory");
        if self.fails {
            return Err("a pretended restore failed".into());
        }
        while self.awaited.as_ref().is_some_and(|tasks| tasks.get() != Tasks::Running) {
            std::thread::yield_now();
        }
        self.tasks.set(Tasks::Stopped);
        match decide() {
            Word::Resume => self.tasks.set(Tasks::Running),
            Word::GiveUp => {
                self.tasks.set(Tasks::Gone);
                return Err("it was given up".into());
            }
        }
        Ok(4711)
    }

    fn processes(&self) -> Result<Vec<i32>, Cause> {
        unreachable!("only who waits for pages is looked for among them")
    }

    fn remove(&self) -> Result<(), Cause> {
        self.tasks.set(Tasks::Gone);
        Ok(())
    }
}
