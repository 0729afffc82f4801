//! Everything that can go wrong between godwit and a containerd.

use std::{io, net::SocketAddr, path::PathBuf};

use containerd_client::tonic::Code;
use godwit_engine::decision::DecisionError;

/// What failed on this node's side of a migration.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// containerd's socket does not answer.
    #[error(
        "cannot reach containerd at {address}: {cause}; is it running, and is this its socket (see --address)?"
    )]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// Why not.
        cause: String,
    },
    /// containerd refused a call.
    #[error("cannot {what}: {message}")]
    Call {
        /// What was asked of it.
        what: &'static str,
        /// containerd's status code.
        code: Code,
        /// containerd's words.
        message: String,
    },
    /// containerd did not answer a call that takes no time.
    #[error("cannot {what}: containerd did not answer within {limit_s} s")]
    Silent {
        /// What was asked of it.
        what: &'static str,
        /// How long it was waited for, in seconds.
        limit_s: u64,
    },
    /// A name from outside is none that containerd accepts, or would escape from a path.
    #[error("bad {what} `{name}`: expected up to 76 letters and digits, parted by single '.', '_' or '-'")]
    BadName {
        /// What is named.
        what: &'static str,
        /// What was given.
        name: String,
    },
    /// The container does not exist.
    #[error(
        "no container `{id}` in namespace `{namespace}`; `ctr namespaces ls` and `ctr -n NAMESPACE containers ls` show what there is"
    )]
    NoContainer {
        /// The container.
        id: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// The container cannot be migrated as it is.
    #[error("container `{id}` {cause}")]
    Unfit {
        /// The container.
        id: String,
        /// Why not, and what to do about it.
        cause: String,
    },
    /// A record, manifest or spec does not read as what it should be.
    #[error("{what} is malformed: {cause}")]
    Malformed {
        /// The document.
        what: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Something outside has a size that this program does not accept.
    #[error("{what} has {size_bytes} bytes, more than the {limit_bytes} that are accepted")]
    TooLarge {
        /// What it is.
        what: String,
        /// Its size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// There is an agent on this host already.
    #[error("another agent works in {directory}: a host has one")]
    AgentRuns {
        /// Where it keeps its records.
        directory: PathBuf,
    },
    /// The agent cannot listen.
    #[error("cannot listen on {address}: {source}; is the port free, and is this an address of this host?")]
    Listen {
        /// Where it was to listen.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The record of what was decided cannot be used.
    #[error(transparent)]
    Record(#[from] DecisionError),
    /// A file, FIFO or socket of our own could not be handled.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was attempted.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl NodeError {
    /// Tells whether containerd said that the thing does not exist.
    #[must_use]
    pub const fn is_not_found(&self) -> bool {
        matches!(self, Self::Call { code: Code::NotFound, .. } | Self::NoContainer { .. })
    }

    /// Tells whether containerd said that the thing exists already.
    #[must_use]
    pub const fn already_exists(&self) -> bool {
        matches!(self, Self::Call { code: Code::AlreadyExists, .. })
    }

    /// Tells whether what was to be created exists, or a directory that containerd makes for it: for that it has no code.
    pub(crate) fn is_in_use(&self) -> bool {
        let is_directory = |message: &str| message.contains("file exists");
        self.already_exists() || matches!(self, Self::Call { message, .. } if is_directory(message))
    }

    pub(crate) fn malformed(what: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self::Malformed { what: what.into(), cause: cause.to_string() }
    }

    /// Returns a closure that wraps an I/O error about `path`.
    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { what, path: path.into(), source }
    }
}

/// Treats "it does not exist" as an answer rather than an error.
pub(crate) trait Optional<T> {
    /// Returns `None` for a thing that is not there.
    ///
    /// # Errors
    /// Every other error is passed on.
    fn optional(self) -> Result<Option<T>, NodeError>;
}

impl<T> Optional<T> for Result<T, NodeError> {
    fn optional(self) -> Result<Option<T>, NodeError> {
        match self {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}
