//! How much storage a writable layer takes.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};

use super::copy::names;
use super::{LayerRoot, RootfsError};

/// What `st_blocks` counts in, in bytes, on every file system.
const BLOCK_BYTES: u64 = 512;

impl LayerRoot {
    /// Adds up what the layer's files and directories take, in bytes; a file with several names counts once.
    ///
    /// The container may be running: what vanishes under the walk counts for nothing. (A snapshotter's own count
    /// fails then, and a container that renames files all the time would never be moved.)
    ///
    /// # Errors
    /// [`RootfsError::File`] if something cannot be read that is still there.
    pub fn size(&self) -> Result<u64, RootfsError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |errno: rustix::io::Errno| RootfsError::File {
            what: "measure",
            path: self.path.clone(),
            source: errno.into(),
        };
        let root = rustix::fs::openat(CWD, &self.path, flags, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&root).map_err(failed)?;
        let mut walk = Walk { device: stat.st_dev, counted: HashSet::new(), bytes: allocated(&stat) };
        walk.directory(root.as_fd(), &mut Vec::new())?;
        Ok(walk.bytes)
    }
}

struct Walk {
    device: u64,
    /// Inodes with several names.
    counted: HashSet<u64>,
    bytes: u64,
}

impl Walk {
    fn directory(&mut self, fd: BorrowedFd<'_>, path: &mut Vec<u8>) -> Result<(), RootfsError> {
        for name in names(fd, path)? {
            let len = path.len();
            if len > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            match self.child(fd, &name, path) {
                Err(error) if error.is_vanished() => {}
                other => other?,
            }
            path.truncate(len);
        }
        Ok(())
    }

    fn child(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &std::ffi::CStr,
        path: &mut Vec<u8>,
    ) -> Result<(), RootfsError> {
        let looked = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = looked.map_err(RootfsError::file("measure", path))?;
        let again = stat.st_nlink > 1 && !is_directory(&stat) && !self.counted.insert(stat.st_ino);
        if stat.st_dev != self.device || again {
            return Ok(());
        }
        self.bytes = self.bytes.saturating_add(allocated(&stat));
        if !is_directory(&stat) {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(parent, name, flags, Mode::empty()) {
            Ok(fd) => self.directory(fd.as_fd(), path),
            // No directory any more.
            Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => Ok(()),
            Err(errno) => Err(RootfsError::file("measure", path)(errno)),
        }
    }
}

fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn allocated(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use godwit_protocol::rootfs::Layer;

    use super::*;

    fn size_of(path: &std::path::Path) -> u64 {
        LayerRoot { path: path.to_owned(), layer: Layer::Whole }.size().unwrap()
    }

    #[test]
    fn a_file_with_two_names_counts_once_and_a_hole_for_nothing() {
        let layer = tempfile::tempdir().unwrap();
        let empty = size_of(layer.path());
        fs::create_dir_all(layer.path().join("a/b")).unwrap();
        let file = layer.path().join("a/b/file");
        fs::write(&file, vec![1; 1 << 20]).unwrap();
        fs::File::open(&file).unwrap().sync_all().unwrap();
        let one = size_of(layer.path()) - empty;
        assert!((1 << 20..=(1 << 20) + (64 << 10)).contains(&one), "{one}");
        fs::hard_link(&file, layer.path().join("a/second")).unwrap();
        std::os::unix::fs::symlink("/", layer.path().join("a/link")).unwrap();
        fs::File::create(layer.path().join("hole")).unwrap().set_len(1 << 30).unwrap();
        let all = size_of(layer.path()) - empty;
        assert!((one..=one + (64 << 10)).contains(&all), "{one} {all}");
    }

    #[test]
    fn what_comes_and_goes_meanwhile_is_no_error() {
        let layer = tempfile::tempdir().unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let [next, now] = ["next", "now"].map(|name| layer.path().join(name));
                while !done.load(Ordering::Relaxed) {
                    fs::create_dir(&next).unwrap();
                    fs::write(next.join("file"), b"x").unwrap();
                    fs::remove_dir_all(&next).unwrap();
                    fs::write(&next, b"x").unwrap();
                    fs::rename(&next, &now).unwrap();
                }
            });
            let sizes: Vec<_> = (0..2000)
                .map(|_| LayerRoot { path: layer.path().to_owned(), layer: Layer::Whole }.size())
                .collect();
            done.store(true, Ordering::Relaxed);
            for size in sizes {
                size.unwrap();
            }
        });
    }
}
