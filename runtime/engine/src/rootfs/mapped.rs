//! Files that the tasks have mapped shared and writable.

use std::collections::BTreeSet;
use std::fs;

/// Returns the paths, relative to the container's root, of the files that any of `pids` has mapped shared and
/// writable. Their change time says nothing: once a page may be written, the kernel learns of no further write.
///
/// A task that has gone is skipped. Paths are as the kernel shows them in `/proc/PID/maps`.
#[must_use]
pub fn shared_writable_paths(pids: &[i32]) -> BTreeSet<Vec<u8>> {
    let mut paths = BTreeSet::new();
    for pid in pids {
        let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        paths.extend(maps.split(|&byte| byte == b'\n').filter_map(path_of_shared_writable));
    }
    paths
}

fn path_of_shared_writable(line: &[u8]) -> Option<Vec<u8>> {
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let mode = fields.nth(1)?;
    if mode.get(1) != Some(&b'w') || mode.get(3) != Some(&b's') {
        return None;
    }
    let path = fields.nth(3)?.trim_ascii_start();
    path.strip_prefix(b"/").filter(|path| !path.is_empty()).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_files_are_named() {
        let line = b"7f00-7f01 rw-s 00000000 00:2a 1234                       /data/a b";
        assert_eq!(path_of_shared_writable(line), Some(b"data/a b".to_vec()));
        for line in [
            b"7f00-7f01 rw-p 00000000 00:2a 1234                       /data/x".as_slice(),
            b"7f00-7f01 r--s 00000000 00:2a 1234                       /data/x",
            b"7f00-7f01 rw-s 00000000 00:00 0 ",
            b"7f00-7f01 rw-s 00000000 00:00 0                          [heap]",
            b"",
        ] {
            assert_eq!(path_of_shared_writable(line), None, "{}", String::from_utf8_lossy(line));
        }
    }
}
