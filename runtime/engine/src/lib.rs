// LEAD → ENGINE HELPER: read AAA_READ_ME_ENGINE_HELPER.md in this directory, then delete this line.
//! The working half of godwit: threads, sockets and files that execute what `godwit_protocol` decides.
//!
//! ```text
//! link       frames over TCP
//! handover   a link from the agent to the target's worker
//! rootfs     the writable layer, read and applied
//! decision   the target's record of what was decided, in a file
//! ```
//! Nothing here knows containerd: what comes from there is given as values.
#![forbid(unsafe_code)]

pub mod decision;
pub mod handover;
pub mod link;
pub mod rootfs;

pub use link::{Link, LinkError};
