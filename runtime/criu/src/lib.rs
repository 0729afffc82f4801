//! One CRIU process, driven over its RPC socket.
//!
//! godwit starts `criu swrk FD` as a child, sends it one request over a socket pair, answers its notifications
//! and reads its response. This crate is that conversation and nothing else: it knows requests, options,
//! notifications and logs, and neither containers nor migrations.
//!
//! ```text
//! Program::find --> Session::start --> (version asked, process idle) --> send(Request)
//!                                                                           |
//!         finish <-- Response <-- next_message <--> answer(accept) <-- Notification
//! ```
//! - [`program`]: the binary and its version
//! - [`options`]: what a request carries
//! - [`session`]: the process and the conversation
//! - [`notification`]: the points at which CRIU asks whether to go on
//! - [`page_images`]: whether a checkpoint's pages are all there
//! - [`failure`]: errors, with the last error lines of CRIU's log
//! - `simulator` (feature of the same name): the other end of the conversation, for tests without root
//!
//! The generated messages are those of the crate `rust-criu`; its own session is not used, for it lacks
//! requests, options and answers that are needed here.

#![forbid(unsafe_code)]

pub mod failure;
pub mod log_tail;
pub mod notification;
pub mod options;
pub mod page_images;
pub mod program;
pub mod session;
#[cfg(any(test, feature = "simulator"))]
pub mod simulator;

pub use failure::{CriuError, Phase, Result};
pub use notification::{Notification, Script};
pub use options::{CgroupsMode, NetworkLock, Options};
pub use program::{Program, Version};
/// The generated messages of CRIU's `rpc.proto`.
pub use rust_criu::rust_criu_protobuf::rpc;
pub use session::{Features, Message, Request, Response, Session, Setup};
