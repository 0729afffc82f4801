//! The source's worker: offers the container, copies its files, freezes and dumps it, commits, and cleans up.
//!
//! ```text
//! connect thread ──► Link          receive thread: link ──► Accepted, Ready, Received, Restored, Resumed, Abort …
//! bulk threads   ──► blobs; live pass; final pass and images            │
//! memory thread  ──► scans, rounds, the plan, pages that are missed     │
//! dump thread    ──► CRIU ──► Dumped … waits for the verdict            │
//! ask thread     ──► the agent's answer about the fate, or a new link   ▼
//! commands ──► Cancel, Release ──────────────────────────────► one loop: protocol::Source
//!                 link, container, threads, events for the shim ◄───────┘ actions
//! ```
//! One thread steps the machine and executes its actions; the others only report. The worker decides nothing: what
//! to do next is `godwit_protocol::source`.
//!
//! Invariants: the container is thawed on every way out, except when the fate is unknown, by a guard that lives
//! from the freeze to the verdict; CRIU holds the dumped tasks until the verdict and lets them go if its worker
//! dies; images live in a directory that dies with the worker.

mod ask;
mod blobs;
mod bulk;
mod container;
mod criu;
mod images;
mod listen;
mod memory;
mod pending;
mod progress;
mod rejoin;
mod tell;
mod work;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use godwit_protocol::offer::Offer;
use godwit_protocol::source::{End, Settings, Source};
use godwit_protocol::worker::{Command, Event};
use godwit_protocol::{MigrationId, MigrationRequest};

pub use container::{Checkpointer, Confirm, Dumping, Tasks, Verdict};
pub use criu::CriuCheckpointer;

use self::worker::Worker;
use crate::Cause;
use crate::clock::Clock;

/// What the worker is to do.
#[derive(Debug, Clone)]
pub struct Order {
    /// The container's id.
    pub id: String,
    /// Where to, and how.
    pub request: MigrationRequest,
    /// The migration's name.
    pub migration: MigrationId,
    /// Where the container's root is mounted.
    pub rootfs: PathBuf,
    /// What a switchover costs beside the pages, from earlier moves on this host.
    pub fixed: Duration,
}

/// The container as the rest of its host knows it.
pub trait Origin: Send + Sync {
    /// Returns everything the target has to know.
    ///
    /// # Errors
    /// What is in the way.
    fn offer(&self) -> Result<Offer, Cause>;

    /// Opens a blob of the container's image.
    ///
    /// # Errors
    /// If there is none of that digest.
    fn open_blob(&self, digest: &str) -> Result<Box<dyn Blob + '_>, Cause>;

    /// Removes what is left of the container here, after it has moved. Called at most once.
    ///
    /// # Errors
    /// What could not be removed.
    fn clean_up(&self) -> Result<(), Cause>;
}

/// A blob being read.
pub trait Blob {
    /// Returns the next bytes; `None` at the end.
    ///
    /// # Errors
    /// If it cannot be read on.
    fn next_piece(&mut self) -> Result<Option<Vec<u8>>, Cause>;
}

/// Runs a migration to its end.
///
/// `commands` that end mean that nobody listens any more: before COMMIT that is a cancellation, afterwards a
/// release. `tell` gets what the shim is to know, in order.
pub fn run<C: Checkpointer>(
    order: Order,
    origin: Arc<dyn Origin>,
    container: C,
    commands: Receiver<Command>,
    tell: impl FnMut(&Event),
) -> End {
    let clock = Clock::start();
    let Order { request, fixed, .. } = &order;
    let settings = Settings { dry_run: request.dry_run, limits: request.limits, fixed: *fixed };
    Worker::new(order, origin, container, clock, tell).run(commands, Source::begin(settings, clock.now()))
}

/// Finishes a migration whose worker died after it had said that it commits.
///
/// `container` is the one that worker left frozen.
pub fn resolve<C: Checkpointer>(
    order: Order,
    origin: Arc<dyn Origin>,
    container: C,
    commands: Receiver<Command>,
    tell: impl FnMut(&Event),
) -> End {
    let clock = Clock::start();
    Worker::new(order, origin, container, clock, tell).run(commands, Source::resolve(clock.now()))
}
