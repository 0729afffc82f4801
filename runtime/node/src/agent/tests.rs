//! The connection handler against peers that behave badly, without a containerd.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread,
};

use godwit_engine::{
    decision::Record,
    handover::{self, Handover},
    link::{Link, LinkError},
};
use godwit_protocol::{
    Mode,
    fate::{Decision, FateAnswer},
    offer::{Needs, Offer},
    wire::{FrameHeader, Hello, Kind, Message, RejectCode, pages::StreamId},
};

use super::*;
use crate::target::sample_offer;

struct Host {
    shared: Arc<Shared>,
    directory: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let shared = Shared {
            containerd: directory.path().join("no-containerd.sock"),
            directory: directory.path().to_owned(),
            state: Mutex::default(),
            name_free: Condvar::new(),
        };
        Self { shared: Arc::new(shared), directory }
    }

    /// Serves one connection, of which `peer` has the other end.
    fn serve<T>(&self, peer: impl FnOnce(TcpStream) -> T) -> (T, Result<(), connection::ConnectionError>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let seat = Seat::take(&self.shared).unwrap();
        let served = thread::spawn(move || connection::serve(&seat, listener.accept().unwrap().0));
        let told = peer(TcpStream::connect(address).unwrap());
        (told, served.join().expect("a peer must not make the agent panic"))
    }

    /// Sends one message and returns the answer.
    fn ask(&self, message: &Message<'_>) -> (u16, String, Result<(), connection::ConnectionError>) {
        let ((code, detail), served) = self.serve(|socket| {
            let mut link = Link::accept(socket).unwrap();
            link.send(message).unwrap();
            match link.receive().unwrap() {
                Message::Reject(reject) => (reject.code, reject.detail),
                other => panic!("{other:?}"),
            }
        });
        (code, detail, served)
    }
}

/// A generator that is good enough to reach every branch of a parser (xorshift64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len_max: u64) -> Vec<u8> {
        let len = self.next() % len_max;
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// Goal: whatever a peer sends, the handler ends with an error and the peer reads the end of the connection.
/// Method: garbage from the first byte on, after a good hello, and in frames with good headers and checksums.
#[test]
fn random_bytes_end_a_connection_and_nothing_else() {
    let host = Host::new();
    for seed in 1..=150 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let mut bytes = Vec::new();
        if !seed.is_multiple_of(3) {
            bytes.extend(Hello::OURS.to_bytes());
        }
        if seed.is_multiple_of(2) {
            let payload = dice.bytes(60);
            let kind = Kind::ALL[usize::try_from(dice.next()).unwrap_or(0) % Kind::ALL.len()];
            if let Ok(header) = FrameHeader::seal(kind, 0, &payload, &[]) {
                bytes.extend(header.to_bytes());
                bytes.extend(payload);
            }
        }
        // At least a header's length: who leaves before that has only looked whether somebody listens.
        bytes.extend([seed.to_le_bytes()[0]; 16]);
        bytes.extend(dice.bytes(300));
        let (_, served) = host.serve(|mut socket| {
            drop(socket.write_all(&bytes));
            drop(socket.shutdown(std::net::Shutdown::Write));
            drop(socket.read_to_end(&mut Vec::new()));
        });
        assert!(served.is_err(), "seed {seed}: {bytes:?}");
    }
    assert_eq!(host.shared.state().connections, 0);
    assert!(host.shared.state().links.is_empty());
}

#[test]
fn a_probe_is_no_error() {
    let (_, served) = Host::new().serve(|socket| drop(Link::accept(socket).unwrap()));
    served.unwrap();
}

#[test]
fn a_message_out_of_place_is_rejected_by_name() {
    let (code, detail, served) = Host::new().ask(&Message::Commit);
    assert_eq!(code, RejectCode::Protocol as u16);
    assert!(detail.contains("Commit"), "{detail}");
    assert!(matches!(served, Err(connection::ConnectionError::Link(LinkError::Unexpected { .. }))));
}

#[test]
fn an_offer_is_declined_when_containerd_is_not_there() {
    let (code, detail, served) = Host::new().ask(&Message::Offer(Box::new(sample_offer())));
    assert_eq!(code, RejectCode::Containerd as u16);
    assert!(detail.contains("no-containerd.sock"), "{detail}");
    assert!(matches!(served, Err(connection::ConnectionError::Declined(_))));
}

#[test]
fn names_that_are_paths_are_refused_before_they_are_used() {
    let host = Host::new();
    let mut offer: Offer = sample_offer();
    offer.container.namespace = "../../x".to_owned();
    let (code, detail, _) = host.ask(&Message::Offer(Box::new(offer)));
    assert_eq!(code, RejectCode::Protocol as u16);
    assert!(detail.contains("../../x"), "{detail}");
    assert_eq!(fs::read_dir(host.directory.path()).unwrap().count(), 0);
}

#[test]
fn the_fate_is_what_the_record_says() {
    let host = Host::new();
    let ask = |name: &str| {
        let migration: MigrationId = name.to_owned().try_into().unwrap();
        let (answer, served) = host.serve(|socket| {
            let mut link = Link::accept(socket).unwrap();
            link.send(&Message::FateQuery { migration }).unwrap();
            match link.receive().unwrap() {
                Message::FateAnswer(answer) => answer,
                other => panic!("{other:?}"),
            }
        });
        served.unwrap();
        answer
    };
    assert_eq!(ask("never-heard-of"), FateAnswer::NotHere);
    let record = Record::of(host.directory.path(), &"m".to_owned().try_into().unwrap());
    record.decide(Decision::Committed).unwrap();
    record.decide(Decision::Resumed).unwrap();
    assert_eq!(ask("m"), FateAnswer::Here);
    record.decide(Decision::Aborted).unwrap();
    assert_eq!(ask("m"), FateAnswer::Here);
}

type Joined = (Result<Link, String>, Result<(), connection::ConnectionError>);

/// Joins a stream and returns the link and what the agent says of it.
fn join(host: &Host, name: &str, stream: StreamId) -> Joined {
    begin_with(host, &Message::JoinStream { migration: name.to_owned().try_into().unwrap(), stream })
}

fn rejoin(host: &Host, name: &str) -> Joined {
    begin_with(host, &Message::Rejoin { migration: name.to_owned().try_into().unwrap() })
}

fn begin_with(host: &Host, first: &Message<'_>) -> Joined {
    let (link, served) = host.serve(|socket| {
        let mut link = Link::accept(socket).unwrap();
        link.send(first).unwrap();
        link.send(&Message::StreamMark { round: 5 }).unwrap();
        link
    });
    let mut link = link;
    match &served {
        Ok(()) => (Ok(link), served),
        Err(_) => match link.receive().unwrap() {
            Message::Abort { detail } => (Err(detail.to_owned()), served),
            other => panic!("{other:?}"),
        },
    }
}

/// Goal: a page stream reaches the worker of its own migration, once for each main link, with nothing of it read, and
/// only while the migration lasts. Method: a worker that takes its link as a real one does.
#[test]
fn page_streams_reach_the_worker_of_their_migration_and_no_other() {
    let host = Host::new();
    let directory = host.directory.path().to_owned();
    let path = directory.join("incoming.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let worker = thread::spawn(move || handover::take(&path).unwrap());
    let (socket, _) = listener.accept().unwrap();

    let (link, _source) = {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let source = thread::spawn(move || Link::accept(near).unwrap());
        (Link::accept(listener.accept().unwrap().0).unwrap(), source.join().unwrap())
    };
    let migration: MigrationId = "m".to_owned().try_into().unwrap();
    assert!(join(&host, "m", StreamId::Fault).0.unwrap_err().contains("no migration m"));
    let seat = Seat::take(&host.shared).unwrap();
    let handover = Handover {
        images: godwit_protocol::request::Images::Cache,
        streams: None,
        migration: migration.clone(),
        id: "web".to_owned(),
        mode: Mode::Native,
        needs: Needs::default(),
        records: directory,
        link: link.state(),
    };
    let (entry, given) =
        streams::Entry::enter(&seat, &migration, socket, |worker| handover::give(worker, link, handover));
    given.unwrap();
    let (_link, handover, agent) = worker.join().unwrap();
    let mut joined = agent.streams(&handover).unwrap();
    let mut entry = Some(entry);
    // The second time by way of an agent that was started anew.
    for _ in 0..2 {
        for stream in [StreamId::Bulk(1), StreamId::Fault] {
            let (_source, served) = join(&host, "m", stream);
            served.unwrap();
            let Some(handover::Later::Stream(mut taken)) = joined.take().unwrap() else {
                panic!("no stream")
            };
            assert_eq!(taken.stream, stream);
            assert_eq!(taken.link.receive().unwrap(), Message::StreamMark { round: 5 });
        }
        assert!(join(&host, "m", StreamId::Fault).0.unwrap_err().contains("joined already"));
        let (_source, served) = rejoin(&host, "m");
        served.unwrap();
        let Some(handover::Later::Main(mut taken)) = joined.take().unwrap() else { panic!("no main link") };
        assert_eq!(taken.receive().unwrap(), Message::StreamMark { round: 5 });
        entry.take();
        entry = streams::Entry::of_earlier(&host.shared, &migration);
    }
    assert!(entry.is_some());
    assert!(rejoin(&host, "other").0.unwrap_err().contains("no worker of migration other"));
    assert!(join(&host, "other", StreamId::Bulk(0)).0.unwrap_err().contains("no migration other"));
    drop(agent);
    assert!(joined.take().unwrap().is_none());
    drop(entry);
    assert!(join(&host, "m", StreamId::Bulk(2)).0.unwrap_err().contains("no migration m"));
}

#[test]
fn seats_and_names_are_given_back() {
    let host = Host::new();
    let seats: Vec<Seat> = (0..CONNECTIONS_MAX).map(|_| Seat::take(&host.shared).unwrap()).collect();
    assert!(Seat::take(&host.shared).is_none());
    let name: MigrationId = "m".to_owned().try_into().unwrap();
    let claim = Claim::take(&seats[0], &name).unwrap();
    assert!(Claim::take(&seats[1], &name).is_none());
    drop(claim);
    assert!(Claim::take(&seats[1], &name).is_some());
    drop(seats);
    assert!(Seat::take(&host.shared).is_some());
}

#[test]
fn a_container_waits_until_what_was_left_under_its_name_is_taken_back() {
    let Host { shared, directory: _directory } = Host::new();
    let (first, second) =
        (Name::share(&shared, ("default", "web")), Name::share(&shared, ("default", "web")));
    assert!(Name::take(&shared, "default", "web", Duration::ZERO).is_none());
    assert!(Name::take(&shared, "default", "db", Duration::ZERO).is_some());
    assert!(Name::take(&shared, "other", "web", Duration::ZERO).is_some());
    drop(first);
    assert!(Name::take(&shared, "default", "web", Duration::ZERO).is_none());
    thread::scope(|scope| {
        let waits = scope.spawn(|| Name::take(&shared, "default", "web", NAME_LIMIT));
        drop(second);
        let taken = waits.join().unwrap();
        assert!(taken.is_some() && Name::take(&shared, "default", "web", Duration::ZERO).is_none());
        drop(taken);
        assert!(Name::take(&shared, "default", "web", Duration::ZERO).is_some());
    });
}

const NAME_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn sockets_of_a_killed_agent_go_and_records_stay() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["m.sock", "m.fate", "m.journal"] {
        fs::write(directory.path().join(name), "").unwrap();
    }
    remove_dead_sockets(directory.path());
    let names: HashSet<_> =
        fs::read_dir(directory.path()).unwrap().flatten().map(|file| file.file_name()).collect();
    assert_eq!(names, HashSet::from(["m.fate", "m.journal"].map(Into::into)));
}
