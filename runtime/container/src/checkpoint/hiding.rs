//! A dump that does not see the bulk of the memory.
//!
//! CRIU is started with its page scans filtered ([`godwit_memory::hide`]); what it shall not see is filled in by
//! the owner of [`Hidden`] once the container is frozen. Where that cannot be done CRIU is started as always, and
//! [`Hiding::Impossible`] says why: the dump then holds all memory, which is slower and just as right.
//!
//! The supervisor is started after CRIU, by a thread that is back in its own mount namespace: a thread shares the
//! working directory of the one that made it, and the kernel moves no thread that shares it into another mount
//! namespace. CRIU scans nothing before it gets a request, so nothing waits meanwhile.

use godwit_criu::{CriuError, Session, Setup};
use godwit_memory::hide::{self, Hidden, Prepared, Supervisor};

use super::error::{CheckpointError, Result};

/// Whether memory is kept from CRIU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hiding {
    /// It was not asked for.
    Unasked,
    /// It is.
    Active,
    /// It cannot be here; the reason.
    Impossible(String),
}

/// The filter on one CRIU.
#[derive(Debug)]
pub(super) struct Filter {
    hiding: Hiding,
    supervisor: Option<Supervisor>,
}

impl Filter {
    pub(super) fn hiding(&self) -> &Hiding {
        &self.hiding
    }

    /// Ends the supervision of a CRIU that has ended.
    pub(super) fn stop(self) {
        match self.supervisor.map(Supervisor::stop) {
            Some(Ok(answered)) => log::debug!("memory hidden from criu: {answered:?}"),
            // CRIU got an error for each scan that was not answered, and yet ended well: it made none.
            Some(Err(error)) => log::warn!("failed to hide memory: {error}"),
            None => {}
        }
    }
}

/// Starts a CRIU by `start`, with `hidden` kept from it where that can be done.
///
/// # Errors
/// What `start` fails with, for other reasons than the filter.
pub(super) fn start(
    hidden: Option<&Hidden>,
    start: impl Fn(Setup) -> Result<Session>,
) -> Result<(Session, Filter)> {
    let hiding = match hidden {
        None => Hiding::Unasked,
        Some(hidden) => match filtered(hidden, &start)? {
            Ok((session, supervisor)) => {
                return Ok((session, Filter { hiding: Hiding::Active, supervisor: Some(supervisor) }));
            }
            Err(reason) => Hiding::Impossible(reason),
        },
    };
    Ok((start(Setup::new())?, Filter { hiding, supervisor: None }))
}

/// The inner error is the reason why there can be no filter.
fn filtered(
    hidden: &Hidden,
    start: impl Fn(Setup) -> Result<Session>,
) -> Result<std::result::Result<(Session, Supervisor), String>> {
    if let Err(error) = hide::probe() {
        return Ok(Err(error.to_string()));
    }
    let (sender, prepared) = std::sync::mpsc::channel::<Prepared>();
    let mut setup = Setup::new();
    setup.adjust(move |command| sender.send(hide::prepare(command)?).map_err(Into::into));
    let session = match start(setup) {
        Ok(session) => session,
        // The kernel, or a policy, refuses filters; without one a CRIU that cannot be run shows as such.
        Err(CheckpointError::Criu(error @ (CriuError::Spawn { .. } | CriuError::Hook { .. }))) => {
            return Ok(Err(error.to_string()));
        }
        Err(error) => return Err(error),
    };
    let supervisor = prepared
        .recv()
        .map_err(|error| error.to_string())
        .and_then(|prepared| prepared.start(hidden.clone()).map_err(|error| error.to_string()));
    Ok(supervisor.map(|supervisor| (session, supervisor)))
}
