//! Links change hands: the agent that accepted them gives them to the worker that restores the container.
//!
//! ```text
//! worker ──connects to the incoming task's unix socket──► agent
//! agent  ──u32 length, with the TCP socket attached, then JSON──► worker      the main link
//! agent  ──the same, for each page stream that joins later──────► worker
//! agent  ──the same, for a main link in the place of a broken one► worker
//!
//! an agent that was started anew ──connects to the worker's own socket──► worker, which takes what comes later from it
//! ```
//! The worker says nothing; the agent keeps its end open and reads its end of file as "the worker is gone". What
//! the worker decided is in the record (`crate::decision`).

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_protocol::offer::Needs;
use godwit_protocol::request::Images;
use godwit_protocol::wire::pages::StreamId;
use godwit_protocol::{MigrationId, Mode};
use godwit_sys::SysError;
use godwit_sys::fdpass;
use nix::sys::socket;
use serde::{Deserialize, Serialize};

use crate::link::{Link, LinkError, LinkState};

/// What the agent tells the worker beside the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The migration's name.
    pub migration: MigrationId,
    /// The container's id.
    pub id: String,
    /// When pages travel.
    pub mode: Mode,
    /// What the container needs of this host.
    pub needs: Needs,
    /// Where images and pages are on their way.
    pub images: Images,
    /// Bulk streams that carry pages beside the link; none when CRIU's images do.
    pub streams: Option<u8>,
    /// The directory of the migration's record (see [`crate::decision::Record::of`]).
    pub records: PathBuf,
    /// How far the link has come; set by [`give`].
    pub link: LinkState,
}

/// A link that did not change hands.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The agent's socket does not answer.
    #[error("no agent answers at {}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The worker's own socket cannot be used.
    #[error("no agent that is started anew can find this worker at {}", .path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The other side is gone or silent.
    #[error("the link was not handed over")]
    Broken(#[from] io::Error),
    /// The socket could not be sent or received.
    #[error("the link was not handed over")]
    Socket(#[from] SysError),
    /// The message is not what it should be.
    #[error("the hand-over is malformed: {what}")]
    Malformed {
        /// Which rule it breaks.
        what: String,
    },
    /// The socket that came is of no use.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// The worker's end of its connection to the agent, to be kept until the worker is done: its end tells the agent so.
#[derive(Debug)]
pub struct AgentEnd(Arc<Connection>);

/// What the worker takes the links from that come after the main link.
#[derive(Debug)]
pub struct Streams(Arc<Connection>);

/// A worker's connection to the agent that there is now.
#[derive(Debug)]
struct Connection(Mutex<Ends>);

#[derive(Debug)]
struct Ends {
    /// None when the worker is done.
    agent: Option<UnixStream>,
    successors: Option<Arc<Successors>>,
}

/// Where agents that were started anew find a worker.
#[derive(Debug)]
struct Successors {
    listener: UnixListener,
    path: PathBuf,
}

/// A link that comes after the main link.
#[derive(Debug)]
pub enum Later {
    /// A page stream.
    Stream(JoinedStream),
    /// The main link, in the place of one that broke.
    Main(Link),
}

/// A page stream that has joined.
#[derive(Debug)]
pub struct JoinedStream {
    /// Which.
    pub stream: StreamId,
    /// Its link, whose first frame has been read.
    pub link: Link,
}

/// What the agent tells of a link that comes after the main link.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct LaterGiven {
    what: What,
    link: LinkState,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum What {
    Bulk(u8),
    Fault,
    Main,
}

/// Gives `link` to the worker at the other end of `worker`.
///
/// # Errors
/// [`HandoverError`]; the link is then closed on this side.
pub fn give(worker: &UnixStream, link: Link, handover: Handover) -> Result<(), HandoverError> {
    let handover = Handover { link: link.state(), ..handover };
    send(worker, link, &handover)
}

/// Gives a page stream to the worker that has the main link. One at a time: the caller sees to it.
///
/// # Errors
/// [`HandoverError`]; the link is then closed on this side, and nothing more can be given.
pub fn give_stream(worker: &UnixStream, stream: StreamId, link: Link) -> Result<(), HandoverError> {
    let what = match stream {
        StreamId::Bulk(index) => What::Bulk(index),
        StreamId::Fault => What::Fault,
    };
    give_later(worker, what, link)
}

/// Gives a main link to the worker whose own broke. One at a time, as with page streams.
///
/// # Errors
/// As [`give_stream`].
pub fn give_again(worker: &UnixStream, link: Link) -> Result<(), HandoverError> {
    give_later(worker, What::Main, link)
}

fn give_later(worker: &UnixStream, what: What, link: Link) -> Result<(), HandoverError> {
    let given = LaterGiven { what, link: link.state() };
    send(worker, link, &given)
}

fn send(mut worker: &UnixStream, link: Link, what: &impl Serialize) -> Result<(), HandoverError> {
    let json = serde_json::to_vec(what).map_err(|error| malformed(error.to_string()))?;
    let len = u32::try_from(json.len()).unwrap_or(u32::MAX);
    worker.set_write_timeout(Some(HANDOVER_MAX))?;
    let sent = fdpass::send(worker, &len.to_le_bytes(), &[link.as_fd()])?;
    worker.write_all(&len.to_le_bytes()[sent..])?;
    worker.write_all(&json)?;
    // The agent's copy has to go: the source sees the end of the link when the worker, its only holder, dies.
    drop(link);
    Ok(())
}

/// Takes the link that the agent at `path` has for this worker, and the connection to the agent.
///
/// # Errors
/// [`HandoverError`].
pub fn take(path: &Path) -> Result<(Link, Handover, AgentEnd), HandoverError> {
    let connected = UnixStream::connect(path);
    let agent = connected.map_err(|source| HandoverError::Connect { path: path.to_owned(), source })?;
    agent.set_read_timeout(Some(HANDOVER_MAX))?;
    let (socket, json) = receive(&agent)?;
    let handover: Handover = serde_json::from_slice(&json).map_err(|error| malformed(error.to_string()))?;
    let link = Link::resume(socket, handover.link)?;
    let ends = Ends { agent: Some(agent), successors: None };
    Ok((link, handover, AgentEnd(Arc::new(Connection(Mutex::new(ends))))))
}

/// Connects an agent that was started anew to the worker of `migration`, whose record is in `records`, to give it links
/// that come later; `None` when there is no worker that takes any.
///
/// # Errors
/// [`HandoverError::Listen`].
pub fn find_worker(records: &Path, migration: &MigrationId) -> Result<Option<UnixStream>, HandoverError> {
    let path = worker_socket(records, migration);
    match UnixStream::connect(&path) {
        Ok(worker) => Ok(Some(worker)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Ok(None)
        }
        Err(source) => Err(HandoverError::Listen { path, source }),
    }
}

/// Removes the socket of a worker that was killed.
pub fn forget_worker(records: &Path, migration: &MigrationId) {
    remove_socket(&worker_socket(records, migration));
}

fn remove_socket(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!(path:% = path.display(); "cannot remove a worker's socket: {error}");
        }
        _ => {}
    }
}

/// Not `.sock`, which a new agent removes: those are its predecessor's, and this is a worker's.
fn worker_socket(records: &Path, migration: &MigrationId) -> PathBuf {
    records.join(format!("{migration}.later"))
}

fn receive(mut agent: &UnixStream) -> Result<(TcpStream, Vec<u8>), HandoverError> {
    let mut len = [0; 4];
    let received = fdpass::receive(agent, &mut len)?;
    let [socket] = <[_; 1]>::try_from(received.fds).map_err(|_| malformed("not one descriptor"))?;
    if received.length_bytes != len.len() {
        return Err(malformed("the length is cut short"));
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > HANDOVER_LEN_MAX {
        return Err(malformed("it is longer than its maximum"));
    }
    let mut json = vec![0; len];
    agent.set_read_timeout(Some(HANDOVER_MAX))?;
    agent.read_exact(&mut json)?;
    Ok((TcpStream::from(socket), json))
}

impl AgentEnd {
    /// Returns what takes the links that come later, also from agents that are started anew: they find this worker by
    /// `handover`.
    ///
    /// # Errors
    /// [`HandoverError::Listen`].
    pub fn streams(&self, handover: &Handover) -> Result<Streams, HandoverError> {
        let path = worker_socket(&handover.records, &handover.migration);
        let listener = match UnixListener::bind(&path) {
            Ok(listener) => listener,
            Err(source) => return Err(HandoverError::Listen { path, source }),
        };
        self.0.lock().successors = Some(Arc::new(Successors { listener, path }));
        Ok(Streams(Arc::clone(&self.0)))
    }
}

impl Drop for AgentEnd {
    fn drop(&mut self) {
        // Also what takes streams ends, and with it the last copy of the descriptors. A socket that is not
        // connected any more is what is wanted.
        let mut ends = self.0.lock();
        if let Some(agent) = ends.agent.take() {
            drop(agent.shutdown(Shutdown::Both));
        }
        if let Some(successors) = ends.successors.take() {
            successors.close();
        }
    }
}

impl Connection {
    /// Returns the connection to the agent; `None` when the worker is done.
    fn agent(&self) -> Result<Option<UnixStream>, HandoverError> {
        let agent = self.lock().agent.as_ref().map(UnixStream::try_clone).transpose()?;
        // Between two links any time may pass.
        agent.as_ref().map_or(Ok(()), |agent| agent.set_read_timeout(None))?;
        Ok(agent)
    }

    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Successors {
    fn close(&self) {
        // On Linux this wakes a thread that waits in accept; there is nothing else that could fail to be shut down.
        socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both).ok();
        remove_socket(&self.path);
    }
}

impl Streams {
    /// Takes links from this connection to an agent.
    #[cfg(test)]
    pub(crate) fn of(agent: UnixStream) -> Self {
        let ends = Ends { agent: Some(agent), successors: None };
        Self(Arc::new(Connection(Mutex::new(ends))))
    }

    /// Waits for the next link, from the agent or from one that is started anew; `None` when this worker has ended the
    /// connection.
    ///
    /// # Errors
    /// [`HandoverError`]; nothing more can be taken then.
    pub fn take(&mut self) -> Result<Option<Later>, HandoverError> {
        let (socket, json) = loop {
            let Some(agent) = self.0.agent()? else { return Ok(None) };
            match receive(&agent) {
                Err(HandoverError::Socket(SysError::Closed)) => {}
                // One that died in the midst of giving: the link is closed with it.
                Err(HandoverError::Broken(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                received => break received?,
            }
            if !self.await_successor()? {
                return Ok(None);
            }
        };
        let LaterGiven { what, link } =
            serde_json::from_slice(&json).map_err(|error| malformed(error.to_string()))?;
        let link = Link::resume(socket, link)?;
        Ok(Some(match what {
            What::Bulk(index) => Later::Stream(JoinedStream { stream: StreamId::Bulk(index), link }),
            What::Fault => Later::Stream(JoinedStream { stream: StreamId::Fault, link }),
            What::Main => Later::Main(link),
        }))
    }

    /// Waits for an agent in the place of one that is gone; false when this worker is done first.
    fn await_successor(&self) -> Result<bool, HandoverError> {
        let Some(successors) = self.0.lock().successors.clone() else { return Ok(false) };
        let accepted = successors.listener.accept();
        let mut ends = self.0.lock();
        if ends.agent.is_none() {
            return Ok(false);
        }
        ends.agent = Some(accepted?.0);
        log::info!("an agent that was started anew is here");
        Ok(true)
    }
}

fn malformed(what: impl Into<String>) -> HandoverError {
    HandoverError::Malformed { what: what.into() }
}

const HANDOVER_MAX: Duration = Duration::from_secs(30);
const HANDOVER_LEN_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use godwit_protocol::wire::Message;

    use super::*;

    fn handover(records: &Path, link: LinkState) -> Handover {
        Handover {
            images: Images::Cache,
            streams: None,
            migration: "m".to_owned().try_into().unwrap(),
            id: "web".to_owned(),
            mode: Mode::Native,
            needs: Needs::default(),
            records: records.to_owned(),
            link,
        }
    }

    #[test]
    fn a_link_works_on_in_other_hands() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("incoming.sock");
        let agent = UnixListener::bind(&path).unwrap();
        let worker = thread::spawn(move || {
            let (mut link, handover, agent) = take(&path).unwrap();
            assert_eq!(link.receive().unwrap(), Message::BlobsEnd);
            link.send(&Message::Ready { room_bytes: 1 }).unwrap();
            let mut streams = agent.streams(&handover).unwrap();
            for expected in [StreamId::Bulk(3), StreamId::Fault] {
                let Some(Later::Stream(mut joined)) = streams.take().unwrap() else { panic!("no stream") };
                assert_eq!(joined.stream, expected);
                assert_eq!(joined.link.receive().unwrap(), Message::StreamMark { round: 7 });
            }
            let Some(Later::Main(mut link)) = streams.take().unwrap() else { panic!("no main link") };
            assert_eq!(link.receive().unwrap(), Message::StreamMark { round: 7 });
            (handover, agent, streams)
        });
        let tcp = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = tcp.local_addr().unwrap();
        let source = thread::spawn(move || {
            let mut link = Link::connect("127.0.0.1", address.port()).unwrap();
            link.send(&Message::Commit).unwrap();
            link.send(&Message::BlobsEnd).unwrap();
            assert_eq!(link.receive().unwrap(), Message::Ready { room_bytes: 1 });
            for _ in 0..3 {
                let mut link = Link::connect("127.0.0.1", address.port()).unwrap();
                link.send(&Message::Received).unwrap();
                link.send(&Message::StreamMark { round: 7 }).unwrap();
            }
        });
        let mut link = Link::accept(tcp.accept().unwrap().0).unwrap();
        assert_eq!(link.receive().unwrap(), Message::Commit);
        let handover = handover(directory.path(), link.state());
        let (connection, _) = agent.accept().unwrap();
        give(&connection, link, handover.clone()).unwrap();
        for stream in [StreamId::Bulk(3), StreamId::Fault] {
            let mut link = Link::accept(tcp.accept().unwrap().0).unwrap();
            assert_eq!(link.receive().unwrap(), Message::Received);
            give_stream(&connection, stream, link).unwrap();
        }
        let mut link = Link::accept(tcp.accept().unwrap().0).unwrap();
        assert_eq!(link.receive().unwrap(), Message::Received);
        give_again(&connection, link).unwrap();
        source.join().unwrap();
        let (taken, held, mut streams) = worker.join().unwrap();
        assert_eq!(taken, handover);
        let waiting = thread::spawn(move || streams.take().unwrap().is_none());
        drop(held);
        assert!(waiting.join().unwrap(), "the end of the worker ends the waiting for streams");
        let mut rest = Vec::new();
        (&connection).read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }

    #[test]
    fn an_agent_that_is_started_anew_finds_the_worker_until_that_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let migration: MigrationId = "m".to_owned().try_into().unwrap();
        let find = || find_worker(directory.path(), &migration).unwrap();
        assert!(find().is_none());
        let tcp = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let link = || {
            let near = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
            let source = thread::spawn(move || Link::accept(near).unwrap());
            let link = Link::accept(tcp.accept().unwrap().0).unwrap();
            drop(source.join().unwrap());
            link
        };
        let (first, worker) = UnixStream::pair().unwrap();
        let ends = Ends { agent: Some(worker), successors: None };
        let held = AgentEnd(Arc::new(Connection(Mutex::new(ends))));
        let mut streams = held.streams(&handover(directory.path(), link().state())).unwrap();
        let taking = thread::spawn(move || {
            let taken = [streams.take().unwrap(), streams.take().unwrap()];
            (taken.map(|later| later.is_some()), streams.take().unwrap().is_none())
        });
        // It is there before the first one is gone, and another dies in the midst of giving.
        let second = find().unwrap();
        assert_eq!(fdpass::send(&first, &9_u32.to_le_bytes(), &[link().as_fd()]).unwrap(), 4);
        drop(first);
        give_stream(&second, StreamId::Fault, link()).unwrap();
        drop(second);
        let third = find().unwrap();
        give_again(&third, link()).unwrap();
        drop(third);
        drop(held);
        assert_eq!(taking.join().unwrap(), ([true, true], true));
        assert!(find().is_none());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_absent_agent_and_a_malformed_message_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("incoming.sock");
        assert!(matches!(take(&path), Err(HandoverError::Connect { .. })));
        let agent = UnixListener::bind(&path).unwrap();
        let worker = thread::spawn(move || take(&path).unwrap_err());
        agent.accept().unwrap().0.write_all(b"nonsense").unwrap();
        assert!(matches!(worker.join().unwrap(), HandoverError::Malformed { .. }));
    }
}
