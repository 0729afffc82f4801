//! What an image consists of, worked out from its documents alone.
//!
//! ```text
//! image record ──target──► [index ──►] manifest ──► config (diff ids) ──► chain ids = snapshot names
//!                                            └────► layers
//! ```
//! A snapshot made by unpacking an image is named by the chain id of its layers, on every host alike: that is
//! how a container's snapshot on the source tells which of an image's manifests it was made from, and how the
//! target finds the same parent.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::error::NodeError;

/// A reference to a blob, as manifests spell it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    /// What kind of document or layer it is.
    #[serde(default)]
    pub(crate) media_type: String,
    /// `algorithm:hex`.
    pub(crate) digest: String,
    /// Size in bytes.
    pub(crate) size: i64,
    /// The platform an index entry is for.
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
}

/// What an image is built for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    /// Go's name of the processor architecture.
    #[serde(default)]
    pub(crate) architecture: String,
    /// Go's name of the operating system.
    #[serde(default)]
    pub(crate) os: String,
}

/// A manifest: one config and its layers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Manifest {
    /// The image's config.
    pub(crate) config: Descriptor,
    /// The layers, lowest first.
    #[serde(default)]
    pub(crate) layers: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Tells whether a media type names a list of manifests.
pub(crate) fn is_index(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

/// Tells whether a media type names a manifest.
pub(crate) fn is_manifest(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.manifest.v1+json" | "application/vnd.docker.distribution.manifest.v2+json"
    )
}

/// Returns an index's manifests that are for Linux on `architecture`, or say nothing about it.
///
/// # Errors
/// [`NodeError::Malformed`], as for the functions below.
pub(crate) fn manifests_of_index(document: &[u8], architecture: &str) -> Result<Vec<Descriptor>, NodeError> {
    let index: Index = parse("image index", document)?;
    let fits = |platform: &Platform| platform.os == "linux" && platform.architecture == architecture;
    index
        .manifests
        .into_iter()
        .filter(|entry| is_manifest(&entry.media_type))
        .filter(|entry| entry.platform.as_ref().is_none_or(fits))
        .map(|entry| checked("image index", entry))
        .collect()
}

/// Reads a manifest.
pub(crate) fn manifest(document: &[u8]) -> Result<Manifest, NodeError> {
    let Manifest { config, layers } = parse("image manifest", document)?;
    Ok(Manifest {
        config: checked("image manifest", config)?,
        layers: layers.into_iter().map(|layer| checked("image manifest", layer)).collect::<Result<_, _>>()?,
    })
}

/// Returns the diff ids of a config, lowest layer first.
pub(crate) fn diff_ids(document: &[u8]) -> Result<Vec<String>, NodeError> {
    let config: Config = parse("image config", document)?;
    for id in &config.rootfs.diff_ids {
        check_digest("image config", id)?;
    }
    Ok(config.rootfs.diff_ids)
}

/// Returns the chain id after each layer: the name of the snapshot that holds it and everything below.
#[must_use]
pub(crate) fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for id in diff_ids {
        chain.push(match chain.last() {
            None => id.clone(),
            Some(below) => sha256(format!("{below} {id}").as_bytes()),
        });
    }
    chain
}

/// Returns the digest of `bytes` as descriptors spell it.
#[must_use]
pub(crate) fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write as _;

    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Checks that `digest` is one containerd can hold: it becomes part of labels and snapshot names.
///
/// # Errors
/// [`NodeError::Malformed`] names `what` carried it.
pub(crate) fn check_digest(what: &str, digest: &str) -> Result<(), NodeError> {
    let length = match digest.split_once(':') {
        Some(("sha256", _)) => 64,
        Some(("sha384", _)) => 96,
        Some(("sha512", _)) => 128,
        _ => 0,
    };
    let hex = digest.split_once(':').map_or("", |(_, hex)| hex);
    let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if length > 0 && hex.len() == length && hex.bytes().all(lower_hex) {
        return Ok(());
    }
    let shown: String = digest.chars().take(150).collect();
    Err(NodeError::malformed(what, format!("`{shown}` is no digest")))
}

/// Returns Go's name of this machine's architecture, which images and containerd use.
#[must_use]
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

fn checked(what: &str, descriptor: Descriptor) -> Result<Descriptor, NodeError> {
    check_digest(what, &descriptor.digest)?;
    if descriptor.size < 0 {
        return Err(NodeError::malformed(what, format!("{} has a negative size", descriptor.digest)));
    }
    Ok(descriptor)
}

fn parse<'a, T: Deserialize<'a>>(what: &str, document: &'a [u8]) -> Result<T, NodeError> {
    serde_json::from_slice(document).map_err(|error| NodeError::malformed(what, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(fill: char) -> String {
        format!("sha256:{}", String::from(fill).repeat(64))
    }

    /// The second value is what `printf '%s %s' A B | sha256sum` prints.
    #[test]
    fn a_chain_id_is_the_digest_of_the_chain_below_and_the_layer() {
        let ids = [digest('a'), digest('b')];
        let chain = chain_ids(&ids);
        assert_eq!(chain[0], ids[0]);
        assert_eq!(chain[1], sha256(format!("{} {}", ids[0], ids[1]).as_bytes()));
        assert_eq!(sha256(b""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn an_index_yields_the_manifests_of_this_architecture() {
        let entry = |fill: char, platform: &str| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":7{platform}}}"#,
                digest(fill)
            )
        };
        let index = format!(
            r#"{{"manifests":[{},{},{},{{"mediaType":"application/x","digest":"{}","size":1}}]}}"#,
            entry('a', r#","platform":{"architecture":"amd64","os":"linux"}"#),
            entry('b', r#","platform":{"architecture":"arm64","os":"linux"}"#),
            entry('c', ""),
            digest('d'),
        );
        let found = manifests_of_index(index.as_bytes(), "amd64").unwrap();
        assert_eq!(found.iter().map(|entry| &entry.digest).collect::<Vec<_>>(), [&digest('a'), &digest('c')]);
    }

    #[test]
    fn documents_with_bad_digests_or_sizes_are_refused() {
        let config = |digest: &str, size: i64| {
            format!(r#"{{"config":{{"mediaType":"x","digest":"{digest}","size":{size}}},"layers":[]}}"#)
        };
        manifest(config(&digest('a'), 1).as_bytes()).unwrap();
        for bad in ["", "sha256:", "sha256:../../x", "md5:abc", &digest('A'), &digest('g')] {
            manifest(config(bad, 1).as_bytes()).unwrap_err();
        }
        manifest(config(&digest('a'), -1).as_bytes()).unwrap_err();
        manifest(b"[]").unwrap_err();
        diff_ids(br#"{"rootfs":{"diff_ids":["x"]}}"#).unwrap_err();
        assert_eq!(diff_ids(br#"{"rootfs":{}}"#).unwrap(), Vec::<String>::new());
    }
}
