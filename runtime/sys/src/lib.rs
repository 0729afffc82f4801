//! The system calls of godwit that the standard library and `nix` do not offer safely.
//!
//! Every `unsafe` block of the project lives in this crate, each with the invariant it relies on. The modules
//! know processes, file descriptors, mounts and the freezer; they know nothing about containers, CRIU or
//! migrations. Everything here blocks, and nothing here leaves a thread behind.
//!
//! - [`spawn`]: children that inherit chosen descriptors and may live in a mount namespace of their own
//! - [`pidfd`]: signal and wait for a process without racing against the reuse of its id
//! - [`fdpass`]: descriptors through unix sockets
//! - [`freezer`]: freeze a cgroup, with a guard that thaws
//! - [`device_filter`]: what devices a cgroup's processes may use, on version 2
//! - [`mountns`], [`mount`]: private mount namespaces, mounts undone on drop
//! - [`netns`]: the loopback device of a namespace
//! - [`keyring`], [`signals`]: what a container's process must not inherit
//! - [`terminal`]: window sizes
//! - [`fork`]: fork(2) where it is sound
//! - [`process`]: subreaper, groups, children
//! - [`userfaultfd`], [`pagemap_scan`]: page faults and written pages of an address space
//! - [`inject`], [`foreign_memory`], [`foreign_fd`]: a userfaultfd, memory and descriptors of another process
//! - [`seccomp_notify`], [`foreign_scan`]: a page scan of a child, answered in the kernel's place
//! - [`seccomp_deny`]: system calls refused, to see how a program does without them
//! - [`arena`], [`window`], [`page_range`]: memory that the kernel changes, memory it copies from, addresses

pub mod arena;
pub mod device_filter;
pub mod error;
pub mod fdpass;
pub mod foreign_fd;
pub mod foreign_memory;
pub mod foreign_scan;
pub mod fork;
pub mod freezer;
pub mod inherited;
pub mod inject;
pub mod keyring;
pub mod memfd;
pub mod mount;
pub mod mountns;
pub mod netns;
pub mod page_range;
pub mod pagemap_scan;
pub mod pidfd;
pub mod process;
pub mod seccomp_deny;
pub mod seccomp_notify;
pub mod signals;
pub mod spawn;
pub mod terminal;
pub mod userfaultfd;
pub mod window;

pub use error::{Result, SysError};
