//! What can go wrong with a bed.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, BedError>;

/// A failure to make, use or remove a bed. The text completes "failed to ...".
#[derive(Debug, thiserror::Error)]
pub enum BedError {
    /// A value given by the user does not parse.
    #[error("understand {what} {value:?}: {expected}")]
    Invalid {
        /// What the value is, such as "bed name".
        what: &'static str,
        /// The value as given.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A bed of this name is up, and in somebody's hands.
    #[error("bring up bed {name}: it is up already (take it down first, or choose another name)")]
    Exists {
        /// The bed's name.
        name: String,
    },
    /// There is no bed of this name.
    #[error("find bed {name}: it is not up")]
    Unknown {
        /// The bed's name.
        name: String,
    },
    /// A program or library that the bed needs is not on this machine.
    #[error("find {tool}: {hint}")]
    Missing {
        /// The program.
        tool: String,
        /// Where it was looked for, and how to get it.
        hint: String,
    },
    /// An operation on a file.
    #[error("{action} {path}")]
    Io {
        /// The verb, such as "read".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A command could not be started.
    #[error("start {command}")]
    Start {
        /// The command line.
        command: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A command ran and reported failure.
    #[error("run {command}: {status}: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard error.
        stderr: String,
    },
    /// A daemon of a node ended, or did not answer in time.
    #[error("start {daemon} on node {node}: {reason}; the end of its log:\n{log}")]
    Daemon {
        /// The daemon.
        daemon: &'static str,
        /// The node.
        node: String,
        /// What was waited for.
        reason: String,
        /// The last lines of its log.
        log: String,
    },
    /// The record of a bed cannot be read.
    #[error("read the record {path} of a bed")]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Something of a bed is still there although it was removed.
    #[error("take down bed {name}: {what} is still there")]
    Leftover {
        /// The bed's name.
        name: String,
        /// What is left.
        what: String,
    },
}

impl BedError {
    /// Returns a closure for `map_err` that says what was done to which file.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
