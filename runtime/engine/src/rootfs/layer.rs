//! Where a container's writable layer lies on this host.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use godwit_protocol::rootfs::Layer;

use super::RootfsError;

/// The directory to read, and what its content describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRoot {
    /// The directory.
    pub path: PathBuf,
    /// Whether it holds differences or everything.
    pub layer: Layer,
}

impl LayerRoot {
    /// Finds the writable layer of the root that is mounted at `rootfs`.
    ///
    /// # Errors
    /// [`RootfsError`] if nothing is mounted there and it is no directory either, or it cannot be looked up.
    pub fn of(rootfs: &Path) -> Result<Self, RootfsError> {
        let failed = |source| RootfsError::File { what: "look up", path: rootfs.to_owned(), source };
        let point = fs::canonicalize(rootfs).map_err(failed)?;
        let mounts = fs::read("/proc/thread-self/mountinfo").map_err(failed)?;
        // The last mount on a path hides the ones before.
        let mount = mounts
            .split(|&byte| byte == b'\n')
            .rev()
            .filter_map(Mount::parse)
            .find(|mount| mount.point == point);
        match mount {
            Some(Mount { upper: Some(path), .. }) => Ok(Self { path, layer: Layer::Delta }),
            _ if point.is_dir() => Ok(Self { path: point, layer: Layer::Whole }),
            _ => Err(RootfsError::NoRoot { path: point }),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    upper: Option<PathBuf>,
}

impl Mount {
    /// Reads a line of proc_pid_mountinfo(5).
    fn parse(line: &[u8]) -> Option<Self> {
        let separator = line.windows(3).position(|window| window == b" - ")?;
        let point = line[..separator].split(|&byte| byte == b' ').nth(4)?;
        let mut back = line[separator + 3..].split(|&byte| byte == b' ');
        let kind = back.next()?;
        let options = back.nth(1)?;
        let upper = options.split(|&byte| byte == b',').find_map(|option| option.strip_prefix(b"upperdir="));
        let upper = upper.filter(|_| kind == b"overlay").map(unescape);
        Some(Self { point: unescape(point), upper })
    }
}

/// Octal escapes stand for blanks and backslashes.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| byte == b'\\');
        let code = digits
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upper_directory_is_found_with_its_blanks() {
        let line = br"60 30 0:52 / /run/a\040b rw,relatime shared:9 - overlay overlay rw,lowerdir=/l,upperdir=/u\040x,workdir=/w";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount, Mount { point: "/run/a b".into(), upper: Some("/u x".into()) });
        let line = b"60 30 0:52 / /run/a rw - ext4 /dev/sda1 rw,upperdir=/x";
        assert_eq!(Mount::parse(line).unwrap().upper, None);
        assert_eq!(Mount::parse(b"nonsense"), None);
        assert_eq!(Mount::parse(b""), None);
    }

    #[test]
    fn a_plain_directory_is_read_whole() {
        let directory = tempfile::tempdir().unwrap();
        let root = LayerRoot::of(directory.path()).unwrap();
        assert_eq!(root.layer, Layer::Whole);
        LayerRoot::of(&directory.path().join("absent")).unwrap_err();
    }
}
