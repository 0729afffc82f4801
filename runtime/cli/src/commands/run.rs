//! `godwit run`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::create::create;
use godwit_container::{Store, lifecycle};

use crate::cli::Globals;
use crate::commands::create::From;
use crate::error::{CliError, Result};
use crate::foreground::{self, Console};

/// Create and start a container; without --detach, wait for it and delete it
///
/// The exit code is the container's (128 + signal when it was killed), or 1 when it could not be started.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Name of the new container: letters, digits and "_+-."
    id: String,
    /// Return once it runs
    #[arg(short, long)]
    detach: bool,
    /// Do not delete it when it has ended
    #[arg(long)]
    keep: bool,
    /// Accepted for runc's callers: godwit adopts no processes that lose their parent
    #[arg(long, hide = true)]
    no_subreaper: bool,
    #[command(flatten)]
    from: From,
}

impl Run {
    pub(crate) fn run(&self, store: &Store, globals: &Globals) -> Result<ExitCode> {
        let mut options = self.from.options(globals, self.detach);
        let console = if !self.detach && options.console_socket.is_none() && self.from.wants_terminal() {
            std::fs::create_dir_all(store.root()).map_err(CliError::io("state root"))?;
            Some(Console::listen(store.root())?)
        } else {
            None
        };
        if let Some(console) = &console {
            options.console_socket = Some(console.path());
        }
        let mut stored = create(store, &self.id, &options).map_err(CliError::Create)?;
        let pid = stored.pid();
        let master = console.map(Console::receive).transpose()?;
        lifecycle::start(&mut stored)?;
        let (false, Some(pid)) = (self.detach, pid) else { return Ok(ExitCode::SUCCESS) };
        let code = foreground::wait(pid, master)?;
        if !self.keep {
            lifecycle::delete(store, &self.id, true)?;
        }
        Ok(ExitCode::from(code))
    }
}
