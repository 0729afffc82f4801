//! The signal state a program expects to start with.

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

use crate::{Result, SysError};

/// Restores what Rust's start-up and our own waiting changed: `SIGPIPE` ends the process again, and no signal
/// is blocked. Both survive exec, so they are undone before a container's program starts.
///
/// # Errors
/// [`SysError::Call`].
pub fn restore_defaults() -> Result<()> {
    // SAFETY: installing SIG_DFL runs no code of ours in a handler.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(SysError::call("signal(SIGPIPE)"))?;
    SigSet::empty().thread_set_mask().map_err(SysError::call("sigprocmask"))
}
