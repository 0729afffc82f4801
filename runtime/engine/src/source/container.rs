//! What the source does with a container.

use std::collections::BTreeSet;
use std::path::Path;

use godwit_memory::ahead::Ahead;
use godwit_memory::hide::Hidden;
use godwit_memory::tracker::DirtyTracker;
use godwit_protocol::plan::Abilities;

use crate::Cause;

/// What becomes of a dumped container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It runs elsewhere now: its tasks are killed.
    Kill,
    /// It goes on as before.
    Release,
}

/// A container that can be dumped.
///
/// Freezing belongs to the caller: `freeze` comes before [`Dump::run`](Dumping::run), and `thaw` after a dump that
/// was released.
pub trait Checkpointer {
    /// A dump that has been prepared.
    type Dump: Dumping;

    /// Returns what can be done here with the memory of its tasks.
    fn abilities(&self) -> Abilities;

    /// Returns its tasks, for a thread that follows their memory.
    ///
    /// # Errors
    /// If its cgroup cannot be found.
    fn tasks(&self) -> Result<Box<dyn Tasks>, Cause>;

    /// Prepares a dump into the directory `images` while the container runs, and touches no task. What is `hidden`
    /// when the dump runs, which is to be all that CRIU restores lazily, is not in it. The mappings are
    /// read `ahead`, and whatever is read of them later is used if it is not known to be wrong by then.
    ///
    /// # Errors
    /// What is in the way of a dump.
    fn prepare(&mut self, images: &Path, hidden: Option<&Hidden>, ahead: &Ahead)
    -> Result<Self::Dump, Cause>;

    /// Stops every task. From here on, dropping the value lets them run again.
    ///
    /// # Errors
    /// What kept a task from stopping; they run then.
    fn freeze(&mut self) -> Result<(), Cause>;

    /// Returns what the frozen tasks have under way that CRIU cannot dump, and that settles when they run.
    ///
    /// # Errors
    /// If that cannot be found out.
    fn unsettled(&self) -> Result<Option<String>, Cause>;

    /// Lets the tasks run again and makes sure of it. A container that was frozen when it came here stays so.
    ///
    /// # Errors
    /// What keeps them from running.
    fn thaw(&mut self) -> Result<(), Cause>;

    /// Gives up the duty to let the tasks run again.
    fn leave_frozen(&mut self);

    /// Kills every task that is left, and returns when they are gone.
    ///
    /// # Errors
    /// What is left.
    fn kill(&mut self) -> Result<(), Cause>;

    /// Returns the files of the container, relative to its root, whose changes leave no trace in their attributes.
    fn untraced_files(&self) -> BTreeSet<Vec<u8>>;
}

/// The tasks of a container, as far as their memory is concerned.
pub trait Tasks: Send {
    /// Returns the processes there are now, by their ids on this host.
    ///
    /// # Errors
    /// If they cannot be listed.
    fn processes(&self) -> Result<Vec<i32>, Cause>;

    /// Makes a tracker of the best kind that the kernel offers.
    ///
    /// # Errors
    /// Why there is none.
    fn tracker(&self) -> Result<Box<dyn DirtyTracker + Send>, Cause>;
}

/// A dump that has been prepared.
pub trait Dumping: Send + 'static {
    /// Dumps the frozen tasks. `decide` is called when everything has been written; it may take its time. What it gets
    /// finds out whether that is true of the tasks, for it may rest on what was read before they were frozen.
    ///
    /// # Errors
    /// What went wrong; the tasks are then as they were before, frozen by whoever froze them.
    fn run(self, decide: impl FnOnce(Confirm<'_>) -> Verdict) -> Result<(), Cause>;
}

/// Fails if what was dumped is not true of the tasks.
pub type Confirm<'d> = &'d dyn Fn() -> Result<(), Cause>;
