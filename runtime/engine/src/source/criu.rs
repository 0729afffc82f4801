//! A container of this host, frozen by its cgroup and dumped by CRIU.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_container::cgroup::FREEZE_LIMIT;
use godwit_container::checkpoint::{CheckpointOptions, Decision, Dump, Outcome, in_flight, preflight};
use godwit_container::{Stored, cgroup};
use godwit_criu::Program;
use godwit_memory::MemoryError;
use godwit_memory::ahead::Ahead;
use godwit_memory::hide::{self, Hidden};
use godwit_memory::tracker::{DirtyTracker, Procfs, SoftDirtyTracker, WpAsyncTracker};
use godwit_protocol::plan::Abilities;
use godwit_sys::freezer::{Freezer, FreezerState, Frozen};
use godwit_sys::pidfd::PidFd;

use super::container::{Checkpointer, Confirm, Dumping, Tasks, Verdict};
use crate::Cause;
use crate::rootfs::shared_writable_paths;

/// A container of this host and its CRIU.
#[derive(Debug)]
pub struct CriuCheckpointer {
    stored: Stored,
    work_path: PathBuf,
    freezer: Freezer,
    was_frozen: bool,
    frozen: Option<Frozen>,
}

impl CriuCheckpointer {
    /// Takes a container; CRIU's logs and scratch files go to `work_path`.
    ///
    /// # Errors
    /// If its cgroup cannot be found.
    pub fn new(stored: Stored, work_path: PathBuf) -> Result<Self, Cause> {
        let freezer = cgroup::freezer(&stored)?;
        let was_frozen = freezer.state()? != FreezerState::Thawed;
        Ok(Self { stored, work_path, freezer, was_frozen, frozen: None })
    }

    /// Takes a container that another worker left frozen; it is this one's to thaw.
    ///
    /// # Errors
    /// If its cgroup cannot be found or frozen.
    pub fn adopt(stored: Stored, work_path: PathBuf) -> Result<Self, Cause> {
        let freezer = cgroup::freezer(&stored)?;
        let frozen = Some(freezer.freeze(FREEZE_LIMIT)?);
        Ok(Self { stored, work_path, freezer, was_frozen: false, frozen })
    }
}

impl Checkpointer for CriuCheckpointer {
    type Dump = Dump;

    fn abilities(&self) -> Abilities {
        let cannot_track =
            self.tasks().and_then(|tasks| tasks.tracker()).err().map(|cause| cause.to_string());
        // Soft-dirty bits are what is left then.
        let cannot_track_running = WpAsyncTracker::new(STOP_LIMIT)
            .err()
            .filter(|_| cannot_track.is_none())
            .map(|error| error.to_string());
        let cannot_hide = hide::probe().err().map(|error| error.to_string());
        Abilities { cannot_track, cannot_track_running, cannot_hide, cannot_serve: None }
    }

    fn tasks(&self) -> Result<Box<dyn Tasks>, Cause> {
        Ok(Box::new(CgroupTasks { stored: self.stored.clone(), freezer: cgroup::freezer(&self.stored)? }))
    }

    fn prepare(&mut self, images: &Path, hidden: Option<&Hidden>, ahead: &Ahead) -> Result<Dump, Cause> {
        let options = CheckpointOptions {
            work_path: Some(self.work_path.clone()),
            tcp_established: true,
            external_unix_sockets: true,
            file_locks: true,
            shortcuts: true,
            // CRIU writes every line by a call of its own, and the container is frozen meanwhile.
            terse_log: !log::log_enabled!(log::Level::Debug),
            hidden: hidden.cloned(),
            ahead: Some(ahead.clone()),
            ..CheckpointOptions::new(images)
        };
        let dump = Dump::prepare(&Program::find()?, &self.stored, &options)?;
        // Twice: a program that changes flags all the time shows it.
        for _ in 0..2 {
            ahead.read(&cgroup::processes(&self.stored)?);
        }
        Ok(dump)
    }

    fn freeze(&mut self) -> Result<(), Cause> {
        if let Some(stopped) = preflight::stopped(&cgroup::processes(&self.stored)?)?.first() {
            return Err(stopped.to_string().into());
        }
        self.frozen = Some(self.freezer.freeze(FREEZE_LIMIT)?);
        Ok(())
    }

    fn unsettled(&self) -> Result<Option<String>, Cause> {
        let waits = |port| format!("a connection to port {port} of the container waits to be accepted");
        Ok(in_flight::unaccepted(&self.stored)?.map(waits))
    }

    fn thaw(&mut self) -> Result<(), Cause> {
        match self.frozen.take() {
            Some(frozen) if self.was_frozen => frozen.commit(),
            Some(frozen) => frozen.thaw()?,
            None => return Ok(()),
        }
        let state = self.freezer.state()?;
        if state == FreezerState::Thawed || self.was_frozen {
            return Ok(());
        }
        Err(format!("its cgroup is still {state:?}").into())
    }

    fn leave_frozen(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.commit();
        }
    }

    fn kill(&mut self) -> Result<(), Cause> {
        let pids = cgroup::processes(&self.stored).unwrap_or_default();
        let processes: Vec<_> = pids.into_iter().filter_map(|pid| PidFd::open(pid).ok()).collect();
        for process in &processes {
            process.send_signal(SIGKILL).ok();
        }
        // A frozen task dies only when it is thawed; with the signal pending it runs no instruction of its own.
        if let Some(frozen) = self.frozen.take() {
            frozen.commit();
        }
        if !processes.is_empty() {
            self.freezer.thaw()?;
        }
        for process in &processes {
            if !process.wait_exit(KILL_LIMIT)? {
                return Err(format!("process {} survives SIGKILL", process.pid()).into());
            }
        }
        Ok(())
    }

    fn untraced_files(&self) -> BTreeSet<Vec<u8>> {
        shared_writable_paths(&cgroup::processes(&self.stored).unwrap_or_default())
    }
}

/// The tasks in the container's cgroup.
#[derive(Debug)]
struct CgroupTasks {
    stored: Stored,
    freezer: Freezer,
}

impl Tasks for CgroupTasks {
    fn processes(&self) -> Result<Vec<i32>, Cause> {
        Ok(cgroup::processes(&self.stored)?)
    }

    fn tracker(&self) -> Result<Box<dyn DirtyTracker + Send>, Cause> {
        let no_wp_async = match WpAsyncTracker::new(STOP_LIMIT) {
            Ok(tracker) => return Ok(Box::new(tracker)),
            Err(error) => error,
        };
        let freezer = Freezer::open(self.freezer.directory())?;
        let halt = move || match freezer.state()? {
            // Frozen by the switchover, which is who thaws it.
            FreezerState::Frozen => Ok(None),
            _ => Ok::<_, MemoryError>(Some(freezer.freeze(FREEZE_LIMIT)?)),
        };
        match Procfs::new(halt) {
            Ok(kernel) => Ok(Box::new(SoftDirtyTracker::new(kernel))),
            Err(no_soft_dirty) => Err(format!("{no_wp_async}; {no_soft_dirty}").into()),
        }
    }
}

impl Dumping for Dump {
    fn run(self, decide: impl FnOnce(Confirm<'_>) -> Verdict) -> Result<(), Cause> {
        let outcome = Self::run(self, |told| match decide(&|| Ok(told.confirm()?)) {
            Verdict::Kill => Decision::Commit,
            Verdict::Release => Decision::Rollback,
        })?;
        match outcome {
            Outcome::Committed | Outcome::RolledBack => Ok(()),
        }
    }
}

/// Time for a task to stop for the injection of its tracker.
const STOP_LIMIT: Duration = Duration::from_millis(500);
const SIGKILL: i32 = 9;
const KILL_LIMIT: Duration = Duration::from_secs(10);
