//! `godwit checkpoint`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use godwit_container::Store;
use godwit_container::checkpoint::{CgroupsMode, CheckpointOptions, checkpoint};

use crate::error::Result;

/// Save a running or paused container to a directory of CRIU images
///
/// The container stops, unless --leave-running; `delete` then removes it. `restore` makes a container of the
/// images again, here or on another machine. When the checkpoint fails the container runs on.
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// The container
    id: String,
    /// Directory for the images
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory for logs and scratch files [default: the image path]
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Images of an earlier pre-dump, relative to the image path
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Let the container run on
    #[arg(long)]
    leave_running: bool,
    /// Save memory only and let the container run on (needs a kernel with soft-dirty tracking)
    #[arg(long)]
    pre_dump: bool,
    /// Save open TCP connections instead of refusing
    #[arg(long)]
    tcp_established: bool,
    /// Leave out TCP connections that are just being accepted
    #[arg(long)]
    tcp_skip_in_flight: bool,
    /// Accept unix sockets whose other end is outside
    #[arg(long)]
    ext_unix_sk: bool,
    /// Accept a session and terminal that come from outside
    #[arg(long)]
    shell_job: bool,
    /// Save file locks
    #[arg(long)]
    file_locks: bool,
    /// Link unlinked files back into their directories
    #[arg(long)]
    link_remap: bool,
    /// Punch pages out of parent images that this one holds anew
    #[arg(long)]
    auto_dedup: bool,
    #[command(flatten)]
    shared: Shared,
}

/// What `checkpoint` and `restore` share.
#[derive(Debug, Args)]
pub(crate) struct Shared {
    /// How cgroups and their limits are treated
    #[arg(long, value_name = "MODE", default_value = "soft")]
    manage_cgroups_mode: Mode,
    /// Namespaces to make without their content; "network" always is, for the caller sets it up
    #[arg(long, value_name = "NAMESPACE")]
    empty_ns: Vec<Namespace>,
}

/// How cgroups are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Limits only for cgroups that CRIU makes
    Soft,
    /// Every cgroup and limit
    Full,
    /// As full, and fail if a cgroup exists
    Strict,
    /// Leave cgroups alone
    Ignore,
}

/// Namespaces that can be made empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Namespace {
    /// Devices, addresses, routes and rules
    Network,
}

impl Shared {
    pub(crate) fn cgroups_mode(&self) -> CgroupsMode {
        match self.manage_cgroups_mode {
            Mode::Soft => CgroupsMode::Soft,
            Mode::Full => CgroupsMode::Full,
            Mode::Strict => CgroupsMode::Strict,
            Mode::Ignore => CgroupsMode::Ignore,
        }
    }
}

impl Checkpoint {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let mut stored = store.open(&self.id)?;
        checkpoint(&mut stored, &self.options())?;
        Ok(ExitCode::SUCCESS)
    }

    fn options(&self) -> CheckpointOptions {
        CheckpointOptions {
            work_path: self.work_path.clone(),
            parent_path: self.parent_path.clone(),
            pre_dump: self.pre_dump,
            leave_running: self.leave_running,
            tcp_established: self.tcp_established,
            tcp_skip_in_flight: self.tcp_skip_in_flight,
            external_unix_sockets: self.ext_unix_sk,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            link_remap: self.link_remap,
            auto_dedup: self.auto_dedup,
            cgroups_mode: self.shared.cgroups_mode(),
            ..CheckpointOptions::new(&self.image_path)
        }
    }
}
