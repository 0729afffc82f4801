//! The source's half: walks the layer and says what it holds, or what has changed since the last walk.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use godwit_protocol::rootfs::{Entry, Layer, Meta, Node, Pass, check_path, xattr_may_travel};
use godwit_protocol::wire::message::DATA_LEN_MAX;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::{LayerRoot, RootfsError, path_of};

/// Takes what the copier says.
pub trait Sink {
    /// A pass begins.
    ///
    /// # Errors
    /// Whatever prevents the pass.
    fn begin(&mut self, pass: Pass, layer: Layer) -> Result<(), RootfsError>;

    /// What a path is to be.
    ///
    /// # Errors
    /// Whatever ends the pass.
    fn entry(&mut self, entry: Entry<'_>) -> Result<(), RootfsError>;

    /// Content of the file whose entry came last.
    ///
    /// # Errors
    /// Whatever ends the pass.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RootfsError>;

    /// A path is to be absent.
    ///
    /// # Errors
    /// Whatever ends the pass.
    fn remove(&mut self, path: &[u8]) -> Result<(), RootfsError>;
}

/// Copies one writable layer in two passes.
#[derive(Debug)]
pub struct Copier {
    root: OwnedFd,
    layer: Layer,
    /// What the last pass sent, by path.
    sent: BTreeMap<Vec<u8>, Stamp>,
    /// Where a file with several names was sent, by inode.
    links: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
}

/// What tells whether a path has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    mode: u32,
    size: u64,
    /// Change time; `None` if it is so young that it may not tell a further change from this one.
    changed: Option<(i64, i64)>,
    opaque: bool,
}

/// One pass in progress.
struct Walk<'w> {
    pass: Pass,
    layer: Layer,
    /// Inodes that are sent whether or not they seem changed.
    forced: HashSet<(u64, u64)>,
    before: BTreeMap<Vec<u8>, Stamp>,
    now: BTreeMap<Vec<u8>, Stamp>,
    links: HashMap<(u64, u64), Vec<u8>>,
    buffer: &'w mut Vec<u8>,
    sink: &'w mut dyn Sink,
    device: u64,
    clock: Clock,
}

impl Copier {
    /// Opens a layer for copying.
    ///
    /// # Errors
    /// [`RootfsError::File`] if the directory cannot be opened.
    pub fn open(root: &LayerRoot) -> Result<Self, RootfsError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, &root.path, flags, Mode::empty()).map_err(|errno| {
            RootfsError::File { what: "open", path: root.path.clone(), source: errno.into() }
        })?;
        let (sent, links) = (BTreeMap::new(), HashMap::new());
        Ok(Self { root: fd, layer: root.layer, sent, links, buffer: vec![0; DATA_LEN_MAX] })
    }

    /// Says what the layer holds (first pass) or what has changed since the last pass (later ones).
    ///
    /// `forced` names files that are sent whether or not they seem changed. In a live pass, what vanishes under the
    /// copier's hands is skipped; in a final pass that is an error.
    ///
    /// # Errors
    /// [`RootfsError`], also what `sink` returned.
    pub fn copy(
        &mut self,
        pass: Pass,
        forced: &BTreeSet<Vec<u8>>,
        sink: &mut dyn Sink,
    ) -> Result<(), RootfsError> {
        sink.begin(pass, self.layer)?;
        let stat = rustix::fs::fstat(&self.root).map_err(RootfsError::file("look at", b""))?;
        let mut walk = Walk {
            pass,
            layer: self.layer,
            forced: self.inodes(forced),
            before: std::mem::take(&mut self.sent),
            now: BTreeMap::new(),
            links: std::mem::take(&mut self.links),
            buffer: &mut self.buffer,
            sink,
            device: stat.st_dev,
            clock: Clock::now(),
        };
        let root = self.root.try_clone().map_err(|error| RootfsError::File {
            what: "open",
            path: "/".into(),
            source: error,
        })?;
        walk.directory(&root, &mut Vec::new(), &stat, false)?;
        walk.remove_vanished()?;
        self.sent = walk.now;
        self.links = walk.links;
        Ok(())
    }

    /// A file may have several names, of which one is mapped: what counts is the inode.
    fn inodes(&self, paths: &BTreeSet<Vec<u8>>) -> HashSet<(u64, u64)> {
        let look =
            |path: &Vec<u8>| rustix::fs::statat(&self.root, path.as_slice(), AtFlags::SYMLINK_NOFOLLOW).ok();
        paths.iter().filter_map(look).map(|stat| (stat.st_dev, stat.st_ino)).collect()
    }
}

impl Walk<'_> {
    /// Sends a directory and everything in it. `anew` says that the target has nothing of it that counts.
    fn directory(
        &mut self,
        fd: &OwnedFd,
        path: &mut Vec<u8>,
        stat: &Stat,
        anew: bool,
    ) -> Result<(), RootfsError> {
        let xattrs = Xattrs::of(fd.as_fd(), c".", path)?;
        let opaque = xattrs.is_opaque() || (path.is_empty() && self.layer == Layer::Whole);
        let stamp = self.clock.stamp(stat, opaque);
        let before = self.before.get(path.as_slice());
        // A directory that is another one than before, or hides what it did not hide before, has to be cleared and
        // filled again: what the target has in its place is of no use.
        let same = before.is_some_and(|before| before.inode == stamp.inode && before.opaque == stamp.opaque);
        let first = before.is_none();
        let anew = anew || !same;
        if anew || !stamp.is_unchanged(before) {
            let clear = anew && (opaque || !first);
            let node = Node::Directory { clear };
            self.sink.entry(Entry { path, node, meta: meta(stat), xattrs: xattrs.travelling() })?;
        }
        self.now.insert(path.clone(), stamp);
        for name in names(fd.as_fd(), path)? {
            let len = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            let sent = self.child(fd, &name, path, anew);
            let vanished = self.pass == Pass::Live && sent.as_ref().is_err_and(RootfsError::is_vanished);
            if vanished {
                // Unknown to the next pass, which sends it if it is back by then.
                self.now.remove(path.as_slice());
            } else {
                sent?;
            }
            path.truncate(len);
        }
        Ok(())
    }

    fn child(
        &mut self,
        parent: &OwnedFd,
        name: &CStr,
        path: &mut Vec<u8>,
        anew: bool,
    ) -> Result<(), RootfsError> {
        check_path(path).map_err(|what| RootfsError::Malformed { what })?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(parent, name, flags, Mode::empty());
        let handle = opened.map_err(RootfsError::file("open", path))?;
        let stat = rustix::fs::fstat(&handle).map_err(RootfsError::file("look at", path))?;
        if stat.st_dev != self.device {
            // Something is mounted here; it is the host's.
            return Ok(());
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice if stat.st_rdev == 0 && self.layer == Layer::Delta => {
                self.whiteout(path, &stat, anew)
            }
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let opened = rustix::fs::openat(&handle, c".", flags, Mode::empty());
                let fd = opened.map_err(RootfsError::file("open", path))?;
                self.directory(&fd, path, &stat, anew)
            }
            _ => {
                let stamp = self.clock.stamp(&stat, false);
                let before = self.before.get(path.as_slice());
                let forced = self.forced.contains(&(stat.st_dev, stat.st_ino));
                let changed = anew || forced || !stamp.is_unchanged(before);
                self.now.insert(path.clone(), stamp);
                if changed { self.leaf(parent, name, &handle, path, &stat) } else { Ok(()) }
            }
        }
    }

    fn whiteout(&mut self, path: &[u8], stat: &Stat, anew: bool) -> Result<(), RootfsError> {
        let stamp = self.clock.stamp(stat, false);
        if anew || !stamp.is_unchanged(self.before.get(path)) {
            self.sink.remove(path)?;
        }
        self.now.insert(path.to_vec(), stamp);
        Ok(())
    }

    fn leaf(
        &mut self,
        parent: &OwnedFd,
        name: &CStr,
        handle: &OwnedFd,
        path: &[u8],
        stat: &Stat,
    ) -> Result<(), RootfsError> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        if let Some(to) = self.earlier_name(path, stat) {
            let node = Node::Hardlink { to: &to };
            return self.sink.entry(Entry { path, node, meta: meta(stat), xattrs: vec![] });
        }
        let xattrs = Xattrs::of(parent.as_fd(), name, path)?;
        if kind == FileType::RegularFile && xattrs.is_metacopy() {
            return Err(RootfsError::Overlay { path: path_of(path), feature: "metacopy" });
        }
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let link;
        let node = match kind {
            FileType::RegularFile => Node::File { size: size_of_file(stat) },
            FileType::Symlink => {
                link = rustix::fs::readlinkat(handle, "", Vec::new())
                    .map_err(RootfsError::file("read", path))?;
                Node::Symlink { to: link.as_bytes() }
            }
            FileType::Fifo => Node::Fifo,
            FileType::Socket => Node::Socket,
            FileType::CharacterDevice => Node::CharDevice { major, minor },
            FileType::BlockDevice => Node::BlockDevice { major, minor },
            _ => return Err(RootfsError::Malformed { what: "a file of an unknown kind" }),
        };
        self.sink.entry(Entry { path, node, meta: meta(stat), xattrs: xattrs.travelling() })?;
        if kind == FileType::RegularFile { self.content(handle, path, size_of_file(stat)) } else { Ok(()) }
    }

    /// Returns the path under which this inode was sent in this pass or stands unchanged on the target.
    fn earlier_name(&mut self, path: &[u8], stat: &Stat) -> Option<Vec<u8>> {
        if stat.st_nlink < 2 {
            return None;
        }
        let inode = (stat.st_dev, stat.st_ino);
        // A name from an earlier pass counts only once it has been met again in this one, with the same inode.
        let met = |known: &Vec<u8>| self.now.get(known).is_some_and(|stamp| stamp.inode == stat.st_ino);
        let known = self.links.get(&inode).filter(|known| *known != path && met(known)).cloned();
        if known.is_none() {
            self.links.insert(inode, path.to_vec());
        }
        known
    }

    fn content(&mut self, handle: &OwnedFd, path: &[u8], size: u64) -> Result<(), RootfsError> {
        // The handle is known to be a regular file, so opening it has no effect beyond reading it.
        let name = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let file = rustix::fs::open(name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(RootfsError::file("open", path))?;
        let mut offset = 0;
        while offset < size {
            let Some(data) = next_data(&file, offset).map_err(RootfsError::file("read", path))? else {
                break;
            };
            let end = next_hole(&file, data).map_err(RootfsError::file("read", path))?.min(size);
            offset = self.extent(&file, path, data, end)?;
            if offset < end {
                // It shrank while it was read: it has changed, and the next pass sends it again.
                break;
            }
        }
        Ok(())
    }

    fn extent(&mut self, file: &OwnedFd, path: &[u8], mut offset: u64, end: u64) -> Result<u64, RootfsError> {
        while offset < end {
            let want = usize::try_from(end - offset).unwrap_or(usize::MAX).min(self.buffer.len());
            let got = rustix::io::pread(file, &mut self.buffer[..want], offset)
                .map_err(RootfsError::file("read", path))?;
            if got == 0 {
                break;
            }
            self.sink.data(offset, &self.buffer[..got])?;
            offset += got as u64;
        }
        Ok(offset)
    }

    /// Removes what the last pass sent and this one has not met, without naming what goes with its parent.
    fn remove_vanished(&mut self) -> Result<(), RootfsError> {
        let mut gone: Option<Vec<u8>> = None;
        for path in self.before.keys().filter(|path| !self.now.contains_key(*path)) {
            let below = |parent: &Vec<u8>| {
                path.strip_prefix(parent.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
            };
            // What lies below a path that is now something else went with it.
            let replaced =
                ancestors(path).any(|above| self.now.contains_key(above) && !self.is_same_directory(above));
            if gone.as_ref().is_some_and(below) || replaced {
                continue;
            }
            self.sink.remove(path)?;
            gone = Some(path.clone());
        }
        Ok(())
    }

    fn is_same_directory(&self, path: &[u8]) -> bool {
        let pair = (self.before.get(path), self.now.get(path));
        let (Some(before), Some(now)) = pair else { return false };
        let is_directory = FileType::from_raw_mode(now.mode) == FileType::Directory;
        is_directory && before.inode == now.inode && before.opaque == now.opaque
    }
}

impl std::fmt::Debug for Walk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walk").field("pass", &self.pass).finish_non_exhaustive()
    }
}

/// The extended attributes of one path.
#[derive(Debug, Default)]
struct Xattrs(Vec<(Vec<u8>, Vec<u8>)>);

impl Xattrs {
    fn of(parent: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<Self, RootfsError> {
        let mut place = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
        place.extend_from_slice(name.to_bytes());
        let failed = |errno| RootfsError::file("read the attributes of", path)(errno);
        let mut list = match rustix::fs::llistxattr_query(place.as_slice()) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Self::default()),
            Ok(_) => vec![0; XATTR_LIST_LEN_MAX],
            Err(errno) => return Err(failed(errno)),
        };
        let len = rustix::fs::llistxattr(place.as_slice(), list.as_mut_slice()).map_err(failed)?;
        let mut found = Self::default();
        for name in list[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let mut value = vec![0; godwit_protocol::rootfs::XATTR_VALUE_LEN_MAX];
            match rustix::fs::lgetxattr(place.as_slice(), name, value.as_mut_slice()) {
                Ok(len) => value.truncate(len),
                // Removed since it was listed, or not for the eyes of this namespace.
                Err(Errno::NODATA | Errno::NOTSUP) => continue,
                Err(errno) => return Err(failed(errno)),
            }
            found.0.push((name.to_vec(), value));
        }
        if found.has(b"trusted.overlay.redirect", |_| true) {
            return Err(RootfsError::Overlay { path: path_of(path), feature: "redirect_dir" });
        }
        Ok(found)
    }

    fn has(&self, name: &[u8], value: impl Fn(&[u8]) -> bool) -> bool {
        self.0.iter().any(|(found, content)| found == name && value(content))
    }

    fn is_opaque(&self) -> bool {
        let opaque = |value: &[u8]| value == b"y";
        self.has(b"trusted.overlay.opaque", opaque) || self.has(b"user.overlay.opaque", opaque)
    }

    fn is_metacopy(&self) -> bool {
        self.has(b"trusted.overlay.metacopy", |_| true) || self.has(b"user.overlay.metacopy", |_| true)
    }

    fn travelling(&self) -> Vec<(&[u8], &[u8])> {
        let travelling = self.0.iter().filter(|(name, _)| xattr_may_travel(name));
        travelling.map(|(name, value)| (name.as_slice(), value.as_slice())).collect()
    }
}

/// When a pass began, to tell changes that its stamps could miss.
#[derive(Debug, Clone, Copy)]
struct Clock {
    s: i64,
    ns: i64,
}

impl Clock {
    fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        Self { s: now.tv_sec, ns: now.tv_nsec }
    }

    fn stamp(self, stat: &Stat, opaque: bool) -> Stamp {
        let changed = (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(0));
        let age_s = self.s.saturating_sub(changed.0);
        let age_ns = age_s.saturating_mul(1_000_000_000).saturating_add(self.ns - changed.1);
        Stamp {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
            size: size_of_file(stat),
            changed: (age_ns > CLOCK_GRAIN_NS).then_some(changed),
            opaque,
        }
    }
}

impl Stamp {
    fn is_unchanged(&self, before: Option<&Self>) -> bool {
        self.changed.is_some() && before == Some(self)
    }
}

fn meta(stat: &Stat) -> Meta {
    Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_s: stat.st_mtime,
        mtime_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
    }
}

fn size_of_file(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

pub(super) fn names(fd: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<std::ffi::CString>, RootfsError> {
    let failed = |errno| RootfsError::file("list", path)(errno);
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(fd).map_err(failed)? {
        let entry = entry.map_err(|errno| RootfsError::file("list", path)(errno))?;
        if ![c".", c".."].contains(&entry.file_name()) {
            names.push(entry.file_name().to_owned());
        }
    }
    // One order on every file system: hard links refer to the same first name in every pass.
    names.sort();
    Ok(names)
}

fn next_data(file: &OwnedFd, offset: u64) -> Result<Option<u64>, Errno> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A file system that knows no holes.
        Err(Errno::INVAL) => Ok(Some(offset)),
        Err(errno) => Err(errno),
    }
}

fn next_hole(file: &OwnedFd, offset: u64) -> Result<u64, Errno> {
    match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
        Ok(hole) => Ok(hole),
        Err(Errno::INVAL | Errno::NXIO) => Ok(u64::MAX),
        Err(errno) => Err(errno),
    }
}

fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at])
}

/// Coarse clocks of file systems tick up to every 10 ms.
const CLOCK_GRAIN_NS: i64 = 50_000_000;

/// The kernel's own limit.
const XATTR_LIST_LEN_MAX: usize = 65_536;
