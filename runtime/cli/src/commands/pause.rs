//! `godwit pause`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::{Store, lifecycle};

use crate::error::Result;

/// Freeze every process of a container
#[derive(Debug, Args)]
pub(crate) struct Pause {
    /// Name of the container
    id: String,
}

impl Pause {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        lifecycle::pause(&mut store.open(&self.id)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
