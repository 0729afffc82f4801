//! The pages of restored tasks: served when they are missed, filled in behind the tasks' backs.
//!
//! `criu restore --lazy-pages` expects a server at `lazy-pages.socket` in its working directory and hands it
//! the userfaultfd of each task; [`FaultServer`] is that server.
//! ```text
//! criu ── pid, userfaultfd … "restored" ──► event thread ◄── faults, fork, remap, remove, unmap
//!                                               │ page in need        ▲ exclusive: reading events
//!                                             Ledger  (per address space, [`ledger`])
//!                                               │ next pages          ▼ shared: installing pages
//!                                          fill threads ──UFFDIO_COPY──► tasks      pages from a [`PageSource`]
//!
//! a page that is remote:  fault ── [`Requester`] ──► the other machine ── … ──► [`FaultServer::bring`]
//!                              into the task at once, or, where that cannot be, to the page source and the fill
//! ```
//! Invariants:
//! - A page is installed from the ledger's `Held`, or as it arrives, and is `Installed` afterwards: once each.
//! - What was dropped, unmapped or moved never gets old contents, also when they arrive afterwards: the kernel
//!   refuses to install while such a change is unread (`EAGAIN`), and from the reading of it until the ledger knows
//!   it, nobody installs (the ledger's lock is held exclusively meanwhile).
//! - A fault is answered whatever the ledger says: with the page, with zeros, or with a wake-up, from the moment
//!   CRIU hands the task over: it, too, touches pages. One that cannot be answered now is kept.
//! - A remote page is asked for at most once, and what arrives reaches every space that came of the process.
//! - Complete means that no ledger holds a page or misses a remote one. A socket that closed, or a cursor at its
//!   end, means nothing.
//!
//! Pages of a forked child are its parent's until either writes: the child gets a copy of the ledger, and
//! nothing is given back to the source before both are done.
//!
//! Closing a userfaultfd makes every later fault read zeros. As long as tasks miss pages, the end of the server's
//! process would therefore destroy them without a sign: a [`Keeper`] in another process holds duplicates, so that
//! such tasks hang instead, and can be ended.
//!
//! Latency of a fault is counted from the reading of its event to the answer. CRIU makes the descriptors without
//! `UFFD_FEATURE_THREAD_ID`, and features cannot be added, so which threads wait is found by samples ([`Waiters`]).
//!
//! Sources: CRIU 4.2.1 criu/uffd.c for the protocol; userfaultfd(2), kernel fs/userfaultfd.c and
//! mm/userfaultfd.c (6.18) for the order of events and the meaning of errors.

mod events;
mod handover;
mod latency;
mod ledger;
mod origin;
mod server;
mod space;
mod store;
mod waiters;

use godwit_sys::SysError;
use godwit_sys::arena::Arena;
use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::userfaultfd::{Features, Userfaultfd};
use godwit_sys::window::Window;

use std::os::fd::OwnedFd;

use crate::{MemoryError, PageSet, Result};

pub use handover::SOCKET_NAME;
pub use latency::Latency;
pub use ledger::{Arrived, Claim, Lacking, Ledger, State};
pub use server::{FaultConfig, FaultServer, Progress, prefer_this_thread};
pub use store::MemoryStore;
pub use waiters::{ThreadWaited, Waiters};

/// Where contents of pages come from. A page is named by the process as CRIU names it and the address it had
/// at the source, wherever it has moved since.
pub trait PageSource: Send + Sync {
    /// Hands the contents of `pages` to `install`. `pages` are ones the server was told of, and never cross a
    /// multiple of [`LEND_BYTES`].
    ///
    /// # Errors
    /// [`crate::MemoryError`] when they are not there, or what `install` returned.
    fn lend(&self, pid: i32, pages: PageRange, install: &mut dyn FnMut(Lent<'_>) -> Result<()>)
    -> Result<()>;

    /// Takes the contents of pages that came and could not go into their task at once.
    ///
    /// # Errors
    /// [`crate::MemoryError`] when there is no room.
    fn keep(&self, pid: i32, pages: PageRange, contents: &[u8]) -> Result<()>;

    /// `pages` are in their task, and in no other's need.
    fn release(&self, pid: i32, pages: PageRange);

    /// Nothing of `pid` is needed any more.
    fn finish(&self, pid: i32);
}

/// Says why restored tasks could not be served here.
///
/// # Errors
/// [`MemoryError::Unavailable`].
pub fn probe() -> Result<()> {
    let unavailable = |error: SysError| MemoryError::Unavailable {
        what: "serving page faults (userfaultfd with its events)",
        reason: error.to_string(),
    };
    let arena = Arena::map(PAGE_BYTES)?;
    let faults = Userfaultfd::for_arena(&arena).map_err(unavailable)?;
    let events = Features::EVENT_FORK
        .with(Features::EVENT_REMAP)
        .with(Features::EVENT_REMOVE)
        .with(Features::EVENT_UNMAP);
    faults.enable(events).map_err(unavailable)?;
    Ok(())
}

/// Says why restored tasks in a user namespace could not be served here. CRIU makes a task's userfaultfd as the task, which
/// has no rights outside its namespace.
///
/// # Errors
/// As [`probe`].
pub fn probe_in_user_namespace() -> Result<()> {
    probe()?;
    let allowed = std::fs::read_to_string(UNPRIVILEGED).unwrap_or_default();
    if allowed.trim() == "1" {
        return Ok(());
    }
    Err(MemoryError::Unavailable {
        what: "serving page faults in a user namespace",
        reason: "vm.unprivileged_userfaultfd is not 1".to_owned(),
    })
}

/// Whether tasks without CAP_SYS_PTRACE may have faults of the kernel in their memory handled.
const UNPRIVILEGED: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// What the server has to know of an address space before CRIU hands it over. Pages in neither set are zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpacePlan {
    /// Pages whose contents the [`PageSource`] has.
    pub held: PageSet,
    /// Pages whose contents are still to come; one that is in both sets is to come, and what is there is old.
    pub remote: PageSet,
}

/// Whoever can get remote pages.
pub trait Requester: Send + Sync {
    /// Asks for `pages` of `space`, which somebody waits for; [`FaultServer::bring`] is called when they come, or
    /// [`FaultServer::arrived`] when they are in the source. May not wait for them, nor for anything long: faults are
    /// answered by the same thread. Where nobody can be asked now, [`FaultServer::lacking`] tells later what is to be
    /// asked for again.
    fn request(&self, space: i32, pages: PageRange);

    /// Nothing of `space` is needed any more: it is complete, or has exited.
    fn finished(&self, space: i32);
}

/// Whoever keeps duplicates of userfaultfds, in another process, until their tasks have all pages.
pub trait Keeper: Send + Sync {
    /// Keeps `faults`, of an address space that came of process `pid`. `key` is a number of its own for each.
    ///
    /// # Errors
    /// Why it cannot be kept. It is served all the same.
    fn keep(&self, key: u64, pid: i32, faults: OwnedFd) -> Result<()>;

    /// The space has all its pages, or has exited. The duplicate has to be closed now: as long as it is open, nobody
    /// answers for pages that the tasks touch for the first time, nor for changes of their memory.
    fn release(&self, key: u64);
}

/// Contents of pages, lent for one installation.
#[derive(Debug, Clone, Copy)]
pub enum Lent<'a> {
    /// Bytes.
    Bytes(&'a [u8]),
    /// Bytes of a window from this offset on; the kernel takes them from there.
    Window(&'a Window, u64),
}

/// See [`PageSource::lend`].
pub const LEND_BYTES: u64 = 2 << 20;
