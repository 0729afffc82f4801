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
//! ```
//! Invariants:
//! - A page is installed from the ledger's `Held`, and is not `Held` afterwards: once each.
//! - What was dropped, unmapped or moved never gets old contents: the kernel refuses to install while such a
//!   change is unread (`EAGAIN`), and from the reading of it until the ledger knows it, nobody installs
//!   (the ledger's lock is held exclusively meanwhile).
//! - A fault is answered whatever the ledger says: with the page, with zeros, or with a wake-up. One that
//!   cannot be answered now is kept.
//! - Complete means that no ledger holds a page. A socket that closed, or a cursor at its end, means nothing.
//!
//! Pages of a forked child are its parent's until either writes: the child gets a copy of the ledger, and
//! nothing is given back to the source before both are done.
//!
//! Sources: CRIU 4.1.1 criu/uffd.c for the protocol; userfaultfd(2), kernel fs/userfaultfd.c and
//! mm/userfaultfd.c (6.18) for the order of events and the meaning of errors.

mod handover;
mod ledger;
mod server;
mod space;
mod store;

use godwit_sys::page_range::PageRange;
use godwit_sys::window::Window;

use crate::Result;

pub use handover::SOCKET_NAME;
pub use ledger::{Claim, Ledger, State};
pub use server::{FaultConfig, FaultServer, Progress};
pub use store::MemoryStore;

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

    /// `pages` are in their task, and in no other's need.
    fn release(&self, pid: i32, pages: PageRange);

    /// Nothing of `pid` is needed any more.
    fn finish(&self, pid: i32);
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
