//! The target's half: everything containerd has to hold before a container can come in.
//!
//! ```text
//! preflight ──► lease ──► blobs ──► image record ──► layers unpacked ──► snapshot ──► record ──► FIFOs, task
//! ```
//! [`Arrival`] makes them in this order and notes each in a journal. Unless the container then runs here, they are
//! undone in the opposite order, by [`Arrival`] or, if the agent died, by the next one ([`LeftOver`]): a migration that
//! fails leaves the target as it was.

mod arrival;
mod image;
mod journal;
mod observe;
mod paths;
pub mod preflight;

#[cfg(test)]
pub(crate) use preflight::sample_offer;

pub use arrival::{Arrival, IncomingTask};
pub use journal::{LeftOver, end_task_of};
pub use observe::observe;
pub use preflight::{Observed, judge};
