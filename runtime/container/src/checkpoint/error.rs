//! What can go wrong in a checkpoint or restore.

use std::io;
use std::path::PathBuf;

use godwit_criu::CriuError;
use godwit_memory::MemoryError;
use godwit_sys::SysError;

use crate::error::ContainerError;
use crate::state::Status;

/// Result of checkpoint and restore.
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// A failed checkpoint or restore.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The container, apart from CRIU.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// CRIU, or the conversation with it.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// Keeping memory from CRIU.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A system call.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The container has no processes to checkpoint, or none that run yet.
    #[error("container cannot be checkpointed in {status} state")]
    Status {
        /// What it is instead of running or paused.
        status: Status,
    },
    /// The kernel does not tell which TCP sockets listen.
    #[error(
        "cannot find the connections that wait to be accepted (sock_diag; is the kernel module tcp_diag there?)"
    )]
    Listeners {
        /// What the kernel answered.
        source: io::Error,
    },
    /// An option that needs a kernel which can tell the pages that were written.
    #[error(
        "{option} needs soft-dirty memory tracking, which this kernel lacks (CONFIG_MEM_SOFT_DIRTY); \
         checkpoint without --{option}"
    )]
    TrackingUnsupported {
        /// The option, `pre-dump` or `parent-path`.
        option: &'static str,
    },
    /// The parent images cannot be used.
    #[error("parent path {path} {reason}")]
    ParentPath {
        /// The path asked for.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A directory could not be made or used.
    #[error("directory {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A path holds bytes that are no text.
    #[error("path {path} is not valid UTF-8, which criu's requests need")]
    NotText {
        /// The path.
        path: PathBuf,
    },
    /// A file of the images or of `/proc` could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The directory holds no checkpoint.
    #[error("{path} holds no checkpoint: {reason}")]
    NoCheckpoint {
        /// The image directory.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A namespace the spec names cannot be used.
    #[error("{kind} namespace {path}: {reason}")]
    Namespace {
        /// Its kind, as in `/proc/PID/ns`.
        kind: &'static str,
        /// The path in the spec.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The terminal could not be handed over.
    #[error("console socket {path}: {reason}")]
    Console {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A mount point in the root file system could not be made.
    #[error("mount point {path}: {source}")]
    MountPoint {
        /// The path in the container.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// What CRIU was told of a process had changed by the time it was frozen.
    #[error(
        "process {pid} changed the flags of its memory (by madvise or mlock) just before it was frozen: migrate it again, \
         and it will be frozen a little longer instead"
    )]
    Changed {
        /// The process.
        pid: i32,
    },
    /// The caller decided against the restored container; it has been removed again.
    #[error("restore abandoned, the restored processes were killed")]
    Abandoned,
}

impl CheckpointError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { path: path.into(), source }
    }
}
