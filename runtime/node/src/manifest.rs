//! Finding the manifest that a snapshot was made from, among those an image's name stands for.

use crate::{
    client::Containerd,
    error::NodeError,
    image::{self, Descriptor},
};

/// A manifest whose layers unpack to a given snapshot.
#[derive(Debug)]
pub(crate) struct Unpackable {
    /// Digests of the documents: the index if there is one, the manifest, the config.
    pub(crate) documents: Vec<String>,
    /// Digest of the config, which is the last of the documents.
    pub(crate) config: String,
    /// The layers, lowest first.
    pub(crate) layers: Vec<Descriptor>,
    /// Their content's digests when unpacked, in the same order.
    pub(crate) diff_ids: Vec<String>,
}

/// Looks for the manifest of which `parent` is the topmost layer's chain id.
///
/// Documents that are not in the store are passed over: an index names the manifests of many platforms, and few
/// of them have been pulled.
///
/// # Errors
/// [`NodeError`] if a document is malformed or containerd fails.
pub(crate) fn find(
    containerd: &Containerd,
    media_type: &str,
    digest: &str,
    parent: &str,
) -> Result<Option<Unpackable>, NodeError> {
    let mut above = Vec::new();
    let candidates = if image::is_index(media_type) {
        let Some(document) = read_if_there(containerd, digest)? else { return Ok(None) };
        above.push(digest.to_owned());
        let manifests = image::manifests_of_index(&document, image::architecture())?;
        manifests.into_iter().map(|manifest| manifest.digest).collect()
    } else {
        vec![digest.to_owned()]
    };
    for candidate in candidates {
        let Some(document) = read_if_there(containerd, &candidate)? else { continue };
        let manifest = image::manifest(&document)?;
        let Some(config) = read_if_there(containerd, &manifest.config.digest)? else { continue };
        let diff_ids = image::diff_ids(&config)?;
        if image::chain_ids(&diff_ids).last().map_or("", String::as_str) != parent {
            continue;
        }
        if manifest.layers.len() != diff_ids.len() {
            return Err(NodeError::malformed(
                format!("image manifest {candidate}"),
                format!("{} layers for {} diff ids", manifest.layers.len(), diff_ids.len()),
            ));
        }
        above.extend([candidate, manifest.config.digest.clone()]);
        return Ok(Some(Unpackable {
            documents: above,
            config: manifest.config.digest,
            layers: manifest.layers,
            diff_ids,
        }));
    }
    Ok(None)
}

fn read_if_there(containerd: &Containerd, digest: &str) -> Result<Option<Vec<u8>>, NodeError> {
    match containerd.blob_info(digest)? {
        Some(_) => containerd.read_document(digest).map(Some),
        None => Ok(None),
    }
}
