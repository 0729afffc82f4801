//! A migration as the source's shim sees it: a worker that does it, and a client that is told.
//!
//! ```text
//! Checkpoint ─► lift the client's pause ─► worker ─progress…─► committing ─► committed ─► answer ─► release
//!                                            │                     │
//!                                            │ dies, fails         │ dies: the target is asked (--resolve)
//!                                            ▼                     ▼
//!                                      thaw, answer with the fate   finish, or thaw, or stay frozen
//! ```
//! Before `committing` the shim may always thaw. After it only the target's answer decides, so the container
//! stays as it is and the shim asks again and again. A committed worker waits for `release` so that the client
//! can fetch its report while the container is still there to ask about.

use std::{sync::Arc, time::Duration};

use godwit_protocol::{
    Failure, Fate, MigrationId, MigrationRequest, Phase as Stage, Side,
    worker::{Command, Snapshot},
};
use serde_json::{Map, Value, json};
use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};

use super::{
    Container, Phase,
    actor::{Reply, answer},
};
use crate::{
    bundle,
    error::{Result, ShimError},
    runtime::Target,
    worker::{Event, Failed, Order, Worker},
};

/// How long a client has to fetch its report.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
const ASK_AGAIN_MIN: Duration = Duration::from_secs(1);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(30);

/// What is known of a container's latest migration.
#[derive(Debug)]
pub(crate) struct MigrationState {
    /// A [`Snapshot`], as the worker wrote it.
    snapshot: Option<Map<String, Value>>,
    running: bool,
    commands: Option<mpsc::UnboundedSender<Command>>,
    release: Arc<Notify>,
}

impl MigrationState {
    fn outgoing(snapshot: Map<String, Value>, commands: mpsc::UnboundedSender<Command>) -> Self {
        Self { snapshot: Some(snapshot), running: true, commands: Some(commands), release: Arc::default() }
    }

    pub(super) fn incoming() -> Self {
        Self { snapshot: None, running: true, commands: None, release: Arc::default() }
    }

    /// Tells whether the migration has not ended.
    pub(super) fn is_running(&self) -> bool {
        self.running
    }
}

/// How a worker ended.
#[derive(Debug)]
enum Outcome {
    /// With its report.
    Committed(Value),
    Failed(Failed),
    /// Without a word about it.
    Died {
        status: u32,
    },
}

impl Container {
    /// Tells how far the latest migration is, as JSON. One that ended well is released by that.
    pub(crate) fn migration_status(&self) -> Result<String> {
        let never = || ShimError::NeverMigrated { id: self.id.clone() };
        let state = self.lock();
        let migration = state.migration.as_ref().ok_or_else(never)?;
        let snapshot = migration.snapshot.as_ref().ok_or_else(never)?;
        let json = serde_json::to_string(snapshot)
            .map_err(|source| ShimError::BadJson { what: "the migration's snapshot", source })?;
        if snapshot.contains_key(ENDED) {
            migration.release.notify_one();
        }
        Ok(json)
    }

    /// Asks the migration in progress to give up.
    pub(crate) fn cancel_migration(&self) -> Result<()> {
        let state = self.lock();
        let migration =
            state.migration.as_ref().ok_or_else(|| ShimError::NeverMigrated { id: self.id.clone() })?;
        let told = match &migration.commands {
            Some(commands) if migration.running => commands.send(Command::Cancel).is_ok(),
            _ => false,
        };
        if told { Ok(()) } else { Err(ShimError::NotMigrating { id: self.id.clone() }) }
    }

    /// Lets a committed worker remove the source: the client has gone on.
    pub(super) fn release_migration(&self) {
        if let Some(migration) = &self.lock().migration {
            migration.release.notify_one();
        }
    }

    /// Migrates the container; answers `reply` as soon as it is known where it runs.
    pub(super) async fn migrate(self: &Arc<Self>, mut request: MigrationRequest, reply: Reply<()>) {
        let (commands, told) = mpsc::unbounded_channel();
        if let Err(error) = self.begin(&mut request, commands).await {
            return answer(reply, Err(error));
        }
        let (outcome, worker) = self.attempt(&request, told).await;
        match outcome {
            Outcome::Committed(report) => {
                // The note stays, so that `delete`, which the worker's own clean-up sets off, leaves it alone.
                self.conclude(well(&report));
                answer(reply, Ok(()));
                if let Some(worker) = worker {
                    tokio::spawn(Arc::clone(self).see_off(worker));
                }
            }
            Outcome::Failed(failure) => {
                let failure = self.make_sure_it_runs(failure).await;
                self.give_up(failure, request, worker, reply);
            }
            Outcome::Died { .. } => unreachable!("`attempt` makes a failure of it"),
        }
    }

    /// Tells the client what went wrong, and goes on finding out or mending where that is left to do.
    fn give_up(
        self: &Arc<Self>,
        failure: Failed,
        request: MigrationRequest,
        worker: Option<Worker>,
        reply: Reply<()>,
    ) {
        let ended = badly(&failure);
        if failure.known.fate != Fate::Unknown {
            bundle::forget_committing(&self.bundle);
            self.conclude(ended);
            return answer(reply, Err(failure.known.into()));
        }
        self.note(ENDED, ended);
        answer(reply, Err(failure.known.clone().into()));
        if bundle::is_committing(&self.bundle) {
            tokio::spawn(Arc::clone(self).ask_until_known(request));
        } else {
            tokio::spawn(Arc::clone(self).mend(failure, worker.map(|worker| worker.lineage)));
        }
    }

    /// Checks that the container can migrate, notes that it does, and lifts a pause.
    async fn begin(
        &self,
        request: &mut MigrationRequest,
        commands: mpsc::UnboundedSender<Command>,
    ) -> Result<()> {
        let migration = match request.migration.clone() {
            Some(migration) => migration,
            None => new_name()?,
        };
        request.migration = Some(migration.clone());
        self.be_whole("migrate").await?;
        let paused = {
            let mut state = self.lock();
            self.not_migrating(&state, "migrate")?;
            if !matches!(state.phase, Phase::Running | Phase::Paused) {
                let now = state.phase.name();
                return Err(ShimError::WrongState { verb: "migrate", state: now, what: "container" });
            }
            let snapshot = Snapshot {
                migration,
                id: self.id.clone(),
                mode: request.mode,
                phase: Stage::Connecting,
                elapsed_ms: 0,
                sent_bytes: 0,
                expected_bytes: 0,
                rate_bytes_per_s: 0,
                round: None,
                ended: None,
            };
            let snapshot = serde_json::to_value(snapshot).map(|snapshot| snapshot.as_object().cloned());
            let snapshot = snapshot.ok().flatten().unwrap_or_default();
            state.migration = Some(MigrationState::outgoing(snapshot, commands));
            state.phase == Phase::Paused
        };
        // ctr and nerdctl pause a task before they ask for its checkpoint, and resume it afterwards. A
        // migration wants it running meanwhile; a dry run leaves it alone.
        if paused && !request.dry_run {
            if let Err(error) = self.thaw().await {
                self.lock().migration = None;
                return Err(error);
            }
            self.lock().resume_owed = true;
        }
        Ok(())
    }

    /// Runs a worker; if it dies, finds out or makes sure where the container is.
    async fn attempt(
        &self,
        request: &MigrationRequest,
        mut told: mpsc::UnboundedReceiver<Command>,
    ) -> (Outcome, Option<Worker>) {
        let mut worker = match self.start_worker(request, false) {
            Ok(worker) => worker,
            Err(error) => {
                let cause = error.to_string();
                return (Outcome::Failed(self.failure(Fate::RunningOnSource, cause)), None);
            }
        };
        let outcome = self.follow(&mut worker, &mut told).await;
        let Outcome::Died { status } = outcome else { return (outcome, Some(worker)) };
        let cause = format!(
            "the migration worker ended with status {status}; its log is {}",
            self.bundle.join("migrate.log").display()
        );
        let let_go = self.wait_until_let_go(&mut worker.lineage).await;
        if bundle::is_committing(&self.bundle) {
            return self.ask_target(request, cause).await;
        }
        let failure = match let_go {
            Ok(()) => {
                self.resume_after_death().await;
                self.failure(self.fate_on_source(), cause)
            }
            Err(why) => self.failure(Fate::Unknown, format!("{cause}; {why}")),
        };
        (Outcome::Failed(failure), Some(worker))
    }

    fn start_worker(&self, request: &MigrationRequest, resolve: bool) -> Result<Worker> {
        // Whatever runtime the container has, only godwit migrates.
        let target = Target {
            binary: self.shared.worker.clone(),
            ..self.settings.record.target(&self.bundle, &self.id)
        };
        let work = bundle::make_migration_work(&self.bundle)?;
        let order = Order {
            target: &target,
            namespace: &self.shared.namespace,
            request,
            containerd: &self.shared.containerd,
            work: &work,
            resolve,
        };
        Worker::start(&order, &self.shared.reaper)
    }

    /// Takes in what the worker says, and passes on what it is told, until the outcome is known.
    async fn follow(&self, worker: &mut Worker, told: &mut mpsc::UnboundedReceiver<Command>) -> Outcome {
        loop {
            let event = {
                let mut next = std::pin::pin!(worker.events.next());
                loop {
                    tokio::select! {
                        event = &mut next => break event,
                        Some(command) = told.recv() => worker.commands.tell(command).await,
                    }
                }
            };
            match event {
                Some(Event::Progress { snapshot }) => self.take_in(snapshot),
                Some(Event::Committing) => {
                    self.note("phase", json!(Stage::Committing));
                    if let Err(error) = bundle::note_committing(&self.bundle) {
                        log::error!("{}: {error}", self.id);
                    }
                }
                Some(Event::Committed { report }) => return Outcome::Committed(report),
                Some(Event::Failed { failure }) => return Outcome::Failed(failure),
                Some(Event::Restored { .. } | Event::Filled) => {}
                None => {
                    let status = (&mut worker.ended).await.map_or(u32::MAX, |exit| exit.status);
                    return Outcome::Died { status };
                }
            }
        }
    }

    /// Asks the target once what it decided; the worker that did is left to clean up.
    async fn ask_target(&self, request: &MigrationRequest, cause: String) -> (Outcome, Option<Worker>) {
        let unknown = |cause| (Outcome::Failed(self.failure(Fate::Unknown, cause)), None);
        let mut worker = match self.start_worker(request, true) {
            Ok(worker) => worker,
            Err(error) => return unknown(format!("{cause}; {error}")),
        };
        let (_nobody, mut told) = mpsc::unbounded_channel();
        match self.follow(&mut worker, &mut told).await {
            Outcome::Died { .. } => unknown(cause),
            known => (known, Some(worker)),
        }
    }

    /// Asks the target until it answers; the container stays frozen meanwhile.
    async fn ask_until_known(self: Arc<Self>, request: MigrationRequest) {
        let mut pause = ASK_AGAIN_MIN;
        let (outcome, worker) = loop {
            sleep(pause).await;
            pause = (pause * 2).min(ASK_AGAIN_MAX);
            let cause = "the target does not say what it decided".to_owned();
            match self.ask_target(&request, cause).await {
                (Outcome::Failed(failure), _) if failure.known.fate == Fate::Unknown => {}
                known => break known,
            }
        };
        match outcome {
            Outcome::Committed(report) => {
                self.conclude(well(&report));
                if let Some(worker) = worker {
                    // The client was answered long ago.
                    self.release_migration();
                    self.see_off(worker).await;
                }
            }
            Outcome::Failed(failure) => {
                bundle::forget_committing(&self.bundle);
                let failure = self.make_sure_it_runs(failure).await;
                let ended = badly(&failure);
                if failure.known.fate == Fate::Unknown {
                    self.note(ENDED, ended);
                    self.mend(failure, None).await;
                } else {
                    self.conclude(ended);
                }
            }
            Outcome::Died { .. } => unreachable!("`ask_target` makes a failure of it"),
        }
    }

    /// Lets the worker remove the source once the client has its report, and waits for its end.
    async fn see_off(self: Arc<Self>, mut worker: Worker) {
        let release = self.lock().migration.as_ref().map(|migration| Arc::clone(&migration.release));
        if let Some(release) = release {
            timeout(RELEASE_LIMIT, release.notified()).await.ok();
        }
        worker.commands.tell(Command::Release).await;
        // Its pipes stay open until it has ended, so that nothing it still writes is an error to it.
        while worker.events.next().await.is_some() {}
        worker.ended.await.ok();
    }

    fn failure(&self, fate: Fate, cause: String) -> Failed {
        let state = self.lock();
        let snapshot = state.migration.as_ref().and_then(|migration| migration.snapshot.as_ref());
        let phase = snapshot.and_then(|snapshot| snapshot.get("phase"));
        let phase = phase.and_then(|phase| serde_json::from_value(phase.clone()).ok());
        Failure { side: Side::Source, phase: phase.unwrap_or(Stage::Connecting), fate, cause }.into()
    }

    /// Keeps what a worker says of its progress.
    pub(super) fn take_in(&self, snapshot: Map<String, Value>) {
        if let Some(migration) = &mut self.lock().migration {
            migration.snapshot = Some(snapshot);
        }
    }

    /// Changes one entry of the snapshot.
    fn note(&self, key: &str, value: Value) {
        let mut state = self.lock();
        if let Some(snapshot) = state.migration.as_mut().and_then(|migration| migration.snapshot.as_mut()) {
            snapshot.insert(key.to_owned(), value);
        }
    }

    /// Notes how the migration ended.
    pub(super) fn conclude(&self, ended: Value) {
        self.note(ENDED, ended);
        self.stop_migrating();
    }

    /// Notes that there is no migration any more that a verb could disturb.
    pub(super) fn stop_migrating(&self) {
        if let Some(migration) = &mut self.lock().migration {
            migration.running = false;
            migration.commands = None;
        }
    }
}

/// Key of a snapshot's [`godwit_protocol::worker::Ended`].
const ENDED: &str = "ended";

fn well(report: &Value) -> Value {
    json!({"end": "well", "report": report})
}

pub(super) fn badly(failure: &Failed) -> Value {
    json!({"end": "badly", "failure": failure})
}

/// Returns a name that no other migration has.
fn new_name() -> Result<MigrationId> {
    const SOURCE: &str = "/proc/sys/kernel/random/uuid";
    let name = std::fs::read_to_string(SOURCE).map_err(ShimError::io(format!("read {SOURCE}")))?;
    Ok(MigrationId::try_from(name.trim().to_owned())?)
}
