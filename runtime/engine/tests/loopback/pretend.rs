//! A container that is a value, with a CRIU that writes and reads files.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use godwit_engine::Cause;
use godwit_engine::source::{Checkpointer, Dumping, Verdict};
use godwit_engine::target::{Restorer, Word};

/// How the tasks of one side are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tasks {
    Running,
    Stopped,
    Gone,
}

/// The tasks of one side, which must never run on both at once.
#[derive(Debug, Clone)]
pub(crate) struct Side {
    both: Arc<Mutex<[Tasks; 2]>>,
    index: usize,
}

impl Side {
    pub(crate) fn pair() -> (Self, Self) {
        let both = Arc::new(Mutex::new([Tasks::Running, Tasks::Gone]));
        (Self { both: Arc::clone(&both), index: 0 }, Self { both, index: 1 })
    }

    pub(crate) fn get(&self) -> Tasks {
        self.both.lock().unwrap()[self.index]
    }

    pub(crate) fn set(&self, tasks: Tasks) {
        let mut both = self.both.lock().unwrap();
        both[self.index] = tasks;
        assert_ne!(*both, [Tasks::Running, Tasks::Running], "both sides run");
        assert_ne!(*both, [Tasks::Gone, Tasks::Gone], "neither side has it");
    }
}

/// The pages of the container: more than one frame, and not a whole number of them.
pub(crate) fn pages() -> Vec<u8> {
    (0..640_u32 * 4096).map(|at| (at ^ (at >> 9)).to_le_bytes()[0]).collect()
}

#[derive(Debug)]
pub(crate) struct PretendedCheckpointer {
    pub(crate) tasks: Side,
    pub(crate) fails: bool,
    /// Runs between the passes, when the container is about to freeze.
    pub(crate) before_freeze: fn(&Path),
    pub(crate) rootfs: std::path::PathBuf,
    pub(crate) thaws: bool,
}

#[derive(Debug)]
pub(crate) struct PretendedDump {
    images: std::path::PathBuf,
    tasks: Side,
    fails: bool,
}

impl Checkpointer for PretendedCheckpointer {
    type Dump = PretendedDump;

    fn prepare(&mut self, images: &Path) -> Result<PretendedDump, Cause> {
        Ok(PretendedDump { images: images.to_owned(), tasks: self.tasks.clone(), fails: self.fails })
    }

    fn freeze(&mut self) -> Result<(), Cause> {
        (self.before_freeze)(&self.rootfs);
        self.tasks.set(Tasks::Stopped);
        self.thaws = true;
        Ok(())
    }

    fn thaw(&mut self) -> Result<(), Cause> {
        if std::mem::take(&mut self.thaws) {
            self.tasks.set(Tasks::Running);
        }
        Ok(())
    }

    fn leave_frozen(&mut self) {
        self.thaws = false;
    }

    fn kill(&mut self) -> Result<(), Cause> {
        self.thaws = false;
        self.tasks.set(Tasks::Gone);
        Ok(())
    }

    fn untraced_files(&self) -> BTreeSet<Vec<u8>> {
        BTreeSet::new()
    }
}

impl Drop for PretendedCheckpointer {
    fn drop(&mut self) {
        drop(self.thaw());
    }
}

impl Dumping for PretendedDump {
    fn run(self, decide: impl FnOnce() -> Verdict) -> Result<(), Cause> {
        assert_eq!(self.tasks.get(), Tasks::Stopped, "dumped while it runs");
        let mut file = fs::File::create(self.images.join("pages-1.img"))?;
        for piece in pages().chunks(300_000) {
            file.write_all(piece)?;
        }
        if self.fails {
            return Err("a pretended dump failed".into());
        }
        fs::write(self.images.join("inventory.img"), b"inventory")?;
        fs::write(self.images.join("descriptors.json"), b"[]")?;
        if decide() == Verdict::Kill {
            self.tasks.set(Tasks::Gone);
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
pub(crate) struct PretendedRestorer {
    pub(crate) tasks: Side,
    pub(crate) fails: bool,
    pub(crate) got: Arc<Mutex<Vec<u8>>>,
}

impl Restorer for PretendedRestorer {
    fn restore(&self, images: &Path, decide: impl FnOnce() -> Word) -> Result<i32, Cause> {
        *self.got.lock().unwrap() = fs::read(images.join("pages-1.img"))?;
        assert_eq!(fs::read(images.join("inventory.img"))?, b"inventory");
        if self.fails {
            return Err("a pretended restore failed".into());
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

    fn remove(&self) -> Result<(), Cause> {
        self.tasks.set(Tasks::Gone);
        Ok(())
    }
}
