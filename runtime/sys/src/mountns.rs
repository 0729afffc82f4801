//! Mount namespaces.
//!
//! CRIU mounts scratch file systems while it restores and leaves them behind when it is killed. In a private
//! namespace they vanish with the last process in it. The order matters: the namespace has to be made before
//! directories are opened whose descriptors are given to CRIU, because a descriptor names a mount of the
//! namespace in which it was opened.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::{Result, SysError};

/// Moves the calling thread into a new mount namespace that receives the old one's changes and sends none.
///
/// In a process with several threads only the caller moves; what it opens and spawns belongs to the new
/// namespace.
///
/// # Errors
/// [`SysError::Call`], mostly `EPERM` without CAP_SYS_ADMIN.
pub fn enter_private() -> Result<()> {
    unshare_private().map_err(SysError::call("unshare(CLONE_NEWNS)"))
}

/// As [`enter_private`], and returns the namespace that was left, for [`run_in`].
///
/// # Errors
/// As [`enter_private`], and [`SysError::File`] when the current namespace cannot be opened.
pub fn leave_for_private() -> Result<File> {
    let path = Path::new("/proc/thread-self/ns/mnt");
    let outer = File::open(path).map_err(SysError::file(path))?;
    enter_private()?;
    Ok(outer)
}

/// Moves the calling thread into the mount namespace `namespace`, with its root as working directory.
///
/// # Errors
/// [`SysError::Call`].
pub fn enter(namespace: &File) -> Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNS).map_err(SysError::call("setns(mnt)"))
}

/// Runs `action` in the mount namespace `outer` and returns to the present one.
///
/// The working directory and the root directory become those of the namespaces' roots, as setns(2) says.
///
/// # Errors
/// [`SysError::Call`] when a namespace cannot be entered; in that case for the way back, the thread stays in
/// `outer`.
pub fn run_in<T>(outer: &File, action: impl FnOnce() -> T) -> Result<T> {
    let path = Path::new("/proc/thread-self/ns/mnt");
    let inner = File::open(path).map_err(SysError::file(path))?;
    enter(outer)?;
    let answer = action();
    enter(&inner)?;
    Ok(answer)
}

/// The two calls, free of allocation so that they may run between fork and exec.
pub(crate) fn unshare_private() -> std::result::Result<(), Errno> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
}
