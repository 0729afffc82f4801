//! The image on the target: blobs taken in, the name registered, the layers unpacked into snapshots.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use containerd_client::{
    services::v1::{
        ApplyRequest, CreateImageRequest, Image as ImageRecord,
        diff_client::DiffClient,
        images_client::ImagesClient,
        snapshots::{CommitSnapshotRequest, PrepareSnapshotRequest, snapshots_client::SnapshotsClient},
    },
    types,
};
use godwit_protocol::offer::{Image, Offer};

use super::observe::snapshot_exists;
use crate::{
    client::Containerd,
    error::NodeError,
    image::{self, Descriptor},
    manifest::{self, Unpackable},
    record, source_image,
};

/// Labels the blobs so that the image's name keeps all of them.
pub(super) fn label_blobs(containerd: &Containerd, image: &Image) -> Result<(), NodeError> {
    for blob in &image.blobs {
        let labels = blob.labels.iter().filter(|(key, _)| source_image::label_travels(key));
        containerd
            .label_blob(&blob.digest, labels.map(|(key, value)| (key.clone(), value.clone())).collect())?;
    }
    Ok(())
}

/// Registers the image; returns whether it was new.
pub(super) fn register(containerd: &Containerd, image: &Image) -> Result<bool, NodeError> {
    let target = record::containerd_descriptor("the offered image", &image.target)?;
    let record = ImageRecord {
        name: image.name.clone(),
        labels: record::hashed(&image.labels),
        target: Some(target),
        ..ImageRecord::default()
    };
    let request = containerd.request(CreateImageRequest { image: Some(record), source_date_epoch: None });
    match containerd.call("register the image", ImagesClient::new(containerd.channel()).create(request)) {
        Ok(_) => Ok(true),
        Err(error) if error.already_exists() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes the snapshots of the image's layers that are not there yet, up to the container's parent.
///
/// # Errors
/// [`NodeError`] if a layer is missing or does not unpack to what the image's config says.
pub(super) fn unpack(
    containerd: &Containerd,
    offer: &Offer,
    image: &Image,
    parent: &str,
) -> Result<(), NodeError> {
    let snapshotter = offer.container.snapshotter.as_str();
    let unpackable = manifest::find(containerd, &image.target.media_type, &image.target.digest, parent)?
        .ok_or_else(|| {
            NodeError::malformed(
                "the offered image",
                format!("it does not unpack to {parent}, the snapshot's parent"),
            )
        })?;
    if !parent.is_empty() && !snapshot_exists(containerd, snapshotter, parent)? {
        unpack_layers(containerd, offer, &unpackable)?;
    }
    let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
    containerd.label_blob(&unpackable.config, vec![(label, parent.to_owned())])
}

fn unpack_layers(containerd: &Containerd, offer: &Offer, image: &Unpackable) -> Result<(), NodeError> {
    let snapshotter = offer.container.snapshotter.as_str();
    let chain = image::chain_ids(&image.diff_ids);
    for (index, (layer, diff_id)) in image.layers.iter().zip(&image.diff_ids).enumerate() {
        let below = if index == 0 { "" } else { chain[index - 1].as_str() };
        let name = chain[index].as_str();
        if snapshot_exists(containerd, snapshotter, name)? {
            continue;
        }
        let key = format!("godwit-{}-{index} {name}", offer.migration);
        let applied = unpack_layer(containerd, snapshotter, &key, below, name, layer, diff_id);
        if applied.is_err() {
            // The error that made it useless is the one to report.
            if let Err(error) = containerd.remove_snapshot(snapshotter, &key) {
                log::warn!(snapshot = key; "cannot remove a half unpacked layer: {error}");
            }
        }
        applied?;
    }
    Ok(())
}

fn unpack_layer(
    containerd: &Containerd,
    snapshotter: &str,
    key: &str,
    below: &str,
    name: &str,
    layer: &Descriptor,
    diff_id: &str,
) -> Result<(), NodeError> {
    let labels = HashMap::from([("containerd.io/snapshot.ref".to_owned(), name.to_owned())]);
    let mounts = prepare(containerd, snapshotter, key, below, labels)?;
    let diff = types::Descriptor {
        media_type: layer.media_type.clone(),
        digest: layer.digest.clone(),
        size: layer.size,
        annotations: HashMap::new(),
    };
    let request = containerd.request(ApplyRequest { diff: Some(diff), mounts, ..ApplyRequest::default() });
    let applied = containerd
        .call_unbounded("unpack an image layer", DiffClient::new(containerd.channel()).apply(request))?
        .applied
        .unwrap_or_default();
    if applied.digest != *diff_id {
        return Err(NodeError::malformed(
            format!("image layer {}", layer.digest),
            format!("it unpacks to {}, the image's config says {diff_id}", applied.digest),
        ));
    }
    let request = containerd.request(CommitSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        name: name.to_owned(),
        key: key.to_owned(),
        labels: HashMap::new(),
    });
    match containerd.call("commit an image layer", SnapshotsClient::new(containerd.channel()).commit(request))
    {
        // Somebody else unpacked the same layer meanwhile; ours is superfluous.
        Err(error) if error.already_exists() => containerd.remove_snapshot(snapshotter, key),
        Err(error) => Err(error),
        Ok(()) => Ok(()),
    }
}

/// Prepares a writable snapshot and returns its mounts.
pub(super) fn prepare(
    containerd: &Containerd,
    snapshotter: &str,
    key: &str,
    parent: &str,
    labels: HashMap<String, String>,
) -> Result<Vec<types::Mount>, NodeError> {
    let request = containerd.request(PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels,
    });
    let answer =
        containerd.call("prepare a snapshot", SnapshotsClient::new(containerd.channel()).prepare(request))?;
    Ok(answer.mounts)
}

/// Returns a moment `after` now in the form containerd's labels have.
pub(super) fn rfc3339(after: Duration) -> String {
    prost_types::Timestamp::from(SystemTime::now() + after).to_string()
}
