//! A descriptor of another process, duplicated into this one (pidfd_getfd(2), kernel 5.6).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::{Result, SysError};

/// Duplicates descriptor `number` of the process behind `process`, close-on-exec.
///
/// # Errors
/// [`SysError::Call`]: `EBADF` when the process has no such descriptor, `EPERM` without the right to trace it,
/// `ESRCH` when it has ended.
pub fn duplicate(process: impl AsFd, number: RawFd) -> Result<OwnedFd> {
    let process = process.as_fd().as_raw_fd();
    // SAFETY: pidfd_getfd takes three integers.
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, number, 0) };
    let raw = Errno::result(answer).map_err(SysError::call("pidfd_getfd"))?;
    let raw =
        RawFd::try_from(raw).map_err(|_| SysError::Call { call: "pidfd_getfd", errno: Errno::EBADF })?;
    // SAFETY: the kernel has just returned `raw` to this call, nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::pidfd::PidFd;

    #[test]
    fn a_childs_pipe_can_be_written_to_through_its_descriptor() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP: duplicating another process's descriptor needs root here");
            return;
        }
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let process = PidFd::open(child.id().try_into().unwrap()).unwrap();
        let stdout = duplicate(&process, 1).unwrap();
        std::fs::File::from(stdout).write_all(b"from outside").unwrap();
        drop(child.stdin.take());
        assert_eq!(child.wait_with_output().unwrap().stdout, b"from outside");
        let answer = duplicate(&process, 9999);
        assert!(
            matches!(answer, Err(SysError::Call { errno: Errno::EBADF | Errno::ESRCH, .. })),
            "{answer:?}"
        );
    }
}
