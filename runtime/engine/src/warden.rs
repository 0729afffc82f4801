//! A process beside the target's worker that keeps tasks from reading zeros when the worker dies.
//!
//! ```text
//! worker ── keep KEY, with a duplicate of a userfaultfd ──► warden
//!        ── let KEY go ───────────────────────────────────►
//!        ── stand down: the container is gone ────────────►
//!        ── end of file ──────────────────────────────────► anything kept? kill the container, then end
//! ```
//! A task that misses a page sleeps as long as somebody has its userfaultfd; when the last one closes it, the kernel
//! gives it a page of zeros. So a worker that is killed while pages are still to come would corrupt the container
//! without a sign. With the warden its tasks sleep on, and are killed: a container that is lost is better than one
//! that computes on with holes in its memory.
//!
//! The warden serves nothing, and holds nothing once every page is in its task.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use godwit_memory::MemoryError;
use godwit_memory::fault::Keeper;
use godwit_sys::{SysError, fdpass};

use crate::Cause;

/// The worker's end.
#[derive(Debug)]
pub struct Warden {
    socket: OwnedFd,
    /// Reaped on drop, when the end of the socket has ended it.
    process: Mutex<Child>,
}

impl Warden {
    /// Starts `command`, which calls [`guard`] on its standard input.
    ///
    /// # Errors
    /// What keeps it from starting.
    pub fn start(mut command: Command) -> io::Result<Self> {
        let (ours, theirs) = fdpass::seqpacket_pair().map_err(io::Error::other)?;
        // Not the container's output, which is this process's own: it would be held open.
        let process = command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Self { socket: ours, process: Mutex::new(process) })
    }

    /// Tells that the container is gone for good: whatever has its name from here on is another.
    pub fn stand_down(&self) {
        // One that is gone watches over nothing.
        self.send(STAND_DOWN, 0, None).ok();
    }

    fn send(&self, what: u8, key: u64, faults: Option<&OwnedFd>) -> Result<(), SysError> {
        let mut message = [what; MESSAGE_LEN];
        message[1..].copy_from_slice(&key.to_le_bytes());
        let fds: Vec<_> = faults.map(AsFd::as_fd).into_iter().collect();
        fdpass::send(&self.socket, &message, &fds).map(drop)
    }
}

impl Keeper for Warden {
    fn keep(&self, key: u64, _pid: i32, faults: OwnedFd) -> Result<(), MemoryError> {
        Ok(self.send(KEEP, key, Some(&faults))?)
    }

    fn release(&self, key: u64) {
        if let Err(error) = self.send(RELEASE, key, None) {
            log::warn!("the warden is gone: {error}");
        }
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        // A null in the place of the socket: its end is what the warden waits for.
        if let Ok(null) = std::fs::File::open("/dev/null") {
            self.socket = null.into();
        }
        let process = self.process.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = process.wait() {
            log::warn!("the warden's end is not known: {error}");
        }
    }
}

/// The warden's whole life: keeps what the worker at the other end of `socket` gives it, and calls `kill` if the
/// worker ends before it has let all of it go. What is kept is closed only after that.
///
/// # Errors
/// What came of `kill`, or a worker that says nonsense; the container is killed then, too.
pub fn guard(socket: impl AsFd, kill: impl FnOnce() -> Result<(), Cause>) -> Result<(), Cause> {
    let mut kept = BTreeMap::new();
    let ended = serve(&socket, &mut kept);
    if kept.is_empty() {
        return ended;
    }
    log::error!("the worker died while {} address spaces lacked pages: the container is killed", kept.len());
    kill().and(ended)
}

/// Keeps and lets go, until the worker ends.
fn serve(socket: &impl AsFd, kept: &mut BTreeMap<u64, OwnedFd>) -> Result<(), Cause> {
    loop {
        let mut message = [0; MESSAGE_LEN];
        let received = match fdpass::receive(socket, &mut message) {
            Ok(received) => received,
            Err(SysError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let [what, key @ ..] = message;
        let key = u64::from_le_bytes(key);
        match (what, <[OwnedFd; 1]>::try_from(received.fds)) {
            (KEEP, Ok([faults])) => drop(kept.insert(key, faults)),
            (RELEASE, Err(_)) => drop(kept.remove(&key)),
            (STAND_DOWN, Err(_)) => kept.clear(),
            _ => return Err("the worker said nonsense".into()),
        }
    }
}

const KEEP: u8 = b'K';
const RELEASE: u8 = b'R';
const STAND_DOWN: u8 = b'S';
const MESSAGE_LEN: usize = 9;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    /// Runs a warden in a thread, lets `worker` talk to it and end; returns whether it killed.
    fn after(worker: impl FnOnce(&OwnedFd)) -> bool {
        let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
        let warden = thread::spawn(move || {
            let mut killed = false;
            let ended = guard(&theirs, || {
                killed = true;
                Ok(())
            });
            (killed, ended.is_ok())
        });
        worker(&ours);
        drop(ours);
        let (killed, _) = warden.join().unwrap();
        killed
    }

    fn say(socket: &OwnedFd, what: u8, key: u64, fd: Option<&UnixStream>) {
        let mut message = [what; MESSAGE_LEN];
        message[1..].copy_from_slice(&key.to_le_bytes());
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        fdpass::send(socket, &message, &fds).unwrap();
    }

    #[test]
    fn a_worker_that_has_let_all_go_may_end() {
        let (fd, _) = UnixStream::pair().unwrap();
        assert!(!after(|_| {}));
        assert!(!after(|socket| {
            say(socket, KEEP, 1, Some(&fd));
            say(socket, KEEP, 2, Some(&fd));
            say(socket, RELEASE, 1, None);
            say(socket, RELEASE, 2, None);
        }));
        assert!(!after(|socket| {
            say(socket, KEEP, 1, Some(&fd));
            say(socket, STAND_DOWN, 0, None);
        }));
    }

    #[test]
    fn a_worker_that_dies_early_or_says_nonsense_costs_the_container() {
        let (fd, _) = UnixStream::pair().unwrap();
        assert!(after(|socket| say(socket, KEEP, 1, Some(&fd))));
        assert!(after(|socket| {
            say(socket, KEEP, 1, Some(&fd));
            say(socket, b'X', 1, None);
        }));
    }

    #[test]
    fn what_is_kept_stays_open_until_the_container_is_killed() {
        use std::io::Read;
        let (fd, mut other) = UnixStream::pair().unwrap();
        let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
        say(&ours, KEEP, 1, Some(&fd));
        drop((ours, fd));
        other.set_nonblocking(true).unwrap();
        guard(&theirs, || {
            let open = other.read(&mut [0; 1]).unwrap_err();
            assert_eq!(open.kind(), io::ErrorKind::WouldBlock);
            Ok(())
        })
        .unwrap();
        assert_eq!(other.read(&mut [0; 1]).unwrap(), 0);
    }
}
