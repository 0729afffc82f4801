//! The containers under one state root: where their state lies, what they are now.
//!
//! Each container has a directory `<root>/<id>` with libcontainer's files (`state.json`, `youki_config.json`,
//! `notify.sock`), so that libcontainer's own verbs accept what is written here, and `godwit.json`, which
//! holds what libcontainer does not keep: when init started, so that a recycled process id is not taken for
//! it, and where the root file system is.
//!
//! The status is derived from facts each time, never from a label alone: init's process, the freezer, and
//! whether `notify.sock` is still there (`start` removes it). The label in `state.json` follows for others to
//! read. Files are replaced as a whole, so that a kill leaves the old one or the new one.

use std::fmt;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus, State};
use libcontainer::oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::error::{ContainerError, Result};
use crate::process;

/// What a container is, in the words of runc's `state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` has not finished, or was killed.
    Creating,
    /// Set up, and waiting for `start`.
    Created,
    /// Its process runs.
    Running,
    /// Its cgroup is frozen.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// The state root: a directory with one directory per container.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// One container of a [`Store`].
#[derive(Debug, Clone)]
pub struct Stored {
    container: Container,
    extra: Extra,
}

/// What `godwit.json` holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Extra {
    /// Start time of init in clock ticks since boot (field 22 of `/proc/PID/stat`).
    init_start_ticks: Option<u64>,
    rootfs: PathBuf,
}

impl Store {
    /// The store in the directory `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of all containers.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of the container `id`, whether or not it exists.
    ///
    /// # Errors
    /// [`ContainerError::InvalidId`], so that an id never leads out of the root.
    pub fn directory(&self, id: &str) -> Result<PathBuf> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
        if id.is_empty() || id == "." || id == ".." || id.len() > ID_BYTES_MAX || !id.bytes().all(valid) {
            return Err(ContainerError::InvalidId { id: id.to_owned() });
        }
        Ok(self.root.join(id))
    }

    /// Reads the container `id`.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`], [`ContainerError::InvalidId`], [`ContainerError::Foreign`], or what is wrong
    /// with its files.
    pub fn open(&self, id: &str) -> Result<Stored> {
        let directory = self.directory(id)?;
        let path = directory.join(STATE_FILE);
        let state: State = match read_json(&path) {
            Err(ContainerError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Err(ContainerError::NotFound { id: id.to_owned() });
            }
            Err(ContainerError::Json { .. }) if is_foreign(&path) => {
                return Err(ContainerError::Foreign { path });
            }
            other => other?,
        };
        let extra = match read_json(&directory.join(EXTRA_FILE)) {
            Err(ContainerError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Extra::default()
            }
            other => other?,
        };
        Ok(Stored { container: Container { state, root: directory }, extra })
    }

    /// Every container whose state can be read, ordered by id.
    ///
    /// # Errors
    /// [`ContainerError::File`] when the root exists but cannot be listed.
    pub fn list(&self) -> Result<Vec<Stored>> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(ContainerError::file(&self.root))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(ContainerError::file(&self.root))?;
            let name = entry.file_name();
            let Some(id) = name.to_str() else { continue };
            match self.open(id) {
                Ok(stored) => found.push(stored),
                Err(ContainerError::NotFound { .. } | ContainerError::InvalidId { .. }) => {}
                Err(error) => log::error!("load container {id}: {error}"),
            }
        }
        found.sort_by(|left, right| left.id().cmp(right.id()));
        Ok(found)
    }
}

impl Stored {
    /// The container's id.
    pub fn id(&self) -> &str {
        self.container.id()
    }

    /// Init's process id while it lives.
    pub fn pid(&self) -> Option<i32> {
        self.container.state.pid.filter(|pid| process::is_alive(*pid, self.extra.init_start_ticks))
    }

    /// The bundle's directory.
    pub fn bundle(&self) -> &Path {
        self.container.bundle()
    }

    /// The container's root file system on the host.
    pub fn rootfs(&self) -> &Path {
        &self.extra.rootfs
    }

    /// The directory of its state.
    pub fn directory(&self) -> &Path {
        &self.container.root
    }

    /// libcontainer's record.
    pub fn record(&self) -> &State {
        &self.container.state
    }

    /// What the container is now.
    ///
    /// # Errors
    /// When its cgroup cannot be read.
    pub fn status(&self) -> Result<Status> {
        let state = &self.container.state;
        if state.pid.is_none() && state.status == ContainerStatus::Creating {
            return Ok(Status::Creating);
        }
        let Some(pid) = self.pid() else { return Ok(Status::Stopped) };
        if cgroup::is_frozen(self)? {
            return Ok(Status::Paused);
        }
        // Read again: it may have ended while the cgroup was looked at.
        if !process::is_alive(pid, self.extra.init_start_ticks) {
            return Ok(Status::Stopped);
        }
        Ok(if self.notify_socket().exists() { Status::Created } else { Status::Running })
    }

    /// Reads the bundle's `config.json`.
    ///
    /// # Errors
    /// [`ContainerError::File`] or [`ContainerError::Json`].
    pub fn spec(&self) -> Result<Spec> {
        read_json(&self.bundle().join("config.json"))
    }

    /// Hooks and cgroup path as they were at `create`.
    ///
    /// # Errors
    /// [`ContainerError::File`] or [`ContainerError::Json`] when `create` or `restore` was killed before it
    /// wrote them.
    pub fn config(&self) -> Result<YoukiConfig> {
        YoukiConfig::load(self.directory()).map_err(|error| ContainerError::File {
            path: self.directory().join("youki_config.json"),
            source: std::io::Error::other(crate::error::causes(&error)),
        })
    }

    /// The cgroup path of the spec, or the default that libcontainer made up.
    ///
    /// # Errors
    /// Those of [`Stored::config`].
    pub fn cgroup_path(&self) -> Result<PathBuf> {
        Ok(self.config()?.cgroup_path)
    }

    /// Whether systemd manages its cgroup.
    pub fn uses_systemd(&self) -> bool {
        self.container.systemd()
    }

    /// A container whose state file is missing or cut short.
    pub(crate) fn torn(state: State, directory: PathBuf) -> Self {
        Self { container: Container { state, root: directory }, extra: Extra::default() }
    }

    pub(crate) fn notify_socket(&self) -> PathBuf {
        self.directory().join(NOTIFY_FILE)
    }

    /// Writes a new label to `state.json`.
    pub(crate) fn set_label(&mut self, label: ContainerStatus) -> Result<()> {
        self.container.set_status(label);
        write_json(&self.directory().join(STATE_FILE), &self.container.state)
    }

    /// Records a container whose init is `pid`: what `create` calls after libcontainer made it, and `restore`
    /// after CRIU did.
    ///
    /// # Errors
    /// [`ContainerError::File`] when the state cannot be written.
    pub fn record_process(
        store: &Store,
        mut container: Container,
        pid: i32,
        rootfs: PathBuf,
        label: ContainerStatus,
    ) -> Result<Self> {
        if container.state.created.is_none() {
            container.set_status(ContainerStatus::Created);
        }
        container.set_pid(pid).set_status(label);
        container.root = store.directory(container.id())?;
        let extra = Extra { init_start_ticks: process::start_ticks(pid), rootfs };
        write_json(&container.root.join(EXTRA_FILE), &extra)?;
        write_json(&container.root.join(STATE_FILE), &container.state)?;
        Ok(Self { container, extra })
    }
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(ContainerError::file(path))?;
    serde_json::from_slice(&text).map_err(ContainerError::json(path))
}

/// Whether a state is one that runc writes, under the same name but in a form of its own.
fn is_foreign(path: &Path) -> bool {
    read_json::<serde_json::Value>(path).is_ok_and(|state| state.get(RUNC_FIELD).is_some())
}

/// Replaces `path` as a whole.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(ContainerError::json(path))?;
    write_whole(path, &text)
}

/// Writes `bytes` beside `path` and renames them into place, so that nobody reads half of them.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        fs::File::create(&beside)?.write_all(bytes)?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| {
        // The cause is the write's; a leftover of ours is only tidied.
        drop(fs::remove_file(&beside));
        ContainerError::File { path: path.to_owned(), source }
    })
}

pub(crate) const STATE_FILE: &str = "state.json";
/// A field of runc's state that is in no other runtime's.
const RUNC_FIELD: &str = "init_process_pid";
const EXTRA_FILE: &str = "godwit.json";
const NOTIFY_FILE: &str = "notify.sock";
/// A file name's maximum.
const ID_BYTES_MAX: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_never_leads_out_of_the_root() {
        let store = Store::new("/run/x");
        for id in ["", ".", "..", "a/b", "a b", "é", "a\n", &"x".repeat(256)] {
            assert!(matches!(store.directory(id), Err(ContainerError::InvalidId { .. })), "{id:?}");
        }
        assert_eq!(store.directory("a-B_1+.2").unwrap(), Path::new("/run/x/a-B_1+.2"));
    }

    #[test]
    fn a_missing_container_a_torn_state_and_another_runtimes_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        assert!(matches!(store.open("web"), Err(ContainerError::NotFound { .. })));
        fs::create_dir(root.path().join("web")).unwrap();
        assert!(matches!(store.open("web"), Err(ContainerError::NotFound { .. })));
        fs::write(root.path().join("web/state.json"), "{\"ociVersion\":").unwrap();
        assert!(matches!(store.open("web"), Err(ContainerError::Json { .. })));
        assert!(store.list().unwrap().is_empty());
        fs::write(root.path().join("web/state.json"), r#"{"id":"web","init_process_pid":7}"#).unwrap();
        assert!(matches!(store.open("web"), Err(ContainerError::Foreign { .. })));
    }

    #[test]
    fn a_container_without_a_process_is_stopped_and_one_in_the_making_is_creating() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        for (id, label) in [("half", ContainerStatus::Creating), ("old", ContainerStatus::Running)] {
            let directory = root.path().join(id);
            fs::create_dir(&directory).unwrap();
            let pid = (label == ContainerStatus::Running).then_some(i32::MAX);
            let state = State::new(id, label, pid, root.path().to_owned());
            write_json(&directory.join(STATE_FILE), &state).unwrap();
        }
        assert_eq!(store.open("half").unwrap().status().unwrap(), Status::Creating);
        assert_eq!(store.open("old").unwrap().status().unwrap(), Status::Stopped);
        let ids: Vec<_> = store.list().unwrap().iter().map(|stored| stored.id().to_owned()).collect();
        assert_eq!(ids, ["half", "old"]);
    }

    #[test]
    fn a_recycled_process_id_is_not_taken_for_init() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        fs::create_dir(root.path().join("web")).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let state = State::new("web", ContainerStatus::Running, Some(pid), root.path().to_owned());
        write_json(&root.path().join("web/state.json"), &state).unwrap();
        assert_eq!(store.open("web").unwrap().pid(), Some(pid));
        let extra = Extra { init_start_ticks: Some(1), rootfs: PathBuf::new() };
        write_json(&root.path().join("web/godwit.json"), &extra).unwrap();
        assert_eq!(store.open("web").unwrap().pid(), None);
    }
}
