//! The working half of godwit: threads, sockets and files that execute what `godwit_protocol` decides.
//!
//! ```text
//! link       frames over TCP
//! handover   links from the agent to the target's worker
//! pages      memory on connections of its own
//! rootfs     the writable layer, read and applied
//! source     the worker that gives a container away
//! target     the worker that takes a container
//! usage      what a worker has cost
//! decision   the target's record of what was decided, in a file
//! ```
//! Nothing here knows containerd: what comes from there is given as values.
#![forbid(unsafe_code)]

mod clock;
pub mod decision;
pub mod handover;
pub mod image_dir;
pub mod link;
pub mod pages;
pub mod rootfs;
pub mod source;
pub mod switchover_cost;
pub mod target;
mod text;
pub mod usage;
pub mod warden;

pub use link::{Link, LinkError};

/// An error of a container, of CRIU or of containerd, kept for its text.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;
