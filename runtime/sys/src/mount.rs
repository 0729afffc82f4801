//! Mounts that are undone when their guard is dropped.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{Result, SysError};

/// A mount made by this process; detached on drop.
#[derive(Debug)]
pub struct Mounted {
    path: PathBuf,
    armed: bool,
}

impl Mounted {
    /// Mounts an empty tmpfs of at most `size_bytes` on the existing directory `path`, for root only.
    ///
    /// # Errors
    /// [`SysError::Mount`].
    pub fn tmpfs(path: &Path, size_bytes: u64) -> Result<Self> {
        let data = format!("size={size_bytes},mode=0700");
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(data.as_str()))
            .map_err(|errno| SysError::Mount { path: path.to_owned(), errno })?;
        Ok(Self { path: path.to_owned(), armed: true })
    }

    /// Binds `source` with everything below it to `path`.
    ///
    /// # Errors
    /// [`SysError::Mount`].
    pub fn bind(source: &Path, path: &Path) -> Result<Self> {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(source), path, None::<&str>, flags, None::<&str>)
            .map_err(|errno| SysError::Mount { path: path.to_owned(), errno })?;
        Ok(Self { path: path.to_owned(), armed: true })
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Detaches the mount and reports what drop would only log.
    ///
    /// # Errors
    /// [`SysError::Mount`].
    pub fn unmount(mut self) -> Result<()> {
        self.armed = false;
        umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| SysError::Mount { path: self.path.clone(), errno })
    }

    /// Leaves the mount in place.
    pub fn keep(mut self) -> PathBuf {
        self.armed = false;
        self.path.clone()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.armed
            && let Err(errno) = umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        {
            log::warn!("failed to unmount {}: {errno}", self.path.display());
        }
    }
}
