//! `godwit create`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use godwit_container::Store;
use godwit_container::create::{CreateOptions, create};

use crate::cli::Globals;
use crate::error::{CliError, Result};

/// Create a container from a bundle; its process waits for `start`
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name of the new container: letters, digits and "_+-."
    id: String,
    #[command(flatten)]
    pub(crate) from: From,
}

/// What `create` and `run` share.
#[derive(Debug, Args)]
pub(crate) struct From {
    /// Directory with config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Unix socket that receives the terminal's master (for "terminal": true)
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Move the root instead of pivoting it: needed when the root file system is on a ramdisk
    #[arg(long)]
    no_pivot: bool,
    /// Stay in the caller's session keyring
    #[arg(long)]
    no_new_keyring: bool,
    /// Pass N descriptors from 3 on to the container (beside $LISTEN_FDS)
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u16,
}

impl From {
    /// Whether the bundle's process wants a terminal; an unreadable bundle is reported by `create`.
    pub(crate) fn wants_terminal(&self) -> bool {
        let spec = oci_spec::runtime::Spec::load(self.bundle.join("config.json")).ok();
        spec.and_then(|spec| spec.process().as_ref()?.terminal()).unwrap_or(false)
    }

    pub(crate) fn options(&self, globals: &Globals, detach: bool) -> CreateOptions {
        CreateOptions {
            bundle: self.bundle.clone(),
            pid_file: self.pid_file.clone(),
            console_socket: self.console_socket.clone(),
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            preserve_fds: self.preserve_fds.into(),
            systemd_cgroup: globals.systemd_cgroup,
            detach,
        }
    }
}

impl Create {
    pub(crate) fn run(&self, store: &Store, globals: &Globals) -> Result<ExitCode> {
        create(store, &self.id, &self.from.options(globals, true)).map_err(CliError::Create)?;
        Ok(ExitCode::SUCCESS)
    }
}
