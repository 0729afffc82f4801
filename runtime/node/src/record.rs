//! containerd's records and the forms in which they travel.

use std::collections::{BTreeMap, HashMap};

use containerd_client::{
    services::v1::{Container, container::Runtime as RuntimeRecord},
    types,
};
use godwit_protocol::offer::{ContainerRecord, Descriptor, Runtime, TypedBytes};
use prost_types::Any;

use crate::error::NodeError;

/// Returns an `Any` as it travels.
pub(crate) fn typed_bytes(any: Any) -> TypedBytes {
    TypedBytes { type_url: any.type_url, value: any.value }
}

/// Returns an `Any` as containerd takes it.
pub(crate) fn any(bytes: &TypedBytes) -> Any {
    Any { type_url: bytes.type_url.clone(), value: bytes.value.clone() }
}

/// Sorts a map, so that what travels does not depend on hashing.
pub(crate) fn sorted<V>(map: HashMap<String, V>) -> BTreeMap<String, V> {
    map.into_iter().collect()
}

/// Returns a map as generated messages want it.
pub(crate) fn hashed(map: &BTreeMap<String, String>) -> HashMap<String, String> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Returns a descriptor as it travels.
///
/// # Errors
/// [`NodeError::Malformed`] for a negative size or a digest that is none.
pub(crate) fn descriptor(what: &str, descriptor: types::Descriptor) -> Result<Descriptor, NodeError> {
    crate::image::check_digest(what, &descriptor.digest)?;
    let size = u64::try_from(descriptor.size)
        .map_err(|_| NodeError::malformed(what, format!("size {}", descriptor.size)))?;
    Ok(Descriptor {
        media_type: descriptor.media_type,
        digest: descriptor.digest,
        size,
        annotations: sorted(descriptor.annotations),
    })
}

/// Returns a descriptor as containerd takes it.
///
/// # Errors
/// [`NodeError::Malformed`] for a digest that is none or a size beyond what containerd can hold.
pub(crate) fn containerd_descriptor(
    what: &str,
    descriptor: &Descriptor,
) -> Result<types::Descriptor, NodeError> {
    crate::image::check_digest(what, &descriptor.digest)?;
    let size = i64::try_from(descriptor.size)
        .map_err(|_| NodeError::malformed(what, format!("size {}", descriptor.size)))?;
    Ok(types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.clone(),
        size,
        annotations: hashed(&descriptor.annotations),
    })
}

/// Returns the record that the target's containerd is asked to create: the source's, with the same names.
pub(crate) fn container(record: &ContainerRecord) -> Container {
    Container {
        id: record.id.clone(),
        labels: hashed(&record.labels),
        image: record.image.as_ref().map(|image| image.name.clone()).unwrap_or_default(),
        runtime: Some(RuntimeRecord {
            name: record.runtime.name.clone(),
            options: record.runtime.options.as_ref().map(any),
        }),
        spec: Some(any(&record.spec)),
        snapshotter: record.snapshotter.clone(),
        snapshot_key: record.snapshot.as_ref().map(|snapshot| snapshot.key.clone()).unwrap_or_default(),
        extensions: record.extensions.iter().map(|(name, value)| (name.clone(), any(value))).collect(),
        sandbox: record.sandbox_id.clone().unwrap_or_default(),
        ..Container::default()
    }
}

/// Returns the runtime of a record.
///
/// # Errors
/// [`NodeError::Malformed`] if the record names none.
pub(crate) fn runtime(id: &str, runtime: Option<RuntimeRecord>) -> Result<Runtime, NodeError> {
    let runtime = runtime
        .filter(|runtime| !runtime.name.is_empty())
        .ok_or_else(|| NodeError::malformed(format!("record of container {id}"), "it names no runtime"))?;
    Ok(Runtime { name: runtime.name, options: runtime.options.map(typed_bytes) })
}
