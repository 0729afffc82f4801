//! The system calls of godwit that the standard library and `nix` do not offer safely.
//!
//! Every `unsafe` block of the project lives in this crate, each with the invariant it relies on. The modules
//! know processes, file descriptors, mounts and the freezer; they know nothing about containers, CRIU or
//! migrations. Everything here blocks, and nothing here starts a thread.
//!
//! - [`spawn`]: children that inherit chosen descriptors and may live in a mount namespace of their own
//! - [`pidfd`]: signal and wait for a process without racing against the reuse of its id
//! - [`fdpass`]: descriptors through unix sockets
//! - [`freezer`]: freeze a cgroup, with a guard that thaws
//! - [`mountns`], [`mount`]: private mount namespaces, mounts undone on drop
//! - [`netns`]: the loopback device of a namespace
//! - [`keyring`], [`signals`]: what a container's process must not inherit
//! - [`terminal`]: window sizes
//! - [`process`]: subreaper, groups, children

pub mod error;
pub mod fdpass;
pub mod freezer;
pub mod keyring;
pub mod memfd;
pub mod mount;
pub mod mountns;
pub mod netns;
pub mod pidfd;
pub mod process;
pub mod signals;
pub mod spawn;
pub mod terminal;

pub use error::{Result, SysError};
