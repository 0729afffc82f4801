//! `godwit restore`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use godwit_container::checkpoint::Decision;
use godwit_container::restore::{RestoreOptions, restore};
use godwit_container::{Store, lifecycle};
use godwit_sys::process;

use crate::cli::Globals;
use crate::commands::checkpoint::Shared;
use crate::error::{CliError, Result};
use crate::foreground::{self, Console};

/// Make a running container out of a directory of CRIU images
///
/// Without --detach, waits for it and deletes it; the exit code is then the container's. What the images hold
/// (TCP connections, file locks, sockets to outside) is restored without further flags.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Name of the new container: letters, digits and "_+-."
    id: String,
    /// Directory with config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Directory of the images
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory for logs and scratch files [default: the image path]
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Return once it runs
    #[arg(short, long)]
    detach: bool,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket that receives the terminal's master
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Do not become the parent of processes that lose theirs (without --detach)
    #[arg(long)]
    no_subreaper: bool,
    /// Restore open TCP connections as closed ones
    #[arg(long)]
    tcp_close: bool,
    /// Take this session and terminal for those that came from outside
    #[arg(long)]
    shell_job: bool,
    /// Punch restored pages out of the images
    #[arg(long)]
    auto_dedup: bool,
    /// LSM profile to use, as TYPE:NAME
    #[arg(long, value_name = "PROFILE")]
    lsm_profile: Option<String>,
    /// SELinux context of mounts
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
    #[command(flatten)]
    shared: Shared,
    #[command(flatten)]
    implied: Implied,
}

/// Flags of runc that say what is the case anyway.
#[derive(Debug, Args)]
struct Implied {
    /// Accepted for runc's callers: connections in the images are restored
    #[arg(long, hide = true)]
    tcp_established: bool,
    /// Accepted for runc's callers: sockets in the images are restored
    #[arg(long, hide = true)]
    ext_unix_sk: bool,
    /// Accepted for runc's callers: locks in the images are restored
    #[arg(long, hide = true)]
    file_locks: bool,
    /// Accepted for runc's callers: CRIU moves the root as the kernel demands
    #[arg(long, hide = true)]
    no_pivot: bool,
}

impl Restore {
    pub(crate) fn run(&self, store: &Store, globals: &Globals) -> Result<ExitCode> {
        let mut options = self.options(globals);
        let console = if !self.detach && options.console_socket.is_none() {
            std::fs::create_dir_all(store.root()).map_err(CliError::io("state root"))?;
            let console = Console::listen(store.root())?;
            options.console_socket = Some(console.path());
            Some(console)
        } else {
            None
        };
        if !self.detach && !self.no_subreaper {
            process::set_subreaper(true)?;
        }
        let stored = restore(store, &self.id, &options, |_| Decision::Commit)?;
        let (false, Some(pid)) = (self.detach, stored.pid()) else { return Ok(ExitCode::SUCCESS) };
        let terminal = stored.spec()?.process().as_ref().and_then(|process| process.terminal()) == Some(true);
        let master = console.filter(|_| terminal).map(Console::receive).transpose()?;
        let code = foreground::wait(pid, master)?;
        lifecycle::delete(store, &self.id, true)?;
        Ok(ExitCode::from(code))
    }

    fn options(&self, globals: &Globals) -> RestoreOptions {
        RestoreOptions {
            work_path: self.work_path.clone(),
            pid_file: self.pid_file.clone(),
            console_socket: self.console_socket.clone(),
            systemd_cgroup: globals.systemd_cgroup,
            tcp_close: self.tcp_close,
            shell_job: self.shell_job,
            auto_dedup: self.auto_dedup,
            cgroups_mode: self.shared.cgroups_mode(),
            lsm_profile: self.lsm_profile.clone(),
            lsm_mount_context: self.lsm_mount_context.clone(),
            ..RestoreOptions::new(&self.bundle, &self.image_path)
        }
    }
}
