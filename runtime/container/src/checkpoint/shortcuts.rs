//! What a dump leaves out because the restore that follows it can do without, or makes it faster itself.
//!
//! CRIU is thorough about things that most containers do not use, and it is so while the container is frozen: it
//! locks a network without connections by `iptables`, walks the host's table of tracked connections, and runs `tar`
//! for every empty tmpfs, twice. A [`Shortcuts`] says what was left out, and travels with the images in a file of its
//! own; without that file a restore is one as always. Only a restore of ours understands it, so plain checkpoints
//! take no shortcuts.
//!
//! - The network namespace: CRIU works inside it, on both sides, so it is no namespace to be dumped. Only while it has
//!   no TCP socket, for then there is nothing that a packet could disturb. What else it holds belongs to whoever set
//!   it up, as always ([`super::external::EMPTY_NAMESPACES`]).
//! - File systems in memory with little in them ([`super::tmpfs`]): they come from outside for CRIU.
//!
//! CRIU is told what to leave out while the container still runs. Once it is frozen [`Shortcuts::seal`] looks whether
//! all of it still holds; if not, the dump is begun anew without shortcuts.

use std::fs;
use std::path::Path;

use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use super::error::{CheckpointError, Result};
use super::external;
use super::tmpfs::{self, Tmpfs};

/// What a dump left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shortcuts {
    /// CRIU worked in the network namespace of the container, and is to do so again.
    pub(crate) network: bool,
    /// File systems that are external mounts for CRIU.
    pub(crate) tmpfs: Vec<Tmpfs>,
}

impl Shortcuts {
    /// Finds what can be left out of the container with the init `pid`, which may run.
    pub(crate) fn find(spec: &Spec, pid: i32) -> Self {
        if !Self::may_be_taken(spec) {
            return Self::default();
        }
        let tmpfs = tmpfs::find(pid).unwrap_or_else(|error| {
            log::debug!("file systems in memory are left to criu: {error}");
            Vec::new()
        });
        Self { network: Self::may_leave_network(spec) && has_no_tcp(pid), tmpfs }
    }

    /// Whether anything can be left out: in a user namespace what is made here would belong to somebody else.
    pub(crate) fn may_be_taken(spec: &Spec) -> bool {
        external::namespaces(spec).all(|(kind, _)| kind != LinuxNamespaceType::User)
    }

    /// Whether the network can be left out, if there is no TCP in it.
    pub(crate) fn may_leave_network(spec: &Spec) -> bool {
        let is_own = |(kind, path): (_, Option<_>)| kind == LinuxNamespaceType::Network && path.is_none();
        Self::may_be_taken(spec) && external::namespaces(spec).any(is_own)
    }

    /// Whether nothing was left out.
    pub(crate) fn is_empty(&self) -> bool {
        !self.network && self.tmpfs.is_empty()
    }

    /// Writes to the directory `images` what was left out of the container, which is frozen. Returns false if that
    /// does not hold any more.
    pub(crate) fn seal(&self, pid: i32, images: &Path) -> Result<bool> {
        if self.is_empty() {
            return Ok(true);
        }
        if self.network && !has_no_tcp(pid) {
            return Ok(false);
        }
        let now = tmpfs::find(pid)?;
        let is_same = |known: &Tmpfs, now: &Tmpfs| known.key == now.key && known.point == now.point;
        if self.tmpfs.len() != now.len()
            || !self.tmpfs.iter().zip(&now).all(|(known, now)| is_same(known, now))
        {
            return Ok(false);
        }
        let path = images.join(FILE_NAME);
        let text = serde_json::to_vec(&Self { network: self.network, tmpfs: now });
        let text = text.map_err(|error| CheckpointError::file(&path)(error.into()))?;
        fs::write(&path, text).map_err(CheckpointError::file(&path))?;
        Ok(true)
    }

    /// Reads what was left out of the images in a directory.
    pub(crate) fn read(images: &Path) -> Result<Self> {
        let path = images.join(FILE_NAME);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| CheckpointError::NoCheckpoint { path, reason: error.to_string() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(CheckpointError::file(&path)(error)),
        }
    }
}

/// Whether there is no TCP socket in the network namespace of `pid` that a packet could reach. False also when the
/// kernel does not say.
fn has_no_tcp(pid: i32) -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    is_without_tcp(&read("sockstat"))
        && (is_without_tcp(&read("sockstat6")) || !Path::new("/proc/net/tcp6").exists())
}

/// Reads `/proc/PID/net/sockstat` or `sockstat6`: sockets in use, and those that wait for late packets.
fn is_without_tcp(text: &str) -> bool {
    let Some(line) = text.lines().find(|line| line.starts_with("TCP")) else { return false };
    let words: Vec<&str> = line.split_whitespace().collect();
    let count = |name: &str| words.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
    count("inuse") == Some("0") && count("tw").is_none_or(|count| count == "0")
}

/// Beside `descriptors.json`, which is runc's.
const FILE_NAME: &str = "shortcuts.json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_network_without_tcp_sockets_is_quiet() {
        assert!(is_without_tcp(
            "sockets: used 9\nTCP: inuse 0 orphan 2 tw 0 alloc 9 mem 1\nUDP: inuse 3 mem 0\n"
        ));
        assert!(is_without_tcp("TCP6: inuse 0\nUDP6: inuse 1\n"));
        for text in
            ["", "TCP: inuse 1 orphan 0 tw 0", "TCP: inuse 0 orphan 0 tw 3", "TCP6: inuse 2", "TCP: what"]
        {
            assert!(!is_without_tcp(text), "{text}");
        }
    }

    #[test]
    fn images_without_the_file_took_no_shortcuts() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Shortcuts::read(directory.path()).unwrap(), Shortcuts::default());
        fs::write(directory.path().join(FILE_NAME), "{}").unwrap();
        Shortcuts::read(directory.path()).unwrap_err();
    }
}
