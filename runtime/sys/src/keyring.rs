//! Session keyrings: what keeps a container from reading the keys of whoever started it.

use std::ffi::CString;

use nix::errno::Errno;

use crate::{Result, SysError};

/// Joins the session keyring of the container `name`, making it when there is none.
///
/// A kernel without keyrings, and a sandbox that forbids them, are no error: there is nothing to keep apart.
///
/// # Errors
/// [`SysError::Call`] when the quota is used up or `name` holds a NUL.
pub fn join_session(name: &str) -> Result<()> {
    let call = "keyctl(KEYCTL_JOIN_SESSION_KEYRING)";
    let name =
        CString::new(format!("_ses.{name}")).map_err(|_| SysError::Call { call, errno: Errno::EINVAL })?;
    // SAFETY: the call reads a NUL-terminated string that outlives it and writes no memory of ours.
    let serial = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    let serial = match Errno::result(serial) {
        Ok(serial) => serial,
        Err(Errno::ENOSYS | Errno::EPERM | Errno::EACCES) => return Ok(()),
        Err(errno) => return Err(SysError::Call { call, errno }),
    };
    // SAFETY: both arguments are integers. `KEY_USR_SEARCH` lets a later process of the same user find the
    // ring by name. Refusal leaves later processes with a ring of their own, which is as safe.
    let _permission = unsafe {
        libc::syscall(libc::SYS_keyctl, libc::KEYCTL_SETPERM, serial, KEY_POSSESSOR_ALL | KEY_USR_SEARCH)
    };
    Ok(())
}

const KEY_POSSESSOR_ALL: u32 = 0x3f00_0000;
const KEY_USR_SEARCH: u32 = 0x0008_0000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_nul_is_refused() {
        assert!(matches!(join_session("a\0b"), Err(SysError::Call { errno: Errno::EINVAL, .. })));
    }
}
