//! The memory of a container's processes: followed, read, hidden from CRIU, and served to the restored ones.
//!
//! ```text
//! source:  tracker ─dirty pages─► reader ─bytes─►  (link)        hide: what the tracker answers for, criu dump
//!                                                                      does not see
//! target:  (link) ─bytes─► fault::store ─► fault::server ─userfaultfd─► restored tasks
//! ```
//! - [`tracker`]: which pages were written since they were last asked for, while the tasks run
//! - [`reader`]: the contents of pages of another process, zeros told apart
//! - [`maps`]: what is mapped, and what of it CRIU restores lazily
//! - [`hide`]: a child, criu, to which given pages look empty
//! - [`ahead`]: what criu has to know of the mappings, read before the freeze
//! - [`fault`]: the pages of restored tasks, as they ask for them and behind their backs
//! - [`page_set`]: sets of pages
//!
//! Nothing here knows a network, a round or a phase, and nothing is written to a disk. All system calls are
//! `godwit_sys`'s. An address belongs to the process it is given together with.
#![forbid(unsafe_code)]

pub mod ahead;
pub mod error;
pub mod fault;
pub mod hide;
pub mod maps;
pub mod page_set;
pub mod reader;
pub mod tracker;

pub use error::{MemoryError, Result};
pub use godwit_sys::page_range::{PAGE_BYTES, PageRange};
pub use page_set::PageSet;
