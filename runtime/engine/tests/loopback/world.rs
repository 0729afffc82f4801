//! The two sides, the agent and the wire between them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, io};

use godwit_engine::decision::{DecisionError, Record};
use godwit_engine::handover::{self, Handover};
use godwit_engine::source::{self, Blob, Origin};
use godwit_engine::{Cause, Link, target};
use godwit_protocol::failure::Fate;
use godwit_protocol::offer::{
    Accept, ContainerRecord, Descriptor, Image, Needs, NodeFacts, Offer, Runtime, Stdio, TypedBytes,
};
use godwit_protocol::plan::Abilities;
use godwit_protocol::source::End;
use godwit_protocol::wire::message::Step;
use godwit_protocol::wire::{Message, Reject, RejectCode};
use godwit_protocol::worker::{Command, Event};
use godwit_protocol::{Failure, MigrationRequest, Mode, Phase, Report, offer};

use crate::pretend::{DumpFailure, LAST_FILE, PretendedCheckpointer, Side, Tasks, pages};
use crate::restore::PretendedRestorer;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToTarget,
    ToSource,
}

/// What happens to one migration.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Plan {
    pub(crate) dry_run: bool,
    pub(crate) reject: Option<&'static str>,
    pub(crate) dump_fails: Option<DumpFailure>,
    /// Freezes that find something under way, before one does not.
    pub(crate) unsettled: u32,
    pub(crate) restore_fails: bool,
    pub(crate) cancel_at: Option<Phase>,
    /// The first connection is cut after this many bytes in this direction.
    pub(crate) cut: Option<(Direction, u64)>,
}

pub(crate) struct World {
    plan: Plan,
    directory: tempfile::TempDir,
    sides: (Side, Side),
    got: Arc<Mutex<Vec<u8>>>,
    events: Vec<Event>,
    cleaned_up: Arc<AtomicBool>,
    workers: Arc<Mutex<Vec<JoinHandle<()>>>>,
    port: u16,
    counts: Arc<[AtomicU64; 2]>,
}

impl World {
    pub(crate) fn new(plan: Plan) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["source", "target", "records"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        fs::write(directory.path().join("source/live"), "written before").unwrap();
        let sides = Side::pair([Tasks::Running, Tasks::Gone]);
        let got = Arc::default();
        let workers = Arc::default();
        let agent = Agent {
            plan,
            directory: directory.path().to_owned(),
            restorer: PretendedRestorer {
                tasks: sides.1.clone(),
                fails: plan.restore_fails,
                awaited: (plan.cancel_at == Some(Phase::Restoring)).then(|| sides.0.clone()),
                got: Arc::clone(&got),
            },
            workers: Arc::clone(&workers),
        };
        let counts = Arc::default();
        let port = proxy(agent.listen(), plan.cut, Arc::clone(&counts));
        let cleaned_up = Arc::default();
        Self { plan, directory, sides, got, events: Vec::new(), cleaned_up, workers, port, counts }
    }

    /// Returns the bytes that an undisturbed migration sends each way, to the target and to the source.
    pub(crate) fn measure() -> (u64, u64) {
        let mut world = Self::new(Plan::default());
        world.migrate();
        (world.counts[0].load(Ordering::Relaxed), world.counts[1].load(Ordering::Relaxed))
    }

    pub(crate) fn migrate(&mut self) -> End {
        let rootfs = self.directory.path().join("source");
        let order = source::Order {
            id: "web".to_owned(),
            request: MigrationRequest {
                dry_run: self.plan.dry_run,
                ..MigrationRequest::to_target(&format!("127.0.0.1:{}", self.port)).unwrap()
            },
            migration: "m".to_owned().try_into().unwrap(),
            rootfs: rootfs.clone(),
            fixed: Duration::ZERO,
        };
        let Plan { dump_fails, unsettled, .. } = self.plan;
        let container = PretendedCheckpointer::new(self.sides.0.clone(), rootfs, dump_fails, unsettled);
        let origin = PretendedOrigin { dry_run: self.plan.dry_run, cleaned_up: Arc::clone(&self.cleaned_up) };
        let (give, commands) = channel();
        let (plan, events) = (self.plan, &mut self.events);
        let tell = |event: &Event| {
            react(plan, event, &give);
            events.push(event.clone());
        };
        let end = source::run(order, Arc::new(origin), container, commands, tell);
        // What the target's worker still does belongs to the outcome.
        for worker in std::mem::take(&mut *self.workers.lock().unwrap()) {
            worker.join().unwrap();
        }
        end
    }

    pub(crate) fn fail(&mut self) -> Failure {
        match self.migrate() {
            End::Failed(failure) => failure,
            other => panic!("it did not fail: {other:?}"),
        }
    }

    /// Compares what the source says with how both sides are.
    pub(crate) fn check(&self, fate: Fate) {
        let expected = match fate {
            Fate::RunningOnSource => (Tasks::Running, Tasks::Gone),
            Fate::RunningOnTarget => (Tasks::Gone, Tasks::Running),
            Fate::Lost | Fate::Unknown => panic!("{fate} with an agent that answers: {:?}", self.plan),
        };
        assert_eq!(self.tasks(), expected, "{:?}: {fate}", self.plan);
        assert_eq!(self.cleaned_up(), fate == Fate::RunningOnTarget);
        if fate == Fate::RunningOnTarget {
            assert!(self.pages_match());
            assert_eq!(self.file_on_target("final"), LAST_FILE);
        }
    }

    pub(crate) fn tasks(&self) -> (Tasks, Tasks) {
        (self.sides.0.get(), self.sides.1.get())
    }

    pub(crate) fn file_on_target(&self, name: &str) -> Vec<u8> {
        fs::read(self.directory.path().join("target").join(name)).unwrap()
    }

    pub(crate) fn pages_match(&self) -> bool {
        *self.got.lock().unwrap() == pages()
    }

    pub(crate) fn page_bytes(&self) -> u64 {
        pages().len() as u64
    }

    pub(crate) fn cleaned_up(&self) -> bool {
        self.cleaned_up.load(Ordering::Relaxed)
    }

    pub(crate) fn events(&self) -> &[Event] {
        &self.events
    }

    pub(crate) fn report(&self) -> Option<&Report> {
        self.events.iter().find_map(|event| match event {
            Event::Committed { report } => Some(report.as_ref()),
            _ => None,
        })
    }
}

/// What a shim does when it hears its worker.
fn react(plan: Plan, event: &Event, give: &Sender<Command>) {
    match event {
        Event::Committed { .. } => give.send(Command::Release).unwrap(),
        Event::Progress { snapshot } if Some(snapshot.phase) == plan.cancel_at => {
            // The worker may have ended in the meantime.
            give.send(Command::Cancel).ok();
        }
        _ => {}
    }
}

/// The agent of the target, without containerd.
#[derive(Clone)]
struct Agent {
    plan: Plan,
    directory: PathBuf,
    restorer: PretendedRestorer,
    workers: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Agent {
    /// Serves connections until the test's process ends, and returns the port.
    fn listen(self) -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for socket in listener.incoming() {
                let agent = self.clone();
                // A connection that is cut is the end of it.
                thread::spawn(move || agent.serve(socket.unwrap()).ok());
            }
        });
        port
    }

    fn serve(&self, socket: TcpStream) -> Result<(), Cause> {
        let mut link = Link::accept(socket)?;
        let dry_run = match link.receive()? {
            Message::Offer(offer) => offer.dry_run,
            Message::FateQuery { migration } => {
                let record = Record::of(&self.directory.join("records"), &migration);
                let answer = record.ask(|| {
                    self.restorer.tasks.set(Tasks::Gone);
                    Ok::<(), DecisionError>(())
                })?;
                return Ok(link.send(&Message::FateAnswer(answer))?);
            }
            other => return Err(format!("{:?} from a source", other.kind()).into()),
        };
        if let Some(detail) = self.plan.reject {
            return Ok(link.send(&Message::Reject(Reject::new(RejectCode::NameTaken, detail)))?);
        }
        let missing = vec![DIGEST.to_owned()];
        link.send(&Message::Accept(Box::new(Accept {
            missing,
            target: facts(),
            // Pages travel in images: the tasks are pretended, and have no memory.
            abilities: Abilities {
                cannot_serve: Some("nothing is restored".to_owned()),
                ..Abilities::default()
            },
        })))?;
        if dry_run {
            return Ok(());
        }
        let mut content = Vec::new();
        loop {
            match link.receive()? {
                Message::Blob { digest: DIGEST, .. } => {}
                Message::BlobData(bytes) => content.extend_from_slice(bytes),
                Message::BlobsEnd => break,
                other => return Err(format!("{:?} from a source", other.kind()).into()),
            }
        }
        assert_eq!(content, BLOB);
        link.send(&Message::Preparing(Step::Task))?;
        self.hand_over(link)
    }

    fn hand_over(&self, link: Link) -> Result<(), Cause> {
        let incoming = self.directory.join("incoming.sock");
        let listener = UnixListener::bind(&incoming)?;
        let order = target::Order { id: "web".to_owned(), incoming, rootfs: self.directory.join("target") };
        let restorer = self.restorer.clone();
        let worker = thread::spawn(move || match target::run(&order, restorer, |_| {}) {
            Ok(pid) => assert_eq!(pid, 4711),
            Err(error) => log::debug!("{error}"),
        });
        self.workers.lock().unwrap().push(worker);
        let (worker, _) = listener.accept()?;
        let handover = Handover {
            migration: "m".to_owned().try_into()?,
            id: "web".to_owned(),
            mode: Mode::Native,
            images: godwit_protocol::request::Images::Cache,
            needs: Needs::default(),
            streams: None,
            records: self.directory.join("records"),
            link: link.state(),
        };
        handover::give(&worker, link, handover)?;
        // Until the worker closes its end.
        let mut rest = Vec::new();
        (&worker).read_to_end(&mut rest)?;
        Ok(())
    }
}

/// Passes connections on to `port`, counts the bytes of the first, and cuts it where the plan says.
fn proxy(port: u16, cut: Option<(Direction, u64)>, counts: Arc<[AtomicU64; 2]>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let own_port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for (index, near) in listener.incoming().enumerate() {
            let near = near.unwrap();
            let far = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let limit = |direction| match cut {
                Some((where_, bytes)) if index == 0 && where_ == direction => bytes,
                _ => u64::MAX,
            };
            let both = [(Direction::ToTarget, &near, &far), (Direction::ToSource, &far, &near)];
            for (at, (direction, from, to)) in both.into_iter().enumerate() {
                let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let (limit, counts) = (limit(direction), Arc::clone(&counts));
                thread::spawn(move || {
                    pump(&from, &to, limit, |count| {
                        if index == 0 {
                            counts[at].fetch_add(count, Ordering::Relaxed);
                        }
                    });
                });
            }
        }
    });
    own_port
}

/// Copies bytes until the end, or until `limit` of them have been copied: then the connection breaks both ways.
fn pump(mut from: &TcpStream, mut to: &TcpStream, limit: u64, count: impl Fn(u64)) {
    let mut buffer = [0; 16 << 10];
    let mut left = limit;
    loop {
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            break;
        }
        match from.read(&mut buffer[..want]) {
            Ok(got @ 1..) if to.write_all(&buffer[..got]).is_ok() => {
                count(got as u64);
                left -= got as u64;
            }
            // The end of one direction is passed on as such.
            Ok(0) if left > 0 => return drop(to.shutdown(Shutdown::Write)),
            _ => break,
        }
    }
    drop(from.shutdown(Shutdown::Both));
    drop(to.shutdown(Shutdown::Both));
}

struct PretendedOrigin {
    dry_run: bool,
    cleaned_up: Arc<AtomicBool>,
}

struct PretendedBlob(Option<Vec<u8>>);

impl Origin for PretendedOrigin {
    fn offer(&self) -> Result<Offer, Cause> {
        let blob = offer::Blob { digest: DIGEST.to_owned(), size: BLOB.len() as u64, labels: [].into() };
        let descriptor = Descriptor {
            media_type: String::new(),
            digest: DIGEST.to_owned(),
            size: blob.size,
            annotations: [].into(),
        };
        Ok(Offer {
            migration: "m".to_owned().try_into()?,
            mode: Mode::Native,
            images: godwit_protocol::request::Images::Cache,
            dry_run: self.dry_run,
            keep: false,
            source: facts(),
            container: ContainerRecord {
                id: "web".to_owned(),
                namespace: "default".to_owned(),
                labels: [].into(),
                image: Some(Image {
                    name: "image".to_owned(),
                    labels: [].into(),
                    target: descriptor,
                    blobs: vec![blob],
                    absent: Vec::new(),
                }),
                runtime: Runtime { name: "io.containerd.godwit.v1".to_owned(), options: None },
                spec: TypedBytes::default(),
                snapshotter: "overlayfs".to_owned(),
                snapshot: None,
                extensions: [].into(),
                sandbox_id: None,
            },
            stdio: Stdio::default(),
            needs: Needs::default(),
            abilities: Abilities::default(),
            streams: 0,
        })
    }

    fn open_blob(&self, digest: &str) -> Result<Box<dyn Blob + '_>, Cause> {
        if digest == DIGEST {
            return Ok(Box::new(PretendedBlob(Some(BLOB.to_vec()))));
        }
        Err(io::Error::from(io::ErrorKind::NotFound).into())
    }

    fn clean_up(&self) -> Result<(), Cause> {
        self.cleaned_up.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Blob for PretendedBlob {
    fn next_piece(&mut self) -> Result<Option<Vec<u8>>, Cause> {
        Ok(self.0.take())
    }
}

fn facts() -> NodeFacts {
    NodeFacts {
        host: "here".to_owned(),
        arch: String::new(),
        kernel: String::new(),
        criu: None,
        godwit: String::new(),
        containerd: None,
        cgroup_version: 2,
        cpu_flags: String::new(),
        memory_available_bytes: 0,
    }
}

const DIGEST: &str = "sha256:0";
const BLOB: &[u8] = b"a layer";
