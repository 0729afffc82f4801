//! What the two hosts tell each other before anything is moved: the container as containerd records it, and what
//! each host is able to do.
//!
//! ```text
//! source ──Offer──► agent ──Accept{blobs it lacks, its facts}──► source
//! ```
//! Both travel as JSON; a key that is not known is ignored, so optional keys may be added within one protocol
//! version. The values are the source's word: the agent checks them against its own containerd before it uses
//! them, and none of them is a path that it opens.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::plan::Abilities;
use crate::request::{Images, MigrationId, Mode};

/// A container that is offered to a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The migration's name.
    pub migration: MigrationId,
    /// When pages are to travel.
    pub mode: Mode,
    /// Whether only the preflight is wanted: the agent answers and creates nothing.
    pub dry_run: bool,
    /// Whether the source keeps its record of the stopped container.
    pub keep: bool,
    /// The source host.
    pub source: NodeFacts,
    /// The container.
    pub container: ContainerRecord,
    /// Whether the task has a terminal, and where its streams go.
    pub stdio: Stdio,
    /// What the container needs of the kernel and of memory.
    pub needs: Needs,
    /// What the source can do with the memory of the container's tasks.
    #[serde(default)]
    pub abilities: Abilities,
    /// Where images and pages are to be on their way.
    #[serde(default)]
    pub images: Images,
    /// Bulk streams that pages are to travel on, if they travel apart from CRIU's images.
    #[serde(default)]
    pub streams: u8,
}

/// What a host is, as far as it matters to a container that moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// The host's name.
    pub host: String,
    /// The processor architecture, by the kernel's name (`x86_64`).
    pub arch: String,
    /// The kernel's release (`6.12.43`).
    pub kernel: String,
    /// CRIU's version (`4.1.1`), if there is a CRIU.
    pub criu: Option<String>,
    /// The version of godwit.
    pub godwit: String,
    /// The version of containerd, if it answered.
    pub containerd: Option<String>,
    /// 1 (also for the hybrid layout) or 2.
    pub cgroup_version: u8,
    /// Instruction set extensions and other processor flags, as `/proc/cpuinfo` lists them, space-separated.
    #[serde(default)]
    pub cpu_flags: String,
    /// Memory that is available, in bytes.
    pub memory_available_bytes: u64,
}

/// What the container needs of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Needs {
    /// Resident memory of all its tasks, in bytes.
    pub memory_bytes: u64,
    /// Size of its writable layer, in bytes.
    pub rootfs_bytes: u64,
    /// Number of its tasks (processes).
    pub tasks: u32,
}

/// A container as containerd records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// The container's id.
    pub id: String,
    /// Its containerd namespace.
    pub namespace: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The image it was made from; a container may have none.
    pub image: Option<Image>,
    /// The runtime that runs it.
    pub runtime: Runtime,
    /// Its OCI runtime specification.
    pub spec: TypedBytes,
    /// The snapshotter that holds its root filesystem.
    pub snapshotter: String,
    /// Its snapshot; a container whose root is a plain directory has none.
    pub snapshot: Option<Snapshot>,
    /// Its extensions by name.
    pub extensions: BTreeMap<String, TypedBytes>,
    /// The pod it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
}

/// An image and everything it consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The image's name in containerd.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The manifest or index the name stands for.
    pub target: Descriptor,
    /// Every blob that the source holds and the container's platform needs: manifests, configuration, layers.
    pub blobs: Vec<Blob>,
    /// Digests of layers that the source has discarded after it unpacked them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub absent: Vec<String>,
}

/// A content descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// The media type.
    pub media_type: String,
    /// `sha256:…`.
    pub digest: String,
    /// Size in bytes.
    pub size: u64,
    /// Its annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// A blob in the content store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// `sha256:…`.
    pub digest: String,
    /// Size in bytes.
    pub size: u64,
    /// The labels that keep it and what it refers to from being collected.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// The runtime that runs a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// The runtime's name (`io.containerd.godwit.v1`).
    pub name: String,
    /// Its options.
    pub options: Option<TypedBytes>,
}

/// The snapshot that holds a container's root filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The snapshot's key.
    pub key: String,
    /// The chain id of the image's layers that it stands on; empty if it stands on none.
    pub parent: String,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// The streams of a task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stdio {
    /// Whether the task has a terminal.
    pub terminal: bool,
    /// Path or URI that its input comes from; empty for none.
    pub stdin: String,
    /// Path or URI that its output goes to; empty for none.
    pub stdout: String,
    /// Path or URI that its errors go to; empty for none.
    pub stderr: String,
}

/// A protobuf `Any`: bytes and the name of their type.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TypedBytes {
    /// The name of the type.
    pub type_url: String,
    /// The value; hexadecimal in JSON.
    #[serde(with = "hex")]
    pub value: Vec<u8>,
}

/// The agent's consent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// Digests of the offered blobs that the target lacks, in the order in which it wants them.
    pub missing: Vec<String>,
    /// The target host.
    pub target: NodeFacts,
    /// What the target can do with the memory of restored tasks.
    #[serde(default)]
    pub abilities: Abilities,
}

/// Byte strings as hexadecimal text, twice their size instead of the four times of a JSON array.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
        let text: String = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let pairs = text.as_bytes().chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return Err(D::Error::custom("an odd number of hexadecimal digits"));
        }
        pairs
            .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
            .collect::<Option<_>>()
            .ok_or_else(|| D::Error::custom("not a hexadecimal digit"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_back_the_same_and_bad_ones_are_refused() {
        let any = TypedBytes { type_url: "t".to_owned(), value: (0..=255).collect() };
        let json = serde_json::to_string(&any).unwrap();
        assert!(json.contains("000102"), "{json}");
        assert_eq!(serde_json::from_str::<TypedBytes>(&json).unwrap(), any);
        for bad in [r#"{"type_url":"t","value":"0"}"#, r#"{"type_url":"t","value":"0g"}"#] {
            assert!(serde_json::from_str::<TypedBytes>(bad).is_err(), "{bad}");
        }
    }
}
