//! `godwit start`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::{Store, lifecycle};

use crate::error::Result;

/// Run the process of a created container
#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Name of the container
    id: String,
}

impl Start {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        lifecycle::start(&mut store.open(&self.id)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
