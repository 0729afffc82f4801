//! What can go wrong, and what CRIU had to say about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use godwit_sys::SysError;

use crate::log_tail::LogTail;
use crate::program::Version;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, CriuError>;

/// What CRIU had been asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Starting the process and asking for its version.
    Start,
    /// A dump of a process tree.
    Dump,
    /// A dump of memory only.
    PreDump,
    /// A restore of a process tree.
    Restore,
    /// A question about the features of this machine.
    Features,
}

impl fmt::Display for Phase {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Start => "start",
            Self::Dump => "dump",
            Self::PreDump => "pre-dump",
            Self::Restore => "restore",
            Self::Features => "feature check",
        })
    }
}

/// A failed conversation with CRIU.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// No `criu` on the search path.
    #[error("criu not found in PATH ({path}); install criu {minimum} or newer", minimum = Version::MINIMUM)]
    NotFound {
        /// The search path.
        path: String,
    },
    /// The `criu` found is older than what current kernels and godwit need.
    #[error("{path} is version {version}, but {minimum} or newer is needed", minimum = Version::MINIMUM)]
    TooOld {
        /// The binary.
        path: PathBuf,
        /// What it says it is.
        version: Version,
    },
    /// The binary could not be run.
    #[error("run {path}: {source}")]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// An image or work directory could not be used.
    #[error("open directory {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The images are damaged.
    #[error("images: {path}: {reason}")]
    Images {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The socket to CRIU failed.
    #[error("criu {phase}: socket: {source}")]
    Socket {
        /// What was being done.
        phase: Phase,
        /// What the kernel answered.
        source: SysError,
    },
    /// CRIU sent something that makes no sense here.
    #[error("criu {phase}: unexpected message: {detail}")]
    Protocol {
        /// What was being done.
        phase: Phase,
        /// What was wrong with it.
        detail: String,
    },
    /// CRIU ended without a response.
    #[error("criu {phase}: ended without an answer ({after}){log}", after = After(.after.as_deref()))]
    Ended {
        /// What was being done.
        phase: Phase,
        /// The last notification before the end.
        after: Option<String>,
        /// What its log says.
        log: LogTail,
    },
    /// CRIU reported failure.
    #[error("criu {phase}: failed, errno {cr_errno} ({after}){log}", after = After(.after.as_deref()))]
    Failed {
        /// What was being done.
        phase: Phase,
        /// CRIU's `cr_errno`, 0 when it gave none.
        cr_errno: i32,
        /// The last notification before the failure.
        after: Option<String>,
        /// What its log says.
        log: LogTail,
    },
    /// Our own part in a notification failed, so CRIU was told to give up.
    #[error("criu {phase}: {script}: {source}")]
    Hook {
        /// What was being done.
        phase: Phase,
        /// The notification.
        script: String,
        /// What failed.
        source: HookError,
    },
}

/// What a notification's closure may fail with.
pub type HookError = Box<dyn std::error::Error + Send + Sync>;

impl CriuError {
    /// Path of CRIU's log, where there is one.
    pub fn log_path(&self) -> Option<&std::path::Path> {
        match self {
            Self::Ended { log, .. } | Self::Failed { log, .. } => log.path(),
            _ => None,
        }
    }
}

/// Says how far CRIU came.
struct After<'a>(Option<&'a str>);

impl fmt::Display for After<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(script) => write!(formatter, "after {script}"),
            None => formatter.write_str("at the beginning"),
        }
    }
}
