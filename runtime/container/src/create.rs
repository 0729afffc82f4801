//! `create`: libcontainer builds the container, godwit checks first and records afterwards.
//!
//! The process that calls this must have one thread: libcontainer forks. The container's init becomes an
//! orphan when the caller exits, so the nearest subreaper above (containerd's shim) inherits it.

use std::fs;
use std::path::{Path, PathBuf};

use godwit_sys::netns;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::error::LibcontainerError;
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Spec};
use libcontainer::syscall::syscall::SyscallType;

use crate::bare_cgroups;
use crate::cgroup;
use crate::checkpoint::external;
use crate::devices;
use crate::error::{ContainerError, Result};
use crate::executor::InitExecutor;
use crate::failure::process_failure;
use crate::process;
use crate::state::{Store, Stored, read_json, write_whole};
use crate::update;

/// What `create` takes beside the id.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// Where to write init's process id.
    pub pid_file: Option<PathBuf>,
    /// Unix socket that receives the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// Move the root instead of pivoting it (for a root file system on a ramdisk).
    pub no_pivot: bool,
    /// Stay in the caller's session keyring.
    pub no_new_keyring: bool,
    /// Number of descriptors from 3 on that the container inherits.
    pub preserve_fds: i32,
    /// Let systemd manage the cgroup.
    pub systemd_cgroup: bool,
    /// Whether the verb returns while the container runs; only then a terminal needs a console socket.
    pub detach: bool,
}

/// Creates the container `id` from a bundle; its process then waits for `start`.
///
/// # Errors
/// [`ContainerError::AlreadyExists`], a spec that cannot be read, or [`ContainerError::Process`] with what
/// failed inside the container. Nothing is left behind.
pub fn create(store: &Store, id: &str, options: &CreateOptions) -> Result<Stored> {
    let directory = store.directory(id)?;
    if directory.exists() {
        return Err(ContainerError::AlreadyExists { id: id.to_owned() });
    }
    let bundle = fs::canonicalize(&options.bundle).map_err(ContainerError::file(&options.bundle))?;
    let spec: Spec = read_json(&bundle.join("config.json"))?;
    check_console(&spec, options)?;
    check_label(&spec)?;
    let rootfs = rootfs(&spec, &bundle)?;
    if !options.no_new_keyring {
        godwit_sys::keyring::join_session(id)?;
    }
    fs::create_dir_all(store.root()).map_err(ContainerError::file(store.root()))?;
    let cgroup = cgroup_path(&spec, id);
    let entered = (!options.systemd_cgroup).then(|| bare_cgroups::enter(&cgroup));
    let built = build(store, id, &bundle, options);
    drop(entered);
    match built {
        Ok(container) => finish(store, container, &spec, rootfs, options).inspect_err(|_| undo(store, id)),
        Err(error) => {
            // libcontainer removes what its own steps made, not what came before them.
            let is_ours = !matches!(error, LibcontainerError::Exist);
            if is_ours {
                undo(store, id);
            }
            process::reap_failed();
            if is_ours && !options.systemd_cgroup {
                // No configuration was written that a deletion could know them by.
                if let Err(error) = cgroup::remove_unrecorded(&cgroup) {
                    log::warn!("remove the cgroup of {id}, which was not created: {error}");
                }
                bare_cgroups::remove(&cgroup);
            }
            Err(process_failure(&error))
        }
    }
}

fn build(
    store: &Store,
    id: &str,
    bundle: &Path,
    options: &CreateOptions,
) -> Result<Container, LibcontainerError> {
    ContainerBuilder::new(id.to_owned(), SyscallType::Linux)
        .with_root_path(store.root())?
        .with_console_socket(options.console_socket.as_ref())
        .with_preserved_fds(options.preserve_fds)
        .with_executor(InitExecutor)
        .validate_id()?
        .as_init(bundle)
        .with_systemd(options.systemd_cgroup)
        .with_detach(options.console_socket.is_some() || options.detach)
        .with_no_pivot(options.no_pivot)
        .build()
}

fn finish(
    store: &Store,
    container: Container,
    spec: &Spec,
    rootfs: PathBuf,
    options: &CreateOptions,
) -> Result<Stored> {
    let Some(pid) = container.state.pid else {
        return Err(ContainerError::Process { detail: "init has no process id".to_owned() });
    };
    let stored = Stored::record_process(store, container, pid, rootfs, ContainerStatus::Created)?;
    // Before anything of the container runs: init waits for `start` in libcontainer's code.
    devices::confine(pid, spec)?;
    if has_new_network(spec) {
        netns::bring_loopback_up(pid)?;
    }
    update::keep_oom_killer_off(&stored, spec)?;
    write_pid(options.pid_file.as_deref(), pid)?;
    Ok(stored)
}

/// The path of the container's cgroup, as libcontainer has it.
fn cgroup_path(spec: &Spec, id: &str) -> PathBuf {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    path.unwrap_or_else(|| format!(":youki:{id}").into())
}

/// Tells whether the container gets a network namespace of its own, in which the loopback device is off at first.
pub(crate) fn has_new_network(spec: &Spec) -> bool {
    external::namespaces(spec).any(|(kind, path)| kind == LinuxNamespaceType::Network && path.is_none())
}

/// Kills and removes what a failed `create` made.
fn undo(store: &Store, id: &str) {
    if let Err(error) = crate::lifecycle::delete(store, id, true) {
        log::warn!("clean up after failed create of {id}: {error}");
    }
}

/// Writes a pid file as a whole, without a newline, as runc does.
pub(crate) fn write_pid(path: Option<&Path>, pid: i32) -> Result<()> {
    path.map_or(Ok(()), |path| write_whole(path, pid.to_string().as_bytes()))
}

fn check_console(spec: &Spec, options: &CreateOptions) -> Result<()> {
    let terminal = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    match (terminal, &options.console_socket) {
        (true, None) if options.detach => Err(ContainerError::Console(
            "cannot allocate tty if godwit will detach without setting console socket",
        )),
        (false, Some(_)) => Err(ContainerError::Console(
            "cannot use console socket if godwit will not detach or allocate tty",
        )),
        _ => Ok(()),
    }
}

/// A label that is silently ignored would leave the container less confined than its caller believes.
fn check_label(spec: &Spec) -> Result<()> {
    let label = spec.process().as_ref().and_then(|process| process.selinux_label().as_ref());
    if label.is_some_and(|label| !label.is_empty()) && Path::new("/sys/fs/selinux/enforce").exists() {
        return Err(ContainerError::Unsupported {
            what: "process.selinuxLabel",
            reason: "SELinux is active here and godwit does not support it; run without a label".to_owned(),
        });
    }
    Ok(())
}

pub(crate) fn rootfs(spec: &Spec, bundle: &Path) -> Result<PathBuf> {
    let path = spec.root().as_ref().map(|root| root.path()).ok_or_else(|| ContainerError::Unsupported {
        what: "root",
        reason: "config.json names no root file system; add \"root\": {\"path\": \"rootfs\"}".to_owned(),
    })?;
    let path = bundle.join(path);
    fs::canonicalize(&path).map_err(ContainerError::file(path))
}
