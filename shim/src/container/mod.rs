//! One container and the actor that owns it.
//!
//! ```text
//!            questions, signals (State Wait Pids Stats Kill ResizePty CloseIO) ──► answered at once
//! handlers ─┤                                                                        ▲ reads
//!            verbs (Start Delete Pause Resume Update Checkpoint) ──► mailbox ──► actor task ──► state
//!                                                                                    ▲ writes
//! reaper ── exits ───────────────────────────────────────────────────────────────────┘
//! ```
//! The actor runs one verb at a time to its end, whether or not the client that asked still waits: ttrpc
//! drops a handler when its client goes away, and half a checkpoint is worse than one nobody waits for. The
//! state is behind a lock that is never held across an await, so a verb that takes minutes delays no question
//! and no signal.
//!
//! Order of events: a process's exit is published after its start, the init's after those of all others.
//!
//! ```text
//! Created ─start─► Running ⇄ Paused        (Restorable is Created from an image: there is no process yet)
//!    │                └──────┴── exit ──► Stopped ── delete ──► gone
//!    └── exit ──────────────────────────────┘
//! ```

mod actor;
mod checkpoint;
mod create;
mod exits;
mod incoming;
mod lifecycle;
mod migration;
mod questions;
mod restore;
#[cfg(test)]
mod tests;
mod thaw;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicI32},
    time::SystemTime,
};

use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
};

use crate::{
    bundle::Record,
    cgroup::{Cgroup, OomWatch},
    error::{Result, ShimError},
    events::Publisher,
    reaper::Reaper,
    runtime::Runtime,
    stdio::{Address, Owner, Streams},
};

pub(crate) use actor::Request;
pub(crate) use create::CreateRequest;
pub(crate) use migration::MigrationState;

use restore::Image;

/// What does not belong to one container.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// The namespace all containers of this shim are in.
    pub(crate) namespace: String,
    /// containerd's gRPC socket.
    pub(crate) containerd: String,
    /// The shim's own socket, as `unix://…`.
    pub(crate) socket: String,
    /// Where each container leaves a file with that address.
    pub(crate) addresses: PathBuf,
    /// The program of migration workers.
    pub(crate) worker: PathBuf,
    /// Collects children.
    pub(crate) reaper: Arc<Reaper>,
    /// Takes events.
    pub(crate) events: Publisher,
}

/// A container; see the module.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    shared: Shared,
    runtime: Arc<dyn Runtime>,
    settings: Settings,
    mailbox: mpsc::UnboundedSender<Request>,
    /// Signalled when an exec ends or fails to start.
    exec_ended: Notify,
    /// Process group of a restore or incoming migration while it runs, else 0.
    restoring: Arc<AtomicI32>,
    /// Whether all of its memory is here; false while a migration fills it.
    whole: watch::Sender<bool>,
    state: Mutex<State>,
}

/// What was decided when the container was created.
#[derive(Debug, Clone)]
struct Settings {
    rootfs: Option<PathBuf>,
    io_uid: u32,
    io_gid: u32,
    no_pivot: bool,
    no_new_keyring: bool,
    /// Where CRIU works in a restore.
    work: PathBuf,
    /// Whether the kernel ends the other processes with the init.
    own_pids: bool,
    /// Which runtime, and where it keeps its state.
    record: Record,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    init: Process,
    execs: HashMap<String, Process>,
    /// Execs that run or are being started.
    running_execs: usize,
    /// The init's exit was collected, though it may not be published yet.
    init_ended: bool,
    /// A start of the init is under way: its exit has to wait for the event.
    starting: bool,
    /// An exit that waits for `starting`.
    deferred_exit: Option<crate::reaper::Exit>,
    cgroup: Option<Cgroup>,
    oom: Option<OomWatch>,
    migration: Option<MigrationState>,
    /// A migration has lifted the client's pause, so its Resume will find nothing to do.
    resume_owed: bool,
    /// Stays with the worker that fills the container's memory.
    companion: Option<JoinHandle<()>>,
}

/// Where a container stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Created,
    Restorable(Image),
    Running,
    Pausing,
    Paused,
    Stopped,
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Created | Self::Restorable(_) => "created",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// The init, or a process beside it.
#[derive(Debug)]
struct Process {
    address: Address,
    /// 0 before it is started.
    pid: i32,
    ended: watch::Sender<Option<Ended>>,
    streams: Option<Streams>,
    /// OCI process as JSON; empty for the init.
    spec: Vec<u8>,
}

/// The end of a process, as Wait tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) status: u32,
    pub(crate) at: Option<SystemTime>,
}

impl Process {
    fn new(address: Address, spec: Vec<u8>) -> Self {
        Self { address, pid: 0, ended: watch::Sender::new(None), streams: None, spec }
    }

    fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    fn end(&self, status: u32, at: Option<SystemTime>) {
        self.ended.send_replace(Some(Ended { status, at }));
    }
}

impl Container {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is a plain assignment: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owner(&self, process: &str) -> Owner {
        Owner {
            namespace: self.shared.namespace.clone(),
            id: process.to_owned(),
            uid: self.settings.io_uid,
            gid: self.settings.io_gid,
            reaper: Arc::clone(&self.shared.reaper),
        }
    }

    /// Refuses `verb` while a migration runs.
    fn not_migrating(&self, state: &State, verb: &'static str) -> Result<()> {
        match &state.migration {
            Some(migration) if migration.is_running() => {
                Err(ShimError::Migrating { verb, id: self.id.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Refuses `verb` at once while a migration runs or its outcome is not known; the actor, which refuses it as well,
    /// answers only when it has an outcome.
    pub(crate) fn refuse_while_migrating(&self, verb: &'static str) -> Result<()> {
        self.not_migrating(&self.lock(), verb)
    }

    /// Hands a request to the actor.
    pub(crate) fn ask(&self, request: Request) -> Result<()> {
        self.mailbox.send(request).map_err(|_| ShimError::Deleted { id: self.id.clone() })
    }
}

impl State {
    fn new(phase: Phase, init: Process) -> Self {
        Self {
            phase,
            init,
            execs: HashMap::new(),
            running_execs: 0,
            init_ended: false,
            starting: false,
            deferred_exit: None,
            cgroup: None,
            oom: None,
            migration: None,
            resume_owed: false,
            companion: None,
        }
    }

    /// Returns the init (for an empty name) or the process of that name.
    fn process(&self, exec_id: &str) -> Result<&Process> {
        if exec_id.is_empty() {
            return Ok(&self.init);
        }
        self.execs.get(exec_id).ok_or_else(|| ShimError::NoProcess { exec_id: exec_id.to_owned() })
    }

    fn process_mut(&mut self, exec_id: &str) -> Result<&mut Process> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs.get_mut(exec_id).ok_or_else(|| ShimError::NoProcess { exec_id: exec_id.to_owned() })
    }
}
