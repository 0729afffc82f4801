//! The working half of godwit: threads, sockets and files that execute what `godwit_protocol` decides.
//!
//! ```text
//! link       frames over TCP
//! handover   a link from the agent to the target's worker
//! decision   the target's record of what was decided, in a file
//! ```
//! Nothing here knows containerd: what comes from there is given as values.
#![forbid(unsafe_code)]

pub mod decision;
pub mod handover;
pub mod link;

pub use link::{Link, LinkError};
