//! A directory for images that lives in memory and dies with its process.
//!
//! It is a tmpfs that is mounted nowhere: the process holds its only reference, a file descriptor, so no death of
//! the process, however sudden, leaves memory taken or a mount behind. Its path is `/proc/self/fd/N`, which works
//! for the process itself; CRIU is given the descriptor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// A directory in memory.
#[derive(Debug)]
pub struct ImageDir {
    _mount: OwnedFd,
    path: PathBuf,
}

impl ImageDir {
    /// Makes an empty directory that takes at most `size_bytes`.
    ///
    /// # Errors
    /// The failed call; `EPERM` without CAP_SYS_ADMIN.
    pub fn new(size_bytes: u64) -> io::Result<Self> {
        let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&context, "size", size_bytes.to_string())?;
        rustix::mount::fsconfig_set_string(&context, "mode", "0700")?;
        rustix::mount::fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        Ok(Self { _mount: mount, path })
    }

    /// Returns the path by which this process reaches it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens it once more, for listing.
    ///
    /// # Errors
    /// The failed call.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(CWD, &self.path, flags, Mode::empty())?)
    }
}

/// Returns how many bytes of images this host has room for: what is available of its memory, but for a reserve.
#[must_use]
pub fn room_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available_kb = text.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    (available_kb.unwrap_or(0) * 1024).saturating_sub(RESERVE_BYTES)
}

/// Left for the rest of the host.
const RESERVE_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_live_in_it_up_to_its_size_and_nobody_else_sees_them() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: needs root");
            return;
        }
        let before = std::fs::read("/proc/self/mounts").unwrap();
        let directory = ImageDir::new(1 << 20).unwrap();
        std::fs::write(directory.path().join("small"), vec![1; 1000]).unwrap();
        assert_eq!(std::fs::read(directory.path().join("small")).unwrap().len(), 1000);
        let error = std::fs::write(directory.path().join("big"), vec![1; 2 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read("/proc/self/mounts").unwrap(), before);
        assert!(room_bytes() > 0);
    }
}
