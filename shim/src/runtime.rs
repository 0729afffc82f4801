//! Runs the OCI runtime: one process per verb.
//!
//! ```text
//! Call{verb, stdio} ──► BINARY --root R --log BUNDLE/log.json --log-format json VERB … ID ──► output, or Error
//! ```
//! The runtime forks in ways that no process with threads survives, so it is never a library here. A verb dies
//! with the shim, is the leader of a process group of its own and carries the bundle in its environment
//! ([`MARK`]): that is how `delete` finds what a killed shim left behind. (A CRIU that a verb started wipes its
//! environment; it ends by itself when the verb has.)

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
};

use async_trait::async_trait;
use godwit_sys::{memfd, spawn::SpawnExt};
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::{
    bundle,
    error::{Result, ShimError},
    reaper::Reaper,
    verb::Verb,
};

use std::os::unix::process::CommandExt;

/// Environment variable that tells which bundle a verb was started for.
pub(crate) const MARK: &str = "GODWIT_VERB_OF";

/// Longest output of a verb that is looked at, in bytes.
const OUTPUT_MAX: u64 = 1 << 20;

/// Longest part of the runtime's log that is searched for its last error, in bytes.
const LOG_MAX: u64 = 1 << 20;

/// What a verb's process has as stdin, stdout and stderr.
#[derive(Debug)]
pub(crate) enum VerbStdio {
    /// Nothing comes in; what goes out is returned, or becomes part of the error.
    Captured,
    /// The container's own: the runtime passes them on. Nothing stands for `/dev/null`.
    Container([Option<OwnedFd>; 3]),
}

/// One run of the runtime.
#[derive(Debug)]
pub(crate) struct Call {
    /// What to do.
    pub(crate) verb: Verb,
    /// With which descriptors.
    pub(crate) stdio: VerbStdio,
    /// Gets the process group of the verb while it runs, 0 before and afterwards.
    pub(crate) group: Option<Arc<AtomicI32>>,
}

impl From<Verb> for Call {
    fn from(verb: Verb) -> Self {
        Self { verb, stdio: VerbStdio::Captured, group: None }
    }
}

/// An OCI runtime, bound to one container.
#[async_trait]
pub(crate) trait Runtime: Send + Sync + std::fmt::Debug {
    /// Runs a verb to its end and returns what it printed, if that was captured.
    async fn run(&self, call: Call) -> Result<Vec<u8>>;
}

/// Which runtime, and where it keeps the container's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// The runtime's program: a path, or a name to be found in `PATH`.
    pub(crate) binary: PathBuf,
    /// Its `--root`, with the namespace.
    pub(crate) root: PathBuf,
    /// Whether cgroups are made through systemd.
    pub(crate) systemd_cgroup: bool,
    /// The container's bundle.
    pub(crate) bundle: PathBuf,
    /// The container.
    pub(crate) id: String,
}

impl Target {
    /// Returns a command up to the verb, which logs to `log` in the bundle.
    pub(crate) fn command(&self, log: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root).arg("--log").arg(self.bundle.join(log));
        command.args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        // systemd's socket would change what the runtime waits for.
        command.env_remove("NOTIFY_SOCKET");
        command
    }
}

/// The runtime as a program.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) target: Target,
    pub(crate) reaper: Arc<Reaper>,
}

const LOG_NAME: &str = "log.json";

#[async_trait]
impl Runtime for Program {
    async fn run(&self, call: Call) -> Result<Vec<u8>> {
        let name = call.verb.name();
        let log = self.target.bundle.join(LOG_NAME);
        let log_start_bytes = fs::metadata(&log).map_or(0, |log| log.len());
        let mut output = match call.stdio {
            VerbStdio::Captured => Some(memory_file()?),
            VerbStdio::Container(_) => None,
        };
        let (pid, ended) = self.start(call.verb, call.stdio, output.as_ref())?;
        let running = call.group.map(|group| Tracked::new(group, pid));
        // The sender is dropped without a word only when the reaper itself has ended.
        let status = ended.await.map_or(u32::MAX, |exit| exit.status);
        drop(running);
        let printed = output.as_mut().map_or_else(|| Ok(Vec::new()), read_back)?;
        if status == 0 {
            return Ok(printed);
        }
        let message = last_error(&log, log_start_bytes)
            .or_else(|| {
                Some(String::from_utf8_lossy(&printed).trim().to_owned()).filter(|text| !text.is_empty())
            })
            .unwrap_or_else(|| format!("{} ended with status {status}", self.target.binary.display()));
        Err(ShimError::Runtime { verb: name, message })
    }
}

impl Program {
    fn start(
        &self,
        verb: Verb,
        stdio: VerbStdio,
        output: Option<&File>,
    ) -> Result<(i32, tokio::sync::oneshot::Receiver<crate::reaper::Exit>)> {
        let mut command = self.target.command(LOG_NAME);
        command.env(MARK, bundle::identity(&self.target.bundle)?);
        command.args(verb.arguments(&self.target.id));
        command.process_group(0).signal_on_parent_death(Signal::SIGKILL);
        command.stdin(Stdio::null());
        match (stdio, output) {
            (VerbStdio::Container([stdin, stdout, stderr]), _) => {
                let or_null = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
                command.stdin(or_null(stdin)).stdout(or_null(stdout)).stderr(or_null(stderr));
            }
            (VerbStdio::Captured, Some(output)) => {
                let duplicate = || output.try_clone().map_err(ShimError::io("duplicate a descriptor"));
                command.stdout(duplicate()?).stderr(duplicate()?);
            }
            (VerbStdio::Captured, None) => {}
        }
        if let Verb::Update { resources } = verb {
            let mut input = memory_file()?;
            io::Write::write_all(&mut input, &resources)
                .and_then(|()| input.rewind())
                .map_err(ShimError::io("write the resources"))?;
            command.stdin(input);
        }
        let binary = self.target.binary.display();
        self.reaper.spawn(&mut command).map_err(ShimError::io(format!("run {binary}")))
    }
}

/// Shows the process group of a verb, or of a worker in the place of one, while it lives.
pub(crate) struct Tracked(Arc<AtomicI32>);

impl Tracked {
    pub(crate) fn new(group: Arc<AtomicI32>, pid: i32) -> Self {
        group.store(pid, Ordering::Release);
        Self(group)
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

/// Returns a file that no process left behind by a verb can make anyone wait for, unlike a pipe.
pub(crate) fn memory_file() -> Result<File> {
    memfd::create(c"godwit-verb").map_err(io::Error::other).map_err(ShimError::io("make a file in memory"))
}

/// Returns what was written to `file`, which is shared with a child.
pub(crate) fn read_back(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.take(OUTPUT_MAX).read_to_end(&mut bytes))
        .map_err(ShimError::io("read back a verb's output"))?;
    Ok(bytes)
}

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// Returns the last error in the JSON lines of `log` from `start_bytes` on.
pub(crate) fn last_error(log: &Path, start_bytes: u64) -> Option<String> {
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(start_bytes)).ok()?;
    let mut text = String::new();
    file.take(LOG_MAX).read_to_string(&mut text).ok()?;
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
        .find(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(directory: &Path, script: &str) -> Program {
        let binary = directory.join("runtime");
        fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&binary, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let reaper = Arc::new(Reaper::default());
        reaper.run(crate::reaper::Scope::Claimed).unwrap();
        let target = Target {
            binary,
            root: "/run/none".into(),
            systemd_cgroup: false,
            bundle: directory.to_owned(),
            id: "web".to_owned(),
        };
        Program { target, reaper }
    }

    #[test]
    fn the_runtimes_own_options_come_before_the_verb() {
        let target = Target {
            binary: "/usr/bin/crun".into(),
            root: "/r/default".into(),
            systemd_cgroup: true,
            bundle: "/b".into(),
            id: "web".to_owned(),
        };
        let command = target.command(LOG_NAME);
        assert_eq!(command.get_program(), "/usr/bin/crun");
        let words: Vec<_> = command.get_args().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(words.join(" "), "--root /r/default --log /b/log.json --log-format json --systemd-cgroup");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_last_error_of_this_verb_is_the_message() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join(LOG_NAME);
        fs::write(&log, "{\"level\":\"error\",\"msg\":\"of an earlier verb\",\"time\":\"\"}\n").unwrap();
        let script =
            r#"echo '{"level":"error","msg":"no such file","time":""}' >>"$4"; echo noise >&2; exit 1"#;
        let error = program(directory.path(), script).run(Verb::Start.into()).await.unwrap_err();
        assert_eq!(error.to_string(), "OCI runtime start failed: no such file");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn without_a_log_line_what_was_printed_is_the_message() {
        let directory = tempfile::tempdir().unwrap();
        let error =
            program(directory.path(), "echo dead >&2; exit 2").run(Verb::Pause.into()).await.unwrap_err();
        assert_eq!(error.to_string(), "OCI runtime pause failed: dead");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn resources_come_by_stdin_and_output_is_returned() {
        let directory = tempfile::tempdir().unwrap();
        let verb = Verb::Update { resources: b"{\"pids\":1}".to_vec() };
        let printed = program(directory.path(), "cat").run(verb.into()).await.unwrap();
        assert_eq!(printed, b"{\"pids\":1}");
    }
}
