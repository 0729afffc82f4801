//! Network namespaces.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::{Result, SysError};

/// Switches the loopback device on in the network namespace of the process `pid`.
///
/// A new network namespace has one, switched off and thus without 127.0.0.1. The calling thread is in that
/// namespace meanwhile, and back in its own afterwards.
///
/// # Errors
/// [`SysError::File`] when the process is gone, [`SysError::Call`] otherwise.
pub fn bring_loopback_up(pid: i32) -> Result<()> {
    run_in_that_of(pid, switch_on)?
}

/// Runs `action` in the network namespace of the process `pid`: what it spawns and every socket it makes belongs to
/// that. The calling thread is back in its own afterwards.
///
/// # Errors
/// [`SysError::File`] when the process is gone, [`SysError::Call`] otherwise.
pub fn run_in_that_of<T>(pid: i32, action: impl FnOnce() -> T) -> Result<T> {
    let theirs = open(&format!("/proc/{pid}/ns/net"))?;
    let enter = || setns(&theirs, CloneFlags::CLONE_NEWNET).map_err(SysError::call("setns(net)"));
    run_after(enter, action)
}

/// As [`run_in_that_of`], in a new network namespace. It lasts as long as something that `action` spawned or made.
///
/// # Errors
/// [`SysError::Call`], mostly `EPERM` without CAP_SYS_ADMIN.
pub fn run_in_new<T>(action: impl FnOnce() -> T) -> Result<T> {
    run_after(|| unshare(CloneFlags::CLONE_NEWNET).map_err(SysError::call("unshare(net)")), action)
}

fn run_after<T>(enter: impl FnOnce() -> Result<()>, action: impl FnOnce() -> T) -> Result<T> {
    let own = open("/proc/thread-self/ns/net")?;
    enter()?;
    let answer = action();
    setns(&own, CloneFlags::CLONE_NEWNET).map_err(SysError::call("setns(own net)"))?;
    Ok(answer)
}

fn open(path: &str) -> Result<File> {
    File::open(path).map_err(SysError::file(Path::new(path)))
}

fn switch_on() -> Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(SysError::call("socket"))?;
    let mut request = request_for_loopback();
    interface_ioctl(&socket, libc::SIOCGIFFLAGS, &mut request, "ioctl(SIOCGIFFLAGS)")?;
    // SAFETY: SIOCGIFFLAGS has just written this member of the union; every bit pattern is a valid c_short.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    request.ifr_ifru.ifru_flags = flags | up;
    interface_ioctl(&socket, libc::SIOCSIFFLAGS, &mut request, "ioctl(SIOCSIFFLAGS)")
}

fn request_for_loopback() -> libc::ifreq {
    let mut name = [0; libc::IFNAMSIZ];
    for (place, letter) in name.iter_mut().zip(*b"lo") {
        *place = libc::c_char::try_from(letter).unwrap_or_default();
    }
    libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } }
}

fn interface_ioctl(
    socket: &OwnedFd,
    number: libc::Ioctl,
    request: &mut libc::ifreq,
    call: &'static str,
) -> Result<()> {
    // SAFETY: both interface requests used here read and write one `ifreq`, which the pointer is to and which
    // is borrowed mutably for the call.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw mut *request) };
    Errno::result(answer).map(drop).map_err(SysError::call(call))
}
