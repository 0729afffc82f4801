//! What a container gets from outside and CRIU therefore neither dumps nor restores itself.
//!
//! Each such thing has a key that the dump writes into the images and the restore maps to what takes its place.
//! Keys are runc's: a bind mount is named by its mount point, every masked file by `/dev/null`, and a
//! namespace given by path by `extRootNetNS` or `extRootPidNS`. CRIU ignores keys it finds no use for, so
//! either side may name more than there is.

use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use super::error::{CheckpointError, Result};
use super::paths::resolve_in_root;
use super::{mountinfo, path_text};
use crate::cgroup;

/// Network devices, addresses and rules belong to whoever set the namespace up (runc: likewise).
pub(crate) const EMPTY_NAMESPACES: u32 = 0x4000_0000;

/// Key and name of every external mount of the running container with the init `pid`.
pub(crate) fn dumped_mounts(spec: &Spec, rootfs: &Path, pid: i32) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut same = |path: &str| found.push((path.to_owned(), path.to_owned()));
    for mount in mounts(spec).filter(|mount| is_bind(mount)) {
        same(path_text(&resolve_in_root(rootfs, mount.destination()))?);
    }
    for device in devices(spec) {
        same(path_text(&device)?);
    }
    if has_external_cgroups(spec)? {
        // Which hierarchies a runtime mounts, and where, differs: look at what is there.
        let inside = mountinfo::read(&pid.to_string())?;
        for mount in inside.iter().filter(|mount| mount.kind.starts_with("cgroup")) {
            same(path_text(&mount.point)?);
        }
    }
    for path in masked(spec) {
        let there = PathBuf::from(format!("/proc/{pid}/root")).join(path.strip_prefix("/").unwrap_or(&path));
        if there.metadata().is_ok_and(|metadata| !metadata.is_dir()) {
            found.push((path_text(&path)?.to_owned(), DEV_NULL.to_owned()));
        }
    }
    Ok(found)
}

/// Key and source of every external mount of a container to be restored, but for its cgroups.
pub(crate) fn restored_mounts(spec: &Spec, rootfs: &Path) -> Result<Vec<(String, String)>> {
    let mut found = vec![(DEV_NULL.to_owned(), DEV_NULL.to_owned())];
    for mount in mounts(spec).filter(|mount| is_bind(mount)) {
        let Some(source) = mount.source() else { continue };
        let destination = resolve_in_root(rootfs, mount.destination());
        // CRIU does not follow a link as mount(8) does. One that leads nowhere is CRIU's to complain about.
        let source = source.canonicalize().unwrap_or_else(|_| source.clone());
        found.push((path_text(&destination)?.to_owned(), path_text(&source)?.to_owned()));
    }
    for device in devices(spec) {
        let text = path_text(&device)?.to_owned();
        if text != DEV_NULL {
            found.push((text.clone(), text));
        }
    }
    Ok(found)
}

/// Whether the container sees version 1 hierarchies as bind mounts of its own cgroups.
pub(crate) fn has_external_cgroups(spec: &Spec) -> Result<bool> {
    let namespaced = namespaces(spec).any(|(kind, _)| kind == LinuxNamespaceType::Cgroup);
    let mounted = mounts(spec).any(|mount| mount.typ().as_deref() == Some("cgroup"));
    Ok(mounted && !namespaced && !cgroup::is_unified()?)
}

/// Where the spec wants cgroups to be seen.
pub(crate) fn cgroup_mount_point(spec: &Spec) -> Option<&Path> {
    mounts(spec)
        .find(|mount| mount.typ().as_deref() == Some("cgroup"))
        .map(|mount| mount.destination().as_path())
}

/// CRIU's texts for namespaces that were made by someone else and given by path.
pub(crate) fn dumped_namespaces(spec: &Spec) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (kind, path) in namespaces(spec) {
        let (Some((name, key)), Some(path)) = (external_key(kind), path) else { continue };
        let metadata = path.metadata().map_err(|error| CheckpointError::Namespace {
            kind: name,
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        found.push(format!("{name}[{}]:{key}", metadata.st_ino()));
    }
    Ok(found)
}

/// Name (as in `/proc/PID/ns`) and key of a namespace kind that CRIU can take from outside.
pub(crate) fn external_key(kind: LinuxNamespaceType) -> Option<(&'static str, &'static str)> {
    match kind {
        LinuxNamespaceType::Network => Some(("net", "extRootNetNS")),
        LinuxNamespaceType::Pid => Some(("pid", "extRootPidNS")),
        _ => None,
    }
}

/// Name of a namespace kind in `/proc/PID/ns`.
pub(crate) fn namespace_name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

/// Kind and path of every namespace of the spec; without a path it is the container's own.
pub(crate) fn namespaces(spec: &Spec) -> impl Iterator<Item = (LinuxNamespaceType, Option<&Path>)> {
    let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    list.into_iter().flatten().map(|namespace| {
        let path = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty());
        (namespace.typ(), path)
    })
}

/// The mounts of the spec.
pub(crate) fn mounts(spec: &Spec) -> impl Iterator<Item = &Mount> {
    spec.mounts().iter().flatten()
}

/// Whether a mount binds something of the host.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind")
        || options.into_iter().any(|option| option == "bind" || option == "rbind")
}

/// Options for CRIU from a file, which are stronger than ours: the annotation `org.criu.config` names it, or
/// switches it off when empty; without one it is the file that runc uses.
pub(crate) fn config_file(spec: &Spec) -> Option<String> {
    let annotation = spec.annotations().as_ref().and_then(|all| all.get("org.criu.config"));
    let file = annotation.map_or(DEFAULT_CONFIG, String::as_str);
    (!file.is_empty()).then(|| file.to_owned())
}

/// Device nodes, which are bind mounts in a container with a user namespace.
fn devices(spec: &Spec) -> Vec<PathBuf> {
    let own = spec.linux().iter().filter_map(|linux| linux.devices().as_ref()).flatten();
    let own = own.map(|device| device.path().clone());
    DEFAULT_DEVICES.iter().map(PathBuf::from).chain(own).collect()
}

fn masked(spec: &Spec) -> Vec<PathBuf> {
    let list = spec.linux().as_ref().and_then(|linux| linux.masked_paths().as_ref());
    list.into_iter().flatten().map(PathBuf::from).collect()
}

const DEV_NULL: &str = "/dev/null";
const DEFAULT_DEVICES: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/urandom", "/dev/random"];
const DEFAULT_CONFIG: &str = "/etc/criu/runc.conf";

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn binds_become_external_by_their_mount_point() {
        let spec = spec(
            r#"{"ociVersion":"1.0.2","mounts":[
                {"destination":"/etc/hosts","type":"bind","source":"/h","options":["rbind","ro"]},
                {"destination":"/data","type":"none","source":"/d","options":["bind"]},
                {"destination":"/proc","type":"proc","source":"proc"}]}"#,
        );
        let found = restored_mounts(&spec, Path::new("/nonexistent")).unwrap();
        let pair = |key: &str, source: &str| (key.to_owned(), source.to_owned());
        assert!(found.contains(&pair("/etc/hosts", "/h")));
        assert!(found.contains(&pair("/data", "/d")));
        assert!(!found.iter().any(|(key, _)| key == "/proc"));
        assert_eq!(found.iter().filter(|(key, _)| key == DEV_NULL).count(), 1);
    }

    #[test]
    fn a_bind_of_a_link_binds_what_it_leads_to() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/usr/..", &link).unwrap();
        let text = serde_json::json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/data", "type": "bind", "source": link, "options": ["rbind"]}]});
        let found = restored_mounts(&spec(&text.to_string()), Path::new("/nonexistent")).unwrap();
        assert!(found.contains(&("/data".to_owned(), "/".to_owned())), "{found:?}");
    }

    #[test]
    fn a_namespace_by_path_is_named_by_its_inode() {
        let spec = spec(
            r#"{"ociVersion":"1.0.2","linux":{"namespaces":[
                {"type":"network","path":"/proc/self/ns/net"},{"type":"pid"},
                {"type":"ipc","path":"/proc/self/ns/ipc"}]}}"#,
        );
        let inode = Path::new("/proc/self/ns/net").metadata().unwrap().st_ino();
        assert_eq!(dumped_namespaces(&spec).unwrap(), [format!("net[{inode}]:extRootNetNS")]);
    }

    #[test]
    fn the_annotation_names_or_switches_off_the_config_file() {
        let with = |text: &str| config_file(&spec(text));
        assert_eq!(with(r#"{"ociVersion":"1"}"#).as_deref(), Some("/etc/criu/runc.conf"));
        assert_eq!(with(r#"{"ociVersion":"1","annotations":{"org.criu.config":""}}"#), None);
        assert_eq!(
            with(r#"{"ociVersion":"1","annotations":{"org.criu.config":"/x"}}"#).as_deref(),
            Some("/x")
        );
    }
}
