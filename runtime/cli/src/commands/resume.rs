//! `godwit resume`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::{Store, lifecycle};

use crate::error::Result;

/// Let the processes of a paused container run again
#[derive(Debug, Args)]
pub(crate) struct Resume {
    /// Name of the container
    id: String,
}

impl Resume {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        lifecycle::resume(&mut store.open(&self.id)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
