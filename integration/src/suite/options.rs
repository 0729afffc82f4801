//! The two messages by which containerd passes options to a shim, as far as cases set them.
//!
//! Their fields are those of containerd's `api/types/runc/options/oci.proto`.

use prost::Message;
use prost_types::Any;

/// Options of a checkpoint, `containerd.runc.v1.CheckpointOptions`.
#[derive(Clone, PartialEq, Message)]
pub struct CheckpointOptions {
    /// End the task afterwards.
    #[prost(bool, tag = "1")]
    pub exit: bool,
    /// Include connected TCP sockets.
    #[prost(bool, tag = "2")]
    pub open_tcp: bool,
    /// Include Unix sockets whose other end is outside.
    #[prost(bool, tag = "3")]
    pub external_unix_sockets: bool,
    /// Include a terminal.
    #[prost(bool, tag = "4")]
    pub terminal: bool,
    /// Include file locks.
    #[prost(bool, tag = "5")]
    pub file_locks: bool,
    /// Namespaces whose content is left out.
    #[prost(string, repeated, tag = "6")]
    pub empty_namespaces: Vec<String>,
    /// What becomes of cgroups: `soft`, `full`, `strict` and so on.
    #[prost(string, tag = "7")]
    pub cgroups_mode: String,
    /// Where the images go.
    #[prost(string, tag = "8")]
    pub image_path: String,
    /// Where logs go.
    #[prost(string, tag = "9")]
    pub work_path: String,
}

impl CheckpointOptions {
    /// Returns it as a request carries it.
    #[must_use]
    pub fn to_any(&self) -> Any {
        Any { type_url: "containerd.runc.v1.CheckpointOptions".to_owned(), value: self.encode_to_vec() }
    }
}

/// Options of a task, `containerd.runc.v1.Options`.
#[derive(Clone, PartialEq, Message)]
pub struct TaskOptions {
    /// Restore the task from the images in this directory instead of running its program.
    #[prost(string, tag = "10")]
    pub criu_image_path: String,
    /// Where logs go.
    #[prost(string, tag = "11")]
    pub criu_work_path: String,
}

impl TaskOptions {
    /// Returns it as a request carries it.
    #[must_use]
    pub fn to_any(&self) -> Any {
        Any { type_url: "containerd.runc.v1.Options".to_owned(), value: self.encode_to_vec() }
    }
}
