//! The pipe on which a migration worker tells its shim what happens: one JSON object a line.

use std::fs::File;
use std::io::Write;
use std::os::fd::RawFd;

use godwit_protocol::worker::Event;

use crate::error::{CliError, Result};

/// The writing end of the pipe.
#[derive(Debug)]
pub(crate) struct WorkerEvents(File);

impl WorkerEvents {
    /// Takes the descriptor that the command line names. To be called before anything is opened.
    ///
    /// # Errors
    /// [`CliError::Sys`] if there is no such descriptor.
    pub(crate) fn inherit(number: RawFd) -> Result<Self> {
        Ok(Self(File::from(godwit_sys::inherited::take(number)?)))
    }

    /// Tells the shim. Whether it still lives makes no difference to the migration.
    pub(crate) fn tell(&mut self, event: &Event) {
        let told = serde_json::to_string(event)
            .map_err(CliError::json("an event"))
            .and_then(|line| self.0.write_all((line + "\n").as_bytes()).map_err(CliError::io("an event")));
        if let Err(error) = told {
            log::warn!("the shim does not listen: {error}");
        }
    }
}
