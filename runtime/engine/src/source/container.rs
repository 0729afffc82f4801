//! What the source does with a container.

use std::collections::BTreeSet;
use std::path::Path;

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

    /// Prepares a dump into the directory `images` while the container runs, and touches no task.
    ///
    /// # Errors
    /// What is in the way of a dump.
    fn prepare(&mut self, images: &Path) -> Result<Self::Dump, Cause>;

    /// Stops every task. From here on, dropping the value lets them run again.
    ///
    /// # Errors
    /// What kept a task from stopping; they run then.
    fn freeze(&mut self) -> Result<(), Cause>;

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

/// A dump that has been prepared.
pub trait Dumping: Send + 'static {
    /// Dumps the frozen tasks. `decide` is called when everything has been written; it may take its time.
    ///
    /// # Errors
    /// What went wrong; the tasks are then as they were before, frozen by whoever froze them.
    fn run(self, decide: impl FnOnce() -> Verdict) -> Result<(), Cause>;
}
