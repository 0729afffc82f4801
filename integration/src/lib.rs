//! Two containerd nodes on one machine, for system tests and by hand.
//!
//! A [`Bed`] is a pair of nodes, `a` and `b`, joined by a network link. Each node has what makes a host
//! of its own for containerd and the runtime: a network namespace, a mount namespace with a private
//! `/run`, a cgroup namespace rooted in a cgroup of its own in every hierarchy (the same container id may
//! run on both), and a containerd with its own root, state and socket. Nodes share the machine's pid
//! namespace, kernel and `/` otherwise.
//!
//! Flow: [`Bed::up`] makes the nodes and their daemons; [`Node::exec`] and [`Node::ctr`] run commands in
//! one; [`image`] builds images without a network; [`Bed::down`] (or dropping the bed) removes all of it.
//! The binary `testbed` offers the same by hand, `hack/cluster` is a wrapper around it.
//!
//! Invariants: every object made carries the bed's name, so beds run side by side and a bed whose maker
//! died can be removed by name alone; a process is only ever ended because it is in a node's cgroup or
//! was recorded as a node's daemon. Everything here needs root.

#![forbid(unsafe_code)]

pub mod bed;
pub mod cgroup;
pub mod containerd;
pub mod error;
pub mod guests;
pub mod image;
pub mod node;
pub mod process;
pub mod skip;
pub mod suite;
pub mod tools;
pub mod workload;

pub use bed::{Bed, BedOptions, Storage};
pub use containerd::Version;
pub use error::{BedError, Result};
pub use node::{Node, NodeName};
