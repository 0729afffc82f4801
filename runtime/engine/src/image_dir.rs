//! A directory for images that dies with its process, in memory unless storage is asked for.
//!
//! In memory it is a tmpfs that is mounted nowhere: the process holds its only reference, a file descriptor, so no death of
//! the process, however sudden, leaves memory taken or a mount behind. Its path is `/proc/self/fd/N`, which works
//! for the process itself; CRIU is given the descriptor.
//!
//! On storage it is a directory below [`STORAGE`] that is removed when it is dropped, or by the next one that is made
//! if its process was killed.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use godwit_protocol::request::Images;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// A directory in memory.
#[derive(Debug)]
pub struct ImageDir {
    place: Place,
    path: PathBuf,
}

#[derive(Debug)]
enum Place {
    Memory { _mount: OwnedFd },
    Storage,
}

/// Where images on storage are.
pub const STORAGE: &str = "/var/lib/godwit/images";

impl ImageDir {
    /// Makes an empty directory where it is wanted; one in memory takes at most `size_bytes`.
    ///
    /// # Errors
    /// As [`ImageDir::new`], or why there can be none on storage.
    pub fn make(images: Images, size_bytes: u64) -> io::Result<Self> {
        match images {
            Images::Cache => Self::new(size_bytes),
            Images::Disk => Self::on_storage(Path::new(STORAGE)),
        }
    }

    /// Makes an empty directory on storage below `parent`, and removes those of processes that are no more.
    ///
    /// # Errors
    /// The failed call.
    pub fn on_storage(parent: &Path) -> io::Result<Self> {
        let private = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        private(parent)?;
        for entry in fs::read_dir(parent)?.flatten() {
            let name = entry.file_name();
            let owner = name.to_str().and_then(|name| name.split('-').next()?.parse::<u32>().ok());
            if owner.is_some_and(|owner| !Path::new(&format!("/proc/{owner}")).exists()) {
                // What is left for another time costs nothing but room.
                fs::remove_dir_all(entry.path()).ok();
            }
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{}-{number}", std::process::id()));
        private(&path)?;
        Ok(Self { place: Place::Storage, path })
    }

    /// Makes an empty directory in memory that takes at most `size_bytes`.
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
        Ok(Self { place: Place::Memory { _mount: mount }, path })
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

impl Drop for ImageDir {
    fn drop(&mut self) {
        if matches!(self.place, Place::Storage)
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            log::warn!("{} is left: {error}", self.path.display());
        }
    }
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Returns how many bytes of images this host has room for: what is available of its memory, but for a reserve.
#[must_use]
pub fn room_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
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
    fn a_directory_on_storage_goes_with_its_owner_and_dead_ones_go_as_well() {
        let parent = tempfile::tempdir().unwrap();
        // No process has this id: it is above the highest there can be.
        let dead = parent.path().join("4194305-0");
        fs::create_dir(&dead).unwrap();
        let (one, two) =
            (ImageDir::on_storage(parent.path()).unwrap(), ImageDir::on_storage(parent.path()).unwrap());
        assert!(!dead.exists());
        fs::write(one.path().join("core.img"), b"x").unwrap();
        assert_ne!(one.path(), two.path());
        drop((one, two));
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_live_in_it_up_to_its_size_and_nobody_else_sees_them() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: needs root");
            return;
        }
        let before = fs::read("/proc/self/mounts").unwrap();
        let directory = ImageDir::new(1 << 20).unwrap();
        fs::write(directory.path().join("small"), vec![1; 1000]).unwrap();
        assert_eq!(fs::read(directory.path().join("small")).unwrap().len(), 1000);
        let error = fs::write(directory.path().join("big"), vec![1; 2 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read("/proc/self/mounts").unwrap(), before);
        assert!(room_bytes() > 0);
    }
}
