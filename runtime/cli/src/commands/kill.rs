//! `godwit kill`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::{Store, lifecycle};

use crate::error::Result;

/// Send a signal to a container's first process
///
/// For example, `godwit kill web KILL` kills the container web. The signal is a name, with or without SIG, or
/// a number; 0 only asks whether the container is alive.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Name of the container
    id: String,
    /// The signal
    #[arg(default_value = "SIGTERM")]
    signal: String,
    /// Send it to every process of the container
    #[arg(short, long)]
    all: bool,
}

impl Kill {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let stored = store.open(&self.id)?;
        lifecycle::kill(&stored, lifecycle::parse_signal(&self.signal)?, self.all)?;
        Ok(ExitCode::SUCCESS)
    }
}
