//! Why a case did not pass, and waiting for what must come.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::rpc::Refusal;
use crate::error::BedError;
use crate::process::wait_until;

/// What comes of a case.
pub type Outcome = Result<(), Trouble>;

/// Why a case, or something it needed, did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The case cannot run here. It counts neither as passed nor as failed.
    #[error("skipped: {reason}")]
    Skipped {
        /// What is missing.
        reason: String,
    },
    /// The bed failed.
    #[error("failed to {0}")]
    Bed(#[from] BedError),
    /// A command ended in another way than the case counted on.
    #[error("`{line}` ended with status {code:?}\n  stdout: {stdout}\n  stderr: {stderr}")]
    Command {
        /// The command line.
        line: String,
        /// Its exit status; `None` when a signal ended it.
        code: Option<i32>,
        /// What it wrote to standard output.
        stdout: String,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// Something that must happen did not.
    #[error("waited {} s in vain: {what}", after.as_secs())]
    Late {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
    },
    /// containerd refused a call that the case counted on.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// An operation of the test itself on a file or process.
    #[error("failed to {action} {path}: {source}")]
    Io {
        /// The verb, such as "read".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// An answer does not have the form that it must have.
    #[error("failed to understand {what}: {text}")]
    Garbled {
        /// What it was to be.
        what: &'static str,
        /// What came.
        text: String,
    },
}

impl Trouble {
    /// Returns a closure for `map_err` that says what was done to which file.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

/// Returns the outcome of a case that cannot run here, to be returned from it at once.
///
/// # Errors
/// Always [`Trouble::Skipped`].
pub fn skip(reason: impl Into<String>) -> Outcome {
    Err(Trouble::Skipped { reason: reason.into() })
}

/// Waits until `condition` holds.
///
/// # Errors
/// [`Trouble::Late`] with `what` when it does not hold within [`LIMIT`].
pub fn await_that(what: &str, condition: impl FnMut() -> bool) -> Outcome {
    if wait_until(LIMIT, condition) {
        return Ok(());
    }
    Err(Trouble::Late { what: what.to_owned(), after: LIMIT })
}

/// How long anything that must happen may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);
