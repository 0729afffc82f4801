//! The error of this crate.

use std::path::PathBuf;

use nix::errno::Errno;

/// What went wrong in a system call or in the kernel's answer to it.
#[derive(Debug, thiserror::Error)]
pub enum SysError {
    /// A system call failed.
    #[error("{call}: {errno}")]
    Call {
        /// Name of the call, with its argument where that helps.
        call: &'static str,
        /// What the kernel answered.
        #[source]
        errno: Errno,
    },
    /// Reading or writing a kernel file failed.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// A mount or unmount failed.
    #[error("mount {path}: {errno}")]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        errno: Errno,
    },
    /// The directory is no cgroup that can be frozen.
    #[error("no freezer in {path} (neither freezer.state nor cgroup.freeze)")]
    NoFreezer {
        /// The directory that was tried.
        path: PathBuf,
    },
    /// The cgroup did not reach the frozen state in time; it has been thawed again.
    #[error("cgroup {path} not frozen after {limit_ms} ms")]
    NotFrozen {
        /// The cgroup's directory.
        path: PathBuf,
        /// How long it was given.
        limit_ms: u128,
    },
    /// The process does not exist (any more).
    #[error("process {pid}: no such process")]
    NoProcess {
        /// The id asked for.
        pid: i32,
    },
    /// A peer closed the socket where a message was due.
    #[error("peer closed the socket")]
    Closed,
    /// A message was longer than its buffer, or carried more descriptors than asked for.
    #[error("message exceeds {limit_bytes} bytes or carries too many descriptors")]
    Oversized {
        /// Size of the buffer.
        limit_bytes: usize,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, SysError>;

impl SysError {
    pub(crate) fn call(call: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Call { call, errno }
    }

    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { path: path.into(), source }
    }
}
