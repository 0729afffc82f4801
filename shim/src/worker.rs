//! The seam to migration workers: how one is started, told, and listened to.
//!
//! ```text
//! shim ──stdin: {"command":"cancel"|"release"}──► godwit migrate-source ──events fd: {"event":…} a line──► shim
//! ```
//! The worker is a child, in a process group of its own, but does not die with the shim: once COMMIT is sent
//! somebody must see it through. Its standard output and error go to `migrate.log` in the bundle.
//!
//! A worker has a CRIU, which outlives it for as long as it takes to let go of the container. It is in a process
//! group of its own and wipes its environment, so what tells that it has gone is a pipe ([`Lineage`]) that the
//! worker and all its descendants inherit without knowing: it ends when the last of them has.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process::{Command as Process, Stdio},
};

use godwit_protocol::{
    MigrationRequest,
    worker::{Command, Event},
};
use godwit_sys::spawn::SpawnExt;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::unix::pipe,
    sync::oneshot,
};

use crate::{
    bundle,
    error::{Result, ShimError},
    reaper::{Exit, Reaper},
    runtime::Target,
};

/// Environment variable that tells which bundle a worker was started for.
pub(crate) const MARK: &str = "GODWIT_WORKER_OF";

/// Longest line a worker may write, in bytes.
const LINE_MAX: u64 = 1 << 20;

const LOG: &str = "migrate.json";
const OUTPUT: &str = "migrate.log";

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

/// Tells when a worker and everything it has started have ended.
#[derive(Debug)]
pub(crate) struct Lineage(pipe::Receiver);

impl Lineage {
    fn new(reader: OwnedFd) -> Result<Self> {
        pipe::Receiver::from_owned_fd(reader).map(Self).map_err(ShimError::io("use a pipe"))
    }

    /// Waits until all have ended; may be asked again after that, and given up at any time.
    pub(crate) async fn gone(&mut self) {
        let mut nothing = [0; 64];
        // Nobody knows of the pipe, so nobody writes to it.
        while self.0.read(&mut nothing).await.is_ok_and(|length| length > 0) {}
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

fn output_file(bundle: &Path) -> Result<File> {
    let path = bundle.join(OUTPUT);
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(ShimError::io(format!("open {}", path.display())))
}

/// A worker's events, in order.
#[derive(Debug)]
pub(crate) struct Events {
    lines: BufReader<pipe::Receiver>,
}

impl Events {
    /// Reads from the pipe `reader`.
    ///
    /// # Errors
    /// [`ShimError::Io`] when it is none.
    pub(crate) fn new(reader: OwnedFd) -> Result<Self> {
        let receiver = pipe::Receiver::from_owned_fd(reader).map_err(ShimError::io("use a pipe"))?;
        Ok(Self { lines: BufReader::with_capacity(1024, receiver) })
    }

    /// Returns the next event; nothing when the worker has closed its end.
    ///
    /// May be dropped while it waits only if the events are not asked for again.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.lines).take(LINE_MAX).read_until(b'\n', &mut line).await;
            match read {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => {
                    log::error!("failed to read a worker's events: {error}");
                    return None;
                }
            }
            match serde_json::from_slice(&line) {
                Ok(event) => return Some(event),
                // A newer worker may say more than this shim knows.
                Err(error) => log::warn!("a worker said what is not understood: {error}"),
            }
        }
    }
}
