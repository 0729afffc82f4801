//! Mount points that a root file system lacks.
//!
//! `create` makes them as it mounts, but CRIU expects them, and on another machine the root file system may
//! come fresh from the image.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use godwit_sys::mount::Mounted;
use libcontainer::oci_spec::runtime::{Mount, Spec};

use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::external::{is_bind, mounts};
use crate::checkpoint::paths::resolve_in_root;

/// Makes every mount point of the spec that does not exist yet.
///
/// Points on a tmpfs of the container are left to CRIU, which restores its content, and those of cgroups lie
/// on one or appear with `/sys`. A bind mount is mounted while the points after it are made, because they may
/// lie in it (`/data` and `/data/cache`). Has to run in a private mount namespace.
pub(super) fn prepare(spec: &Spec, rootfs: &Path) -> Result<()> {
    let mut bound: Vec<Mounted> = Vec::new();
    for mount in mounts(spec) {
        let destination = mount.destination();
        if mount.typ().as_deref() == Some("cgroup") || is_on_tmpfs(spec, destination) {
            continue;
        }
        let inside = resolve_in_root(rootfs, destination);
        let point = rootfs.join(inside.strip_prefix("/").unwrap_or(&inside));
        let source = mount.source().as_deref().filter(|_| is_bind(mount));
        make(&point, source)
            .map_err(|source| CheckpointError::MountPoint { path: destination.clone(), source })?;
        if let Some(source) = source {
            bound.push(Mounted::bind(source, &point)?);
        }
    }
    // The last one first: it may lie in an earlier one.
    while bound.pop().is_some() {}
    Ok(())
}

/// A file is bound to a file, everything else is mounted on a directory.
fn make(point: &Path, source: Option<&Path>) -> std::io::Result<()> {
    let directory = source.map_or(Ok(true), |source| source.metadata().map(|metadata| metadata.is_dir()))?;
    if point.exists() {
        return Ok(());
    }
    if directory {
        return fs::create_dir_all(point);
    }
    if let Some(parent) = point.parent() {
        fs::create_dir_all(parent)?;
    }
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o755).open(point).map(drop)
}

fn is_on_tmpfs(spec: &Spec, path: &Path) -> bool {
    mounts(spec).filter(|mount| is_tmpfs(mount)).any(|mount| {
        let below = path.strip_prefix(mount.destination());
        below.is_ok_and(|rest| !rest.as_os_str().is_empty())
    })
}

fn is_tmpfs(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("tmpfs") && !is_bind(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_and_files_are_made_as_their_source_is() {
        let root = tempfile::tempdir().unwrap();
        let source = tempfile::NamedTempFile::new().unwrap();
        let file = root.path().join("etc/hosts");
        make(&file, Some(source.path())).unwrap();
        assert!(file.is_file());
        let directory = root.path().join("a/b");
        make(&directory, Some(root.path())).unwrap();
        make(&directory, None).unwrap();
        assert!(directory.is_dir());
        assert!(make(&root.path().join("x"), Some(Path::new("/nonexistent"))).is_err());
    }

    #[test]
    fn only_what_lies_in_a_tmpfs_is_on_it() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","mounts":[
                {"destination":"/dev","type":"tmpfs","source":"tmpfs"},
                {"destination":"/proc","type":"proc","source":"proc"}]}"#,
        )
        .unwrap();
        assert!(is_on_tmpfs(&spec, Path::new("/dev/pts")));
        assert!(!is_on_tmpfs(&spec, Path::new("/dev")));
        assert!(!is_on_tmpfs(&spec, Path::new("/developer")));
    }
}
