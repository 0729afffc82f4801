//! `godwit exec`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use godwit_container::exec::{ExecOptions, Overrides, exec, process_for};
use godwit_container::{ContainerError, Store, Stored};
use oci_spec::runtime::Process;

use crate::error::{CliError, Result};
use crate::foreground::{self, Console};

/// Run a further program in a container
///
/// Either name the program, with its arguments, or give a file with its whole description (--process). The
/// exit code is the program's (128 + signal when it was killed), or 255 when it could not be started.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Name of the container
    id: String,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "process")]
    command: Vec<String>,
    /// File with the process as in config.json; then no other option about the process counts
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Return once it runs
    #[arg(short, long)]
    detach: bool,
    /// Who it runs as
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Further groups it belongs to (repeatable)
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// Where it starts, inside the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Set a variable (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Capability it gets beside the container's (repeatable)
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Forbid it to gain privileges by exec
    #[arg(long)]
    no_new_privs: bool,
    /// AppArmor profile to confine it with
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// SELinux label (refused: godwit does not support SELinux)
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Unix socket that receives the terminal's master (with --detach and --tty)
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File to write its process id to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Pass N descriptors from 3 on to it (beside $LISTEN_FDS)
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u16,
    /// Put it in this cgroup below the container's, which must exist
    #[arg(long, value_name = "CGROUP")]
    cgroup: Option<String>,
    /// Enter a paused container as well
    #[arg(long)]
    ignore_paused: bool,
}

impl Exec {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let stored = store.open(&self.id).map_err(CliError::Exec)?;
        let process = self.process(&stored)?;
        let terminal = process.terminal().unwrap_or(false);
        if self.detach {
            exec(&stored, process, &self.options(self.console_socket.as_deref())).map_err(CliError::Exec)?;
            return Ok(ExitCode::SUCCESS);
        }
        if self.console_socket.is_some() {
            let text = "cannot use console socket if godwit will not detach or allocate tty";
            return Err(CliError::Exec(ContainerError::Console(text)));
        }
        let console = if terminal { Some(Console::listen(stored.directory())?) } else { None };
        let socket = console.as_ref().map(Console::path);
        let pid = exec(&stored, process, &self.options(socket.as_deref())).map_err(CliError::Exec)?;
        let master = console.map(Console::receive).transpose()?;
        Ok(ExitCode::from(foreground::wait(pid, master)?))
    }

    fn process(&self, stored: &Stored) -> Result<Process> {
        if self.process_label.as_ref().is_some_and(|label| !label.is_empty()) {
            let reason = "SELinux is not supported; leave the option out".to_owned();
            return Err(CliError::Exec(ContainerError::Unsupported { what: "--process-label", reason }));
        }
        if let Some(file) = &self.process {
            let what = file.display().to_string();
            let text = std::fs::read(file).map_err(CliError::io(what.as_str()))?;
            return serde_json::from_slice(&text).map_err(CliError::json(what));
        }
        let overrides = Overrides {
            args: self.command.clone(),
            terminal: self.tty,
            user: self.user.clone(),
            additional_gids: self.additional_gids.clone(),
            cwd: self.cwd.clone(),
            env: self.env.clone(),
            capabilities: self.cap.clone(),
            no_new_privileges: self.no_new_privs,
            apparmor: self.apparmor.clone(),
        };
        process_for(stored, &overrides).map_err(CliError::Exec)
    }

    fn options(&self, console_socket: Option<&Path>) -> ExecOptions {
        ExecOptions {
            pid_file: self.pid_file.clone(),
            console_socket: console_socket.map(Path::to_owned),
            preserve_fds: self.preserve_fds.into(),
            ignore_paused: self.ignore_paused,
            // runc takes "controller:path" on version 1; libcgroups puts a process in the same path everywhere.
            sub_cgroup: self.cgroup.as_deref().map(|path| path.rsplit(':').next().unwrap_or(path).to_owned()),
        }
    }
}
