//! A link changes hands: the agent that accepted it gives it to the worker that restores the container.
//!
//! ```text
//! worker ──connects to the incoming task's unix socket──► agent
//! agent  ──u32 length, with the TCP socket attached, then JSON──► worker
//! ```
//! Afterwards nothing more is said; the agent keeps its end open and reads its end of file as "the worker is
//! gone". What the worker decided is in the record (`crate::decision`).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_protocol::offer::Needs;
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

/// Gives `link` to the worker at the other end of `worker`.
///
/// # Errors
/// [`HandoverError`]; the link is then closed on this side.
pub fn give(mut worker: &UnixStream, link: Link, handover: Handover) -> Result<(), HandoverError> {
    let handover = Handover { link: link.state(), ..handover };
    let json = serde_json::to_vec(&handover)
        .map_err(|error| HandoverError::Malformed { what: error.to_string() })?;
    let len = u32::try_from(json.len()).unwrap_or(u32::MAX);
    worker.set_write_timeout(Some(HANDOVER_MAX))?;
    fdpass::send(worker, &len.to_le_bytes(), &[link.as_fd()])?;
    worker.write_all(&json)?;
    // The agent's copy has to go: the source sees the end of the link when the worker, its only holder, dies.
    drop(link);
    Ok(())
}

/// Takes the link that the agent at `path` has for this worker, and the connection to the agent, to be kept
/// open until the worker is done.
///
/// # Errors
/// [`HandoverError`].
pub fn take(path: &Path) -> Result<(Link, Handover, UnixStream), HandoverError> {
    let connected = UnixStream::connect(path);
    let mut agent = connected.map_err(|source| HandoverError::Connect { path: path.to_owned(), source })?;
    agent.set_read_timeout(Some(HANDOVER_MAX))?;
    let mut len = [0; 4];
    let received = fdpass::receive(&agent, &mut len)?;
    let malformed = |what: &str| HandoverError::Malformed { what: what.to_owned() };
    let [socket] = <[_; 1]>::try_from(received.fds).map_err(|_| malformed("not one descriptor"))?;
    if received.length_bytes != len.len() {
        return Err(malformed("the length is cut short"));
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > HANDOVER_LEN_MAX {
        return Err(malformed("it is longer than its maximum"));
    }
    let mut json = vec![0; len];
    agent.read_exact(&mut json)?;
    let handover: Handover = serde_json::from_slice(&json)
        .map_err(|error| HandoverError::Malformed { what: error.to_string() })?;
    let link = Link::resume(TcpStream::from(socket), handover.link)?;
    Ok((link, handover, agent))
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
            (handover, agent)
        });
        let tcp = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = tcp.local_addr().unwrap();
        let source = thread::spawn(move || {
            let mut link = Link::connect("127.0.0.1", address.port()).unwrap();
            link.send(&Message::Commit).unwrap();
            link.send(&Message::BlobsEnd).unwrap();
            assert_eq!(link.receive().unwrap(), Message::Ready { room_bytes: 1 });
        });
        let mut link = Link::accept(tcp.accept().unwrap().0).unwrap();
        assert_eq!(link.receive().unwrap(), Message::Commit);
        let handover = Handover {
            migration: "m".to_owned().try_into().unwrap(),
            id: "web".to_owned(),
            mode: Mode::Native,
            needs: Needs::default(),
            records: directory.path().to_owned(),
            link: link.state(),
        };
        let (connection, _) = agent.accept().unwrap();
        give(&connection, link, handover.clone()).unwrap();
        source.join().unwrap();
        let (taken, held) = worker.join().unwrap();
        assert_eq!(taken, handover);
        drop(held);
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
