//! Restores a container of this host with CRIU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use godwit_container::checkpoint::Decision;
use godwit_container::restore::{Hold, RestoreOptions, restore_when};
use godwit_container::{Store, cgroup, lifecycle};
use godwit_memory::fault;
use godwit_protocol::plan::Abilities;

use super::{Restorer, Word};
use crate::Cause;

/// Where and how a container is restored.
///
/// Standard input, output and error of this process become those of the container.
#[derive(Debug, Clone)]
pub struct CriuRestorer {
    /// The state root.
    pub store: Store,
    /// The container's id.
    pub id: String,
    /// Directory with `config.json` and the mounted root file system.
    pub bundle: PathBuf,
    /// Directory for CRIU's log and scratch files.
    pub work_path: PathBuf,
    /// Where to write init's process id.
    pub pid_file: Option<PathBuf>,
    /// Unix socket that receives the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// Whether systemd manages the cgroup.
    pub systemd_cgroup: bool,
}

impl Restorer for CriuRestorer {
    fn work_path(&self) -> &Path {
        &self.work_path
    }

    fn warden(&self) -> Option<Command> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("--root").arg(self.store.root()).args(["migrate-warden", "--id", &self.id]);
        Some(command)
    }

    fn restore(
        &self,
        images: &Path,
        lazy_pages: bool,
        begin: impl FnOnce() -> bool,
        decide: impl FnOnce() -> Word,
    ) -> Result<i32, Cause> {
        let options = RestoreOptions {
            work_path: Some(self.work_path.clone()),
            pid_file: self.pid_file.clone(),
            console_socket: self.console_socket.clone(),
            systemd_cgroup: self.systemd_cgroup,
            terse_log: !log::log_enabled!(log::Level::Debug),
            lazy_pages,
            ..RestoreOptions::new(&self.bundle, images)
        };
        let begin = || begin().then(|| hold_for(images)).transpose();
        let stored = restore_when(&self.store, &self.id, &options, begin, |_| match decide() {
            Word::Resume => Decision::Commit,
            Word::GiveUp => Decision::Rollback,
        })?;
        Ok(stored.pid().ok_or("the restored container has no init")?)
    }

    fn processes(&self) -> Result<Vec<i32>, Cause> {
        Ok(cgroup::processes(&self.store.open(&self.id)?)?)
    }

    fn remove(&self) -> Result<(), Cause> {
        Ok(lifecycle::delete(&self.store, &self.id, true)?)
    }
}

/// Returns what can be done here with the memory of restored tasks, which may be in a user namespace of their own.
#[must_use]
pub fn abilities(user_namespace: bool) -> Abilities {
    let probed = if user_namespace { fault::probe_in_user_namespace() } else { fault::probe() };
    let cannot_serve = probed.err().map(|error| error.to_string());
    Abilities { cannot_serve, ..Abilities::default() }
}

/// With connections to keep, the network has to stay locked while the container is held, so that no packet is
/// answered by a container that may yet be given up. Without, less is left to fail at the later point.
fn hold_for(images: &Path) -> io::Result<Hold> {
    for entry in fs::read_dir(images)? {
        if entry?.file_name().to_string_lossy().starts_with("tcp-stream") {
            return Ok(Hold::PostRestore);
        }
    }
    Ok(Hold::PreResume)
}
