//! Links change hands: the agent that accepted them gives them to the worker that restores the container.
//!
//! ```text
//! worker ──connects to the incoming task's unix socket──► agent
//! agent  ──u32 length, with the TCP socket attached, then JSON──► worker      the main link
//! agent  ──the same, for each page stream that joins later──────► worker
//! agent  ──the same, for a main link in the place of a broken one► worker
//! ```
//! The worker says nothing; the agent keeps its end open and reads its end of file as "the worker is gone". What
//! the worker decided is in the record (`crate::decision`).

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_protocol::offer::Needs;
use godwit_protocol::request::Images;
use godwit_protocol::wire::pages::StreamId;
use godwit_protocol::{MigrationId, Mode};
use godwit_sys::SysError;
use godwit_sys::fdpass;
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
pub struct AgentEnd(UnixStream);

/// What the worker takes the links from that come after the main link.
#[derive(Debug)]
pub struct Streams(UnixStream);

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
    Ok((link, handover, AgentEnd(agent)))
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
    /// Returns what takes the links that come later.
    ///
    /// # Errors
    /// [`HandoverError::Broken`] without a descriptor left.
    pub fn streams(&self) -> Result<Streams, HandoverError> {
        Ok(Streams(self.0.try_clone()?))
    }
}

impl Drop for AgentEnd {
    fn drop(&mut self) {
        // Also what takes streams ends, and with it the last copy of the descriptor. A socket that is not
        // connected any more is what is wanted.
        drop(self.0.shutdown(Shutdown::Both));
    }
}

impl Streams {
    /// Takes links from this connection to an agent.
    #[cfg(test)]
    pub(crate) const fn of(agent: UnixStream) -> Self {
        Self(agent)
    }

    /// Waits for the next link; `None` when the agent, or this worker, has ended the connection.
    ///
    /// # Errors
    /// [`HandoverError`]; nothing more can be taken then.
    pub fn take(&mut self) -> Result<Option<Later>, HandoverError> {
        // Between two links any time may pass.
        self.0.set_read_timeout(None)?;
        let (socket, json) = match receive(&self.0) {
            Err(HandoverError::Socket(SysError::Closed)) => return Ok(None),
            received => received?,
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

    #[test]
    fn a_link_works_on_in_other_hands() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("incoming.sock");
        let agent = UnixListener::bind(&path).unwrap();
        let worker = thread::spawn(move || {
            let (mut link, handover, agent) = take(&path).unwrap();
            assert_eq!(link.receive().unwrap(), Message::BlobsEnd);
            link.send(&Message::Ready { room_bytes: 1 }).unwrap();
            let mut streams = agent.streams().unwrap();
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
        let handover = Handover {
            images: Images::Cache,
            streams: None,
            migration: "m".to_owned().try_into().unwrap(),
            id: "web".to_owned(),
            mode: Mode::Native,
            needs: Needs::default(),
            records: directory.path().to_owned(),
            link: link.state(),
        };
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
