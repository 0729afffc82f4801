//! Files in memory.

use std::ffi::CStr;
use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{Result, SysError};

/// Makes an empty file in memory, close-on-exec; `name` shows in `/proc/PID/fd`.
///
/// # Errors
/// [`SysError::Call`] when no descriptor is left.
pub fn create(name: &CStr) -> Result<File> {
    memfd_create(name, MFdFlags::MFD_CLOEXEC).map(File::from).map_err(SysError::call("memfd_create"))
}
