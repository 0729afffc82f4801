//! Window sizes of terminals.

use std::os::fd::{AsFd, AsRawFd};

use crate::{Result, SysError};

use request::{get_window_size, set_window_size};

/// Gives the terminal `to` the window size of `from`.
///
/// # Errors
/// [`SysError::Call`] when either is no terminal.
pub fn copy_window_size(from: impl AsFd, to: impl AsFd) -> Result<()> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize` to the pointer, which is to one.
    unsafe { get_window_size(from.as_fd().as_raw_fd(), &raw mut size) }
        .map_err(SysError::call("ioctl(TIOCGWINSZ)"))?;
    // SAFETY: TIOCSWINSZ reads one `winsize` from the pointer, which is to one.
    unsafe { set_window_size(to.as_fd().as_raw_fd(), &raw const size) }
        .map_err(SysError::call("ioctl(TIOCSWINSZ)"))?;
    Ok(())
}

mod request {
    nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);
    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
}
