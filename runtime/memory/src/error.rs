//! The error of this crate.

use std::path::PathBuf;

use godwit_sys::SysError;

/// Why memory could not be followed, read, hidden or served.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A kernel file could not be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// A kernel file holds what this code cannot read.
    #[error("{path}: unexpected line '{line}'")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line.
        line: String,
    },
    /// The kernel, or the rights this process has, do not allow it.
    #[error("{what} is not available: {reason}")]
    Unavailable {
        /// What was to be used.
        what: &'static str,
        /// What is missing.
        reason: String,
    },
    /// CRIU said something on the lazy-pages socket that it should not.
    #[error("criu's lazy-pages socket: {what}")]
    Protocol {
        /// What came.
        what: String,
    },
    /// Pages could not be installed in a restored task.
    #[error("process {pid}: {pages} pages at {address:x} not installed: {reason}")]
    NotInstalled {
        /// The process, as CRIU named it.
        pid: i32,
        /// First address.
        address: u64,
        /// How many.
        pages: u64,
        /// Why.
        reason: String,
    },
    /// A plan names the same process twice, or pages its source does not have.
    #[error("process {pid}: {what}")]
    Plan {
        /// The process.
        pid: i32,
        /// What is wrong.
        what: String,
    },
    /// A thread of ours ended early.
    #[error("the {name} thread panicked")]
    Thread {
        /// Its name.
        name: &'static str,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, MemoryError>;

impl MemoryError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { path: path.into(), source }
    }
}
