//! fork(2) where it is sound.

use nix::unistd::ForkResult;

use crate::{Result, SysError};

/// Forks a process that has one thread, and runs `child` in the child, which ends with what it returns.
/// Returns the child's id; reaping it is the caller's.
///
/// # Errors
/// [`SysError::Call`] with `EDEADLK` when the process has other threads: the child would find their locks
/// taken for ever.
pub fn run(child: impl FnOnce() -> i32) -> Result<i32> {
    let path = "/proc/self/task";
    let threads = std::fs::read_dir(path).map_err(SysError::file(path))?.count();
    if threads != 1 {
        return Err(SysError::Call { call: "fork", errno: nix::errno::Errno::EDEADLK });
    }
    // SAFETY: this is the only thread, so no lock is held by one that the child lacks, and none can start
    // between the check and the call.
    match unsafe { nix::unistd::fork() }.map_err(SysError::call("fork"))? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => std::process::exit(child()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_forked() {
        // Tests run on threads of their own.
        let answer = run(|| 0);
        assert!(
            matches!(answer, Err(SysError::Call { errno: nix::errno::Errno::EDEADLK, .. })),
            "{answer:?}"
        );
    }
}
