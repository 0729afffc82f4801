//! Why a request to the shim failed, and the code containerd reads.
//!
//! The codes are those of containerd's own shim, because its callers act on them: `NotFound` of a `Kill` means
//! "already gone", `AlreadyExists` of an `Exec` is retried under another name. A verb that came at the wrong
//! moment has the code `Unknown` there, and so it has here.

use std::path::PathBuf;

use godwit_protocol::{Failure, request::RequestError};
use ttrpc::{Code, error::get_rpc_status};

/// What a verb of the Task or Migrate service can end with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    /// No container of that name lives in this shim.
    #[error("container not created")]
    NoContainer,
    /// The container has no process of that name.
    #[error("process does not exist {exec_id}")]
    NoProcess {
        /// The name that was asked for.
        exec_id: String,
    },
    /// The runtime does not know the container: it was never started, or is gone.
    #[error("no such container")]
    Unstarted,
    /// The process has ended.
    #[error("process already finished")]
    Finished,
    /// The process has no pid yet.
    #[error("process not created")]
    NotCreated,
    /// The container's init has ended, so nothing can be started beside it.
    #[error("container {id} init process is not running")]
    InitEnded {
        /// The container.
        id: String,
    },
    /// A container of that name lives in this shim.
    #[error("container {id} already exists")]
    ContainerExists {
        /// The container.
        id: String,
    },
    /// The shim of an earlier container of that name does not end.
    #[error(
        "the shim of an earlier container of this name still listens at {}: end that container, or the shim",
        .socket.display()
    )]
    Predecessor {
        /// Its socket.
        socket: PathBuf,
    },
    /// The container has a process of that name.
    #[error("id {exec_id}")]
    ExecExists {
        /// The process.
        exec_id: String,
    },
    /// The verb does not fit the state.
    #[error("cannot {verb} a {state} {what}")]
    WrongState {
        /// What was asked for.
        verb: &'static str,
        /// In which state.
        state: &'static str,
        /// Of a container, task or process.
        what: &'static str,
    },
    /// Nothing but questions and signals are answered while a migration runs.
    #[error("cannot {verb} container {id}: a migration of it is in progress")]
    Migrating {
        /// What was asked for.
        verb: &'static str,
        /// The container.
        id: String,
    },
    /// The container came from another host, and what runs here lacks memory yet.
    #[error(
        "cannot {verb} container {id}: its memory is still arriving from where it came from; try again later"
    )]
    Incomplete {
        /// What was asked for.
        verb: &'static str,
        /// The container.
        id: String,
    },
    /// No migration was ever asked for.
    #[error("container {id} was never asked to migrate")]
    NeverMigrated {
        /// The container.
        id: String,
    },
    /// There is no migration that could be cancelled.
    #[error("no migration of container {id} is in progress")]
    NotMigrating {
        /// The container.
        id: String,
    },
    /// An option that cannot be honoured.
    #[error("option {name} is refused: {reason}")]
    RefusedOption {
        /// The option as the client spells it.
        name: String,
        /// Why, and what to do instead.
        reason: &'static str,
    },
    /// The options are of a type that is not known here.
    #[error("options of type {type_url} are not known")]
    UnknownOptions {
        /// The type as sent.
        type_url: String,
    },
    /// A message inside a request cannot be decoded.
    #[error("failed to decode {what}")]
    Undecodable {
        /// Which part.
        what: &'static str,
        /// Why.
        source: protobuf::Error,
    },
    /// A JSON document inside a request or file cannot be decoded.
    #[error("failed to decode {what}: {source}")]
    BadJson {
        /// Which part.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// A migration request that cannot be understood.
    #[error("{0}")]
    BadMigration(#[from] RequestError),
    /// A stdio address that cannot be understood.
    #[error("cannot use {uri} for stdio: {reason}")]
    BadStdio {
        /// The address as sent.
        uri: String,
        /// Why.
        reason: &'static str,
    },
    /// The runtime failed.
    #[error("OCI runtime {verb} failed: {message}")]
    Runtime {
        /// The verb as the runtime spells it.
        verb: &'static str,
        /// The runtime's own last error line.
        message: String,
    },
    /// A migration did not do what was asked.
    #[error("{0}")]
    Migration(#[from] Failure),
    /// A system call failed.
    #[error("failed to {action}: {source}")]
    Io {
        /// What was being done, with the path.
        action: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A helper of the shim library failed.
    #[error("failed to {action}: {source}")]
    Library {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: containerd_shim::Error,
    },
    /// Something did not happen in time.
    #[error("timed out waiting for {what}")]
    TimedOut {
        /// What did not happen.
        what: &'static str,
    },
    /// The container was deleted while the request waited.
    #[error("container {id} was deleted")]
    Deleted {
        /// The container.
        id: String,
    },
}

/// What the verbs return.
pub(crate) type Result<T> = std::result::Result<T, ShimError>;

impl ShimError {
    /// Makes the closure that adds to an I/O error what was being done.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action: action.into(), source }
    }

    /// As [`Self::io`], for errors of nix.
    pub(crate) fn errno(action: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        move |errno| Self::Io { action: action.into(), source: errno.into() }
    }

    /// Returns the code that containerd's own shim would give.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NoContainer
            | Self::NoProcess { .. }
            | Self::Unstarted
            | Self::Finished
            | Self::NeverMigrated { .. } => Code::NOT_FOUND,
            Self::ContainerExists { .. } | Self::Predecessor { .. } | Self::ExecExists { .. } => {
                Code::ALREADY_EXISTS
            }
            Self::NotCreated
            | Self::InitEnded { .. }
            | Self::Migrating { .. }
            | Self::Incomplete { .. }
            | Self::NotMigrating { .. } => Code::FAILED_PRECONDITION,
            Self::RefusedOption { .. }
            | Self::UnknownOptions { .. }
            | Self::Undecodable { .. }
            | Self::BadJson { .. }
            | Self::BadMigration(_)
            | Self::BadStdio { .. } => Code::INVALID_ARGUMENT,
            Self::Migration(_) => Code::ABORTED,
            Self::Deleted { .. } => Code::UNAVAILABLE,
            Self::WrongState { .. }
            | Self::Runtime { .. }
            | Self::Io { .. }
            | Self::Library { .. }
            | Self::TimedOut { .. } => Code::UNKNOWN,
        }
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        get_rpc_status(error.code(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_carry_the_codes_of_containerds_own_shim() {
        let id = || "web".to_owned();
        let cases = [
            (ShimError::NoContainer, Code::NOT_FOUND),
            (ShimError::NoProcess { exec_id: id() }, Code::NOT_FOUND),
            (ShimError::Finished, Code::NOT_FOUND),
            (ShimError::Unstarted, Code::NOT_FOUND),
            (ShimError::ExecExists { exec_id: id() }, Code::ALREADY_EXISTS),
            (ShimError::InitEnded { id: id() }, Code::FAILED_PRECONDITION),
            (ShimError::NotCreated, Code::FAILED_PRECONDITION),
            (ShimError::Migrating { verb: "pause", id: id() }, Code::FAILED_PRECONDITION),
            (ShimError::WrongState { verb: "start", state: "running", what: "process" }, Code::UNKNOWN),
            (ShimError::UnknownOptions { type_url: id() }, Code::INVALID_ARGUMENT),
            (ShimError::Runtime { verb: "create", message: id() }, Code::UNKNOWN),
        ];
        for (error, code) in cases {
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[test]
    fn the_text_reaches_the_client() {
        let error =
            ttrpc::Error::from(ShimError::WrongState { verb: "pause", state: "paused", what: "container" });
        let ttrpc::Error::RpcStatus(status) = error else { panic!("{error}") };
        assert_eq!(status.message, "cannot pause a paused container");
    }
}
