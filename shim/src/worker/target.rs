//! The worker of a migration's target: it restores the container, and goes on to fill its memory.
//!
//! It dies with the shim, as the runtime's verbs do: without a shim the container is lost in any case.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use godwit_sys::spawn::SpawnExt;
use nix::sys::signal::Signal;
use tokio::sync::oneshot;

use super::{Events, LOG, output_file};
use crate::{
    bundle,
    error::{Result, ShimError},
    reaper::{Exit, Reaper},
    runtime::{self, Target, VerbStdio},
};

/// What a target worker has to know.
#[derive(Debug)]
pub(crate) struct Incoming<'a> {
    /// The worker's program, and where the container's state is to be.
    pub(crate) target: &'a Target,
    /// Socket on which the agent hands over the source's connection.
    pub(crate) socket: &'a Path,
    pub(crate) work: &'a Path,
    pub(crate) pid_file: &'a Path,
    pub(crate) console: Option<PathBuf>,
}

/// A running target worker.
#[derive(Debug)]
pub(crate) struct TargetWorker {
    pub(crate) process: WorkerProcess,
    pub(crate) events: Events,
}

/// Its process, which is ended when dropped.
#[derive(Debug)]
pub(crate) struct WorkerProcess {
    /// Its pid, which is its process group's.
    pub(crate) pid: i32,
    ended: oneshot::Receiver<Exit>,
    log: PathBuf,
    log_start_bytes: u64,
    /// Known once it has ended.
    status: Option<u32>,
}

impl TargetWorker {
    /// Starts a worker with the container's stdio.
    ///
    /// # Errors
    /// [`ShimError::Io`].
    pub(crate) fn start(order: &Incoming<'_>, stdio: VerbStdio, reaper: &Reaper) -> Result<Self> {
        let target = order.target;
        let (events, events_writer) = io::pipe().map_err(ShimError::io("make a pipe"))?;
        let log = target.bundle.join(LOG);
        let log_start_bytes = fs::metadata(&log).map_or(0, |log| log.len());
        let mut command = target.command(LOG);
        command.env(runtime::MARK, bundle::identity(&target.bundle)?);
        command.process_group(0).signal_on_parent_death(Signal::SIGKILL);
        arguments(&mut command, order, events_writer.as_raw_fd());
        command.inherit_fd(events_writer.into());
        set_stdio(&mut command, stdio, || output_file(&target.bundle))?;
        let binary = target.binary.display();
        let (pid, ended) = reaper.spawn(&mut command).map_err(ShimError::io(format!("run {binary}")))?;
        // With it goes the shim's own copy of the events' writing end, and of the container's stdio.
        drop(command);
        let process = WorkerProcess { pid, ended, log, log_start_bytes, status: None };
        Ok(Self { process, events: Events::new(events.into())? })
    }
}

impl WorkerProcess {
    /// Waits for its end; returns why it failed, if it did.
    pub(crate) async fn failure(&mut self) -> Option<String> {
        let status = self.wait().await;
        (status != 0).then(|| {
            runtime::last_error(&self.log, self.log_start_bytes).unwrap_or_else(|| {
                format!("the migration worker ended with status {status}; its log is {}", self.log.display())
            })
        })
    }

    /// Waits for its end; returns its exit code, or 128 + the signal.
    pub(crate) async fn wait(&mut self) -> u32 {
        if let Some(status) = self.status {
            return status;
        }
        // The sender is dropped without a word only when the reaper itself has ended.
        let status = (&mut self.ended).await.map_or(u32::MAX, |exit| exit.status);
        *self.status.insert(status)
    }

    /// Ends it, with what it has started, at once.
    pub(crate) fn kill(&mut self) {
        if let Ok(exit) = self.ended.try_recv() {
            self.status = Some(exit.status);
        }
        // Its pid may be another's once it was collected.
        if self.status.is_none()
            && let Err(error) = godwit_sys::process::kill_group(self.pid)
        {
            log::error!("failed to end migration worker {}: {error}", self.pid);
        }
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn arguments(command: &mut Command, order: &Incoming<'_>, events: i32) {
    command.args(["migrate-target", "--id", &order.target.id]);
    command.arg("--incoming").arg(order.socket).arg("--bundle").arg(&order.target.bundle);
    command.arg("--work-path").arg(order.work).arg("--pid-file").arg(order.pid_file);
    if let Some(console) = &order.console {
        command.arg("--console-socket").arg(console);
    }
    command.args(["--events-fd", &events.to_string()]);
}

fn set_stdio(command: &mut Command, stdio: VerbStdio, output: impl Fn() -> Result<File>) -> Result<()> {
    command.stdin(Stdio::null());
    match stdio {
        VerbStdio::Container([stdin, stdout, stderr]) => {
            let or_null = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
            command.stdin(or_null(stdin)).stdout(or_null(stdout)).stderr(or_null(stderr));
        }
        VerbStdio::Captured => {
            command.stdout(output()?).stderr(output()?);
        }
    }
    Ok(())
}
