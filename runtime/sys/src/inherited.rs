//! Descriptors that the process was started with, known by their numbers.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use nix::errno::Errno;

use crate::{Result, SysError};

/// Takes over the inherited descriptor `number`, and keeps it from the children of this process.
///
/// To be called at the start of a program, for a number that its command line names, before the program opens
/// anything: a number that is not inherited would by then be another descriptor's.
///
/// # Errors
/// [`SysError::Call`]: `EBADF` if there is no such descriptor, if it is one of the standard ones, or if it has been
/// taken before.
pub fn take(number: RawFd) -> Result<OwnedFd> {
    let refused = |errno| SysError::Call { call: "fcntl(F_SETFD)", errno };
    let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if number <= 2 || taken.contains(&number) {
        return Err(refused(Errno::EBADF));
    }
    // SAFETY: fcntl with F_SETFD takes numbers only; one that is no descriptor is an error.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(result).map_err(refused)?;
    taken.push(number);
    // SAFETY: the descriptor is open, as fcntl has shown; it came with the process, so no other value owns it, and
    // `TAKEN` sees to it that this is the only one that ever will.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_standard_ones_never() {
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let taken = take(number).unwrap();
        take(number).unwrap_err();
        drop(taken);
        take(1).unwrap_err();
        take(1_000_000).unwrap_err();
    }
}
