//! Containers by the OCI runtime specification, on top of libcontainer.
//!
//! One function per verb of the runtime's command line, each over a [`Store`] (the state root) or a
//! [`Stored`] container. libcontainer sets up namespaces, mounts, cgroups and processes; this crate decides
//! what a container is, signals, freezes and deletes it, and repairs what libcontainer leaves undone
//! (`executor`). It knows nothing about command lines, shims, or where a container's memory travels.
//!
//! Call it from a process with one thread: libcontainer forks without the C library's knowledge, changes
//! directory, makes the process undumpable and writes its OOM score. One process per verb pays for that.
//!
//! - [`create`], [`lifecycle`], [`exec`]: the verbs that change something
//! - [`state`]: what is on disk, and the status derived from it
//! - [`checkpoint`], [`restore`]: the container into CRIU's images and out of them
//! - [`update`]: new limits
//! - [`report`], [`stats`]: what the verbs print
//! - [`cgroup`], [`trace`]: what the verbs share

#![forbid(unsafe_code)]

mod bare_cgroups;
pub mod cgroup;
pub mod checkpoint;
pub mod create;
mod devices;
pub mod error;
pub mod exec;
mod executor;
mod failure;
pub mod lifecycle;
mod process;
pub mod report;
pub mod restore;
pub mod state;
pub mod stats;
pub mod trace;
pub mod update;

pub use error::{ContainerError, Result};
pub use state::{Status, Store, Stored};
