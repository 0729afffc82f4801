//! `exec`: a further process in a container.
//!
//! libcontainer's tenant builder accepts running containers only and reads everything it needs from a state
//! directory. It is shown a copy of the state under `<state>/exec-<pid>/`, in which the container is running:
//! so a created container can be entered, as with runc, and its sockets and the process file disappear with
//! the copy whatever happens.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use libcontainer::container::ContainerStatus;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::oci_spec::runtime::{Capabilities, Capability, Process, Spec};
use libcontainer::syscall::syscall::SyscallType;

use crate::bare_cgroups;
use crate::create::write_pid;
use crate::error::{ContainerError, Result};
use crate::executor::{Credentials, ExecExecutor, no_capabilities};
use crate::failure::process_failure;
use crate::process;
use crate::state::{STATE_FILE, Status, Stored, write_json};

/// What `exec` takes beside the container and the process.
#[derive(Debug, Clone, Default)]
pub struct ExecOptions {
    /// Where to write the process's id.
    pub pid_file: Option<PathBuf>,
    /// Unix socket that receives the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// Number of descriptors from 3 on that the process inherits.
    pub preserve_fds: i32,
    /// Enter a paused container as well: the process starts when it is resumed.
    pub ignore_paused: bool,
    /// A cgroup below the container's, which must exist.
    pub sub_cgroup: Option<String>,
}

/// How a process that is given by its arguments differs from the container's first.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// `UID` or `UID:GID`.
    pub user: Option<String>,
    /// Further groups.
    pub additional_gids: Vec<u32>,
    /// Working directory.
    pub cwd: Option<PathBuf>,
    /// Variables, `NAME=VALUE`, that replace those of the same name.
    pub env: Vec<String>,
    /// Capabilities beside the container's.
    pub capabilities: Vec<String>,
    /// Set `no_new_privs` even if the container does not.
    pub no_new_privileges: bool,
    /// AppArmor profile instead of the container's.
    pub apparmor: Option<String>,
}

/// The container's first process with other arguments and some changes: what `exec ID PROGRAM` starts.
///
/// # Errors
/// [`ContainerError::Unsupported`] for a user, capability or variable that makes no sense.
pub fn process_for(stored: &Stored, overrides: &Overrides) -> Result<Process> {
    let spec = stored.spec()?;
    let mut process = spec.process().clone().unwrap_or_default();
    process.set_args(Some(overrides.args.clone())).set_terminal(Some(overrides.terminal));
    if let Some(cwd) = &overrides.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(profile) = &overrides.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if overrides.no_new_privileges {
        process.set_no_new_privileges(Some(true));
    }
    set_user(&mut process, overrides)?;
    set_environment(&mut process, &overrides.env)?;
    add_capabilities(&mut process, &overrides.capabilities)?;
    Ok(process)
}

fn set_user(process: &mut Process, overrides: &Overrides) -> Result<()> {
    let mut user = process.user().clone();
    if let Some(text) = &overrides.user {
        let refused = |_| ContainerError::Unsupported {
            what: "--user",
            reason: format!("\"{text}\" is not UID or UID:GID, both numbers"),
        };
        let (uid, gid) = text.split_once(':').unwrap_or((text, ""));
        user.set_uid(uid.parse().map_err(refused)?);
        if !gid.is_empty() {
            user.set_gid(gid.parse().map_err(refused)?);
        }
    }
    let mut groups = user.additional_gids().clone().unwrap_or_default();
    groups.extend(&overrides.additional_gids);
    if !groups.is_empty() {
        user.set_additional_gids(Some(groups));
    }
    process.set_user(user);
    Ok(())
}

fn set_environment(process: &mut Process, wanted: &[String]) -> Result<()> {
    let mut env = process.env().clone().unwrap_or_default();
    for entry in wanted {
        let Some((name, _)) = entry.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            let reason = format!("\"{entry}\" is not NAME=VALUE");
            return Err(ContainerError::Unsupported { what: "--env", reason });
        };
        env.retain(|old| old.split('=').next() != Some(name));
        env.push(entry.clone());
    }
    process.set_env(Some(env));
    Ok(())
}

/// Adds to what the process may do, not to what it passes on: inheritable capabilities could be gained by
/// running any file that asks for them.
fn add_capabilities(process: &mut Process, names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let mut sets = process.capabilities().clone().unwrap_or_else(no_capabilities);
    for name in names {
        let full = name.to_ascii_uppercase();
        let full = if full.starts_with("CAP_") { full } else { format!("CAP_{full}") };
        let capability: Capability = full.parse().map_err(|_| ContainerError::Unsupported {
            what: "--cap",
            reason: format!("\"{name}\" is no capability"),
        })?;
        let with = |set: &Option<Capabilities>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let (bounding, effective) = (with(sets.bounding()), with(sets.effective()));
        let permitted = with(sets.permitted());
        let ambient = with(sets.ambient()).filter(|_| sets.inheritable().is_some());
        sets.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
        sets.set_ambient(ambient.or_else(|| sets.ambient().clone()));
    }
    process.set_capabilities(Some(sets));
    Ok(())
}

/// Starts `process` in the container and returns its id; it is a child of the calling process.
///
/// What `process` leaves open (capabilities, limits, profile, OOM score) is as the container's spec says.
///
/// # Errors
/// [`ContainerError::ExecStopped`], [`ContainerError::ExecPaused`], or [`ContainerError::Process`] with what
/// failed.
pub fn exec(stored: &Stored, mut process: Process, options: &ExecOptions) -> Result<i32> {
    let status = stored.status()?;
    let init = match (status, stored.pid()) {
        (Status::Paused, _) if !options.ignore_paused => return Err(ContainerError::ExecPaused),
        (Status::Created | Status::Running | Status::Paused, Some(init)) => init,
        _ => return Err(ContainerError::ExecStopped),
    };
    check_console(&process, options)?;
    let spec = stored.spec()?;
    fill_in(&mut process, &spec);
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let credentials = Credentials::taken_from(&mut process, seccomp, foreign_user_namespace(init)?)?;
    godwit_sys::keyring::join_session(stored.id())?;
    let scratch = Scratch::new(stored, &process)?;
    let entered =
        if stored.uses_systemd() { None } else { Some(bare_cgroups::enter(&stored.cgroup_path()?)) };
    let built = build(stored, &scratch, credentials, options);
    drop(entered);
    let pid = built.map_err(|error| {
        process::reap_failed();
        process_failure(&error)
    })?;
    write_pid(options.pid_file.as_deref(), pid)?;
    Ok(pid)
}

fn build(
    stored: &Stored,
    scratch: &Scratch,
    credentials: Credentials,
    options: &ExecOptions,
) -> Result<i32, LibcontainerError> {
    let pid = ContainerBuilder::new(stored.id().to_owned(), SyscallType::Linux)
        .with_root_path(&scratch.directory)?
        .with_console_socket(options.console_socket.as_ref())
        .with_preserved_fds(options.preserve_fds)
        .with_executor(ExecExecutor::new(credentials))
        .as_tenant()
        .with_detach(true)
        .with_ignore_paused(true)
        .with_sub_cgroup(options.sub_cgroup.clone())
        .with_process(Some(scratch.process()))
        .build()?;
    Ok(pid.as_raw())
}

/// Fields that an exec'd process inherits from the container when its own spec leaves them open.
fn fill_in(process: &mut Process, spec: &Spec) {
    let Some(init) = spec.process() else { return };
    if process.capabilities().is_none() {
        process.set_capabilities(init.capabilities().clone());
    }
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(init.rlimits().clone());
    }
    if process.apparmor_profile().as_ref().is_none_or(String::is_empty) {
        process.set_apparmor_profile(init.apparmor_profile().clone());
    }
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(init.oom_score_adj());
    }
}

fn check_console(process: &Process, options: &ExecOptions) -> Result<()> {
    match (process.terminal().unwrap_or(false), &options.console_socket) {
        (true, None) => Err(ContainerError::Console(
            "cannot allocate tty if godwit will detach without setting console socket",
        )),
        (false, Some(_)) => Err(ContainerError::Console(
            "cannot use console socket if godwit will not detach or allocate tty",
        )),
        _ => Ok(()),
    }
}

/// The user namespace of `init` when it is not the caller's.
fn foreign_user_namespace(init: i32) -> Result<Option<OwnedFd>> {
    let path = PathBuf::from(format!("/proc/{init}/ns/user"));
    let theirs = fs::read_link(&path).map_err(ContainerError::file(&path))?;
    let ours = fs::read_link("/proc/self/ns/user").map_err(ContainerError::file("/proc/self/ns/user"))?;
    if theirs == ours {
        return Ok(None);
    }
    fs::File::open(&path).map(|file| Some(file.into())).map_err(ContainerError::file(path))
}

/// The copy of the state that libcontainer is shown; removed on drop.
#[derive(Debug)]
struct Scratch {
    directory: PathBuf,
}

impl Scratch {
    fn new(stored: &Stored, process: &Process) -> Result<Self> {
        let directory = stored.directory().join(format!("exec-{}", std::process::id()));
        let scratch = Self { directory };
        let state = scratch.directory.join(stored.id());
        fs::create_dir_all(&state).map_err(ContainerError::file(&state))?;
        let mut record = stored.record().clone();
        record.status = ContainerStatus::Running;
        write_json(&state.join(STATE_FILE), &record)?;
        write_json(&scratch.process(), process)?;
        Ok(scratch)
    }

    fn process(&self) -> PathBuf {
        self.directory.join("process.json")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.directory) {
            log::warn!("remove {}: {error}", self.directory.display());
        }
    }
}

fn remove(directory: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
