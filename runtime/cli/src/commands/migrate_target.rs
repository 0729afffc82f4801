//! `godwit migrate-target`: the target's migration worker, which a shim runs in the place of `restore`.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use godwit_container::Store;
use godwit_engine::target::{self, CriuRestorer, Order};

use crate::cli::Globals;
use crate::commands::worker_events::WorkerEvents;
use crate::error::Result;

/// Take a migrated container from its source and restore it (called by the shim)
///
/// Standard input, output and error become those of the container.
#[derive(Debug, Args)]
pub(crate) struct MigrateTarget {
    /// Name of the container
    #[arg(long)]
    id: String,
    /// Unix socket on which the agent hands over the source's connection
    #[arg(long, value_name = "SOCKET")]
    incoming: PathBuf,
    /// Directory with config.json and the mounted root file system
    #[arg(long, value_name = "DIR")]
    bundle: PathBuf,
    /// Directory for logs
    #[arg(long, value_name = "DIR")]
    work_path: PathBuf,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pid_file: PathBuf,
    /// Unix socket that receives the terminal's master
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Number of an inherited descriptor to write events to, one JSON object a line
    #[arg(long, value_name = "N")]
    events_fd: RawFd,
}

impl MigrateTarget {
    pub(crate) fn run(&self, store: &Store, globals: &Globals) -> Result<ExitCode> {
        let mut events = WorkerEvents::inherit(self.events_fd)?;
        let order = Order {
            id: self.id.clone(),
            incoming: self.incoming.clone(),
            // Where containerd has a shim mount it.
            rootfs: self.bundle.join("rootfs"),
        };
        let restorer = CriuRestorer {
            store: store.clone(),
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            work_path: self.work_path.clone(),
            pid_file: Some(self.pid_file.clone()),
            console_socket: self.console_socket.clone(),
            systemd_cgroup: globals.systemd_cgroup,
        };
        target::run(&order, restorer, |event| events.tell(event))?;
        Ok(ExitCode::SUCCESS)
    }
}
