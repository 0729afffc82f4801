//! One migration, from its offer to the worker that has the link, and to its end.
//!
//! Until the hand-over every failure is told to the source with a `Reject`, and dropping the [`Arrival`] takes back
//! what was made. From the hand-over on the worker talks to the source, and the migration's record says how the
//! arrival is settled.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use godwit_engine::{
    decision::Record,
    handover::{self, Handover},
    link::{Link, LinkError},
};
use godwit_protocol::{
    fate::{Decision, FateAnswer},
    offer::{Accept, Offer},
    plan::Plan,
    wire::{Message, Reject, RejectCode, message::Step},
};

use super::{
    Claim, Name, SOCKET_SUFFIX, Seat, blobs,
    connection::{ConnectionError, decline},
    streams::Entry,
};
use crate::{
    Containerd, NodeError,
    target::{self, Arrival, IncomingTask, Observed},
};

/// Why a migration ends before a worker has it.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The link is gone, or the source broke a rule.
    Link(LinkError),
    /// The source has to be told this.
    Reject(Reject),
    /// The source gave up, for this reason.
    Aborted(String),
}

impl From<LinkError> for Refusal {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<NodeError> for Refusal {
    fn from(error: NodeError) -> Self {
        let code = match error {
            NodeError::Malformed { .. } | NodeError::BadName { .. } | NodeError::TooLarge { .. } => {
                RejectCode::Protocol
            }
            _ => RejectCode::Containerd,
        };
        Self::Reject(Reject::new(code, error.to_string()))
    }
}

impl Refusal {
    pub(super) fn reject(code: RejectCode, detail: impl Into<String>) -> Self {
        Self::Reject(Reject::new(code, detail))
    }
}

/// Serves an offer to its end.
///
/// # Errors
/// [`ConnectionError`] to be logged, once; the peer has been told.
pub(super) fn serve(seat: &Seat, mut link: Link, offer: Offer) -> Result<(), ConnectionError> {
    let (migration, id) = (offer.migration.clone(), offer.container.id.clone());
    log::info!(migration:%, container = id, source = offer.source.host; "container {id} is offered");
    match arrive(seat, &mut link, offer) {
        Ok(None) => {
            log::info!(migration:%, container = id; "container {id} could come: only a check was asked for");
            Ok(())
        }
        Ok(Some(meeting)) => meeting.finish(seat, link),
        Err(Refusal::Link(error)) => {
            decline(&mut link, &Reject::new(RejectCode::Protocol, error.to_string()));
            Err(error.into())
        }
        Err(Refusal::Reject(reject)) => {
            decline(&mut link, &reject);
            Err(ConnectionError::Declined(reject))
        }
        Err(Refusal::Aborted(detail)) => {
            Err(ConnectionError::Failed(format!("the source gave up: {detail}")))
        }
    }
}

/// An incoming task whose worker has come to fetch the link.
struct Meeting {
    _held: (Claim, Name),
    _socket: IncomingSocket,
    arrival: Arrival,
    record: Record,
    worker: UnixStream,
    /// Bulk streams that carry the pages, if CRIU's images do not.
    streams: Option<u8>,
    started: Receiver<Result<u32, NodeError>>,
}

/// Takes everything in that comes before the worker; `None` if only the preflight was wanted.
fn arrive(seat: &Seat, link: &mut Link, offer: Offer) -> Result<Option<Meeting>, Refusal> {
    let claim = Claim::take(seat, &offer.migration).ok_or_else(|| known(&offer))?;
    let (namespace, id) = (&offer.container.namespace, &offer.container.id);
    let name = Name::take(&seat.shared, namespace, id, NAME_MAX).ok_or_else(|| busy(&offer))?;
    let containerd = Containerd::connect(seat.containerd(), &offer.container.namespace)?;
    let here = target::observe(&containerd, &offer)?;
    target::judge(&offer, &here).map_err(Refusal::Reject)?;
    let Observed { facts, missing, user_namespace, .. } = here;
    let abilities = godwit_engine::target::abilities(user_namespace);
    let streams = Plan::is_ours(offer.mode, offer.images, &abilities).then_some(offer.streams);
    if offer.dry_run {
        link.send(&Message::Accept(Box::new(Accept { missing, target: facts, abilities })))?;
        return Ok(None);
    }
    let record = Record::of(seat.directory(), &offer.migration);
    if record.begin().map_err(NodeError::from)? != Decision::Undecided {
        return Err(known(&offer));
    }
    let wanted = blobs::wanted(&offer, &missing);
    link.send(&Message::Accept(Box::new(Accept { missing, target: facts, abilities })))?;

    let meeting = bring_to_worker(seat, link, Arrival::begin(containerd, offer, seat.directory())?, wanted);
    match meeting {
        Ok((socket, arrival, worker, started)) => {
            let held = (claim, name);
            Ok(Some(Meeting { _held: held, _socket: socket, arrival, record, worker, streams, started }))
        }
        Err(refusal) => {
            // No worker had the link, so there is nothing to ask about.
            if let Err(error) = record.remove() {
                log::warn!("{error}");
            }
            Err(refusal)
        }
    }
}

type Met = (IncomingSocket, Arrival, UnixStream, Receiver<Result<u32, NodeError>>);

/// Takes the blobs, makes everything, and waits for the task's worker.
fn bring_to_worker(
    seat: &Seat,
    link: &mut Link,
    mut arrival: Arrival,
    wanted: BTreeMap<String, u64>,
) -> Result<Met, Refusal> {
    link.set_silence_max(Some(BLOB_SILENCE_MAX))?;
    blobs::receive(link, &arrival, wanted)?;
    link.set_silence_max(None)?;
    let socket = IncomingSocket::bind(seat.directory(), &arrival)?;
    let task = make(link, &mut arrival, &socket.path)?;
    let started = start(task);
    let worker = meet(link, &socket, &started)?;
    Ok((socket, arrival, worker, started))
}

fn known(offer: &Offer) -> Refusal {
    Refusal::reject(
        RejectCode::MigrationKnown,
        format!("migration {} has been here before: every attempt needs a name of its own", offer.migration),
    )
}

fn busy(offer: &Offer) -> Refusal {
    Refusal::reject(
        RejectCode::NameTaken,
        format!(
            "container `{}` is on its way in there, or what is left of an earlier migration of it is being taken \
             back: try again",
            offer.container.id
        ),
    )
}

/// Makes image, snapshot, container and task, and tells the source every second that it is at it.
fn make(link: &mut Link, arrival: &mut Arrival, socket: &Path) -> Result<IncomingTask, Refusal> {
    let step = Mutex::new(Step::Image);
    let (sender, made) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| drop(sender.send(make_all(arrival, socket, &step))));
        loop {
            let at = *step.lock().unwrap_or_else(PoisonError::into_inner);
            link.send(&Message::Preparing(at))?;
            match made.recv_timeout(SIGN_OF_LIFE) {
                Ok(made) => return made.map_err(Refusal::from),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Refusal::reject(RejectCode::Containerd, "the agent failed: see its log"));
                }
            }
        }
    })
}

fn make_all(arrival: &mut Arrival, socket: &Path, step: &Mutex<Step>) -> Result<IncomingTask, NodeError> {
    let at = |next| *step.lock().unwrap_or_else(PoisonError::into_inner) = next;
    arrival.register_image()?;
    at(Step::Snapshot);
    arrival.make_snapshot()?;
    at(Step::Container);
    arrival.create_container()?;
    at(Step::Task);
    arrival.create_task(socket)
}

/// Starts the incoming task, which lasts as long as the migration.
fn start(task: IncomingTask) -> Receiver<Result<u32, NodeError>> {
    let (sender, started) = mpsc::channel();
    thread::spawn(move || drop(sender.send(task.start())));
    started
}

/// Waits for the task's worker to come and fetch the link.
fn meet(
    link: &mut Link,
    socket: &IncomingSocket,
    started: &Receiver<Result<u32, NodeError>>,
) -> Result<UnixStream, Refusal> {
    let deadline = Instant::now() + WORKER_MAX;
    let mut sign_of_life = Instant::now();
    loop {
        if let Some(worker) = socket.accept()? {
            return Ok(worker);
        }
        match started.try_recv() {
            Ok(Err(error)) => {
                return Err(Refusal::reject(
                    RejectCode::Containerd,
                    format!("{error}; is the target's shim for this runtime godwit's?"),
                ));
            }
            Ok(Ok(_)) | Err(TryRecvError::Disconnected) => {
                return Err(Refusal::reject(
                    RejectCode::Unfit,
                    "the target's shim started the task without its migration: it is not godwit's",
                ));
            }
            Err(TryRecvError::Empty) if Instant::now() > deadline => {
                return Err(Refusal::reject(
                    RejectCode::Containerd,
                    format!("the target's shim did not begin within {} s", WORKER_MAX.as_secs()),
                ));
            }
            Err(TryRecvError::Empty) => {}
        }
        if sign_of_life.elapsed() > SIGN_OF_LIFE {
            sign_of_life = Instant::now();
            link.send(&Message::Preparing(Step::Task))?;
        }
        thread::sleep(WORKER_POLL);
    }
}

impl Meeting {
    /// Gives the link away, waits for the task and settles the arrival as the record says.
    fn finish(self, seat: &Seat, link: Link) -> Result<(), ConnectionError> {
        let offer = self.arrival.offer();
        let (migration, id) = (offer.migration.clone(), offer.container.id.clone());
        let handover = Handover {
            migration: migration.clone(),
            id: id.clone(),
            mode: offer.mode,
            needs: offer.needs,
            images: offer.images,
            streams: self.streams,
            records: seat.directory().to_owned(),
            link: link.state(),
        };
        seat.reclaim();
        let give = |worker: &UnixStream| handover::give(worker, link, handover);
        let (entry, given) = Entry::enter(seat, &migration, self.worker, give);
        if let Err(error) = &given {
            log::warn!(migration:%; "{error}");
        }
        let started = self.started.recv();
        let fate = self.arrival.settle(&self.record);
        // Entered until here: streams, and another main link, join as long as pages are lacking.
        drop(entry);
        match (fate, started) {
            (Ok(FateAnswer::Lost), _) => Err(ConnectionError::Failed(format!(
                "container {id} was ended here, where it had begun to run: not all of its memory came"
            ))),
            (Ok(fate), started) if fate.has_run() => {
                if let Ok(Err(error)) = started {
                    log::warn!(migration:%; "the container runs, but containerd was not told so well: {error}");
                }
                log::info!(migration:%, container = id; "container {id} runs here");
                Ok(())
            }
            (Ok(_), Ok(Err(error))) => Err(ConnectionError::Failed(error.to_string())),
            (Ok(_), _) => Err(ConnectionError::Failed("the worker ended without a decision".to_owned())),
            (Err(error), _) => Err(ConnectionError::Failed(error.to_string())),
        }
    }
}

/// The socket on which a task's worker asks for its link; removed on drop.
struct IncomingSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl IncomingSocket {
    fn bind(directory: &Path, arrival: &Arrival) -> Result<Self, NodeError> {
        let path = directory.join(format!("{}.{SOCKET_SUFFIX}", arrival.offer().migration));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(NodeError::file("replace", &path)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(NodeError::file("listen at", &path))?;
        let socket = Self { path, listener };
        socket.listener.set_nonblocking(true).map_err(NodeError::file("listen at", &socket.path))?;
        Ok(socket)
    }

    fn accept(&self) -> Result<Option<UnixStream>, NodeError> {
        match self.listener.accept() {
            Ok((worker, _)) => {
                worker.set_nonblocking(false).map_err(NodeError::file("listen at", &self.path))?;
                Ok(Some(worker))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(NodeError::file("listen at", &self.path)(error)),
        }
    }
}

impl Drop for IncomingSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::debug!(path:% = self.path.display(); "cannot remove a socket: {error}");
        }
    }
}

/// Taking back a task that does not end at once takes so long, and the source waits longer.
const NAME_MAX: Duration = Duration::from_secs(60);

/// A source that reads a blob from a busy disk may pause between two frames.
const BLOB_SILENCE_MAX: Duration = Duration::from_secs(60);

const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// From the start of the task to its worker's connection.
const WORKER_MAX: Duration = Duration::from_secs(30);

const WORKER_POLL: Duration = Duration::from_millis(5);
