//! `godwit state`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::Store;
use godwit_container::report::StateReport;

use crate::commands::print_json_indented;
use crate::error::Result;

/// Print what a container is, as JSON
#[derive(Debug, Args)]
pub(crate) struct State {
    /// Name of the container
    id: String,
}

impl State {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let report = StateReport::of(&store.open(&self.id)?)?;
        print_json_indented(&report)?;
        Ok(ExitCode::SUCCESS)
    }
}
