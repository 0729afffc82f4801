//! `start`, `kill`, `pause`, `resume` and `delete`.
//!
//! libcontainer's own `kill` marks a container stopped whatever the signal was, and its `delete` needs files
//! that an interrupted `create` has not written: both are done here. Signals go through a pidfd, to the process
//! that was checked. A frozen process of cgroup version 1 dies only once it is thawed, so SIGKILL thaws.

use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use godwit_sys::SysError;
use godwit_sys::pidfd::PidFd;
use libcgroups::common::CgroupManager;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use libcontainer::notify_socket::NotifySocket;
use libcontainer::oci_spec::runtime::Hook;
use nix::sys::signal::Signal;

use crate::bare_cgroups;
use crate::cgroup::{self, FREEZE_LIMIT};
use crate::error::{ContainerError, Result, causes};
use crate::state::{Status, Store, Stored};

/// Lets the process of a created container run.
///
/// # Errors
/// [`ContainerError::NotStartable`], or a failed `poststart` hook: the process runs then, as the OCI
/// specification asks, and the error only reports the hook.
pub fn start(stored: &mut Stored) -> Result<()> {
    let status = stored.status()?;
    if status != Status::Created {
        return Err(ContainerError::NotStartable { status });
    }
    NotifySocket::new(stored.notify_socket()).notify_container_start().map_err(|error| {
        // Init ended between the check and here.
        log::debug!("{}", causes(&error));
        ContainerError::NotStartable { status: Status::Stopped }
    })?;
    fs::remove_file(stored.notify_socket()).map_err(ContainerError::file(stored.notify_socket()))?;
    stored.set_label(ContainerStatus::Running)?;
    let config = stored.config()?;
    let hooks = config.hooks.as_ref().and_then(|hooks| hooks.poststart().as_ref());
    hook("poststart", hooks, stored.record())
}

/// Sends `signal` to init, or with `all` to every process of the container's cgroup.
///
/// # Errors
/// [`ContainerError::NotRunning`] for a stopped container, [`ContainerError::Signal`] when the kernel refuses.
pub fn kill(stored: &Stored, signal: i32, all: bool) -> Result<()> {
    let status = stored.status()?;
    if all {
        let pids = cgroup::processes(stored)?;
        if pids.is_empty() && status == Status::Stopped {
            return Err(ContainerError::NotRunning { status });
        }
        return signal_all(stored, signal);
    }
    let (Status::Created | Status::Running | Status::Paused, Some(init)) = (status, stored.pid()) else {
        return Err(ContainerError::NotRunning { status });
    };
    PidFd::open(init).and_then(|process| process.send_signal(signal)).map_err(ContainerError::Signal)?;
    if status == Status::Paused && signal == Signal::SIGKILL as i32 {
        thaw_quietly(stored);
    }
    Ok(())
}

/// Parses a signal as runc does: a number, or a name with or without `SIG`, in either case.
///
/// # Errors
/// [`ContainerError::UnknownSignal`].
pub fn parse_signal(name: &str) -> Result<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return Ok(number);
    }
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let alias = match full.as_str() {
        "SIGPOLL" => "SIGIO",
        "SIGCLD" => "SIGCHLD",
        "SIGIOT" => "SIGABRT",
        other => other,
    };
    alias
        .parse::<Signal>()
        .map(|signal| signal as i32)
        .map_err(|_| ContainerError::UnknownSignal { name: name.to_owned() })
}

/// Freezes every process of the container and waits until all have stopped.
///
/// # Errors
/// [`ContainerError::NotRunning`] unless it is created or running.
pub fn pause(stored: &mut Stored) -> Result<()> {
    let status = stored.status()?;
    if !matches!(status, Status::Created | Status::Running) {
        return Err(ContainerError::NotRunning { status });
    }
    cgroup::freezer(stored)?.freeze(FREEZE_LIMIT)?.commit();
    if status == Status::Running { stored.set_label(ContainerStatus::Paused) } else { Ok(()) }
}

/// Lets the processes of a paused container run again.
///
/// # Errors
/// [`ContainerError::NotPaused`].
pub fn resume(stored: &mut Stored) -> Result<()> {
    let status = stored.status()?;
    if status != Status::Paused {
        return Err(ContainerError::NotPaused { status });
    }
    cgroup::freezer(stored)?.thaw()?;
    let created = stored.notify_socket().exists();
    stored.set_label(if created { ContainerStatus::Created } else { ContainerStatus::Running })
}

/// Removes what a container holds: its processes, cgroup and state; then runs its `poststop` hooks.
///
/// A created or stopped container goes at once. With `force` a running or paused one is killed first, a state
/// left over from an interrupted `create` goes with whatever it had started, and a missing one is fine.
///
/// # Errors
/// [`ContainerError::NotFound`], [`ContainerError::NotStopped`], [`ContainerError::StillRunning`], or what
/// could not be removed; a failed hook is logged, not returned.
pub fn delete(store: &Store, id: &str, force: bool) -> Result<()> {
    let directory = store.directory(id)?;
    let stored = match store.open(id) {
        Ok(stored) => stored,
        Err(ContainerError::NotFound { .. } | ContainerError::Json { .. }) if force => {
            remove_torn(store, id)?;
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    match stored.status()? {
        Status::Stopped => {}
        Status::Created => kill_init(&stored)?,
        status @ (Status::Creating | Status::Running | Status::Paused) => {
            if !force {
                return Err(ContainerError::NotStopped { id: id.to_owned(), status });
            }
            kill_init(&stored)?;
        }
    }
    let hooks = remove_cgroup(&stored)?;
    remove_directory(&directory)?;
    // As runc: by now there is nothing left that a failing hook could keep from being removed.
    if let Err(error) = hook("poststop", hooks.as_ref(), stored.record()) {
        log::warn!("{error}");
    }
    Ok(())
}

/// Kills init and waits for its end, then whatever shares the cgroup with it: without a PID namespace of its
/// own the kernel does not do that.
fn kill_init(stored: &Stored) -> Result<()> {
    if let Some(pid) = stored.pid() {
        match PidFd::open(pid) {
            Ok(process) => {
                match process.send_signal(Signal::SIGKILL as i32) {
                    Ok(()) | Err(SysError::NoProcess { .. }) => {}
                    Err(error) => return Err(ContainerError::Signal(error)),
                }
                thaw_quietly(stored);
                if !process.wait_exit(KILL_LIMIT)? {
                    return Err(ContainerError::StillRunning { pid });
                }
            }
            Err(SysError::NoProcess { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Kills what is left in the cgroup and removes it; the `poststop` hooks, if the container has any.
///
/// A container whose configuration was never written has no cgroup yet, or one nobody can name any more.
fn remove_cgroup(stored: &Stored) -> Result<Option<Vec<Hook>>> {
    let Ok(config) = stored.config() else { return Ok(None) };
    let deadline = Instant::now() + KILL_LIMIT;
    while !cgroup::processes(stored)?.is_empty() {
        signal_all(stored, Signal::SIGKILL as i32)?;
        if Instant::now() > deadline {
            return Err(ContainerError::Cgroup {
                detail: format!("processes of container {} survive SIGKILL", stored.id()),
            });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    cgroup::manager(stored)?.remove().map_err(ContainerError::cgroup)?;
    if !stored.uses_systemd() {
        bare_cgroups::remove(&config.cgroup_path);
    }
    Ok(config.hooks.and_then(|hooks| hooks.poststop().clone()))
}

/// Removes a directory whose state file is missing or cut short; what its cgroup may hold goes first.
fn remove_torn(store: &Store, id: &str) -> Result<()> {
    let directory = store.directory(id)?;
    if !directory.exists() {
        return Ok(());
    }
    let state = State::new(id, ContainerStatus::Creating, None, directory.clone());
    let stored = Stored::torn(state, directory.clone());
    remove_cgroup(&stored)?;
    remove_directory(&directory)
}

fn remove_directory(directory: &std::path::Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(ContainerError::file(directory)(error)),
        _ => Ok(()),
    }
}

/// Signals every process of the cgroup while it is frozen, so that none can fork in between.
fn signal_all(stored: &Stored, signal: i32) -> Result<()> {
    let freezer = cgroup::freezer(stored);
    // A cgroup that does not freeze (a process in an uninterruptible sleep) is signalled all the same.
    let frozen = freezer.as_ref().ok().and_then(|freezer| freezer.freeze(FREEZE_ALL_LIMIT).ok());
    let mut refused = None;
    for pid in cgroup::processes(stored)? {
        match PidFd::open(pid).and_then(|process| process.send_signal(signal)) {
            Ok(()) | Err(SysError::NoProcess { .. }) => {}
            Err(error) => refused = Some(error),
        }
    }
    drop(frozen);
    refused.map_or(Ok(()), |error| Err(ContainerError::Signal(error)))
}

fn thaw_quietly(stored: &Stored) {
    let thawed = cgroup::freezer(stored).and_then(|freezer| freezer.thaw().map_err(Into::into));
    if let Err(error) = thawed {
        log::debug!("thaw after SIGKILL: {error}");
    }
}

fn hook(point: &'static str, hooks: Option<&Vec<Hook>>, state: &State) -> Result<()> {
    if hooks.is_none_or(Vec::is_empty) {
        return Ok(());
    }
    // The specification knows no "paused".
    let mut state = state.clone();
    if state.status == ContainerStatus::Paused {
        state.status = ContainerStatus::Running;
    }
    if point == "poststop" {
        state.status = ContainerStatus::Stopped;
        state.pid = None;
    }
    run_hooks(hooks, Some(&state), None, None, None)
        .map_err(|error| ContainerError::Hook { point, detail: causes(&error) })
}

/// How long a killed process may take to end (runc waits as long).
const KILL_LIMIT: Duration = Duration::from_secs(10);
const FREEZE_ALL_LIMIT: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_parsed_as_runc_parses_them() {
        for (name, number) in [("KILL", 9), ("SIGKILL", 9), ("sigterm", 15), ("9", 9), ("0", 0), ("99", 99)] {
            assert_eq!(parse_signal(name).unwrap(), number, "{name}");
        }
        assert_eq!(parse_signal("NOSIG").unwrap_err().to_string(), "unknown signal \"NOSIG\"");
    }

    #[test]
    fn forced_deletion_of_a_missing_container_is_fine_and_plain_deletion_is_not() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        delete(&store, "web", true).unwrap();
        assert!(matches!(delete(&store, "web", false), Err(ContainerError::NotFound { .. })));
    }

    #[test]
    fn what_an_interrupted_create_left_is_deleted_by_force_only() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        for text in [None, Some("{"), Some(CREATING)] {
            fs::create_dir(root.path().join("web")).unwrap();
            if let Some(text) = text {
                fs::write(root.path().join("web/state.json"), text).unwrap();
            }
            assert!(delete(&store, "web", false).is_err());
            delete(&store, "web", true).unwrap();
            assert!(!root.path().join("web").exists());
        }
    }

    const CREATING: &str =
        r#"{"ociVersion":"1.0.2","id":"web","status":"creating","bundle":"/","useSystemd":false}"#;
}
