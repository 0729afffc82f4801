//! `godwit delete`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::{Store, lifecycle};

use crate::error::Result;

/// Remove a stopped container: its cgroup, its state, and what runs in it
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Name of the container
    id: String,
    /// Kill the container first if it runs; clean up after an interrupted create; accept that it is gone
    #[arg(short, long)]
    force: bool,
}

impl Delete {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        lifecycle::delete(store, &self.id, self.force)?;
        Ok(ExitCode::SUCCESS)
    }
}
