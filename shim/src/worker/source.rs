//! The worker of a migration's source: it gives the container away.
//!
//! It does not die with the shim: once COMMIT is sent somebody must see it through.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process::{Command as Process, Stdio},
};

use godwit_protocol::{MigrationRequest, worker::Command};
use godwit_sys::spawn::SpawnExt;
use tokio::{io::AsyncWriteExt, net::unix::pipe, sync::oneshot};

use super::{Events, LOG, Lineage, MARK, output_file};
use crate::{
    bundle,
    error::{Result, ShimError},
    reaper::{Exit, Reaper},
    runtime::Target,
};

/// What a source worker has to know.
#[derive(Debug)]
pub(crate) struct Order<'a> {
    /// The worker's program, and where the container's state is.
    pub(crate) target: &'a Target,
    pub(crate) namespace: &'a str,
    pub(crate) request: &'a MigrationRequest,
    pub(crate) containerd: &'a str,
    pub(crate) work: &'a Path,
    /// Ask the target what became of a migration whose worker died, instead of migrating.
    pub(crate) resolve: bool,
}

/// A running source worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) ended: oneshot::Receiver<Exit>,
    pub(crate) events: Events,
    pub(crate) commands: Commands,
    pub(crate) lineage: Lineage,
}

/// Where a worker is told what to do.
#[derive(Debug)]
pub(crate) struct Commands(pipe::Sender);

impl Worker {
    /// Starts a worker.
    ///
    /// # Errors
    /// [`ShimError::Io`].
    pub(crate) fn start(order: &Order<'_>, reaper: &Reaper) -> Result<Self> {
        let target = order.target;
        let new_pipe = || io::pipe().map_err(ShimError::io("make a pipe"));
        let (events, events_writer) = new_pipe()?;
        let (commands_reader, commands) = new_pipe()?;
        let (lineage, lineage_writer) = new_pipe()?;
        let output = output_file(&target.bundle)?;
        let mut command = target.command(LOG);
        command.env(MARK, bundle::identity(&target.bundle)?).process_group(0);
        let number = command.inherit_fd(events_writer.into());
        command.inherit_fd(lineage_writer.into());
        arguments(&mut command, order, number);
        let duplicate = output.try_clone().map_err(ShimError::io("duplicate a descriptor"))?;
        command.stdin(Stdio::from(OwnedFd::from(commands_reader))).stdout(output).stderr(duplicate);
        let binary = target.binary.display();
        let (_, ended) = reaper.spawn(&mut command).map_err(ShimError::io(format!("run {binary}")))?;
        // With it go the shim's own copies of the pipes' writing ends.
        drop(command);
        let commands = pipe::Sender::from_owned_fd(commands.into()).map_err(ShimError::io("use a pipe"))?;
        let (events, lineage) = (Events::new(events.into())?, Lineage::new(lineage.into())?);
        Ok(Self { ended, events, commands: Commands(commands), lineage })
    }
}

impl Commands {
    /// Tells the worker something; one that has ended is past hearing.
    pub(crate) async fn tell(&mut self, command: Command) {
        let line = serde_json::to_string(&command).map(|line| line + "\n").unwrap_or_default();
        if let Err(error) = self.0.write_all(line.as_bytes()).await {
            log::debug!("a worker does not listen: {error}");
        }
    }
}

fn arguments(command: &mut Process, order: &Order<'_>, events: i32) {
    command.args(["migrate-source", "--id", &order.target.id, "--namespace", order.namespace]);
    command.args(["--to", &order.request.to_string(), "--containerd", order.containerd]);
    command.arg("--bundle").arg(&order.target.bundle).arg("--work-path").arg(order.work);
    command.args(["--events-fd", &events.to_string()]);
    if order.resolve {
        command.arg("--resolve");
    }
}
