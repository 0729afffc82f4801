//! Looking at this host with an offer in hand.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use containerd_client::services::v1::{
    GetContainerRequest, GetImageRequest, GetRequest, PluginsRequest,
    containers_client::ContainersClient,
    images_client::ImagesClient,
    introspection_client::IntrospectionClient,
    snapshots::{StatSnapshotRequest, snapshots_client::SnapshotsClient},
    tasks_client::TasksClient,
};
use godwit_protocol::offer::{Image, Offer};
use godwit_sys::{mount::Mounted, mountns};
use nix::sys::statvfs::statvfs;

use super::{paths, preflight::Observed};
use crate::{
    client::Containerd,
    error::{NodeError, Optional},
    facts, image, name,
};

/// Finds out what [`super::judge`] needs to know.
///
/// # Errors
/// [`NodeError`] if the offer's names, digests or specification are malformed, or containerd fails.
pub fn observe(containerd: &Containerd, offer: &Offer) -> Result<Observed, NodeError> {
    let container = &offer.container;
    name::check("container id", &container.id)?;
    let spec = &container.spec.value;
    let absent_paths = paths::absent(spec, Path::exists)?;
    let (snapshotters, root) = snapshotters(containerd, &container.snapshotter)?;
    let usable = snapshotters.contains(&container.snapshotter);
    let exists =
        |key: &str| if usable { snapshot_exists(containerd, &container.snapshotter, key) } else { Ok(false) };
    let parent = container.snapshot.as_ref().map_or("", |snapshot| snapshot.parent.as_str());
    let shim = shim_binary(&container.runtime.name);
    let facts = facts::gather(Some(containerd));
    Ok(Observed {
        criu_complaint: facts.criu.as_ref().and_then(|_| criu_complaint()),
        facts,
        container_exists: container_exists(containerd, &container.id)?,
        snapshot_exists: match &container.snapshot {
            Some(snapshot) => exists(&snapshot.key)?,
            None => false,
        },
        snapshotters,
        shim_found: in_path(&shim),
        shim,
        user_namespace: paths::has_user_namespace(spec)?,
        absent_paths,
        parent_exists: parent.is_empty() || exists(parent)?,
        other_image: match &container.image {
            Some(image) => other_image(containerd, image)?,
            None => None,
        },
        missing: missing(containerd, container.image.as_ref())?,
        layers_nowhere: layers_nowhere(containerd, container.image.as_ref())?,
        disk_available_bytes: root.and_then(|root| disk_available_bytes(&root)),
    })
}

fn container_exists(containerd: &Containerd, id: &str) -> Result<bool, NodeError> {
    let request = containerd.request(GetContainerRequest { id: id.to_owned() });
    let record = containerd
        .call("look for a container of that name", ContainersClient::new(containerd.channel()).get(request))
        .optional()?;
    let request = containerd.request(GetRequest { container_id: id.to_owned(), exec_id: String::new() });
    let task = containerd
        .call("look for a task of that name", TasksClient::new(containerd.channel()).get(request))
        .optional()?;
    Ok(record.is_some() || task.is_some())
}

/// Tells whether a snapshot exists.
pub(super) fn snapshot_exists(
    containerd: &Containerd,
    snapshotter: &str,
    key: &str,
) -> Result<bool, NodeError> {
    let request =
        containerd.request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() });
    let answer = containerd
        .call("look for a snapshot", SnapshotsClient::new(containerd.channel()).stat(request))
        .optional()?;
    Ok(answer.is_some())
}

/// Returns the snapshotters that work, and where `wanted` keeps its files.
fn snapshotters(containerd: &Containerd, wanted: &str) -> Result<(Vec<String>, Option<PathBuf>), NodeError> {
    let request =
        containerd.request(PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".to_owned()] });
    let plugins = containerd
        .call("list snapshotters", IntrospectionClient::new(containerd.channel()).plugins(request))?
        .plugins;
    let working = |plugin: &&containerd_client::services::v1::Plugin| {
        plugin.init_err.as_ref().is_none_or(|error| error.code == 0)
    };
    let root = plugins
        .iter()
        .find(|plugin| plugin.id == wanted)
        .and_then(|plugin| plugin.exports.get("root"))
        .map(PathBuf::from);
    let mut names: Vec<String> = plugins.iter().filter(working).map(|plugin| plugin.id.clone()).collect();
    names.sort();
    Ok((names, root))
}

/// Returns the digest that the image's name stands for here, if it is not the offered one.
fn other_image(containerd: &Containerd, offered: &Image) -> Result<Option<String>, NodeError> {
    let request = containerd.request(GetImageRequest { name: offered.name.clone() });
    let here = containerd
        .call("look for the image", ImagesClient::new(containerd.channel()).get(request))
        .optional()?
        .and_then(|answer| answer.image?.target);
    Ok(here.map(|target| target.digest).filter(|digest| *digest != offered.target.digest))
}

fn missing(containerd: &Containerd, offered: Option<&Image>) -> Result<Vec<String>, NodeError> {
    let mut missing = Vec::new();
    for blob in offered.iter().flat_map(|image| &image.blobs) {
        image::check_digest("the offer", &blob.digest)?;
        if containerd.blob_info(&blob.digest)?.is_none() {
            missing.push(blob.digest.clone());
        }
    }
    Ok(missing)
}

fn layers_nowhere(containerd: &Containerd, offered: Option<&Image>) -> Result<Vec<String>, NodeError> {
    let mut nowhere = Vec::new();
    for digest in offered.iter().flat_map(|image| &image.absent) {
        image::check_digest("the offer", digest)?;
        if containerd.blob_info(digest)?.is_none() {
            nowhere.push(digest.clone());
        }
    }
    Ok(nowhere)
}

/// Returns the binary that containerd runs for a runtime: named by the last two parts of the runtime's name, or
/// given as an absolute path.
fn shim_binary(runtime: &str) -> String {
    if runtime.starts_with('/') {
        return runtime.to_owned();
    }
    let mut parts = runtime.rsplit('.');
    let version = parts.next().unwrap_or_default();
    let name = parts.next().unwrap_or_default();
    format!("containerd-shim-{name}-{version}")
}

/// Tells whether containerd would find a binary, supposing that it has the agent's path.
fn in_path(binary: &str) -> bool {
    if binary.starts_with('/') {
        return Path::new(binary).is_file();
    }
    // containerd puts this directory in front of its own path.
    find_in_path(binary).is_some() || Path::new("/opt/containerd/bin").join(binary).is_file()
}

fn find_in_path(binary: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|directory| directory.join(binary)).find(|file| file.is_file())
}

/// Returns what `criu check` complains of, if it does.
///
/// CRIU makes directories in `/tmp` when it looks at a kernel for the first time. It does so in a mount namespace
/// of its own, where `/tmp` is in memory: a migration writes nothing to storage.
fn criu_complaint() -> Option<String> {
    let checking = thread::spawn(|| {
        if let Err(error) = mountns::enter_private().and_then(|()| cover_tmp()) {
            log::warn!("`criu check` writes to /tmp: {error}");
        }
        check_criu()
    });
    checking.join().unwrap_or_else(|_| Some("it could not be run".to_owned()))
}

/// Puts an empty tmpfs on `/tmp`, unless CRIU itself is there. It goes with the mount namespace.
fn cover_tmp() -> godwit_sys::Result<()> {
    let directory = Path::new("/tmp");
    if find_in_path("criu").is_some_and(|criu| criu.starts_with(directory)) {
        return Ok(());
    }
    Mounted::tmpfs(directory, TMP_SIZE_BYTES).map(|mounted| drop(mounted.keep()))
}

fn check_criu() -> Option<String> {
    let output = Command::new("criu").arg("check").stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned()
                + &String::from_utf8_lossy(&output.stdout);
            let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("Error")).collect();
            Some(if errors.is_empty() { output.status.to_string() } else { errors.join(", ") })
        }
        Err(error) => Some(error.to_string()),
    }
}

fn disk_available_bytes(root: &Path) -> Option<u64> {
    let stat = statvfs(root).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Room for directories; CRIU keeps no content there.
const TMP_SIZE_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shims_name_follows_from_the_runtimes() {
        assert_eq!(shim_binary("io.containerd.godwit.v1"), "containerd-shim-godwit-v1");
        assert_eq!(shim_binary("io.containerd.runc.godwit.v1"), "containerd-shim-godwit-v1");
        assert_eq!(shim_binary("io.containerd.runc.v2"), "containerd-shim-runc-v2");
        assert_eq!(shim_binary("/opt/x/shim"), "/opt/x/shim");
        assert!(in_path("sh") && !in_path("containerd-shim-no-such-v1") && !in_path("/no/such"));
    }
}
