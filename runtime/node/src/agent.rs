//! The target's agent: listens for migrations and brings each to the worker that restores it.
//!
//! ```text
//! connection ──hello──► Offer ──► preflight ──► Accept | Reject
//!                                  blobs ──► image, snapshot, record, task (Arrival)
//!                                  task's worker connects ──► the link is handed to it
//!                                  task has started, or not ──► settled as the migration's record says
//!                       JoinStream, Rejoin ──► handed to the worker of its migration
//!                       FateQuery ──► the record's answer
//! ```
//! One thread a connection, at most [`CONNECTIONS_MAX`] of them; every wait has a limit, every size from the peer
//! a maximum. What a peer sends wrongly ends its connection with a `Reject` and one line in the log. The agent
//! may be killed at any moment: a worker that has the link does not need it, and the next agent settles what
//! this one left (see [`crate::target::LeftOver`]), and takes no container of the same name before.
//!
//! Nothing is encrypted and nobody is asked who they are: the network must be trusted.

mod blobs;
mod connection;
mod migration;
mod streams;

use std::{
    collections::{HashMap, HashSet},
    fs::{self, DirBuilder, File},
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use godwit_engine::link::Breaker;
use godwit_protocol::MigrationId;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::{
        signal::{SigSet, Signal},
        socket::{Shutdown, shutdown},
    },
};

use crate::{Containerd, NodeError, target};

/// Where an agent keeps sockets, records and journals of migrations.
pub const DIRECTORY: &str = "/run/godwit/migrations";

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 64;

/// How an agent is to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The socket of its containerd.
    pub containerd: PathBuf,
    /// Where it keeps sockets, records and journals.
    pub directory: PathBuf,
}

/// An agent that listens, and is not yet serving.
#[derive(Debug)]
pub struct Agent {
    listener: TcpListener,
    /// Held as long as the agent lives: a second one would take the first one's arrivals for left-overs.
    _lock: Flock<File>,
    shared: Arc<Shared>,
}

/// What the connections of one agent share.
#[derive(Debug)]
struct Shared {
    containerd: PathBuf,
    directory: PathBuf,
    state: Mutex<State>,
    /// Signalled when a name is given back.
    name_free: Condvar,
}

#[derive(Debug, Default)]
struct State {
    connections: usize,
    leaving: bool,
    migrations: HashSet<MigrationId>,
    /// Namespaces and ids of containers under which something is being made or taken back, and by how many.
    names: HashMap<(String, String), usize>,
    /// Workers that page streams may join.
    workers: HashMap<MigrationId, Arc<Mutex<streams::Worker>>>,
    /// Links that no worker has yet, by connection number; breaking one ends its migration.
    links: Vec<(u64, Breaker)>,
    next: u64,
}

impl Agent {
    /// Checks that containerd answers, settles what an earlier agent left unfinished, and begins to listen.
    ///
    /// # Errors
    /// [`NodeError::Unreachable`] without containerd, [`NodeError::AgentRuns`] beside another agent,
    /// [`NodeError::Listen`] if the address cannot be had.
    pub fn bind(config: Config) -> Result<Self, NodeError> {
        drop(Containerd::connect(&config.containerd, "default")?);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.directory)
            .map_err(NodeError::file("create directory", &config.directory))?;
        let lock = lock(&config.directory)?;
        remove_dead_sockets(&config.directory);
        forget_old_records(&config.directory);
        let shared = Arc::new(Shared {
            containerd: config.containerd,
            directory: config.directory,
            state: Mutex::default(),
            name_free: Condvar::new(),
        });
        settle_left_overs(&shared)?;
        let listener = TcpListener::bind(config.listen)
            .map_err(|source| NodeError::Listen { address: config.listen, source })?;
        Ok(Self { listener, _lock: lock, shared })
    }

    /// Returns where it listens.
    ///
    /// # Errors
    /// [`io::Error`] if the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until SIGTERM or SIGINT; then lets migrations that are under way finish for [`LEAVE_LIMIT`].
    ///
    /// # Errors
    /// [`NodeError::Listen`] if the signals or the listener cannot be set up.
    pub fn serve(self) -> Result<(), NodeError> {
        let address = self
            .address()
            .map_err(|source| NodeError::Listen { address: SocketAddr::from(([0, 0, 0, 0], 0)), source })?;
        let failed = |source: io::Error| NodeError::Listen { address, source };
        // Blocked before any thread is made, so that all inherit it and the signal waits for `wait`.
        let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
        signals.thread_block().map_err(|errno| failed(errno.into()))?;
        let listener = self.listener.try_clone().map_err(failed)?;
        let shared = Arc::clone(&self.shared);
        let acceptor = thread::spawn(move || accept(&listener, &shared));

        let signal = signals.wait().map_err(|errno| failed(errno.into()))?;
        log::info!("{signal}: no more migrations are taken");
        self.shared.state().leaving = true;
        // On Linux this wakes a thread that waits in accept.
        shutdown(self.listener.as_raw_fd(), Shutdown::Both).map_err(|errno| failed(errno.into()))?;
        if acceptor.join().is_err() {
            log::error!("the listening thread had panicked");
        }
        self.shared.leave();
        Ok(())
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete when it can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the connections to end; the migrations that no worker has yet are ended half way.
    fn leave(&self) {
        let begun = Instant::now();
        let mut broken = false;
        loop {
            let (connections, links) = {
                let state = self.state();
                (state.connections, state.links.clone())
            };
            if connections == 0 || begun.elapsed() > LEAVE_LIMIT {
                return;
            }
            if begun.elapsed() > LEAVE_LIMIT / 2 && !broken {
                log::warn!("{connections} connections are still open: breaking those that no worker has");
                links.iter().for_each(|(_, breaker)| breaker.break_link());
                broken = true;
            }
            thread::sleep(LEAVE_POLL);
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let (socket, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(_) if shared.state().leaving => return,
            Err(error) => {
                // Out of descriptors, most likely: the connections that are open will give some back.
                log::warn!("cannot accept a connection: {error}");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let Some(seat) = Seat::take(shared) else {
            log::warn!(peer:%; "refused: {CONNECTIONS_MAX} connections are open");
            continue;
        };
        spawn(seat, socket, peer);
    }
}

fn spawn(seat: Seat, socket: TcpStream, peer: SocketAddr) {
    let spawned = thread::Builder::new().name(format!("from {peer}")).spawn(move || {
        if let Err(error) = connection::serve(&seat, socket) {
            log::warn!(peer:%; "{error}");
        }
    });
    if let Err(error) = spawned {
        log::warn!(peer:%; "refused: no thread for the connection: {error}");
    }
}

/// A connection's place among those that are open; given back on drop.
#[derive(Debug)]
struct Seat {
    shared: Arc<Shared>,
    number: u64,
}

impl Seat {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let mut state = shared.state();
        if state.connections >= CONNECTIONS_MAX {
            return None;
        }
        state.connections += 1;
        state.next += 1;
        Some(Self { shared: Arc::clone(shared), number: state.next })
    }

    /// Lets the agent break the link when it leaves.
    fn lend(&self, breaker: Breaker) {
        self.shared.state().links.push((self.number, breaker));
    }

    /// Takes that back: the link is a worker's now.
    fn reclaim(&self) {
        self.shared.state().links.retain(|(number, _)| *number != self.number);
    }

    fn containerd(&self) -> &Path {
        &self.shared.containerd
    }

    fn directory(&self) -> &Path {
        &self.shared.directory
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.reclaim();
        self.shared.state().connections -= 1;
    }
}

/// A migration's claim on its name; given back on drop.
#[derive(Debug)]
struct Claim {
    shared: Arc<Shared>,
    migration: MigrationId,
}

impl Claim {
    fn take(seat: &Seat, migration: &MigrationId) -> Option<Self> {
        let shared = Arc::clone(&seat.shared);
        let fresh = shared.state().migrations.insert(migration.clone());
        fresh.then(|| Self { shared, migration: migration.clone() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.state().migrations.remove(&self.migration);
    }
}

/// A container's name, for as long as something is being made or taken back under it; given back on drop.
#[derive(Debug)]
struct Name {
    shared: Arc<Shared>,
    name: (String, String),
}

impl Name {
    /// Takes a name that nobody has; `None` if it is not given back within `limit`.
    fn take(shared: &Arc<Shared>, namespace: &str, id: &str, limit: Duration) -> Option<Self> {
        let name = (namespace.to_owned(), id.to_owned());
        let is_taken = |state: &mut State| state.names.contains_key(&name);
        let (mut state, waited) = shared
            .name_free
            .wait_timeout_while(shared.state(), limit, is_taken)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        state.names.insert(name.clone(), 1);
        drop(state);
        Some(Self { shared: Arc::clone(shared), name })
    }

    /// Takes a name, with whoever else has taken it so.
    fn share(shared: &Arc<Shared>, (namespace, id): (&str, &str)) -> Self {
        let name = (namespace.to_owned(), id.to_owned());
        *shared.state().names.entry(name.clone()).or_default() += 1;
        Self { shared: Arc::clone(shared), name }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(holders) = state.names.get_mut(&self.name) {
            *holders -= 1;
            if *holders == 0 {
                state.names.remove(&self.name);
            }
        }
        drop(state);
        self.shared.name_free.notify_all();
    }
}

/// Settles what earlier agents left unfinished, each in a thread that waits for its worker to end, and meanwhile lets
/// join it what has to. The names of the containers are taken when this returns, until then.
fn settle_left_overs(shared: &Arc<Shared>) -> Result<(), NodeError> {
    for left in target::LeftOver::find(&shared.directory)? {
        let name = Name::share(shared, left.name());
        thread::spawn(move || {
            let mut entry = None;
            let migration = left.migration().clone();
            let while_it_lives = || {
                entry = entry.take().or_else(|| streams::Entry::of_earlier(&name.shared, &migration));
            };
            if let Err(error) = left.settle(&name.shared.containerd, &name.shared.directory, while_it_lives) {
                log::error!("cannot settle an earlier migration of {}: {error}", name.name.1);
            }
        });
    }
    Ok(())
}

fn lock(directory: &Path) -> Result<Flock<File>, NodeError> {
    let path = directory.join("agent.lock");
    let file = File::create(&path).map_err(NodeError::file("create", &path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => Err(NodeError::AgentRuns { directory: directory.to_owned() }),
        Err((_, errno)) => Err(NodeError::file("lock", &path)(errno.into())),
    }
}

/// Removes the sockets of an agent that was killed. With the lock held, every socket here is a dead agent's.
fn remove_dead_sockets(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == SOCKET_SUFFIX)
            && let Err(error) = fs::remove_file(&path)
        {
            log::warn!(path:% = path.display(); "cannot remove a dead agent's socket: {error}");
        }
    }
}

/// Removes records that no source can still ask about.
fn forget_old_records(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_record =
            path.extension().is_some_and(|extension| extension == "fate" || extension == "worker");
        let age = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        let age = age.and_then(|modified| SystemTime::now().duration_since(modified).ok());
        if is_record
            && age.is_some_and(|age| age > RECORD_LIFE)
            && let Err(error) = fs::remove_file(&path)
        {
            log::warn!(path:% = path.display(); "cannot remove an old record: {error}");
        }
    }
}

/// How long an agent that was told to leave waits for the migrations that are under way.
pub const LEAVE_LIMIT: Duration = Duration::from_secs(60);

/// What the name of an incoming task's socket ends with.
const SOCKET_SUFFIX: &str = "sock";

const LEAVE_POLL: Duration = Duration::from_millis(50);

const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A source asks within minutes; a week outlasts every weekend.
const RECORD_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

#[cfg(test)]
mod tests;
