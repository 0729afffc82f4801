//! Groups, children, the subreaper and priorities.

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

/// Makes the calling thread run before others of its kind: for one that wakes up, does little, and is waited for.
///
/// # Errors
/// [`SysError::Call`]: `EACCES` without CAP_SYS_NICE.
pub fn prefer_this_thread() -> Result<()> {
    // SAFETY: the call takes three integers. On Linux it is the thread, not the process, that 0 stands for.
    let answer = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, PREFERRED) };
    Errno::result(answer).map(drop).map_err(SysError::call("setpriority"))
}

/// A niceness with which a thread gets some nine times the processor time of an ordinary one, if it wants that.
const PREFERRED: i32 = -10;

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
    fn a_preferred_thread_alone_has_another_priority() {
        let nice = |thread: &str| {
            let stat = std::fs::read_to_string(format!("/proc/{thread}/stat")).unwrap();
            // The 19th field of stat(5); the second is a name in parentheses.
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(16).unwrap().parse::<i32>().unwrap()
        };
        let before = nice("thread-self");
        let thread = std::thread::spawn(move || match prefer_this_thread() {
            Ok(()) => assert_eq!(nice("thread-self"), PREFERRED),
            Err(error) => eprintln!("SKIP: {error}"),
        });
        thread.join().unwrap();
        assert_eq!(nice("thread-self"), before);
    }

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
