//! Processes by descriptor.
//!
//! A process id may be given to another process as soon as its owner has been reaped; a pidfd names one
//! process for ever. See pidfd_open(2) and pidfd_send_signal(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{Result, SysError};

/// One process, alive or dead.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    pid: i32,
}

impl PidFd {
    /// Opens the process that has `pid` now.
    ///
    /// # Errors
    /// [`SysError::NoProcess`] when there is none, [`SysError::Call`] otherwise.
    pub fn open(pid: i32) -> Result<Self> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let answer = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let raw = match Errno::result(answer) {
            Ok(raw) => RawFd::try_from(raw)
                .map_err(|_| SysError::Call { call: "pidfd_open", errno: Errno::EBADF })?,
            Err(Errno::ESRCH | Errno::EINVAL) => return Err(SysError::NoProcess { pid }),
            Err(errno) => return Err(SysError::Call { call: "pidfd_open", errno }),
        };
        // SAFETY: the kernel has just returned `raw` to this call, nothing else owns it. It is close-on-exec
        // by definition of pidfd_open.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd, pid })
    }

    /// The process id at the time of [`PidFd::open`].
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends the signal with number `signal` (0 only probes).
    ///
    /// # Errors
    /// [`SysError::NoProcess`] when it has been reaped, [`SysError::Call`] for a wrong number or missing rights.
    pub fn send_signal(&self, signal: i32) -> Result<()> {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: `self.fd` is an open pidfd; a null siginfo makes the kernel fill in its own.
        let answer =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal, info, 0) };
        match Errno::result(answer) {
            Ok(_) => Ok(()),
            Err(Errno::ESRCH) => Err(SysError::NoProcess { pid: self.pid }),
            Err(errno) => Err(SysError::Call { call: "pidfd_send_signal", errno }),
        }
    }

    /// Waits until the process has ended (it may still have to be reaped); false when `limit` passed first.
    ///
    /// # Errors
    /// [`SysError::Call`] when poll(2) fails.
    pub fn wait_exit(&self, limit: Duration) -> Result<bool> {
        let deadline = std::time::Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(SysError::Call { call: "poll", errno }),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_killed_child_is_seen_to_end_before_it_is_reaped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = PidFd::open(child.id().try_into().unwrap()).unwrap();
        assert!(!process.wait_exit(Duration::ZERO).unwrap());
        process.send_signal(libc::SIGKILL).unwrap();
        assert!(process.wait_exit(Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        assert!(matches!(process.send_signal(0), Err(SysError::NoProcess { .. })));
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        assert!(matches!(PidFd::open(i32::MAX), Err(SysError::NoProcess { pid: i32::MAX })));
        assert!(matches!(PidFd::open(-1), Err(SysError::NoProcess { pid: -1 })));
    }
}
