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
    /// Where the images of an earlier checkpoint are, seen from the new ones. Of this build's shim alone.
    #[prost(string, tag = "10")]
    pub parent_path: String,
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
    /// Move the root instead of pivoting it.
    #[prost(bool, tag = "1")]
    pub no_pivot_root: bool,
    /// Stay in the session keyring of whoever runs the runtime.
    #[prost(bool, tag = "2")]
    pub no_new_keyring: bool,
    /// The cgroup that the shim is put into.
    #[prost(string, tag = "3")]
    pub shim_cgroup: String,
    /// The user who owns the pipes of standard streams.
    #[prost(uint32, tag = "4")]
    pub io_uid: u32,
    /// The group that owns the pipes of standard streams.
    #[prost(uint32, tag = "5")]
    pub io_gid: u32,
    /// The runtime's program.
    #[prost(string, tag = "6")]
    pub binary_name: String,
    /// Where the runtime keeps its state.
    #[prost(string, tag = "7")]
    pub root: String,
    /// Where CRIU is. containerd has not had it since 2.0.
    #[prost(string, tag = "8")]
    pub criu_path: String,
    /// Let systemd manage cgroups.
    #[prost(bool, tag = "9")]
    pub systemd_cgroup: bool,
    /// Restore the task from the images in this directory instead of running its program.
    #[prost(string, tag = "10")]
    pub criu_image_path: String,
    /// Where logs go.
    #[prost(string, tag = "11")]
    pub criu_work_path: String,
    /// Where somebody else serves the task.
    #[prost(string, tag = "12")]
    pub task_api_address: String,
    /// By which version of the Task service.
    #[prost(uint32, tag = "13")]
    pub task_api_version: u32,
}

impl TaskOptions {
    /// Returns it as a request carries it.
    #[must_use]
    pub fn to_any(&self) -> Any {
        Any { type_url: "containerd.runc.v1.Options".to_owned(), value: self.encode_to_vec() }
    }
}
