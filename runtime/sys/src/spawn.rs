//! Children that inherit chosen descriptors.
//!
//! Every descriptor of godwit is close-on-exec, so that a child started at the same moment by another thread
//! inherits nothing. What a child shall have is named here: the flag is cleared in the child, between fork
//! and exec, and the descriptor keeps its number.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::Signal;

use crate::mountns;

/// What [`Command`] cannot do safely by itself.
pub trait SpawnExt {
    /// Lets the child inherit `fd` under the number that is returned.
    ///
    /// The command owns `fd`: it stays open here until the command is dropped.
    fn inherit_fd(&mut self, fd: OwnedFd) -> RawFd;

    /// Runs the child in a mount namespace of its own that follows the parent's but changes nothing in it.
    ///
    /// A descriptor opened before the fork still refers to the parent's mounts: mounting below it in the
    /// child fails with `EINVAL`. Use [`mountns::enter_private`] in the parent where that matters.
    fn private_mounts(&mut self) -> &mut Self;

    /// Lets the kernel send the child `signal` when the thread that spawned it ends.
    fn signal_on_parent_death(&mut self, signal: Signal) -> &mut Self;
}

impl SpawnExt for Command {
    fn inherit_fd(&mut self, fd: OwnedFd) -> RawFd {
        let raw = fd.as_raw_fd();
        let clear = move || {
            let flags = FdFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFD)?);
            fcntl(&fd, FcntlArg::F_SETFD(flags - FdFlag::FD_CLOEXEC))?;
            Ok(())
        };
        // SAFETY: the closure runs between fork and exec and only calls fcntl(2), which is async-signal-safe;
        // it allocates nothing, takes no lock, and owns the descriptor it changes.
        unsafe { self.pre_exec(clear) };
        raw
    }

    fn private_mounts(&mut self) -> &mut Self {
        // SAFETY: the closure runs between fork and exec and only calls unshare(2) and mount(2) with static
        // strings, which nix passes on from the stack; it allocates nothing and takes no lock.
        unsafe { self.pre_exec(|| mountns::unshare_private().map_err(io::Error::from)) }
    }

    fn signal_on_parent_death(&mut self, signal: Signal) -> &mut Self {
        // SAFETY: the closure runs between fork and exec and only calls prctl(2) with integers; it allocates
        // nothing and takes no lock.
        unsafe { self.pre_exec(move || prctl::set_pdeathsig(signal).map_err(io::Error::from)) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_a_named_descriptor_is_inherited() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (_kept, other) = UnixStream::pair().unwrap();
        let mut command = Command::new("/bin/sh");
        let number = command.inherit_fd(theirs.into());
        let other = other.as_raw_fd();
        command.args(["-c", &format!("echo here >&{number}; test ! -e /proc/self/fd/{other}")]);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "here\n");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn a_descriptor_stays_close_on_exec_in_the_parent() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("/bin/true");
        command.inherit_fd(theirs.try_clone().unwrap().into());
        command.status().unwrap();
        let flags = fcntl(&theirs, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        ours.write_all(b"still open").unwrap();
    }
}
