//! What a verb fails with, and the exit code that goes with it.

use std::process::ExitCode;

use godwit_container::ContainerError;
use godwit_container::checkpoint::CheckpointError;

/// Result of a verb.
pub(crate) type Result<T, E = CliError> = std::result::Result<T, E>;

/// A failed verb.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The container said no.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// `create` or `run` failed.
    #[error("godwit create failed: {0}")]
    Create(#[source] ContainerError),
    /// `exec` failed before its process ran.
    #[error("exec failed: {0}")]
    Exec(#[source] ContainerError),
    /// A checkpoint or restore failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] godwit_sys::SysError),
    /// containerd, or the agent beside it, said no.
    #[error(transparent)]
    Node(#[from] godwit_node::NodeError),
    /// A migration's target worker failed.
    #[error(transparent)]
    Target(#[from] godwit_engine::target::TargetError),
    /// A migration's source worker failed.
    #[error(transparent)]
    Migration(#[from] godwit_protocol::Failure),
    /// There is no migration to ask about, or the shim that runs it does not answer.
    #[error("{0}")]
    Status(String),
    /// An argument does not make sense.
    #[error("{0}")]
    Usage(String),
    /// Reading or writing something that belongs to the caller failed.
    #[error("{what}: {source}")]
    Io {
        /// What was read or written.
        what: String,
        /// What the system answered.
        source: std::io::Error,
    },
    /// JSON from the caller, or for it, is wrong.
    #[error("{what}: {source}")]
    Json {
        /// Whose JSON.
        what: String,
        /// Where and why.
        source: serde_json::Error,
    },
}

impl CliError {
    /// The verb's exit code: 255 where the exit code of an exec'd program would else stand, 1 otherwise.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Exec(_) => ExitCode::from(255),
            _ => ExitCode::FAILURE,
        }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }

    pub(crate) fn json(what: impl Into<String>) -> impl FnOnce(serde_json::Error) -> Self {
        move |source| Self::Json { what: what.into(), source }
    }
}
