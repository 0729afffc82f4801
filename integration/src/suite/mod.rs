//! What the system tests under `tests/` share: cases, lanes, and the hands with which they use a node.
//!
//! ```text
//! Suite ──for each Lane──► Stage (a bed with a Site per node) ──for each Case──► Outcome
//! ```
//! A *lane* is a containerd release together with the name under which containers ask for a runtime. All
//! cases of a lane share one bed, because making one costs more than most cases take, and run side by side on
//! it: a case therefore names its containers by [`Site::id`], and leaves every global setting of a node alone
//! unless it is marked as [`Case::alone`]. After the cases of a lane, both nodes must have what they had before
//! them, no more and no less ([`footprint`]).
//!
//! A case is a function that returns an error or panics when what it claims does not hold. Nothing here waits
//! for a fixed time: everything is polled for, with limits that only a failure reaches.

mod arguments;
pub mod container;
pub mod events;
pub mod footprint;
pub mod harness;
pub mod job;
pub mod lane;
pub mod migration;
pub mod options;
pub mod pairs;
pub mod rpc;
pub mod site;
pub mod trouble;

pub use container::{Container, Plan};
pub use harness::{Case, Suite, run};
pub use job::{Done, Job};
pub use lane::{Lane, Runtime};
pub use migration::Answer;
pub use rpc::{Refusal, Rpc};
pub use site::{Site, Stage};
pub use trouble::{Outcome, Trouble, await_that, skip};
