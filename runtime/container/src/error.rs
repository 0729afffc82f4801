//! What can go wrong with a container, grouped by what the caller does about it.
//!
//! Callers of an OCI runtime recognise some of these by their text: containerd takes `container does not
//! exist`, `container not running` and `no such process` for "not found", dockerd takes `executable file not
//! found` and `permission denied` for exit codes 127 and 126. Those texts are part of the interface.

use std::error::Error as StdError;
use std::path::PathBuf;

use crate::state::Status;

/// Result of this crate.
pub type Result<T, E = ContainerError> = std::result::Result<T, E>;

/// What went wrong with a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// There is no state of that id under the root.
    #[error("container does not exist")]
    NotFound {
        /// The id asked for.
        id: String,
    },
    /// The id is taken.
    #[error("container with given ID already exists")]
    AlreadyExists {
        /// The id asked for.
        id: String,
    },
    /// The id is empty, names a directory, or has a character that is none of `A-Za-z0-9_+-.`.
    #[error("invalid container ID format")]
    InvalidId {
        /// The id asked for.
        id: String,
    },
    /// The verb needs a live container.
    #[error("container not running")]
    NotRunning {
        /// What the container is instead.
        status: Status,
    },
    /// `resume` needs a paused container.
    #[error("container not paused")]
    NotPaused {
        /// What the container is instead.
        status: Status,
    },
    /// `start` needs a created container.
    #[error("{}", start_refusal(*status))]
    NotStartable {
        /// What the container is instead.
        status: Status,
    },
    /// `exec` into a paused container would hang.
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    ExecPaused,
    /// `exec` needs a live init.
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    /// `delete` needs a stopped container, or force.
    #[error("cannot delete container {id} that is not stopped: {status} (--force kills it first)")]
    NotStopped {
        /// The container.
        id: String,
        /// What the container is instead.
        status: Status,
    },
    /// The init process survived SIGKILL for ten seconds.
    #[error("container init still running")]
    StillRunning {
        /// Its process id.
        pid: i32,
    },
    /// The kernel refused the signal.
    #[error("unable to signal init: {0}")]
    Signal(#[source] godwit_sys::SysError),
    /// The signal's name is unknown.
    #[error("unknown signal \"{name}\"")]
    UnknownSignal {
        /// The name asked for.
        name: String,
    },
    /// The process could not be set up inside the container; the text says at which step.
    #[error("unable to start container process: {detail}")]
    Process {
        /// The innermost cause that is known.
        detail: String,
    },
    /// A terminal was asked for without a socket to send it to, or the reverse.
    #[error("{0}")]
    Console(&'static str),
    /// A field of the spec or of the request cannot be honoured.
    #[error("{what}: {reason}")]
    Unsupported {
        /// The field or option.
        what: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// A file of the container could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The container's state is of another runtime, which alone understands it.
    #[error("{path} is another OCI runtime's; make the container with godwit (the shim's option BinaryName)")]
    Foreign {
        /// The state.
        path: PathBuf,
    },
    /// A JSON file of the container does not parse.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A cgroup could not be found, read or written.
    #[error("cgroup: {detail}")]
    Cgroup {
        /// The cause.
        detail: String,
    },
    /// A hook failed.
    #[error("{point} hook: {detail}")]
    Hook {
        /// Which list it is in.
        point: &'static str,
        /// The cause.
        detail: String,
    },
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] godwit_sys::SysError),
}

impl ContainerError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { path: path.into(), source }
    }

    pub(crate) fn json(path: impl Into<PathBuf>) -> impl FnOnce(serde_json::Error) -> Self {
        move |source| Self::Json { path: path.into(), source }
    }

    pub(crate) fn cgroup(error: impl StdError) -> Self {
        Self::Cgroup { detail: causes(&error) }
    }
}

fn start_refusal(status: Status) -> &'static str {
    match status {
        Status::Creating => "cannot start a container that is still being created",
        Status::Paused => "cannot start a container in the paused state",
        Status::Stopped => "cannot start a container that has stopped",
        Status::Created | Status::Running => "cannot start an already running container",
    }
}

/// The texts of an error and its sources in one line, each said once.
pub(crate) fn causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_callers_look_for_do_not_change() {
        let id = || "web".to_owned();
        let texts = [
            (ContainerError::NotFound { id: id() }, "container does not exist"),
            (ContainerError::AlreadyExists { id: id() }, "container with given ID already exists"),
            (ContainerError::NotRunning { status: Status::Stopped }, "container not running"),
            (ContainerError::NotPaused { status: Status::Running }, "container not paused"),
            (
                ContainerError::NotStartable { status: Status::Running },
                "cannot start an already running container",
            ),
            (
                ContainerError::Signal(godwit_sys::SysError::NoProcess { pid: 7 }),
                "unable to signal init: process 7: no such process",
            ),
        ];
        for (error, text) in texts {
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn a_cause_is_said_once() {
        let inner = std::io::Error::other("disk is full");
        let outer = ContainerError::File { path: "/x".into(), source: inner };
        assert_eq!(causes(&outer), "/x: disk is full");
    }
}
