//! The target's half: makes paths what the source says they are, below one directory and nowhere else.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use godwit_protocol::rootfs::{Entry, Layer, Meta, Node, Pass};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::{RootfsError, Sink};

/// Applies what the source says to a mounted root.
///
/// The container must not run in it. Nothing that is applied can lead out of it, whatever the source says.
#[derive(Debug)]
pub struct Applier {
    root: OwnedFd,
    file: Option<Incoming>,
    /// Times of directories, set when a pass is over: changing what is in a directory changes its time. They are
    /// those of the directory's entry, or those it had before the pass.
    directories: BTreeMap<Vec<u8>, Timestamps>,
    written_bytes: u64,
}

/// A file whose content is coming.
#[derive(Debug)]
struct Incoming {
    fd: OwnedFd,
    path: Vec<u8>,
    size: u64,
    end: u64,
    meta: Meta,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Applier {
    /// Opens the root that is mounted at `rootfs`.
    ///
    /// # Errors
    /// [`RootfsError::File`] if it is no directory.
    pub fn open(rootfs: &Path) -> Result<Self, RootfsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, rootfs, flags, Mode::empty()).map_err(|errno| {
            RootfsError::File { what: "open", path: rootfs.to_owned(), source: errno.into() }
        })?;
        Ok(Self { root, file: None, directories: BTreeMap::new(), written_bytes: 0 })
    }

    /// Ends a pass: everything that came has been applied when this returns.
    ///
    /// # Errors
    /// [`RootfsError::File`].
    pub fn end(&mut self) -> Result<(), RootfsError> {
        self.finish_file()?;
        for (path, times) in std::mem::take(&mut self.directories) {
            let Some((parent, name)) = self.place(&path)? else { continue };
            // A directory that was replaced since has an entry of its own, or is none any more.
            if kind_of(&parent, name, &path)? == Some(FileType::Directory) {
                set_times(&parent, name, &times).map_err(RootfsError::file("date", &path))?;
            }
        }
        Ok(())
    }

    /// Returns how many bytes of content have been written.
    #[must_use]
    pub const fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Finds the directory that holds `path` and its name in it; `None` if that directory does not exist.
    ///
    /// Only true directories are walked through, so no link can lead anywhere.
    fn place<'p>(&self, path: &'p [u8]) -> Result<Option<(OwnedFd, &'p OsStr)>, RootfsError> {
        let (parent, name): (&[u8], &[u8]) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None if path.is_empty() => (b".", b"."),
            None => (b".", path),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        match rustix::fs::openat2(&self.root, parent, flags, Mode::empty(), resolve) {
            Ok(fd) => Ok(Some((fd, OsStr::from_bytes(name)))),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(errno) => Err(RootfsError::file("open the parent of", path)(errno)),
        }
    }

    fn existing_place<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p OsStr), RootfsError> {
        let place = self.place(path)?;
        place.ok_or_else(|| RootfsError::file("open the parent of", path)(Errno::NOENT))
    }

    /// As [`Self::existing_place`], for a change of what is in that directory.
    fn change<'p>(&mut self, path: &'p [u8]) -> Result<(OwnedFd, &'p OsStr), RootfsError> {
        let (parent, name) = self.existing_place(path)?;
        self.keep_times(path, &parent)?;
        Ok((parent, name))
    }

    fn keep_times(&mut self, path: &[u8], parent: &OwnedFd) -> Result<(), RootfsError> {
        let directory = path.iter().rposition(|&byte| byte == b'/').map_or(&b""[..], |at| &path[..at]);
        if !self.directories.contains_key(directory) {
            let stat = rustix::fs::fstat(parent).map_err(RootfsError::file("look at", directory))?;
            let tv_nsec = stat.st_mtime_nsec.try_into().unwrap_or(0);
            let last_modification = Timespec { tv_sec: stat.st_mtime, tv_nsec };
            self.directories
                .insert(directory.to_vec(), Timestamps { last_access: UNTOUCHED, last_modification });
        }
        Ok(())
    }

    fn finish_file(&mut self) -> Result<(), RootfsError> {
        let Some(file) = self.file.take() else { return Ok(()) };
        let failed = |errno| RootfsError::file("write", &file.path)(errno);
        rustix::fs::ftruncate(&file.fd, file.size).map_err(failed)?;
        let Meta { mode, uid, gid, .. } = file.meta;
        // The owner first: changing it takes set-user-id bits and capabilities away.
        rustix::fs::fchown(&file.fd, Some(owner(uid)), Some(group(gid))).map_err(failed)?;
        rustix::fs::fchmod(&file.fd, Mode::from_raw_mode(mode)).map_err(failed)?;
        for (name, value) in &file.xattrs {
            let set = rustix::fs::fsetxattr(&file.fd, name.as_slice(), value, XattrFlags::empty());
            tolerate_user_xattr(name, set)
                .map_err(|errno| RootfsError::file("set an attribute of", &file.path)(errno))?;
        }
        rustix::fs::futimens(&file.fd, &times(&file.meta)).map_err(failed)
    }

    fn directory(&mut self, path: &[u8], clear: bool, meta: &Meta) -> Result<(), RootfsError> {
        let (parent, name) = self.change(path)?;
        let is_directory = kind_of(&parent, name, path)? == Some(FileType::Directory);
        if !is_directory {
            remove_all(&parent, name, path)?;
            rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700))
                .map_err(RootfsError::file("make", path))?;
        } else if clear {
            let fd = open_directory(&parent, name).map_err(RootfsError::file("open", path))?;
            clear_directory(&fd, path)?;
        }
        self.directories.insert(path.to_vec(), times(meta));
        Ok(())
    }

    fn file(&mut self, entry: &Entry<'_>, size: u64) -> Result<(), RootfsError> {
        let (parent, name) = self.change(entry.path)?;
        remove_all(&parent, name, entry.path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600))
            .map_err(RootfsError::file("create", entry.path))?;
        self.file = Some(Incoming {
            fd,
            path: entry.path.to_vec(),
            size,
            end: 0,
            meta: entry.meta,
            xattrs: entry.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
        });
        Ok(())
    }

    fn other(&mut self, entry: &Entry<'_>) -> Result<(), RootfsError> {
        let Entry { path, node, meta, .. } = entry;
        let failed = |errno| RootfsError::file("create", path)(errno);
        let (parent, name) = self.change(path)?;
        if let Node::Hardlink { to } = node {
            return self.hardlink(&parent, name, path, to);
        }
        remove_all(&parent, name, path)?;
        let mode = Mode::from_raw_mode(meta.mode);
        let make = |kind, dev| rustix::fs::mknodat(&parent, name, kind, mode, dev);
        match *node {
            Node::Symlink { to } => rustix::fs::symlinkat(OsStr::from_bytes(to), &parent, name),
            Node::Fifo => make(FileType::Fifo, 0),
            Node::Socket => make(FileType::Socket, 0),
            Node::CharDevice { major, minor } => {
                make(FileType::CharacterDevice, rustix::fs::makedev(major, minor))
            }
            Node::BlockDevice { major, minor } => {
                make(FileType::BlockDevice, rustix::fs::makedev(major, minor))
            }
            Node::Directory { .. } | Node::File { .. } | Node::Hardlink { .. } => Ok(()),
        }
        .map_err(failed)
    }

    fn hardlink(&self, parent: &OwnedFd, name: &OsStr, path: &[u8], to: &[u8]) -> Result<(), RootfsError> {
        if to == path {
            return Err(RootfsError::Malformed { what: "a file is a link to itself" });
        }
        let (to_parent, to_name) = self.existing_place(to)?;
        // Removing first could remove the very file, if it is a directory above the other name.
        match kind_of(&to_parent, to_name, to)? {
            Some(FileType::Directory) | None => Err(RootfsError::file("link to", to)(Errno::NOENT)),
            Some(_) => {
                remove_all(parent, name, path)?;
                rustix::fs::linkat(&to_parent, to_name, parent, name, AtFlags::empty())
                    .map_err(RootfsError::file("link", path))
            }
        }
    }

    /// Sets owner, mode, attributes and (for all but directories) times of a path that is no regular file.
    fn dress(&self, entry: &Entry<'_>) -> Result<(), RootfsError> {
        let Entry { path, node, meta, xattrs } = entry;
        let failed = |errno| RootfsError::file("set the owner and mode of", path)(errno);
        let (parent, name) = self.existing_place(path)?;
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(&parent, name, Some(owner(meta.uid)), Some(group(meta.gid)), nofollow)
            .map_err(failed)?;
        if !matches!(node, Node::Symlink { .. }) {
            // Follows links, of which the name is none: it has just been made, and nobody else is in here.
            let mode = Mode::from_raw_mode(meta.mode);
            rustix::fs::chmodat(&parent, name, mode, AtFlags::empty()).map_err(failed)?;
        }
        let mut place = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
        place.extend_from_slice(name.as_bytes());
        if let Node::Directory { .. } = node {
            remove_stale_xattrs(&place, entry)?;
        }
        for (key, value) in xattrs {
            let set = rustix::fs::lsetxattr(place.as_slice(), *key, value, XattrFlags::empty());
            tolerate_user_xattr(key, set)
                .map_err(|errno| RootfsError::file("set an attribute of", path)(errno))?;
        }
        if let Node::Directory { .. } = node {
            return Ok(());
        }
        set_times(&parent, name, &times(meta)).map_err(RootfsError::file("date", path))
    }
}

impl Sink for Applier {
    fn begin(&mut self, _pass: Pass, _layer: Layer) -> Result<(), RootfsError> {
        self.finish_file()
    }

    fn entry(&mut self, entry: Entry<'_>) -> Result<(), RootfsError> {
        self.finish_file()?;
        match entry.node {
            Node::File { size } => return self.file(&entry, size),
            Node::Hardlink { .. } => return self.other(&entry),
            Node::Directory { clear } => self.directory(entry.path, clear, &entry.meta)?,
            _ => self.other(&entry)?,
        }
        self.dress(&entry)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RootfsError> {
        let Some(file) = &mut self.file else {
            return Err(RootfsError::Malformed { what: "content without a file" });
        };
        let end = offset.saturating_add(bytes.len() as u64);
        if offset < file.end || end > file.size {
            return Err(RootfsError::Malformed { what: "content out of order or beyond the file's end" });
        }
        let (mut offset, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let count =
                rustix::io::pwrite(&file.fd, rest, offset).map_err(RootfsError::file("write", &file.path))?;
            offset += count as u64;
            rest = &rest[count..];
        }
        file.end = end;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), RootfsError> {
        self.finish_file()?;
        match self.place(path)? {
            Some((parent, name)) => {
                self.keep_times(path, &parent)?;
                remove_all(&parent, name, path)
            }
            None => Ok(()),
        }
    }
}

fn kind_of(parent: &OwnedFd, name: &OsStr, path: &[u8]) -> Result<Option<FileType>, RootfsError> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(RootfsError::file("look at", path)(errno)),
    }
}

/// Removes a path with everything under it; one that is absent is well.
fn remove_all(parent: &OwnedFd, name: &OsStr, path: &[u8]) -> Result<(), RootfsError> {
    let failed = |errno| RootfsError::file("remove", path)(errno);
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let fd = open_directory(parent, name).map_err(failed)?;
    clear_directory(&fd, path)?;
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(failed)
}

fn clear_directory(fd: &OwnedFd, path: &[u8]) -> Result<(), RootfsError> {
    let failed = |errno| RootfsError::file("list", path)(errno);
    // Read in full before anything is removed: not every file system keeps its place in a directory that shrinks.
    let entries = rustix::fs::Dir::read_from(fd).map_err(failed)?;
    let entries = entries.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    for entry in entries {
        let name = entry.file_name();
        if name != c"." && name != c".." {
            remove_all(fd, OsStr::from_bytes(name.to_bytes()), path)?;
        }
    }
    Ok(())
}

fn open_directory(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(parent.as_fd(), name, flags, Mode::empty(), resolve)
}

/// A directory that was there before may have attributes that the source's has no more.
fn remove_stale_xattrs(place: &[u8], entry: &Entry<'_>) -> Result<(), RootfsError> {
    let failed = |errno| RootfsError::file("remove an attribute of", entry.path)(errno);
    let mut list = match rustix::fs::llistxattr_query(place) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(()),
        Ok(_) => vec![0; 65_536],
        Err(errno) => return Err(failed(errno)),
    };
    let len = rustix::fs::llistxattr(place, list.as_mut_slice()).map_err(failed)?;
    for name in list[..len].split(|&byte| byte == 0) {
        let ours = godwit_protocol::rootfs::xattr_may_travel(name);
        if ours && !entry.xattrs.iter().any(|(kept, _)| *kept == name) {
            rustix::fs::lremovexattr(place, name).or_else(absent_is_well).map_err(failed)?;
        }
    }
    Ok(())
}

fn set_times(parent: &OwnedFd, name: &OsStr, times: &Timestamps) -> Result<(), Errno> {
    rustix::fs::utimensat(parent, name, times, AtFlags::SYMLINK_NOFOLLOW)
}

fn times(meta: &Meta) -> Timestamps {
    let last_modification = Timespec { tv_sec: meta.mtime_s, tv_nsec: meta.mtime_ns.into() };
    Timestamps { last_access: UNTOUCHED, last_modification }
}

fn owner(uid: u32) -> Uid {
    Uid::from_raw(uid)
}

fn group(gid: u32) -> Gid {
    Gid::from_raw(gid)
}

fn absent_is_well(errno: Errno) -> Result<(), Errno> {
    match errno {
        Errno::NOENT | Errno::NODATA => Ok(()),
        errno => Err(errno),
    }
}

/// A file system without attributes for users is no reason to refuse a container; losing a capability is.
fn tolerate_user_xattr(name: &[u8], set: Result<(), Errno>) -> Result<(), Errno> {
    match set {
        Err(Errno::NOTSUP) if name.starts_with(b"user.") => {
            log::warn!("the target's file system takes no attribute `{}`", String::from_utf8_lossy(name));
            Ok(())
        }
        set => set,
    }
}

const UNTOUCHED: Timespec = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };

const _: () = assert!(size_of::<RawMode>() == 4, "a mode travels as a u32");
