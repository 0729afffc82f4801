//! `godwit migrate-warden`: what the target's worker leaves behind should it die while pages are still to come.

use std::io::stdin;
use std::process::ExitCode;

use clap::Args;
use godwit_container::{Store, lifecycle};
use godwit_engine::warden;

use crate::error::{CliError, Result};

/// Kill a container whose worker dies before all of its memory has come (called by that worker)
///
/// Standard input is the worker's socket.
#[derive(Debug, Args)]
pub(crate) struct MigrateWarden {
    /// Name of the container
    #[arg(long)]
    id: String,
}

impl MigrateWarden {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let kill = || Ok(lifecycle::kill(&store.open(&self.id)?, SIGKILL, true)?);
        warden::guard(stdin(), kill).map_err(|cause| CliError::Status(cause.to_string()))?;
        Ok(ExitCode::SUCCESS)
    }
}

const SIGKILL: i32 = 9;
