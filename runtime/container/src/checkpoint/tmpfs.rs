//! File systems in memory with little in them, moved without CRIU.
//!
//! CRIU packs and unpacks each with `tar` and `gzip`, about 10 ms on either side. Most are empty: `/dev/shm`, `/run`,
//! and those that mask a directory of `/proc` or `/sys`. One that is simple enough is read here, and made anew on a
//! directory that CRIU then binds to its place like any mount from outside. Everything about it that is not understood
//! (an option, an attribute, a hard link, much content) leaves it to CRIU.
//!
//! What is read is the file system itself, not what is mounted over its directories: a detached copy of the mount,
//! made inside the container's mount namespace. Sockets are left out, as `tar` does; CRIU makes them as it restores
//! their owners.

use std::collections::HashSet;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use godwit_sys::mountns;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{self, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;
use rustix::fs::CWD;
use rustix::mount::OpenTreeFlags;
use serde::{Deserialize, Serialize};

use super::error::{CheckpointError, Result};
use super::mountinfo::{self, Mount};

/// One file system: how it was mounted, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tmpfs {
    /// Its name among external mounts.
    pub(crate) key: String,
    /// Where the container sees it.
    pub(crate) point: PathBuf,
    source: String,
    options: String,
    read_only: bool,
    /// A directory before what is in it; the first is the root, with an empty path.
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    path: String,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
    node: Node,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Node {
    Directory,
    File(Vec<u8>),
    Link(String),
    /// A device or a named pipe; `kind` in the bits of `st_mode`.
    Special {
        kind: u32,
        device: u64,
    },
}

impl Tmpfs {
    /// Makes it on the directory `point`, in the mount namespace of the caller, which is to be a private one.
    ///
    /// # Errors
    /// If it cannot be made, or its description is not one that [`find`] makes.
    pub(crate) fn make(&self, point: &Path) -> Result<()> {
        self.fill(point).map_err(CheckpointError::file(&self.point))
    }

    fn fill(&self, point: &Path) -> io::Result<()> {
        if split(&self.options).1 {
            return Err(malformed());
        }
        let data = Some(self.options.as_str());
        mount(Some(self.source.as_str()), point, Some("tmpfs"), MsFlags::empty(), data)?;
        let mut directories = HashSet::new();
        for entry in &self.entries {
            let path = Path::new(&entry.path);
            // The description is another host's word: nothing in it leads out through a link.
            let is_below = path.parent().is_none_or(|above| directories.contains(above));
            if !is_below || path.components().any(|part| !matches!(part, Component::Normal(_))) {
                return Err(malformed());
            }
            entry.make(&point.join(path))?;
            if entry.node == Node::Directory {
                directories.insert(path);
            }
        }
        // What is in a directory changes its time.
        for entry in self.entries.iter().rev() {
            entry.date(&point.join(&entry.path))?;
        }
        if self.read_only {
            mount(None::<&str>, point, None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, data)?;
        }
        Ok(())
    }
}

impl Entry {
    fn make(&self, path: &Path) -> io::Result<()> {
        match &self.node {
            // The root is there.
            Node::Directory if self.path.is_empty() => {}
            Node::Directory => fs::create_dir(path)?,
            Node::File(content) => File::create_new(path)?.write_all(content)?,
            Node::Link(target) => symlink(target, path)?,
            Node::Special { kind, device } => {
                mknod(path, SFlag::from_bits_truncate(*kind), stat::Mode::empty(), *device)?;
            }
        }
        lchown(path, Some(self.uid), Some(self.gid))?;
        if !matches!(self.node, Node::Link(_)) {
            // After the owner, whose change clears bits of it.
            fs::set_permissions(path, Permissions::from_mode(self.mode))?;
        }
        Ok(())
    }

    fn date(&self, path: &Path) -> io::Result<()> {
        let time = TimeSpec::new(self.mtime.0, self.mtime.1);
        Ok(utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)?)
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its description is malformed")
}

/// Reads every file system of the process `pid` that is simple enough.
///
/// # Errors
/// If its mounts or their content cannot be read.
pub(crate) fn find(pid: i32) -> Result<Vec<Tmpfs>> {
    let mounts = mountinfo::read(&pid.to_string())?;
    let chosen: Vec<(&Mount, String)> =
        mounts.iter().filter_map(|mount| Some((mount, simple_options(mount, &mounts)?))).collect();
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let path = PathBuf::from(format!("/proc/{pid}/ns/mnt"));
    let namespace = File::open(&path).map_err(CheckpointError::file(&path))?;
    // Only a thread with a working directory of its own may change its mount namespace.
    let file = |errno: nix::Error| CheckpointError::file(&path)(errno.into());
    unshare(CloneFlags::CLONE_FS).map_err(file)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = |mount: &Mount| {
        rustix::mount::open_tree(CWD, &mount.point, flags | OpenTreeFlags::AT_SYMLINK_NOFOLLOW)
    };
    let copies: Vec<_> =
        mountns::run_in(&namespace, || chosen.iter().map(|(mount, _)| clone(mount)).collect())?;
    let mut found = Vec::new();
    for ((mount, options), copy) in chosen.into_iter().zip(copies) {
        let copy = copy.map_err(|errno| CheckpointError::file(&mount.point)(errno.into()))?;
        if let Some(entries) = read(&copy).map_err(CheckpointError::file(&mount.point))? {
            found.push(Tmpfs {
                key: format!("godwit-tmpfs-{}", found.len()),
                point: mount.point.clone(),
                source: mount.source.clone(),
                options,
                read_only: mount.options.split(',').any(|option| option == "ro"),
                entries,
            });
        }
    }
    Ok(found)
}

/// Returns the options to mount it with again, if that is all there is to it.
fn simple_options(mount: &Mount, all: &[Mount]) -> Option<String> {
    let is_alone = all.iter().filter(|other| other.point == mount.point).count() == 1;
    // Single files of it may be bound elsewhere: masks are the container's /dev/null.
    let mut others = all.iter().filter(|other| other.device == mount.device && other.id != mount.id);
    let is_shared = others.any(|other| other.root != Path::new("/null"));
    let is_whole =
        mount.root == Path::new("/") && mount.point != Path::new("/") && mount.point.to_str().is_some();
    if mount.kind != "tmpfs" || !is_whole || !is_alone || is_shared || mount.propagates {
        return None;
    }
    let (options, has_unknown) = split(&mount.options);
    (!has_unknown).then_some(options)
}

/// Returns the options that matter when it is mounted, and whether there are any whose meaning is not known.
fn split(options: &str) -> (String, bool) {
    let is_known = |option: &&str| KNOWN_OPTIONS.contains(&option.split('=').next().unwrap_or_default());
    let all = options.split(',').filter(|option| !["rw", "ro", ""].contains(option));
    let (known, unknown): (Vec<&str>, Vec<&str>) = all.partition(is_known);
    (known.join(","), !unknown.is_empty())
}

/// Reads a file system from its root; `None` if there is too much in it, or what is not understood.
fn read(root: &OwnedFd) -> io::Result<Option<Vec<Entry>>> {
    let root = PathBuf::from(format!("/proc/self/fd/{}/", root.as_raw_fd()));
    let mut room = CONTENT_BYTES_MAX;
    let mut entries = Vec::new();
    let mut next = 0;
    match entry_of(&root, String::new(), &mut room)? {
        Read::Entry(entry) => entries.push(entry),
        Read::Nothing | Read::TooMuch => return Ok(None),
    }
    // Each directory appends what is in it, so that it comes before.
    while let Some(entry) = entries.get(next) {
        next += 1;
        if entry.node != Node::Directory {
            continue;
        }
        let above = entry.path.clone();
        for file in fs::read_dir(root.join(&above))? {
            let Ok(name) = file?.file_name().into_string() else { return Ok(None) };
            let path = if above.is_empty() { name } else { format!("{above}/{name}") };
            match entry_of(&root.join(&path), path, &mut room)? {
                Read::Entry(_) if entries.len() >= ENTRIES_MAX => return Ok(None),
                Read::Entry(entry) => entries.push(entry),
                Read::Nothing => {}
                Read::TooMuch => return Ok(None),
            }
        }
    }
    Ok(Some(entries))
}

enum Read {
    Entry(Entry),
    Nothing,
    TooMuch,
}

fn entry_of(file: &Path, path: String, room: &mut u64) -> io::Result<Read> {
    let metadata = fs::symlink_metadata(file)?;
    let kind = metadata.file_type();
    if kind.is_socket() {
        return Ok(Read::Nothing);
    }
    if (!kind.is_dir() && metadata.nlink() != 1) || has_attributes(file)? {
        return Ok(Read::TooMuch);
    }
    let node = if kind.is_dir() {
        Node::Directory
    } else if kind.is_symlink() {
        let Ok(target) = fs::read_link(file)?.into_os_string().into_string() else {
            return Ok(Read::TooMuch);
        };
        Node::Link(target)
    } else if kind.is_file() {
        let Some(left) = room.checked_sub(metadata.len()) else { return Ok(Read::TooMuch) };
        *room = left;
        Node::File(fs::read(file)?)
    } else {
        Node::Special { kind: metadata.mode() & SFlag::S_IFMT.bits(), device: metadata.rdev() }
    };
    Ok(Read::Entry(described(path, &metadata, node)))
}

fn described(path: String, metadata: &Metadata, node: Node) -> Entry {
    Entry {
        path,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        node,
    }
}

/// Whether a file has extended attributes: capabilities, access lists, labels.
fn has_attributes(path: &Path) -> io::Result<bool> {
    match rustix::fs::llistxattr(path, &mut [][..] as &mut [u8]) {
        Ok(bytes) => Ok(bytes > 0),
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Options that say all about themselves.
const KNOWN_OPTIONS: [&str; 7] = ["size", "nr_blocks", "nr_inodes", "mode", "uid", "gid", "inode64"];
/// More than this is for `tar`, which is no slower then.
const CONTENT_BYTES_MAX: u64 = 64 << 10;
const ENTRIES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(text: &str) -> Mount {
        let mut fields = text.split(' ');
        let mut next = || fields.next().unwrap().to_owned();
        Mount {
            id: 7,
            device: next(),
            root: next().into(),
            point: next().into(),
            kind: next(),
            options: next(),
            ..Mount::default()
        }
    }

    #[test]
    fn only_a_whole_tmpfs_of_its_own_with_known_options_is_simple() {
        let simple = mount_of("0:5 / /dev/shm tmpfs rw,size=64k,inode64");
        let alone = |mount: &Mount| simple_options(mount, std::slice::from_ref(mount));
        assert_eq!(alone(&simple).as_deref(), Some("size=64k,inode64"));
        assert_eq!(alone(&mount_of("0:5 / /proc/acpi tmpfs ro")).as_deref(), Some(""));
        for other in
            ["0:5 / / tmpfs rw", "0:5 /a /x tmpfs rw", "0:5 / /x proc rw", "0:5 / /x tmpfs rw,seclabel"]
        {
            assert_eq!(alone(&mount_of(other)), None, "{other}");
        }
        assert_eq!(alone(&Mount { propagates: true, ..simple.clone() }), None);
        let with = |other: &str| {
            let other = Mount { id: 8, ..mount_of(other) };
            simple_options(&simple, &[simple.clone(), other])
        };
        assert!(with("0:5 /null /proc/keys tmpfs rw").is_some(), "a masked file");
        assert!(with("0:5 /a /b tmpfs rw").is_none(), "a part of it is bound elsewhere");
        assert!(with("0:6 / /dev/shm tmpfs rw").is_none(), "another is mounted over it");
    }

    #[test]
    fn a_file_system_is_made_as_it_was_read() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: needs root");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        fs::create_dir_all(old.join("a/b")).unwrap();
        fs::create_dir(&new).unwrap();
        fs::write(old.join("a/b/file"), "content").unwrap();
        fs::set_permissions(old.join("a/b/file"), Permissions::from_mode(0o4711)).unwrap();
        lchown(old.join("a"), Some(3), Some(4)).unwrap();
        symlink("/nowhere", old.join("a/link")).unwrap();
        mknod(&old.join("null"), SFlag::S_IFCHR, stat::Mode::empty(), stat::makedev(1, 3)).unwrap();
        let read_at = |path: &Path| {
            let mut entries = read(&File::open(path).unwrap().into()).unwrap().expect("it is simple");
            entries.sort_by(|one, other| one.path.cmp(&other.path));
            entries
        };
        let made = Tmpfs {
            key: "k".to_owned(),
            point: "/x".into(),
            source: "shm".to_owned(),
            options: "size=64k".to_owned(),
            read_only: true,
            entries: read_at(&old),
        };
        std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                mountns::enter_private().unwrap();
                made.make(&new).unwrap();
                assert!(fs::write(new.join("x"), "").is_err(), "it is read-only");
                read_at(&new)
            });
            assert_eq!(there.join().unwrap(), made.entries);
        });
        fs::hard_link(old.join("a/b/file"), old.join("hard")).unwrap();
        assert!(read(&File::open(&old).unwrap().into()).unwrap().is_none());
    }

    #[test]
    fn a_description_that_leads_out_is_refused() {
        let entry = |path: &str, node| Entry {
            path: path.to_owned(),
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            node,
        };
        let outside = tempfile::tempdir().unwrap();
        let link = Node::Link(outside.path().to_str().unwrap().to_owned());
        let file = Node::File(b"x".to_vec());
        for entries in [
            vec![entry("", Node::Directory), entry("a", link), entry("a/x", file.clone())],
            vec![entry("", Node::Directory), entry("../x", file.clone())],
            vec![entry("", Node::Directory), entry("/etc/x", file)],
        ] {
            let hostile = Tmpfs {
                key: "k".to_owned(),
                point: "/x".into(),
                source: "tmpfs".to_owned(),
                options: String::new(),
                read_only: false,
                entries,
            };
            let point = tempfile::tempdir().unwrap();
            std::thread::scope(|scope| {
                let refused =
                    scope.spawn(|| mountns::enter_private().is_err() || hostile.make(point.path()).is_err());
                assert!(refused.join().unwrap());
            });
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
