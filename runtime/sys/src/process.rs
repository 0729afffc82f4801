//! Groups, children and the subreaper.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::{Result, SysError};

/// Makes orphaned descendants children of this process (or stops doing so).
///
/// # Errors
/// [`SysError::Call`].
pub fn set_subreaper(on: bool) -> Result<()> {
    prctl::set_child_subreaper(on).map_err(SysError::call("prctl(PR_SET_CHILD_SUBREAPER)"))
}

/// Kills every process of the group `group` with `SIGKILL`; no process left is no error.
///
/// # Errors
/// [`SysError::Call`].
pub fn kill_group(group: i32) -> Result<()> {
    match killpg(Pid::from_raw(group), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(SysError::Call { call: "killpg", errno }),
    }
}

/// Reaps the child `pid` if it ends within `limit`; its status as a shell would show it, `None` when it runs on.
///
/// A child that is not ours (any more) counts as ended with status 0.
///
/// # Errors
/// [`SysError::Call`].
pub fn reap(pid: i32, limit: Duration) -> Result<Option<i32>> {
    let deadline = Instant::now() + limit;
    let process = crate::pidfd::PidFd::open(pid);
    loop {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(Some(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Some(128 + signal as i32)),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Ok(Some(0)),
            Err(errno) => return Err(SysError::Call { call: "waitpid", errno }),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        if let Ok(process) = &process {
            process.wait_exit(left)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "reaping by id is what is tested")]
    fn a_group_is_killed_and_its_leader_reaped() {
        let child = Command::new("sh").args(["-c", "sleep 60 & sleep 60"]).process_group(0).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(reap(pid, Duration::ZERO).unwrap(), None);
        kill_group(pid).unwrap();
        assert_eq!(reap(pid, Duration::from_secs(10)).unwrap(), Some(137));
        assert_eq!(reap(pid, Duration::ZERO).unwrap(), Some(0));
    }
}
