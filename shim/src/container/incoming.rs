//! A container that comes from another host: the worker that restores it, and then fills its memory.
//!
//! ```text
//! Start ─► worker ─progress…─► restored ─► Start is answered ─progress…─► filled ─► ends
//!             │ ends                                    │ ends badly        │ how it ends is of no interest
//!             ▼                                         ▼
//!        Start fails                     memory is missing: SIGKILL to all
//! ```
//! From `restored` on the worker is a companion of the container, and ends with it at the latest. The container's
//! init may be the worker's child until then, so that its status can be collected only when the worker has ended:
//! its end is noticed by a pidfd, and the worker ended for it.

use std::{
    os::fd::AsFd,
    path::Path,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use godwit_protocol::{Failure, Fate, Phase as Stage, Side};
use godwit_sys::{SysError, pidfd::PidFd};
use tokio::{net::unix::pipe, time::timeout};

use super::{
    Container,
    migration::{MigrationState, badly},
};
use crate::{
    bundle,
    error::{Result, ShimError},
    reaper::Exit,
    runtime::{Target, Tracked, VerbStdio},
    stdio::Prepared,
    verb::Verb,
    worker::{Event, Events, Incoming, TargetWorker, WorkerProcess},
};

/// How long a worker that has filled the memory gets to end by itself when the container does, and how long the last
/// words of one that has ended are waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long the end of an init may take to be collected once it is nobody else's child.
const COLLECT_LIMIT: Duration = Duration::from_secs(1);
/// How long a checkpoint waits for the memory to be here.
const WHOLE_LIMIT: Duration = Duration::from_secs(5);
const KILL: u32 = 9;
/// Status of an init whose own cannot be known.
const UNKNOWN_STATUS: u32 = 255;

impl Container {
    /// Makes the container from what a source sends, over the connection that comes by `socket`.
    pub(super) async fn receive(
        self: &Arc<Self>,
        socket: &Path,
        mut prepared: Prepared,
        pid_file: &Path,
    ) -> Result<()> {
        let stdio = prepared.take_theirs().map_or(VerbStdio::Captured, VerbStdio::Container);
        // Whatever runtime the container has, only godwit migrates.
        let target = Target {
            binary: self.shared.worker.clone(),
            ..self.settings.record.target(&self.bundle, &self.id)
        };
        let work = bundle::make_migration_work(&self.bundle)?;
        let order = Incoming { target: &target, socket, work: &work, pid_file, console: prepared.console() };
        let window = self.shared.reaper.window();
        let mut worker = TargetWorker::start(&order, stdio, &self.shared.reaper)?;
        self.lock().migration = Some(MigrationState::incoming());
        let tracked = Tracked::new(Arc::clone(&self.restoring), worker.process.pid);
        let restored = self.follow_restore(&mut worker).await;
        drop(tracked);
        self.stop_migrating();
        let pid = restored?;
        let streams = prepared.connect().await?;
        let init = Init::watch(pid)?;
        self.whole.send_replace(false);
        self.adopt_init(pid, streams, window.claim(pid));
        let companion = tokio::spawn(Arc::clone(self).accompany(worker, init));
        self.lock().companion = Some(companion);
        Ok(())
    }

    /// Takes in what the worker says until the container runs; returns the pid of its init.
    async fn follow_restore(&self, worker: &mut TargetWorker) -> Result<i32> {
        while let Some(event) = worker.events.next().await {
            match event {
                Event::Restored { pid } => return Ok(pid),
                event => self.note_incoming(event),
            }
        }
        let message = worker.process.failure().await.unwrap_or_else(|| "it restored nothing".to_owned());
        Err(ShimError::Runtime { verb: "migrate-target", message })
    }

    fn note_incoming(&self, event: Event) {
        match event {
            Event::Progress { snapshot } => self.take_in(snapshot),
            Event::Failed { failure } => self.conclude(badly(&failure)),
            Event::Filled => {
                self.whole.send_replace(true);
            }
            Event::Restored { .. } | Event::Committing | Event::Committed { .. } => {}
        }
    }

    /// Stays with the container and its worker until one of them has ended.
    async fn accompany(self: Arc<Self>, worker: TargetWorker, init: Init) {
        let TargetWorker { mut process, mut events } = worker;
        {
            let mut filling = pin!(self.follow_filling(&mut events));
            tokio::select! {
                () = init.ended() => {
                    self.end_companion(&mut process).await;
                    self.whole.send_replace(true);
                    return self.make_sure_of_exit(init.pid).await;
                }
                () = &mut filling => {}
                // What it said last is waited for, but not for others who may have the pipe as well.
                _ = process.wait() => {
                    timeout(LAST_WORDS, filling).await.ok();
                }
            }
        }
        let failure = process.failure().await;
        if let Some(why) = failure.filter(|_| !*self.whole.borrow() && !init.has_ended()) {
            self.kill_incomplete(&why).await;
        }
        self.whole.send_replace(true);
    }

    async fn follow_filling(&self, events: &mut Events) {
        while let Some(event) = events.next().await {
            self.note_incoming(event);
        }
    }

    /// Ends the worker of a container that has ended.
    async fn end_companion(&self, worker: &mut WorkerProcess) {
        if *self.whole.borrow() && timeout(LAST_WORDS, worker.wait()).await.is_ok() {
            return;
        }
        worker.kill();
        worker.wait().await;
    }

    /// Kills what would run on with holes in its memory.
    async fn kill_incomplete(&self, why: &str) {
        log::error!(
            "{}: killed, because its migration worker ended before all of its memory had arrived: {why}",
            self.id
        );
        let init = self.lock().init.pid;
        // At once; the kernel takes the others of its pid namespace along. One that has ended is what is wanted.
        PidFd::open(init).and_then(|process| process.send_signal(9)).ok();
        // Also those outside such a namespace, and frozen ones.
        if let Err(error) = self.run(Verb::Kill { signal: KILL, all: true }).await {
            log::debug!("{}: nothing left for the runtime to kill: {error}", self.id);
        }
        let cause = format!("the migration worker ended before all memory had arrived: {why}");
        let failure = Failure { side: Side::Target, phase: Stage::Committed, fate: Fate::Lost, cause };
        self.conclude(badly(&failure.into()));
    }

    /// Tells the end of an init whose status went to its worker, and with it.
    async fn make_sure_of_exit(self: &Arc<Self>, pid: i32) {
        let mut ended = self.lock().init.ended.subscribe();
        let told = timeout(COLLECT_LIMIT, ended.wait_for(Option::is_some)).await.is_ok();
        if !told && !self.lock().init_ended {
            log::error!("{}: the status of its init is not known", self.id);
            self.init_ended(Exit { pid, status: UNKNOWN_STATUS, at: SystemTime::now() }).await;
        }
    }

    /// Waits until all of the container's memory is here, for a while.
    pub(super) async fn be_whole(&self, verb: &'static str) -> Result<()> {
        let mut whole = self.whole.subscribe();
        match timeout(WHOLE_LIMIT, whole.wait_for(|whole| *whole)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(ShimError::Incomplete { verb, id: self.id.clone() }),
        }
    }

    /// Waits for the end of the worker of a container that has ended.
    pub(super) async fn lose_companion(&self) {
        let companion = self.lock().companion.take();
        if let Some(companion) = companion
            && let Err(error) = companion.await
        {
            log::error!("{}: its companion ended early: {error}", self.id);
        }
    }
}

/// An init that may be another process's child.
struct Init {
    pid: i32,
    /// Nothing when it was gone before it could be looked at.
    process: Option<(PidFd, pipe::Receiver)>,
}

impl Init {
    fn watch(pid: i32) -> Result<Self> {
        let process = match PidFd::open(pid) {
            Ok(process) => process,
            Err(SysError::NoProcess { .. }) => return Ok(Self { pid, process: None }),
            Err(error) => return Err(ShimError::io(format!("watch {pid}"))(std::io::Error::other(error))),
        };
        let watch = process.as_fd().try_clone_to_owned();
        // tokio's reader of pipes asks nothing of a descriptor, to wait for it, but poll(2).
        let watch = watch.and_then(pipe::Receiver::from_owned_fd_unchecked);
        let watch = watch.map_err(ShimError::io(format!("watch {pid}")))?;
        Ok(Self { pid, process: Some((process, watch)) })
    }

    async fn ended(&self) {
        if let Some((_, watch)) = &self.process {
            // Fails only when the runtime itself ends.
            watch.readable().await.ok();
        }
    }

    fn has_ended(&self) -> bool {
        let still_runs = |process: &PidFd| matches!(process.wait_exit(Duration::ZERO), Ok(false));
        !self.process.as_ref().is_some_and(|(process, _)| still_runs(process))
    }
}
