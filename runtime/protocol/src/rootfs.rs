//! The writable layer as it travels: entries that say what a path is to be, and rules for paths and attributes.
//!
//! A path is relative to the container's root, in bytes, without empty, `.` or `..` components, so that an entry
//! cannot name anything outside; the empty path is the root itself. Symbolic links are the receiver's matter:
//! it must not follow any (see `godwit_engine::rootfs`).

/// Longest path in bytes.
pub const PATH_LEN_MAX: usize = 4096;

/// Longest component of a path in bytes.
pub const NAME_LEN_MAX: usize = 255;

/// Most extended attributes of one entry.
pub const XATTRS_MAX: usize = 256;

/// Longest value of an extended attribute in bytes, as the kernel has it.
pub const XATTR_VALUE_LEN_MAX: usize = 65_536;

/// One of the passes in which a writable layer is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pass {
    /// While the container runs.
    Live,
    /// While it is frozen: only what changed since.
    Final,
}

/// What the entries describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layer {
    /// Differences from the image, which the target has.
    Delta,
    /// The whole tree: whatever the target has of it is removed first.
    Whole,
}

/// What a path is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The path, valid by [`check_path`].
    pub path: &'a [u8],
    /// The kind of file.
    pub node: Node<'a>,
    /// Owner, mode and times.
    pub meta: Meta,
    /// Extended attributes: name and value.
    pub xattrs: Vec<(&'a [u8], &'a [u8])>,
}

/// The kind of file at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node<'a> {
    /// A directory.
    Directory {
        /// Whether everything in it is removed first: it hides what lay below it, or is not the one that was
        /// there before.
        clear: bool,
    },
    /// A regular file, whose content follows; what does not follow is a hole.
    File {
        /// Size in bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to; any bytes, up to [`PATH_LEN_MAX`].
        to: &'a [u8],
    },
    /// Another name of a file that was sent before.
    Hardlink {
        /// The path it was sent as, valid by [`check_path`].
        to: &'a [u8],
    },
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
    /// A character device; never 0:0, which is how an overlay stores an absent file.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// Owner, mode and times of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits with set-uid, set-gid and sticky: at most 0o7777.
    pub mode: u32,
    /// Owner as the initial user namespace numbers it.
    pub uid: u32,
    /// Group as the initial user namespace numbers it.
    pub gid: u32,
    /// Time of the last change of the content, seconds of the epoch.
    pub mtime_s: i64,
    /// The same, nanoseconds: below 1,000,000,000.
    pub mtime_ns: u32,
}

/// Checks that `path` is relative, stays inside, and is in its one normal form; the root itself is empty.
///
/// # Errors
/// A fragment that says which rule it breaks.
pub fn check_path(path: &[u8]) -> Result<(), &'static str> {
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > PATH_LEN_MAX {
        return Err("a path is longer than its maximum");
    }
    if path.contains(&0) {
        return Err("a path contains a zero byte");
    }
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." | b".." => return Err("a path has an empty, `.` or `..` component"),
            _ if name.len() > NAME_LEN_MAX => return Err("a component of a path is longer than its maximum"),
            _ => {}
        }
    }
    Ok(())
}

/// Tells whether an extended attribute may travel: it belongs to the file, and not to the overlay that stores it.
#[must_use]
pub fn xattr_may_travel(name: &[u8]) -> bool {
    let of_the_file: [&[u8]; 5] =
        [b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default"];
    let of_the_overlay: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];
    name.len() <= NAME_LEN_MAX
        && !name.contains(&0)
        && of_the_file.iter().any(|prefix| name.starts_with(prefix))
        && !of_the_overlay.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_could_leave_the_root_is_refused() {
        for good in ["", "a", "a/b", "...", "a/..b", " ", "\u{fc}"] {
            assert_eq!(check_path(good.as_bytes()), Ok(()), "{good}");
        }
        let long = "x".repeat(256);
        let deep = "x/".repeat(2100) + "x";
        for bad in ["/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.", "a\0", &long, &deep] {
            assert!(check_path(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_overlays_own_attributes_stay_behind() {
        for (name, may) in [
            ("user.comment", true),
            ("security.capability", true),
            ("trusted.x", true),
            ("system.posix_acl_access", true),
            ("trusted.overlay.opaque", false),
            ("user.overlay.opaque", false),
            ("system.nfs4_acl", false),
            ("", false),
        ] {
            assert_eq!(xattr_may_travel(name.as_bytes()), may, "{name}");
        }
    }
}
