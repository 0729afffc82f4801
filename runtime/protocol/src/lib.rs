//! The pure half of godwit: what both ends of a migration say and decide, and nothing that touches the world.
//!
//! There is no I/O here, no clock, no thread and no `unsafe`: time is an argument, bytes are slices, effects
//! are returned as values for `godwit-engine` to execute.
//!
//! ```text
//! request   godwit://host:port?mode=native&…    what a client asks for
//! phase     where a migration stands            labels of logs, progress and failures
//! worker    what a migration worker tells the shim, and is told by it
//! report    what came of it, with the parts of the downtime
//! offer     the container and the hosts, as they are told to each other before anything moves
//! wire      hello, frames and messages of the link
//! rootfs    the writable layer as it travels
//! fate      the target's record of what was decided, and its answer to the source's question
//! source    what the source does next          state machine, oracle table beside it
//! target    what the target's worker does next
//! failure   what went wrong, on which side, and where the container is now
//! ```
#![forbid(unsafe_code)]

pub mod failure;
pub mod fate;
pub mod offer;
pub mod phase;
pub mod plan;
pub mod policy;
pub mod report;
pub mod request;
pub mod rootfs;
pub mod source;
pub mod target;
#[cfg(test)]
mod transitions;
pub mod wire;
pub mod worker;

pub use failure::{Failure, Fate, Side};
pub use phase::Phase;
pub use report::Report;
pub use request::{MigrationId, MigrationRequest, Mode};
