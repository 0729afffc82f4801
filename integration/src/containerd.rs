//! The containerd releases that beds run, and their configuration.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{BedError, Result};

/// A containerd release line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Version {
    /// Debian 12's.
    #[default]
    #[serde(rename = "1.6")]
    V1_6,
    /// Debian 13's.
    #[serde(rename = "1.7")]
    V1_7,
    /// A newer Debian's.
    #[serde(rename = "2.1")]
    V2_1,
}

impl Version {
    /// Every release line, oldest first.
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2_1];

    /// Returns its name, such as `1.6`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }

    /// Returns the content of `config.toml` for a node with this containerd.
    ///
    /// What a bed has no use for is off: CRI, which wants a CNI, and the snapshotters that need a device
    /// or a file system of their own.
    pub(crate) fn config(self, root: &Path) -> String {
        let (version, disabled) = match self {
            Self::V1_6 | Self::V1_7 => (2, DISABLED_1),
            Self::V2_1 => (3, DISABLED_2),
        };
        let disabled: Vec<_> = disabled.iter().map(|plugin| format!("\"{plugin}\"")).collect();
        format!(
            "version = {version}\nroot = \"{}\"\nstate = \"{STATE}\"\ndisabled_plugins = [{}]\n\n\
             [grpc]\n  address = \"{SOCKET}\"\n\n[ttrpc]\n  address = \"{SOCKET}.ttrpc\"\n",
            root.display(),
            disabled.join(", "),
        )
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Version {
    type Err = BedError;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| BedError::Invalid {
            what: "containerd version",
            value: text.to_owned(),
            expected: "one of 1.6, 1.7, 2.1",
        })
    }
}

/// The socket of a node's containerd, as seen in the node. It is where every client looks by default.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

const STATE: &str = "/run/containerd";
const DISABLED_1: &[&str] = &[
    "io.containerd.grpc.v1.cri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.tracing",
];
const DISABLED_2: &[&str] = &[
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.cri",
    "io.containerd.nri.v1.nri",
    "io.containerd.podsandbox.controller.v1.podsandbox",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.tracing",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_read_back_from_its_name() {
        for version in Version::ALL {
            assert_eq!(version.as_str().parse::<Version>().unwrap(), version);
        }
        "1.5".parse::<Version>().unwrap_err();
    }

    #[test]
    fn configuration_has_the_format_that_the_release_reads() {
        let root = Path::new("/state/a/root");
        assert!(Version::V1_7.config(root).starts_with("version = 2\nroot = \"/state/a/root\"\n"));
        assert!(Version::V2_1.config(root).starts_with("version = 3\n"));
    }
}
