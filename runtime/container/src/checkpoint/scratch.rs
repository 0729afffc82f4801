//! A `/tmp` in memory for CRIU.
//!
//! CRIU makes the mount points it needs for a moment in `/tmp`, whatever it is told, and there they are written to
//! the host's storage. A mount namespace of its own, in which `/tmp` is an empty tmpfs, keeps them in memory, and
//! whatever CRIU leaves behind vanishes with it.

use std::path::Path;

use godwit_criu::{Program, Session, Setup};
use godwit_sys::mount::Mounted;
use godwit_sys::mountns;

use super::error::{CheckpointError, Result};

/// Starts a CRIU whose `/tmp` is in memory, unless it has to reach one of `used` there.
///
/// The calling thread's working directory is `/` afterwards.
pub(crate) fn start(program: &Program, setup: Setup, used: &[&Path]) -> Result<Session> {
    let outer = mountns::leave_for_private()?;
    let started = cover(used).and_then(|()| Ok(Session::start(program, setup)?));
    mountns::enter(&outer)?;
    started
}

/// Covers `/tmp` of the calling thread's mount namespace, which is to be a private one, unless one of `used` is in it.
pub(crate) fn cover(used: &[&Path]) -> Result<()> {
    let directory = Path::new("/tmp");
    if used.iter().any(|path| path.starts_with(directory)) {
        return Ok(());
    }
    // It goes with the namespace.
    Mounted::tmpfs(directory, SIZE_BYTES).map(|mounted| drop(mounted.keep())).map_err(CheckpointError::from)
}

/// Room for directories; CRIU keeps no content there.
const SIZE_BYTES: u64 = 16 << 20;
