//! The files of a container's bundle that matter to the shim.
//!
//! `config.json` comes from containerd; `godwit.json` is ours: what a `delete` action that shares nothing with
//! the process that created the container must know to clean up after it.

use std::{
    collections::HashMap,
    env,
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, ShimError},
    options::CreateOptions,
    runtime::Target,
};

/// Where the runtime keeps its state unless told otherwise; the namespace is added.
const DEFAULT_ROOT: &str = "/run/containerd/godwit";

/// containerd's default for runc, kept for it so that `runc list` finds what the shim made.
const RUNC_ROOT: &str = "/run/containerd/runc";

/// The runtime's program, if neither the options nor [`RUNTIME_ENV`] name one.
const DEFAULT_BINARY: &str = "godwit";

/// Environment variable that names the runtime's program where options cannot.
pub(crate) const RUNTIME_ENV: &str = "GODWIT_RUNTIME";

const RECORD: &str = "godwit.json";

/// Written while the outcome of a migration is not the shim's to decide any more.
const COMMITTING: &str = "migration-committing";

/// Annotations that put several containers into one shim, in order of precedence.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// The parts of `config.json` that are looked at.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Spec {
    #[serde(default)]
    annotations: HashMap<String, String>,
    linux: Option<Linux>,
}

#[derive(Debug, Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<Namespace>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Spec {
    /// Reads the bundle's `config.json`.
    ///
    /// # Errors
    /// When it is missing or no OCI runtime configuration.
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(ShimError::io(format!("read {}", path.display())))?;
        serde_json::from_slice(&text).map_err(|source| ShimError::BadJson { what: "config.json", source })
    }

    /// Returns the name that the container shares its shim under, its own `id` if it does not.
    pub(crate) fn group<'a>(&'a self, id: &'a str) -> &'a str {
        GROUPS.iter().find_map(|name| self.annotations.get(*name)).map_or(id, String::as_str)
    }

    /// Tells whether the kernel ends the container's other processes with its init.
    pub(crate) fn has_own_pids(&self) -> bool {
        let own = |namespace: &Namespace| namespace.kind == "pid" && namespace.path.is_empty();
        self.linux.as_ref().is_some_and(|linux| linux.namespaces.iter().any(own))
    }
}

/// How the container's runtime is reached, for a later `delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    binary: PathBuf,
    root: PathBuf,
    systemd_cgroup: bool,
}

impl Record {
    /// Decides which runtime `options` mean.
    pub(crate) fn new(options: &CreateOptions, namespace: &str) -> Self {
        let binary = runtime_binary(&options.binary_name);
        let root = match (options.root.as_str(), is_runc(&binary)) {
            ("", true) => RUNC_ROOT,
            ("", false) => DEFAULT_ROOT,
            (root, _) => root,
        };
        let root = Path::new(root).join(namespace);
        Self { binary, root, systemd_cgroup: options.systemd_cgroup }
    }

    /// Writes the record into `bundle`.
    ///
    /// # Errors
    /// Those of writing a file.
    pub(crate) fn write(&self, bundle: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|source| ShimError::BadJson { what: RECORD, source })?;
        fs::write(bundle.join(RECORD), text).map_err(ShimError::io(format!("write {RECORD}")))
    }

    /// Reads the record of `bundle`; nothing if no container was ever created in it.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub(crate) fn read(bundle: &Path) -> Result<Option<Self>> {
        let text = match fs::read(bundle.join(RECORD)) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ShimError::io(format!("read {RECORD}"))(error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| ShimError::BadJson { what: RECORD, source })
    }

    /// Returns the runtime for one container.
    pub(crate) fn target(&self, bundle: &Path, id: &str) -> Target {
        Target {
            binary: self.binary.clone(),
            root: self.root.clone(),
            systemd_cgroup: self.systemd_cgroup,
            bundle: bundle.to_owned(),
            id: id.to_owned(),
        }
    }
}

fn is_runc(binary: &Path) -> bool {
    binary.file_name().is_some_and(|name| name == "runc")
}

/// Returns the program that `name` (as in the options) means: godwit beside the shim, or in `PATH`, if empty.
pub(crate) fn runtime_binary(name: &str) -> PathBuf {
    if !name.is_empty() {
        return name.into();
    }
    if let Some(named) = env::var_os(RUNTIME_ENV).filter(|named| !named.is_empty()) {
        return named.into();
    }
    godwit_binary()
}

/// Returns the `godwit` beside the shim, else the one in `PATH`.
pub(crate) fn godwit_binary() -> PathBuf {
    let beside = env::current_exe().ok().map(|shim| shim.with_file_name(DEFAULT_BINARY));
    beside.filter(|path| path.exists()).unwrap_or_else(|| DEFAULT_BINARY.into())
}

/// Returns the file to which the runtime writes the pid of the container's init.
pub(crate) fn init_pid_file(bundle: &Path) -> PathBuf {
    bundle.join("init.pid")
}

/// Reads a pid that the runtime wrote.
///
/// # Errors
/// When the file is missing or holds no pid.
pub(crate) fn read_pid(path: &Path) -> Result<i32> {
    let action = || format!("read a pid from {}", path.display());
    let text = fs::read_to_string(path).map_err(ShimError::io(action()))?;
    let pid = text.trim().parse().ok().filter(|pid| *pid > 0);
    pid.ok_or_else(|| ShimError::io(action())(std::io::ErrorKind::InvalidData.into()))
}

/// Returns what tells the processes of this bundle from those of any other, for as long as it exists.
///
/// The path alone does not: another mount namespace, as that of a container which runs a containerd of its own, may
/// have a bundle of the same path and still show its processes here.
///
/// # Errors
/// Those of looking at the bundle: mostly that it does not exist.
pub(crate) fn identity(bundle: &Path) -> Result<OsString> {
    let metadata = fs::metadata(bundle).map_err(ShimError::io(format!("look at {}", bundle.display())))?;
    let mut identity = OsString::from(format!("{}:{}:", metadata.dev(), metadata.ino()));
    identity.push(bundle);
    Ok(identity)
}

/// Returns the directory for a migration worker's logs and CRIU's, having made it.
///
/// It is in the bundle, which containerd keeps in memory, and not in its `work`, which is on disk: a migration
/// writes nothing to storage.
///
/// # Errors
/// Those of making a directory.
pub(crate) fn make_migration_work(bundle: &Path) -> Result<PathBuf> {
    let path = bundle.join("migration");
    fs::create_dir_all(&path).map_err(ShimError::io(format!("make {}", path.display())))?;
    Ok(path)
}

/// Notes that a migration's worker, and no longer the shim, decides what becomes of the container.
///
/// # Errors
/// Those of writing a file.
pub(crate) fn note_committing(bundle: &Path) -> Result<()> {
    fs::write(bundle.join(COMMITTING), []).map_err(ShimError::io(format!("write {COMMITTING}")))
}

/// Takes the note back.
pub(crate) fn forget_committing(bundle: &Path) {
    fs::remove_file(bundle.join(COMMITTING)).ok();
}

/// Tells whether the note is there.
pub(crate) fn is_committing(bundle: &Path) -> bool {
    bundle.join(COMMITTING).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn pods_share_a_shim_by_their_sandbox() {
        assert_eq!(spec("{}").group("web"), "web");
        let pod = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
        assert_eq!(spec(pod).group("web"), "pod");
        let both =
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(spec(both).group("web"), "g");
    }

    #[test]
    fn a_pid_namespace_given_by_path_is_not_the_containers_own() {
        let with = |namespaces: &str| spec(&format!(r#"{{"linux":{{"namespaces":[{namespaces}]}}}}"#));
        assert!(with(r#"{"type":"mount"},{"type":"pid"}"#).has_own_pids());
        assert!(!with(r#"{"type":"pid","path":"/proc/1/ns/pid"}"#).has_own_pids());
        assert!(!spec("{}").has_own_pids());
    }

    #[test]
    fn a_record_is_found_again_and_runc_keeps_its_root() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(bundle.path()).unwrap(), None);
        let options = CreateOptions { binary_name: "/usr/sbin/runc".to_owned(), ..CreateOptions::default() };
        let record = Record::new(&options, "default");
        record.write(bundle.path()).unwrap();
        assert_eq!(Record::read(bundle.path()).unwrap(), Some(record.clone()));
        assert_eq!(record.root, Path::new("/run/containerd/runc/default"));
        let options = CreateOptions { root: "/r".to_owned(), ..options };
        assert_eq!(Record::new(&options, "default").root, Path::new("/r/default"));
    }

    #[test]
    fn a_pid_file_without_a_pid_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("init.pid");
        for (text, pid) in [("7", Some(7)), ("7\n", Some(7)), ("", None), ("-1", None), ("0", None)] {
            fs::write(&file, text).unwrap();
            assert_eq!(read_pid(&file).ok(), pid, "{text:?}");
        }
    }
}
