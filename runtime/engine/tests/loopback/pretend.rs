//! A container that is a value, with a CRIU that writes files.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use godwit_engine::Cause;
use godwit_engine::source::{self, Checkpointer, Confirm, Dumping, Verdict};
use godwit_memory::ahead::Ahead;
use godwit_memory::hide::Hidden;
use godwit_protocol::plan::Abilities;

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
    /// Two sides that start with these tasks.
    pub(crate) fn pair(tasks: [Tasks; 2]) -> (Self, Self) {
        let both = Arc::new(Mutex::new(tasks));
        (Self { both: Arc::clone(&both), index: 0 }, Self { both, index: 1 })
    }

    pub(crate) fn get(&self) -> Tasks {
        self.both.lock().expect("no thread panicked")[self.index]
    }

    pub(crate) fn set(&self, tasks: Tasks) {
        let mut both = self.both.lock().expect("no thread panicked");
        both[self.index] = tasks;
        assert_ne!(*both, [Tasks::Running, Tasks::Running], "both sides run");
        assert_ne!(*both, [Tasks::Gone, Tasks::Gone], "neither side has it");
    }
}

/// The pages of the container: more than one frame, and not a whole number of them.
pub(crate) fn pages() -> Vec<u8> {
    (0..640_u32 * 4096).map(|at| (at ^ (at >> 9)).to_le_bytes()[0]).collect()
}

/// When a dump fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DumpFailure {
    /// Amid the writing.
    Before,
    /// When it turns out not to be true of the tasks.
    Behind,
}

#[derive(Debug)]
pub(crate) struct PretendedCheckpointer {
    tasks: Side,
    fails: Option<DumpFailure>,
    /// Where the container writes a last file before it is frozen.
    rootfs: PathBuf,
    thaws: bool,
    /// Freezes that find something under way, before one does not.
    unsettled: Cell<u32>,
}

impl PretendedCheckpointer {
    pub(crate) fn new(tasks: Side, rootfs: PathBuf, fails: Option<DumpFailure>, unsettled: u32) -> Self {
        let thaws = tasks.get() == Tasks::Stopped;
        Self { thaws, tasks, fails, rootfs, unsettled: unsettled.into() }
    }
}

#[derive(Debug)]
pub(crate) struct PretendedDump {
    images: PathBuf,
    tasks: Side,
    fails: Option<DumpFailure>,
}

impl Checkpointer for PretendedCheckpointer {
    type Dump = PretendedDump;

    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn tasks(&self) -> Result<Box<dyn source::Tasks>, Cause> {
        Err("the tasks are pretended".into())
    }

    fn prepare(
        &mut self,
        images: &Path,
        hidden: Option<&Hidden>,
        _ahead: &Ahead,
    ) -> Result<PretendedDump, Cause> {
        assert!(hidden.is_none(), "nothing can be hidden here");
        Ok(PretendedDump { images: images.to_owned(), tasks: self.tasks.clone(), fails: self.fails })
    }

    fn freeze(&mut self) -> Result<(), Cause> {
        fs::write(self.rootfs.join("final"), LAST_FILE)?;
        self.tasks.set(Tasks::Stopped);
        self.thaws = true;
        Ok(())
    }

    fn unsettled(&self) -> Result<Option<String>, Cause> {
        assert_eq!(self.tasks.get(), Tasks::Stopped);
        let left = self.unsettled.get();
        self.unsettled.set(left.saturating_sub(1));
        Ok((left > 0).then(|| "something is under way".to_owned()))
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
    fn run(self, decide: impl FnOnce(Confirm<'_>) -> Verdict) -> Result<(), Cause> {
        assert_eq!(self.tasks.get(), Tasks::Stopped, "dumped while it runs");
        let mut file = fs::File::create(self.images.join("pages-1.img"))?;
        for piece in pages().chunks(300_000) {
            file.write_all(piece)?;
        }
        if self.fails == Some(DumpFailure::Before) {
            return Err("a pretended dump failed".into());
        }
        fs::write(self.images.join("inventory.img"), b"inventory")?;
        fs::write(self.images.join("descriptors.json"), b"[]")?;
        let is_true = self.fails != Some(DumpFailure::Behind);
        let confirm = || if is_true { Ok(()) } else { Err("a pretended task had changed".into()) };
        if decide(&confirm) == Verdict::Kill {
            self.tasks.set(Tasks::Gone);
        }
        Ok(())
    }
}

/// What the container writes between the passes.
pub(crate) const LAST_FILE: &[u8] = b"written between the passes";
