//! The last steps before a container's program: what libcontainer leaves to its caller, and what it forgets.
//!
//! - The program is looked up as runc does, with runc's words when it cannot be found or run: dockerd reads
//!   exit codes out of them.
//! - A process without capabilities in its spec gets none; libcontainer leaves it all it has.
//! - Rust ignores SIGPIPE from the start of a program, and that survives exec: it is undone.
//! - **exec**: libcontainer builds the process's spec anew, without the seccomp profile, and joins no user
//!   namespace. So libcontainer is asked to change neither identity nor capabilities
//!   ([`Credentials::taken_from`]), and this module does it at the end: join the user namespace, load the
//!   filter while CAP_SYS_ADMIN is still there (or, under `no_new_privs`, as late as can be), take on groups,
//!   ids and capabilities.
//!
//! All of it runs in the child after the fork, single-threaded, where nothing may be written to stdout or
//! stderr: those are the container's.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::capabilities::drop_privileges;
use libcontainer::oci_spec::runtime::{
    Capabilities, LinuxCapabilities, LinuxCapabilitiesBuilder, LinuxSeccomp, Process, Spec, User,
};
use libcontainer::seccomp::{initialize_seccomp, is_notify};
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::unistd::{AccessFlags, Gid, Uid, access, execve, setgroups, setresgid, setresuid};

use crate::error::{ContainerError, Result, causes};

/// Runs the program of a new container.
#[derive(Debug, Clone)]
pub(crate) struct InitExecutor;

impl Executor for InitExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = process_of(spec)?;
        if process.capabilities().is_none() {
            apply_capabilities(&no_capabilities())?;
        }
        run(process)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        validate(spec)
    }
}

/// Runs a further program in a container.
#[derive(Debug, Clone)]
pub(crate) struct ExecExecutor {
    credentials: Rc<Credentials>,
}

/// What an exec'd process is to be, taken away from libcontainer.
#[derive(Debug)]
pub(crate) struct Credentials {
    user: User,
    capabilities: LinuxCapabilities,
    seccomp: Option<LinuxSeccomp>,
    no_new_privileges: bool,
    /// The container's user namespace, where it has its own.
    user_namespace: Option<OwnedFd>,
}

impl Credentials {
    /// Moves identity and capabilities out of `process`, so that libcontainer leaves the process privileged.
    ///
    /// # Errors
    /// [`ContainerError::Unsupported`] for a profile that hands its decisions to another process: its listener
    /// is only set up for init.
    pub(crate) fn taken_from(
        process: &mut Process,
        seccomp: Option<LinuxSeccomp>,
        user_namespace: Option<OwnedFd>,
    ) -> Result<Self> {
        if seccomp.as_ref().is_some_and(is_notify) {
            return Err(ContainerError::Unsupported {
                what: "linux.seccomp",
                reason: "SCMP_ACT_NOTIFY is supported for a container's first process only".to_owned(),
            });
        }
        let user = process.user().clone();
        let mut outer = User::default();
        outer.set_umask(user.umask());
        if user_namespace.is_none() {
            // A working directory that only the user may enter is entered as the user.
            outer = user.clone();
        }
        process.set_user(outer);
        let capabilities = process.capabilities().clone().unwrap_or_else(no_capabilities);
        process.set_capabilities(None);
        Ok(Self {
            user,
            capabilities,
            seccomp,
            no_new_privileges: process.no_new_privileges() == Some(true),
            user_namespace,
        })
    }

    fn apply(&self) -> Result<(), ExecutorError> {
        if let Some(namespace) = &self.user_namespace {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWUSER).map_err(step("join user namespace"))?;
        }
        // Loading a filter needs either CAP_SYS_ADMIN, which goes below, or no_new_privs.
        if !self.no_new_privileges {
            self.load_seccomp()?;
        }
        if self.user_namespace.is_some() {
            self.become_user()?;
        }
        apply_capabilities(&self.capabilities)?;
        if self.no_new_privileges {
            self.load_seccomp()?;
        }
        Ok(())
    }

    fn load_seccomp(&self) -> Result<(), ExecutorError> {
        let Some(profile) = &self.seccomp else { return Ok(()) };
        initialize_seccomp(profile)
            .map(|_| ())
            .map_err(|error| ExecutorError::Other(format!("load seccomp profile: {}", causes(&error))))
    }

    fn become_user(&self) -> Result<(), ExecutorError> {
        let groups: Vec<Gid> =
            self.user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
        // A user namespace may deny setgroups; the groups are then those of its creator, as with init.
        match setgroups(&groups) {
            Err(Errno::EPERM) if groups.is_empty() => {}
            other => other.map_err(step("setgroups"))?,
        }
        let (uid, gid) = (Uid::from_raw(self.user.uid()), Gid::from_raw(self.user.gid()));
        prctl::set_keepcaps(true).map_err(step("keep capabilities"))?;
        setresgid(gid, gid, gid).map_err(step("setresgid"))?;
        setresuid(uid, uid, uid).map_err(step("setresuid"))?;
        prctl::set_keepcaps(false).map_err(step("keep capabilities"))
    }
}

impl ExecExecutor {
    pub(crate) fn new(credentials: Credentials) -> Self {
        Self { credentials: Rc::new(credentials) }
    }
}

impl Executor for ExecExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = process_of(spec)?;
        self.credentials.apply()?;
        run(process)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        validate(spec)
    }
}

fn process_of(spec: &Spec) -> Result<&Process, ExecutorError> {
    spec.process().as_ref().ok_or(ExecutorError::InvalidArg)
}

fn step(what: &'static str) -> impl FnOnce(Errno) -> ExecutorError {
    move |errno| ExecutorError::Other(format!("{what}: {}", errno.desc()))
}

pub(crate) fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(Some(Capabilities::new()))
        .set_effective(Some(Capabilities::new()))
        .set_permitted(Some(Capabilities::new()))
        .set_inheritable(Some(Capabilities::new()))
        .set_ambient(Some(Capabilities::new()));
    none
}

/// Takes on exactly the five sets; a set the spec leaves out is empty.
fn apply_capabilities(wanted: &LinuxCapabilities) -> Result<(), ExecutorError> {
    let or_empty = |set: &Option<Capabilities>| set.clone().unwrap_or_default();
    let complete = LinuxCapabilitiesBuilder::default()
        .bounding(or_empty(wanted.bounding()))
        .effective(or_empty(wanted.effective()))
        .permitted(or_empty(wanted.permitted()))
        .inheritable(or_empty(wanted.inheritable()))
        .ambient(or_empty(wanted.ambient()))
        .build()
        .map_err(|error| ExecutorError::Other(format!("capabilities: {error}")))?;
    let syscall = SyscallType::Linux.create_syscall();
    // A set is dropped from its whole: libcontainer's order needs every capability still effective.
    drop_privileges(&complete, syscall.as_ref())
        .map_err(|error| ExecutorError::Other(format!("apply capabilities: {}", causes(&error))))
}

/// Replaces this process by the program. Returns only to report why it could not.
fn run(process: &Process) -> Result<(), ExecutorError> {
    let args = process.args().as_deref().unwrap_or_default();
    let environment = process.env().as_deref().unwrap_or_default();
    let name = args.first().ok_or(ExecutorError::InvalidArg)?;
    let path = look_up(name, path_of(environment)).map_err(ExecutorError::Other)?;
    let to_c = |text: &str| CString::new(text).map_err(|_| ExecutorError::InvalidArg);
    let args = args.iter().map(|arg| to_c(arg)).collect::<Result<Vec<_>, _>>()?;
    // Not the specification's list but the process's own environment: libcontainer has added HOME to it.
    let environment = std::env::vars()
        .map(|(key, value)| to_c(&format!("{key}={value}")))
        .collect::<Result<Vec<_>, _>>()?;
    let program = to_c(&path.to_string_lossy())?;
    godwit_sys::signals::restore_defaults().map_err(|error| ExecutorError::Other(error.to_string()))?;
    match execve(&program, &args, &environment) {
        Ok(never) => match never {},
        Err(errno) => Err(ExecutorError::Other(format!("exec: \"{name}\": {}", describe(errno)))),
    }
}

fn validate(spec: &Spec) -> Result<(), ExecutorValidationError> {
    let process = spec.process().as_ref();
    let args = process.and_then(|process| process.args().as_deref()).unwrap_or_default();
    let environment = process.and_then(|process| process.env().as_deref()).unwrap_or_default();
    let Some(name) = args.first().filter(|name| !name.is_empty()) else {
        let text = "process.args is empty: name the program to run";
        return Err(ExecutorValidationError::ArgValidationError(text.to_owned()));
    };
    look_up(name, path_of(environment)).map(|_| ()).map_err(ExecutorValidationError::ArgValidationError)
}

fn path_of(environment: &[String]) -> &str {
    environment.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default()
}

/// Finds the program, or says in runc's words why it cannot be run.
fn look_up(name: &str, path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        let candidate = Path::new(name);
        return match runnable(candidate) {
            Ok(()) => Ok(candidate.to_owned()),
            Err(Errno::EACCES) => Err(format!("exec: \"{name}\": permission denied")),
            Err(errno) => Err(format!("exec: \"{name}\": stat {name}: {}", describe(errno))),
        };
    }
    let mut denied = false;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        match runnable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(errno) => denied |= errno == Errno::EACCES,
        }
    }
    let reason = if denied { "permission denied" } else { "executable file not found in $PATH" };
    Err(format!("exec: \"{name}\": {reason}"))
}

fn runnable(path: &Path) -> Result<(), Errno> {
    let to_errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let metadata = std::fs::metadata(path).map_err(to_errno)?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    access(path, AccessFlags::X_OK)
}

/// The C library's text, as other runtimes print it.
fn describe(errno: Errno) -> String {
    let text = errno.desc();
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_run_is_described_as_callers_expect() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        std::fs::write(directory.path().join("plain"), "").unwrap();
        let cases = [
            ("absent", "exec: \"absent\": executable file not found in $PATH".to_owned()),
            ("plain", "exec: \"plain\": permission denied".to_owned()),
            ("/absent/x", "exec: \"/absent/x\": stat /absent/x: no such file or directory".to_owned()),
            (path, format!("exec: \"{path}\": permission denied")),
        ];
        for (name, text) in cases {
            assert_eq!(look_up(name, path).unwrap_err(), text);
        }
        assert_eq!(look_up("sh", "/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(look_up("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        assert_eq!(look_up("sh", "").unwrap_err(), "exec: \"sh\": executable file not found in $PATH");
    }

    #[test]
    fn the_last_path_in_the_environment_counts() {
        let environment = ["PATH=/a".to_owned(), "X=1".to_owned(), "PATH=/b".to_owned()];
        assert_eq!(path_of(&environment), "/b");
        assert_eq!(path_of(&[]), "");
    }
}
