//! The target's worker: takes the link, the writable layer and the images, restores, and lets the container run
//! when the source commits.
//!
//! ```text
//! receive thread: link ──► rootfs, images ──► Applied, Complete, Commit, Abort … ─┐
//! restore thread: CRIU ──► Held, Running, Failed ────────────────────────────────┼─► this loop: protocol::Target
//! page receiver: streams ──► RoundComplete, Arrived; another main link ──► Rejoined ─┤
//! this loop's own: Recorded, Undone, Deadline ───────────────────────────────────┘        │ actions
//!                 link, record, restore thread, events for the shim ◄─────────────────────┘
//! ```
//! One thread steps the machine and executes its actions; the other two only report. Images are in memory that is
//! gone with the worker, however it ends ([`ImageDir`]).
//!
//! The worker decides nothing: when to record, resume, undo and tell is `godwit_protocol::target`.

mod criu;
mod images;
mod main_link;
mod memory;
mod receive;
mod restore;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use godwit_memory::PageSet;
use godwit_memory::fault::MemoryStore;
use godwit_protocol::fate::Decision;
use godwit_protocol::request::Images as Place;
use godwit_protocol::target::{Action, End, Event, Step, Target};
use godwit_protocol::wire::Message;
use godwit_protocol::wire::message::Resumed;
use godwit_protocol::{Failure, Mode, worker};

pub use self::criu::{CriuRestorer, abilities};
use self::images::Images;
use self::main_link::MainLink;
use self::memory::Memory;
use self::receive::Receiver as LinkReceiver;
use self::restore::Restoring;
use crate::Cause;
use crate::clock::Clock;
use crate::decision::{DecisionError, Record, WorkerAlive};
use crate::handover::{self, Handover, HandoverError};
use crate::image_dir::{self, ImageDir};
use crate::link::SendHalf;
use crate::pages::frames;
use crate::text::causes;
use crate::usage::Usage;
use crate::warden::Warden;

/// What the shim tells the worker.
#[derive(Debug, Clone)]
pub struct Order {
    /// The container's id.
    pub id: String,
    /// Unix socket of the agent that has the link.
    pub incoming: PathBuf,
    /// Where the container's root is mounted.
    pub rootfs: PathBuf,
}

/// The word that a held container waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Let it run.
    Resume,
    /// Remove it.
    GiveUp,
}

/// Restores one container.
pub trait Restorer: Clone + Send + 'static {
    /// Returns where CRIU works, and looks for the server of page faults.
    fn work_path(&self) -> &Path;

    /// Prepares what can be, and calls `begin`, which returns when all images are in the directory `images`, or false if
    /// they will not come. Then restores from them; with `lazy_pages` memory that is not in them comes from the
    /// server of page faults. `decide` is called when the container is held, complete
    /// and stopped; it may take its time. Returns the process id of its init, which runs.
    ///
    /// # Errors
    /// What went wrong, or that the container was given up; nothing of it is left then.
    fn restore(
        &self,
        images: &Path,
        lazy_pages: bool,
        begin: impl FnOnce() -> bool,
        decide: impl FnOnce() -> Word,
    ) -> Result<i32, Cause>;

    /// Returns the command of a process that watches over the container should this one die while pages are still to
    /// come (see [`crate::warden`]).
    fn warden(&self) -> Option<Command>;

    /// Returns the processes of the container that runs, by their ids on this host.
    ///
    /// # Errors
    /// If they cannot be listed.
    fn processes(&self) -> Result<Vec<i32>, Cause>;

    /// Removes the container after it was let run.
    ///
    /// # Errors
    /// What is left.
    fn remove(&self) -> Result<(), Cause>;
}

/// A migration that did not bring the container here.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The link was not handed over.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The hand-over is for another container.
    #[error("the agent hands over `{given}`, but `{id}` was to be restored")]
    WrongContainer {
        /// The container that the shim wants.
        id: String,
        /// The container that the agent has.
        given: String,
    },
    /// The migration's record cannot be used.
    #[error(transparent)]
    Record(#[from] DecisionError),
    /// The directory for images cannot be made.
    #[error("no directory in memory can be made for the images")]
    Images(#[source] io::Error),
    /// The memory of the container cannot be received.
    #[error("the container's memory cannot be received")]
    Memory(#[source] Cause),
    /// The process that is to watch over the container cannot be started.
    #[error("no warden can be started")]
    Warden(#[source] io::Error),
    /// A thread cannot be started.
    #[error("no thread can be started")]
    Thread(#[source] io::Error),
    /// The migration failed; the container is where the failure says.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Takes one container from its source and returns the process id of its init, which runs.
///
/// `report` is told that it runs, for the shim. Blocks for the whole migration.
///
/// # Errors
/// [`TargetError`]; nothing of the container is left here then, unless the failure's fate is unknown.
pub fn run(
    order: &Order,
    restorer: impl Restorer,
    report: impl FnMut(&worker::Event),
) -> Result<i32, TargetError> {
    let clock = Clock::start();
    let (link, handover, agent) = handover::take(&order.incoming)?;
    if handover.id != order.id {
        return Err(TargetError::WrongContainer { id: order.id.clone(), given: handover.id });
    }
    let record = Record::of(&handover.records, &handover.migration);
    let alive = record.work()?;
    let room_bytes = images_max(&handover).min(image_dir::room_bytes());
    let images = ImageDir::make(handover.images, room_bytes).map_err(TargetError::Images)?;
    let (main, send, receive, reading) = MainLink::over(link);
    let (tell, events) = channel();
    let memory = match handover.streams {
        Some(bulk_count) => {
            let tell = tell.clone();
            // A machine that has ended does not care.
            let tell = move |event| drop(tell.send(event));
            let store = store(&handover, &images, room_bytes)?;
            let warden = restorer.warden().map(Warden::start).transpose().map_err(TargetError::Warden)?;
            let received = Memory::receive(
                agent.streams(&handover)?,
                bulk_count,
                store,
                handover.images,
                warden,
                main.clone(),
                tell,
            );
            Some(received.map_err(TargetError::Memory)?)
        }
        None => None,
    };
    let gate = memory.as_ref().map(Memory::gate);
    let receiver =
        LinkReceiver::new(receive, order.rootfs.clone(), Images::into_directory(images.path()), gate);
    let teller = tell.clone();
    let body = move || {
        receiver.run(|event| teller.send(event).is_ok());
        drop(reading);
    };
    thread::Builder::new().name("receive".to_owned()).spawn(body).map_err(TargetError::Thread)?;
    let restoring = {
        let tell = tell.clone();
        let tell = move |event| drop(tell.send(event));
        Restoring::start(restorer.clone(), images.path().to_owned(), memory.is_some(), tell)
    };
    let mut worker = Worker {
        restorer,
        handover: &handover,
        record: &record,
        room_bytes,
        main,
        send,
        tell,
        restoring: Some(restoring.map_err(TargetError::Thread)?),
        memory,
        report,
        clock,
        _alive: alive,
    };
    let end = worker.work(&events);
    let main = worker.main.clone();
    drop(worker);
    match end {
        End::Resumed { pid } => Ok(pid),
        End::Failed(failure) => {
            main.take_leave();
            // The agent reads the end of this connection as the end of the worker.
            drop(agent);
            Err(failure.into())
        }
    }
}

/// Makes what pages wait in until they are in their tasks.
fn store(handover: &Handover, images: &ImageDir, room_bytes: u64) -> Result<MemoryStore, TargetError> {
    let store = match handover.images {
        Place::Cache => MemoryStore::new(room_bytes),
        Place::Disk => MemoryStore::on_storage(images.path(), room_bytes),
    };
    let store = store.map_err(|error| TargetError::Memory(error.into()))?;
    if (handover.mode, handover.images) == (Mode::Native, Place::Cache) {
        // All pages come in the freeze, and to find memory for a page takes longer than to receive it.
        store.take_ahead(handover.needs.memory_bytes);
    }
    Ok(store)
}

/// Bounds the memory that images may take: what the source says it needs, half as much again for state that is no
/// page, and a floor for containers with many small images.
fn images_max(handover: &Handover) -> u64 {
    let pages_bytes = handover.needs.memory_bytes;
    pages_bytes.saturating_add(pages_bytes / 2).saturating_add(STATE_BYTES_MAX)
}

struct Worker<'w, C, R> {
    restorer: C,
    handover: &'w Handover,
    record: &'w Record,
    room_bytes: u64,
    main: MainLink,
    /// The sending half of the main link.
    send: SendHalf,
    tell: Sender<Event>,
    restoring: Option<Restoring>,
    memory: Option<Memory>,
    report: R,
    clock: Clock,
    /// Tells whoever is asked about the fate that the answer is still to come.
    _alive: WorkerAlive,
}

impl<C: Restorer, R: FnMut(&worker::Event)> Worker<'_, C, R> {
    /// Steps the machine to its end.
    fn work(&mut self, events: &Receiver<Event>) -> End {
        let mut step = Target::begin(self.memory.is_some(), self.clock.now());
        loop {
            let Step { state, actions } = step;
            for action in actions {
                self.execute(action);
            }
            if let Some(end) = state.end() {
                return end.clone();
            }
            let event = next(events, state.deadline().map(|deadline| self.clock.until(deadline)));
            let (before, name) = (state.label(), event.label());
            step = state.step(event, self.clock.now());
            let after = step.state.label();
            if before != after {
                log::info!(
                    migration = self.handover.migration.as_str(), side = "target",
                    mode = self.handover.mode.name(), phase = step.state.phase().label();
                    "{before} --{name}--> {after}"
                );
            }
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::SendReady => self.say(&Message::Ready { room_bytes: self.room_bytes }),
            Action::SendApplied(pass) => self.say(&Message::RootfsApplied { pass }),
            Action::SendRoundReceived(round) => self.say(&Message::RoundReceived { round }),
            Action::SendReceived => self.say(&Message::Received),
            Action::Restore => self.restore(),
            Action::SendRestored => {
                self.say(&Message::Restored);
                // All memory is registered by now: what is here may be put in place before the tasks ask for it.
                if let Some(memory) = &self.memory {
                    memory.begin_working_set();
                }
            }
            Action::Record(decision) => self.tell(self.recorded(decision)),
            Action::Resume => {
                if let Some(memory) = &self.memory {
                    let restorer = self.restorer.clone();
                    memory.fill(move || restorer.processes());
                }
                if let Some(restoring) = &self.restoring {
                    restoring.resume();
                }
            }
            Action::ReportResumed { pid } => self.report_resumed(pid),
            Action::ReportFilled(memory) => {
                self.say(&Message::MemoryComplete(memory));
                (self.report)(&worker::Event::Filled);
            }
            Action::DropLink => {
                self.send.breaker().break_link();
                if let Some(memory) = &self.memory {
                    memory.stop();
                }
            }
            Action::SendLacking => self.rejoin(),
            Action::Destroy => self.destroy(),
            Action::Undo { tell } => self.undo(tell),
            Action::ReportFailed { failure } => {
                log::error!(
                    migration = self.handover.migration.as_str(), side = "target";
                    "{failure}"
                );
                (self.report)(&worker::Event::Failed { failure });
            }
        }
    }

    /// Takes a step of the record. The last one is tried again, for without it a container that has all of its memory
    /// would be taken for one that lacks some, and be ended.
    fn recorded(&self, decision: Decision) -> Event {
        let mut tries = if decision == Decision::Resumed { LAST_STEP_TRIES } else { 1 };
        loop {
            tries -= 1;
            match self.record.decide(decision) {
                Ok(decision) => return Event::Recorded(decision),
                Err(error) if tries == 0 => return Event::Failed { cause: causes(&error) },
                Err(error) => log::warn!("{}", causes(&error)),
            }
            thread::sleep(LAST_STEP_PAUSE);
        }
    }

    fn restore(&mut self) {
        if let Some(memory) = &self.memory
            && let Err(cause) = memory.serve(self.restorer.work_path())
        {
            return self.tell(Event::Failed { cause: causes(cause.as_ref()) });
        }
        if let Some(restoring) = &self.restoring {
            restoring.begin();
        }
    }

    /// Takes the new link, and says over it what is lacking. Without one it was taken already, for a word that came
    /// before this one.
    fn rejoin(&mut self) {
        let (Some(memory), Some((send, receive, reading))) = (&self.memory, self.main.take()) else { return };
        self.send = send;
        let tell = self.tell.clone();
        let body = move || {
            receive::until_the_end(receive, |event| drop(tell.send(event)));
            drop(reading);
        };
        if let Err(error) = thread::Builder::new().name("receive".to_owned()).spawn(body) {
            return self.tell(Event::LinkLost { cause: format!("no thread can be started: {error}") });
        }
        let lacking = memory.reopen();
        log::info!(
            migration = self.handover.migration.as_str(), side = "target";
            "the source is back: {} pages are lacking", lacking.values().map(PageSet::pages).sum::<u64>()
        );
        for (space, pages) in &lacking {
            for runs in frames(pages) {
                self.say(&Message::Lacking { space: *space, runs });
            }
        }
        self.say(&Message::LackingEnd);
    }

    fn report_resumed(&mut self, pid: i32) {
        let Usage { cpu_us, disk_bytes_written, .. } = Usage::so_far();
        self.say(&Message::Resumed(Resumed { pid, cpu_us, disk_bytes_written }));
        (self.report)(&worker::Event::Restored { pid });
    }

    /// Removes what was restored, and only then records and says that the source may go on.
    fn undo(&mut self, detail: Option<String>) {
        if let Some(memory) = &self.memory {
            memory.stop();
        }
        let restoring = self.restoring.take();
        let removed = restoring.map_or(Ok(()), |restoring| restoring.undo(&self.restorer));
        self.note_gone(&removed);
        let undone = removed.and_then(|()| match self.record.decide(Decision::Aborted) {
            Ok(Decision::Aborted) => Ok(()),
            Ok(decision) => Err(format!("the record says {decision:?}")),
            Err(error) => Err(causes(&error)),
        });
        match undone {
            Ok(()) => {
                if let Some(detail) = detail {
                    self.say(&Message::Abort { detail: &detail });
                }
                self.tell(Event::Undone);
            }
            Err(cause) => self.tell(Event::UndoFailed { cause }),
        }
    }

    /// Removes what runs here and lacks memory, and only then records that it is lost.
    fn destroy(&self) {
        let destroyed = self.restorer.remove().map_err(|cause| causes(cause.as_ref()));
        self.note_gone(&destroyed);
        let event = match destroyed {
            Ok(()) => {
                // Where that fails the agent does it, once this worker has ended.
                if let Err(error) = self.record.decide(Decision::Lost) {
                    log::warn!("{}", causes(&error));
                }
                Event::Undone
            }
            Err(cause) => Event::UndoFailed { cause },
        };
        self.tell(event);
    }

    fn note_gone(&self, removed: &Result<(), String>) {
        if let (Some(memory), Ok(())) = (&self.memory, removed) {
            memory.container_is_gone();
        }
    }

    /// Tells the source; a link that is lost is noticed by the receiving thread.
    fn say(&mut self, message: &Message<'_>) {
        if let Err(error) = self.send.send(message) {
            log::warn!("failed to tell the source: {error}");
        }
    }

    fn tell(&self, event: Event) {
        // The receiver lives as long as this worker.
        drop(self.tell.send(event));
    }
}

/// Waits for the next event; the deadline is one.
fn next(events: &Receiver<Event>, limit: Option<Duration>) -> Event {
    let received = match limit {
        Some(limit) => events.recv_timeout(limit),
        None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
    };
    received.unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Event::Deadline,
        RecvTimeoutError::Disconnected => unreachable!("the worker holds a sender of its own"),
    })
}

/// Memory for images that hold no pages: memory maps, descriptors, mounts, content of tmpfs mounts.
const STATE_BYTES_MAX: u64 = 512 << 20;

/// How often the last step of the record is tried, and how long after one another.
const LAST_STEP_TRIES: u32 = 10;
const LAST_STEP_PAUSE: Duration = Duration::from_millis(100);
