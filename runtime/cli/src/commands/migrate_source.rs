//! `godwit migrate-source`: the source's migration worker, which a shim starts when a client asks for a migration.
//!
//! ```text
//! containerd ◄── godwit_node::Source (record, blobs, clean-up) ──► godwit_engine::source ◄── this host's container
//! shim ──stdin: commands──►                                            └──events──► shim
//! ```

use std::io::{BufRead, stdin};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use clap::Args;
use godwit_container::checkpoint::preflight::blockers;
use godwit_container::{Store, Stored};
use godwit_criu::{Program, Session, Setup};
use godwit_engine::source::{self, Blob, CriuCheckpointer, Order, Origin};
use godwit_engine::{Cause, switchover_cost};
use godwit_node::Source;
use godwit_node::content::BlobReader;
use godwit_protocol::offer::Offer;
use godwit_protocol::source::End;
use godwit_protocol::worker::Command;
use godwit_protocol::{Failure, Fate, MigrationId, MigrationRequest, Phase, Side, worker};

use crate::commands::worker_events::WorkerEvents;
use crate::error::{CliError, Result};

/// Give a container to another host (called by the shim)
///
/// Standard input carries commands, one JSON object a line; its end cancels what can still be cancelled.
#[derive(Debug, Args)]
pub(crate) struct MigrateSource {
    /// Name of the container
    #[arg(long)]
    id: String,
    /// containerd's namespace
    #[arg(long, value_name = "NAME")]
    namespace: String,
    /// Where to, and how
    #[arg(long, value_name = "URI")]
    to: MigrationRequest,
    /// containerd's socket
    #[arg(long, value_name = "SOCKET")]
    containerd: PathBuf,
    /// Directory with config.json and the mounted root file system
    #[arg(long, value_name = "DIR")]
    bundle: PathBuf,
    /// Directory for logs
    #[arg(long, value_name = "DIR")]
    work_path: PathBuf,
    /// Number of an inherited descriptor to write events to, one JSON object a line
    #[arg(long, value_name = "N")]
    events_fd: RawFd,
    /// Finish a migration whose worker died after it had said that it commits
    #[arg(long)]
    resolve: bool,
}

impl MigrateSource {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let mut events = WorkerEvents::inherit(self.events_fd)?;
        let migration = self.to.migration.clone();
        let migration = migration.ok_or_else(|| CliError::Usage("--to has no migration=NAME".to_owned()))?;
        let order = Order {
            id: self.id.clone(),
            request: self.to.clone(),
            migration: migration.clone(),
            rootfs: self.bundle.join("rootfs"),
            fixed: switchover_cost::last(Path::new(COST_FILE)),
        };
        let (origin, container) = match self.open(store, migration) {
            Ok(opened) => opened,
            Err(cause) => {
                let failure = self.not_begun(cause.as_ref());
                events.tell(&worker::Event::Failed { failure: failure.clone() });
                return Err(failure.into());
            }
        };
        let work = if self.resolve { source::resolve } else { source::run };
        match work(order, origin, container, commands(), &mut |event: &worker::Event| events.tell(event)) {
            End::Migrated(moved) => {
                switchover_cost::note(Path::new(COST_FILE), &moved.downtime);
                Ok(ExitCode::SUCCESS)
            }
            End::Checked => Ok(ExitCode::SUCCESS),
            End::Failed(failure) => Err(failure.into()),
        }
    }

    fn open(
        &self,
        store: &Store,
        migration: MigrationId,
    ) -> std::result::Result<(Arc<dyn Origin>, CriuCheckpointer), Cause> {
        let stored = store.open(&self.id)?;
        let origin = NodeOrigin {
            source: Source::open(&self.containerd, &self.namespace, &self.id)?,
            request: self.to.clone(),
            migration,
            stored: stored.clone(),
        };
        let work_path = self.work_path.clone();
        let container = if self.resolve {
            CriuCheckpointer::adopt(stored, work_path)?
        } else {
            CriuCheckpointer::new(stored, work_path)?
        };
        Ok((Arc::new(origin), container))
    }

    /// Nothing has been touched; but a worker that was to resolve leaves the question open.
    fn not_begun(&self, cause: &(dyn std::error::Error + 'static)) -> Failure {
        let (phase, fate) = if self.resolve {
            (Phase::Committing, Fate::Unknown)
        } else {
            (Phase::Connecting, Fate::RunningOnSource)
        };
        Failure { side: Side::Source, phase, fate, cause: cause.to_string() }
    }
}

/// Where the cost of the last move's switchover is remembered until the next boot.
const COST_FILE: &str = "/run/godwit/switchover_us";

/// The container in this host's containerd.
#[derive(Debug)]
struct NodeOrigin {
    source: Source,
    request: MigrationRequest,
    migration: MigrationId,
    stored: Stored,
}

impl Origin for NodeOrigin {
    fn offer(&self) -> std::result::Result<Offer, Cause> {
        refuse_what_cannot_move(&self.stored)?;
        Ok(self.source.offer(&self.request, self.migration.clone())?)
    }

    fn open_blob(&self, digest: &str) -> std::result::Result<Box<dyn Blob + '_>, Cause> {
        Ok(Box::new(NodeBlob(self.source.containerd().open_blob(digest)?)))
    }

    fn clean_up(&self) -> std::result::Result<(), Cause> {
        Ok(self.source.clean_up(self.request.keep)?)
    }
}

/// Names everything about the container that would fail its dump, or would be lost by it.
///
/// A process that `exec` brought in is lost: it is no child of init, and CRIU takes init's tree alone.
fn refuse_what_cannot_move(stored: &Stored) -> std::result::Result<(), Cause> {
    let version = Session::start(&Program::find()?, Setup::new())?.version();
    let blockers = blockers(stored, version)?;
    if blockers.is_empty() {
        return Ok(());
    }
    let texts: Vec<String> = blockers.iter().map(ToString::to_string).collect();
    Err(texts.join("; ").into())
}

#[derive(Debug)]
struct NodeBlob<'a>(BlobReader<'a>);

impl Blob for NodeBlob<'_> {
    fn next_piece(&mut self) -> std::result::Result<Option<Vec<u8>>, Cause> {
        Ok(self.0.next_piece()?)
    }
}

/// Reads commands from standard input in a thread of its own; they end with it.
fn commands() -> Receiver<Command> {
    let (give, commands) = channel();
    thread::spawn(move || read_commands(&give));
    commands
}

fn read_commands(give: &Sender<Command>) {
    for line in stdin().lock().lines() {
        let Ok(line) = line else { return };
        match serde_json::from_str(&line) {
            Ok(command) if give.send(command).is_err() => return,
            Ok(_) => {}
            Err(error) => log::warn!("the shim's command `{line}` makes no sense: {error}"),
        }
    }
}
