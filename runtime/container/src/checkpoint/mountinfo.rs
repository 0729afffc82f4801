//! `/proc/PID/mountinfo`, as far as it is needed here. See proc_pid_mountinfo(5).

use std::fs;
use std::path::PathBuf;

use super::error::{CheckpointError, Result};

/// One mount.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) id: u64,
    /// Major and minor number of the file system, as text.
    pub(crate) device: String,
    /// Which directory of the file system is mounted.
    pub(crate) root: PathBuf,
    pub(crate) point: PathBuf,
    /// Whether it takes part in the propagation of mounts.
    pub(crate) propagates: bool,
    pub(crate) kind: String,
    /// What was given as its source; a mere name for a file system in memory.
    pub(crate) source: String,
    /// Options of the file system (not of the mount); names the controllers of a cgroup hierarchy.
    pub(crate) options: String,
}

/// Reads the mounts that the process `pid` ("self" for this one) sees.
pub(crate) fn read(pid: &str) -> Result<Vec<Mount>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = fs::read_to_string(&path).map_err(CheckpointError::file(path))?;
    Ok(text.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ');
    let id = front.next()?.parse().ok()?;
    let mut front = front.skip(1);
    let device = front.next()?.to_owned();
    let root = unescape(front.next()?).into();
    let point = unescape(front.next()?).into();
    // Behind the mount's own options.
    let propagates = front.nth(1).is_some();
    let mut back = back.split(' ');
    let kind = back.next()?.to_owned();
    let source = unescape(back.next()?);
    let options = back.next()?.to_owned();
    Some(Mount { id, device, root, point, propagates, kind, source, options })
}

/// Space, tab, newline and backslash appear as three octal digits after a backslash.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        let Some(byte) = digits else {
            out.push('\\');
            rest = &rest[at + 1..];
            continue;
        };
        out.push(char::from(byte));
        rest = &rest[at + 4..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_optional_fields_and_escapes_is_read() {
        let line = r"36 35 98:0 /a\040b /mnt\0111 rw,noatime master:1 shared:2 - cgroup none rw,cpu,cpuacct";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.device.as_str(), mount.propagates), (36, "98:0", true));
        assert!(!parse("36 35 98:0 / /x rw - tmpfs shm rw").unwrap().propagates);
        assert_eq!(mount.root, PathBuf::from("/a b"));
        assert_eq!(mount.point, PathBuf::from("/mnt\t1"));
        assert_eq!((mount.kind.as_str(), mount.options.as_str()), ("cgroup", "rw,cpu,cpuacct"));
        assert_eq!(parse("36 35 98:0 /"), None);
        assert_eq!(unescape(r"a\9"), r"a\9");
    }
}
