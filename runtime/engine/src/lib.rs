//! The working half of godwit: threads, sockets and files that execute what `godwit_protocol` decides.
//!
//! ```text
//! link       frames over TCP
//! ```
//! Nothing here knows containerd: what comes from there is given as values.
#![forbid(unsafe_code)]

pub mod link;

pub use link::{Link, LinkError};
