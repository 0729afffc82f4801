//! The image of a container that is to move: which of its documents and layers the target may need.

use containerd_client::services::v1::{GetImageRequest, images_client::ImagesClient};
use godwit_protocol::offer::{Blob, Image};

use crate::{
    client::Containerd,
    error::{NodeError, Optional},
    manifest, record,
};

/// Why an image cannot go with its container.
#[derive(Debug)]
pub(crate) enum ImageError {
    /// What is in the way, completing "container `x` …".
    Unfit(String),
    /// A call failed or a document is malformed.
    Node(NodeError),
}

impl From<NodeError> for ImageError {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

/// Reads the image `name`, of which the container's snapshot has the layers `parent`.
///
/// A container without an image is fine if its snapshot stands on nothing: then all of its files travel.
///
/// # Errors
/// [`ImageError::Unfit`] if the image is gone, or is not the one the container was made from.
pub(crate) fn read(containerd: &Containerd, name: &str, parent: &str) -> Result<Option<Image>, ImageError> {
    if name.is_empty() {
        return if parent.is_empty() { Ok(None) } else { Err(no_image(parent)) };
    }
    let request = containerd.request(GetImageRequest { name: name.to_owned() });
    let record = containerd
        .call("read the container's image", ImagesClient::new(containerd.channel()).get(request))
        .optional()?
        .and_then(|answer| answer.image)
        .ok_or_else(|| gone(name))?;
    let target = record::descriptor(
        &format!("image record {name}"),
        record
            .target
            .ok_or_else(|| NodeError::malformed(format!("image record {name}"), "it has no target"))?,
    )?;

    let found = manifest::find(containerd, &target.media_type, &target.digest, parent)?
        .ok_or_else(|| other_image(name, parent))?;

    let (mut blobs, mut absent) = (Vec::new(), Vec::new());
    let layers = found.layers.into_iter().map(|layer| layer.digest);
    for digest in found.documents.into_iter().chain(layers) {
        match blob(containerd, &digest)? {
            Some(blob) => blobs.push(blob),
            // A layer may be discarded once it is unpacked. Then the target must have it, or its snapshot.
            None => absent.push(digest),
        }
    }
    Ok(Some(Image { name: name.to_owned(), labels: record::sorted(record.labels), target, blobs, absent }))
}

/// Returns what is known of a blob, with those of its labels that hold what it refers to.
fn blob(containerd: &Containerd, digest: &str) -> Result<Option<Blob>, NodeError> {
    let Some(info) = containerd.blob_info(digest)? else { return Ok(None) };
    let size = u64::try_from(info.size)
        .map_err(|_| NodeError::malformed(format!("blob {digest}"), "it has a negative size"))?;
    let labels = info.labels.into_iter().filter(|(key, _)| label_travels(key)).collect();
    Ok(Some(Blob { digest: info.digest, size, labels }))
}

/// Tells whether a blob's label means the same on another host: what it refers to, and where it was pulled from.
pub(crate) fn label_travels(key: &str) -> bool {
    key.starts_with("containerd.io/gc.ref.content.") || key.starts_with("containerd.io/distribution.source.")
}

fn no_image(parent: &str) -> ImageError {
    ImageError::Unfit(format!(
        "names no image, but its snapshot stands on {parent}: there is nothing to make that from on the target; \
         create the container from an image"
    ))
}

fn gone(name: &str) -> ImageError {
    ImageError::Unfit(format!(
        "was made from image `{name}`, which containerd no longer has: pull or import it again under that name"
    ))
}

fn other_image(name: &str, parent: &str) -> ImageError {
    ImageError::Unfit(format!(
        "stands on snapshot {parent}, to which image `{name}` does not unpack as far as containerd still has it: \
         the name was given to another image since, or its manifest was deleted, or the snapshot was remapped \
         for a user namespace; pull or tag the image it was made from under that name"
    ))
}
