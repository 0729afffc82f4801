//! Collects every child that ends: the runtime's verbs, containers' processes, orphans.
//!
//! ```text
//! SIGCHLD ──► waitpid(-1) until nothing is left ──► the receiver that claimed the pid, or the open windows
//! ```
//! The shim is a subreaper, so a container's init becomes its child when the runtime that made it exits. The
//! pid is known only then (from the pid file), and the process may have ended before it is: whoever starts a
//! verb opens a [`Window`] first, exits of unclaimed pids are kept while a window is open, and
//! [`Window::claim`] looks there before it waits. Outside of windows they are forgotten, so that the exit of a
//! former process is never taken for that of a later one with the same pid.
//!
//! [`Reaper::spawn`] holds the lock that the collection takes as well: no exit of a child can be seen before
//! its receiver is registered.

use std::{
    collections::HashMap,
    io,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Who ended.
    pub(crate) pid: i32,
    /// Exit code, or 128 + the signal.
    pub(crate) status: u32,
    /// When it was collected.
    pub(crate) at: SystemTime,
}

/// Which children are collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every child of the process, as a subreaper has to.
    Everything,
    /// Those that were claimed: in a process with several reapers, one must not take another's.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests run several reapers in one process"))]
    Claimed,
}

/// Collects children; see the module.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    claimed: HashMap<i32, oneshot::Sender<Exit>>,
    windows: usize,
    unclaimed: Vec<Exit>,
}

impl Reaper {
    /// Begins to collect, now and at every SIGCHLD, until the runtime ends.
    ///
    /// # Errors
    /// When the signal's handler cannot be installed.
    pub(crate) fn run(self: &Arc<Self>, scope: Scope) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        let reaper = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                reaper.collect(scope);
                ended.recv().await;
            }
        });
        Ok(())
    }

    /// Starts `command`; the receiver gets its end.
    ///
    /// # Errors
    /// Those of starting a process.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(i32, oneshot::Receiver<Exit>)> {
        let mut inner = self.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let (sender, receiver) = oneshot::channel();
        inner.claimed.insert(pid, sender);
        Ok((pid, receiver))
    }

    /// Opens a window; see the module.
    pub(crate) fn window(self: &Arc<Self>) -> Window {
        self.lock().windows += 1;
        Window { reaper: Arc::clone(self) }
    }

    fn collect(&self, scope: Scope) {
        // Held throughout: see `spawn`.
        let mut inner = self.lock();
        let candidates = match scope {
            Scope::Everything => vec![None],
            Scope::Claimed => inner.claimed.keys().map(|pid| Some(Pid::from_raw(*pid))).collect(),
        };
        for candidate in candidates {
            while let Some(exit) = next_exit(candidate) {
                inner.ended(exit);
            }
        }
    }

    /// Takes note of an exit that something else collected.
    #[cfg(test)]
    pub(crate) fn report(&self, exit: Exit) {
        self.lock().ended(exit);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing under the lock leaves the maps half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn ended(&mut self, exit: Exit) {
        if let Some(claimed) = self.claimed.remove(&exit.pid) {
            // Whoever claimed it may have lost interest.
            claimed.send(exit).ok();
        } else if self.windows > 0 {
            self.unclaimed.push(exit);
        }
    }
}

/// Returns an exit that was not collected yet, of one child or of any.
fn next_exit(of: Option<Pid>) -> Option<Exit> {
    loop {
        let (pid, status) = match waitpid(of, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code.unsigned_abs()),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + (signal as i32).unsigned_abs()),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return None,
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(errno) => {
                log::error!("failed to collect children: {errno}");
                return None;
            }
        };
        return Some(Exit { pid: pid.as_raw(), status, at: SystemTime::now() });
    }
}

/// The time between the start of a verb and the moment its container's pid is known.
#[derive(Debug)]
pub(crate) struct Window {
    reaper: Arc<Reaper>,
}

impl Window {
    /// Returns the receiver of the end of `pid`, which may have come already.
    pub(crate) fn claim(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let mut inner = self.reaper.lock();
        let (sender, receiver) = oneshot::channel();
        if let Some(found) = inner.unclaimed.iter().rposition(|exit| exit.pid == pid) {
            sender.send(inner.unclaimed.swap_remove(found)).ok();
        } else {
            inner.claimed.insert(pid, sender);
        }
        receiver
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let mut inner = self.reaper.lock();
        inner.windows -= 1;
        if inner.windows == 0 {
            inner.unclaimed = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(pid: i32, status: u32) -> Exit {
        Exit { pid, status, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn an_exit_inside_the_window_is_found_by_a_later_claim() {
        let reaper = Arc::new(Reaper::default());
        let window = reaper.window();
        reaper.report(exit(7, 3));
        assert_eq!(window.claim(7).try_recv().unwrap().status, 3);
        let mut waiting = window.claim(8);
        waiting.try_recv().unwrap_err();
        drop(window);
        reaper.report(exit(8, 4));
        assert_eq!(waiting.try_recv().unwrap().status, 4);
    }

    #[test]
    fn an_exit_before_the_window_is_not_taken_for_a_later_process() {
        let reaper = Arc::new(Reaper::default());
        reaper.report(exit(7, 3));
        drop(reaper.window());
        let window = reaper.window();
        window.claim(7).try_recv().unwrap_err();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_status_of_a_killed_child_is_128_and_the_signal() {
        let reaper = Arc::new(Reaper::default());
        reaper.run(Scope::Claimed).unwrap();
        let mut command = Command::new("/bin/sh");
        let (pid, ended) = reaper.spawn(command.args(["-c", "kill -9 $$"])).unwrap();
        let exit = ended.await.unwrap();
        assert_eq!((exit.pid, exit.status), (pid, 137));
    }
}
