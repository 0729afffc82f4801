//! A dump that leaves out the bulk of the memory.
//!
//! CRIU is started with its page scans filtered ([`godwit_memory::hide`]); what it shall not see is filled in by
//! the owner of [`Hidden`] once the container is frozen. Where that cannot be done CRIU dumps lazily, and
//! [`Hiding::Lazy`] says why: it then leaves out what it restores lazily, which is what is hidden otherwise
//! ([`godwit_memory::maps::lazy`]), but finds each page, and holds them all in pipes until the dump ends. It makes an
//! exception of pages under stack pointers; those are in its images, and a restore finds them in place.
//!
//! The supervisor is started after CRIU, by a thread that is back in its own mount namespace: a thread shares the
//! working directory of the one that made it, and the kernel moves no thread that shares it into another mount
//! namespace. CRIU scans nothing before it gets a request, so nothing waits meanwhile.

use godwit_criu::{Session, Setup};
use godwit_memory::MemoryError;
use godwit_memory::hide::{self, Hidden, Prepared, Supervisor};

use super::error::Result;

/// How memory is kept out of CRIU's images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hiding {
    /// It was not asked for.
    Unasked,
    /// CRIU does not see it.
    Active,
    /// CRIU leaves it to a page server that there is not; the reason.
    Lazy(String),
}

/// The filter on one CRIU, if there is one.
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
/// What `start` fails with, or the filter where it can be had.
pub(super) fn start(
    hidden: Option<&Hidden>,
    start: impl Fn(Setup) -> Result<Session>,
) -> Result<(Session, Filter)> {
    let mut setup = Setup::new();
    let Some(hidden) = hidden else {
        return Ok((start(setup)?, Filter { hiding: Hiding::Unasked, supervisor: None }));
    };
    if let Err(error) = hide::probe() {
        setup.without_page_server();
        return Ok((start(setup)?, Filter { hiding: Hiding::Lazy(error.to_string()), supervisor: None }));
    }
    let (sender, prepared) = std::sync::mpsc::channel::<Prepared>();
    setup.adjust(move |command| sender.send(hide::prepare(command)?).map_err(Into::into));
    let session = start(setup)?;
    let unfiltered = |_| MemoryError::Thread { name: "hide" };
    let supervisor = prepared.recv().map_err(unfiltered)?.start(hidden.clone())?;
    Ok((session, Filter { hiding: Hiding::Active, supervisor: Some(supervisor) }))
}
