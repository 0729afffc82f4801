//! The threads of the fault server.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use godwit_sys::SysError;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::PageSource;
use super::handover::{self, Message, SOCKET_NAME};
use super::ledger::Ledger;
use super::space::{Counters, Filled, Space};
use crate::{MemoryError, PageSet, Result};

/// How a server works.
#[derive(Debug, Clone, Copy)]
pub struct FaultConfig {
    /// Threads that fill pages in.
    pub fill_threads: usize,
    /// Pages installed at once while no task waits.
    pub fill_pages: u64,
    /// Pages installed at once when one is missed, and by the fill shortly after.
    pub fault_pages: u64,
}

impl Default for FaultConfig {
    /// As many threads as cores, up to 4; 256 KiB, and 64 KiB in need.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { fill_threads: cores.min(4), fill_pages: 64, fault_pages: 16 }
    }
}

/// What a server has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Tasks that CRIU handed over, and their children since.
    pub spaces: u64,
    /// Pages their source still has.
    pub held_pages: u64,
    /// Faults answered.
    pub faults: u64,
    /// Pages installed because one was missed.
    pub installed_on_fault_pages: u64,
    /// Pages filled in.
    pub installed_behind_pages: u64,
    /// Pages of zeros made because one was missed.
    pub zeroed_pages: u64,
    /// Pages that were there when theirs came.
    pub present_already_pages: u64,
}

/// Serves the pages of one restore. Stopped on drop; tasks whose pages are not all there then find zeros.
#[derive(Debug)]
pub struct FaultServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    config: FaultConfig,
    source: Arc<dyn PageSource>,
    state: Mutex<State>,
    changed: Condvar,
    counters: Counters,
    /// Wakes the event thread.
    doorbell: EventFd,
    begin: Instant,
    /// When a fault was last seen, in ms since `begin`, plus one.
    fault_ms: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Pages of tasks that CRIU has not handed over yet.
    plan: BTreeMap<i32, PageSet>,
    spaces: BTreeMap<u64, Arc<Space>>,
    spaces_seen: u64,
    restored: bool,
    filling: bool,
    stopping: bool,
    drained: bool,
    failure: Option<MemoryError>,
}

impl FaultServer {
    /// Listens in `directory`, CRIU's working directory for the restore, and serves from `source` the pages
    /// of `plan` (by the ids that processes have in the container). Pages not in the plan are zeros.
    ///
    /// # Errors
    /// [`MemoryError::File`] when the socket cannot be made, [`MemoryError::Sys`].
    pub fn start(
        directory: &Path,
        plan: BTreeMap<i32, PageSet>,
        source: Arc<dyn PageSource>,
        config: FaultConfig,
    ) -> Result<Self> {
        let path = directory.join(SOCKET_NAME);
        let listener = bind(&path)?;
        let doorbell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(call("eventfd"))?;
        let shared = Arc::new(Shared {
            config,
            source,
            state: Mutex::new(State { plan, ..State::default() }),
            changed: Condvar::new(),
            counters: Counters::default(),
            doorbell,
            begin: Instant::now(),
            fault_ms: AtomicU64::new(0),
        });
        let mut server = Self { shared: shared.clone(), threads: Vec::new() };
        let events = Events::new(shared, listener)?;
        server.spawn("faults", move |_| events.run())?;
        for _ in 0..config.fill_threads.max(1) {
            server.spawn("fill", |shared| shared.fill())?;
        }
        Ok(server)
    }

    /// Begins to fill pages in before CRIU says that all is restored: once it has registered all memory, which
    /// it has when it asks before resuming the tasks.
    pub fn begin_fill(&self) {
        self.shared.lock().filling = true;
        self.shared.changed.notify_all();
    }

    /// Waits until CRIU says that all tasks are restored; false when `limit` passed first.
    ///
    /// # Errors
    /// What made the server fail, once.
    pub fn wait_restored(&self, limit: Duration) -> Result<bool> {
        self.wait(limit, |state| state.restored)
    }

    /// Waits until every page is in its task; false when `limit` passed first.
    ///
    /// # Errors
    /// What made the server fail, once.
    pub fn wait_drained(&self, limit: Duration) -> Result<bool> {
        self.wait(limit, |state| state.drained)
    }

    /// What has been done.
    pub fn progress(&self) -> Progress {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = self.shared.lock();
        let planned: u64 = state.plan.values().map(PageSet::pages).sum();
        Progress {
            spaces: state.spaces_seen,
            held_pages: planned + state.spaces.values().map(|space| space.held()).sum::<u64>(),
            faults: read(&counters.faults),
            installed_on_fault_pages: read(&counters.installed_on_fault),
            installed_behind_pages: read(&counters.installed_behind),
            zeroed_pages: read(&counters.zeroed),
            present_already_pages: read(&counters.present_already),
        }
    }

    fn wait(&self, limit: Duration, done: impl Fn(&State) -> bool) -> Result<bool> {
        let waiting = |state: &mut State| !done(state) && state.failure.is_none() && !state.stopping;
        let state = self.shared.lock();
        let (mut state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        match state.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(done(&state)),
        }
    }

    fn spawn(&mut self, name: &'static str, body: impl FnOnce(&Shared) + Send + 'static) -> Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || body(&shared));
        self.threads.push(thread.map_err(MemoryError::file("thread"))?);
        Ok(())
    }
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
        self.shared.ring();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the fault server panicked");
            }
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Shared").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        if let Err(errno) = self.doorbell.write(1) {
            log::error!("doorbell of the fault server: {errno}");
        }
    }

    /// The first failure is the one that counts; serving goes on as well as it can.
    fn fail(&self, error: MemoryError) {
        log::error!("failed to serve pages: {error}");
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Body of a fill thread.
    fn fill(&self) {
        let mut turn = 0_usize;
        loop {
            let spaces: Vec<Arc<Space>> = {
                let idle = |state: &mut State| !state.stopping && (!state.filling || state.spaces.is_empty());
                let state = self.lock();
                let state = self.changed.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner);
                if state.stopping {
                    return;
                }
                state.spaces.values().cloned().collect()
            };
            turn = turn.wrapping_add(1);
            if !self.fill_round(&spaces, turn) {
                // Changes are read by the event thread; others' claims end in a moment.
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    /// One step for each space, beginning with another each time; whether anything was done.
    fn fill_round(&self, spaces: &[Arc<Space>], turn: usize) -> bool {
        let mut any = false;
        for index in 0..spaces.len() {
            let space = &spaces[(index + turn) % spaces.len()];
            match space.fill(&self.counters, self.fill_pages()) {
                Ok(Filled::More) => any = true,
                Ok(Filled::Later) => {}
                Ok(Filled::Nothing) => self.ring(),
                Err(error) => {
                    self.fail(error);
                    return false;
                }
            }
        }
        any
    }

    /// Large pieces when nobody waits, small ones while tasks miss pages.
    fn fill_pages(&self) -> u64 {
        let last = self.fault_ms.load(Ordering::Relaxed);
        let is_quiet = last == 0 || self.elapsed_ms() > last + QUIET_MS;
        if is_quiet { self.config.fill_pages } else { self.config.fault_pages }.max(1)
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The event thread.
struct Events {
    shared: Arc<Shared>,
    epoll: Epoll,
    listener: Option<UnixListener>,
    criu: Option<UnixStream>,
    next_key: u64,
    /// Spaces with faults that could not be answered yet.
    retry: Vec<u64>,
}

impl Events {
    fn new(shared: Arc<Shared>, listener: UnixListener) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(call("epoll_create1"))?;
        let readable = |key| EpollEvent::new(EpollFlags::EPOLLIN, key);
        epoll.add(&shared.doorbell, readable(DOORBELL)).map_err(call("epoll_ctl"))?;
        epoll.add(&listener, readable(LISTENER)).map_err(call("epoll_ctl"))?;
        Ok(Self { shared, epoll, listener: Some(listener), criu: None, next_key: SPACES, retry: Vec::new() })
    }

    fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let timeout = if self.retry.is_empty() { EpollTimeout::NONE } else { EpollTimeout::from(1_u8) };
            let count = match self.epoll.wait(&mut ready, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(errno) => return self.shared.fail(SysError::Call { call: "epoll_wait", errno }.into()),
            };
            let mut keys: Vec<u64> = std::mem::take(&mut self.retry);
            keys.extend(ready[..count].iter().map(EpollEvent::data));
            for key in keys {
                if let Err(error) = self.handle(key) {
                    self.shared.fail(error);
                }
            }
            if self.finish() {
                return;
            }
        }
    }

    fn handle(&mut self, key: u64) -> Result<()> {
        match key {
            DOORBELL => {
                // Only that it rang matters.
                let _rings = self.shared.doorbell.read();
                Ok(())
            }
            LISTENER => self.accept(),
            CRIU => self.hear(),
            key => self.serve(key),
        }
    }

    fn accept(&mut self) -> Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let (criu, _) = listener.accept().map_err(MemoryError::file(SOCKET_NAME))?;
        criu.set_read_timeout(Some(HEAR_LIMIT)).map_err(MemoryError::file(SOCKET_NAME))?;
        self.epoll.add(&criu, EpollEvent::new(EpollFlags::EPOLLIN, CRIU)).map_err(call("epoll_ctl"))?;
        self.criu = Some(criu);
        Ok(())
    }

    fn hear(&mut self) -> Result<()> {
        let Some(criu) = self.criu.as_mut() else { return Ok(()) };
        match handover::receive(criu) {
            Ok(Message::Task { pid, faults }) => {
                let plan = self.shared.lock().plan.remove(&pid).unwrap_or_default();
                self.add(Space::new(pid, self.shared.source.clone(), faults, Ledger::new(&plan)))
            }
            Ok(Message::Zombie) => Ok(()),
            Ok(Message::Restored) => {
                let mut state = self.shared.lock();
                (state.restored, state.filling) = (true, true);
                let missing: Vec<(i32, PageSet)> = std::mem::take(&mut state.plan).into_iter().collect();
                drop(state);
                self.shared.changed.notify_all();
                match missing.into_iter().find(|(_, pages)| !pages.is_empty()) {
                    None => Ok(()),
                    Some((pid, pages)) => Err(MemoryError::NotInstalled {
                        pid,
                        address: pages.ranges().first().map_or(0, |range| range.start()),
                        pages: pages.pages(),
                        reason: "criu restored no such process".to_owned(),
                    }),
                }
            }
            Ok(Message::Closed) => {
                self.criu = None;
                if self.shared.lock().restored {
                    return Ok(());
                }
                Err(MemoryError::Protocol { what: "closed before all was restored".to_owned() })
            }
            Err(error) => {
                // What follows cannot be understood.
                self.criu = None;
                Err(error)
            }
        }
    }

    fn add(&mut self, space: Space) -> Result<()> {
        let key = self.next_key;
        self.next_key += 1;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, key);
        self.epoll.add(space.faults.as_fd(), readable).map_err(call("epoll_ctl"))?;
        let mut state = self.shared.lock();
        state.spaces_seen += 1;
        state.spaces.insert(key, Arc::new(space));
        drop(state);
        self.shared.changed.notify_all();
        // A fault may have come before the descriptor was watched, which reports it all the same; a child's
        // may have been kept by nobody.
        self.serve(key)
    }

    fn serve(&mut self, key: u64) -> Result<()> {
        let Some(space) = self.shared.lock().spaces.get(&key).cloned() else { return Ok(()) };
        self.shared.fault_ms.store(self.shared.elapsed_ms() + 1, Ordering::Relaxed);
        let shared = &self.shared;
        let (children, is_left) = space.serve(&shared.counters, shared.config.fault_pages.max(1))?;
        if is_left {
            self.retry.push(key);
        }
        for child in children {
            self.add(child)?;
        }
        Ok(())
    }

    /// Lets go of what is complete; true when the thread has nothing more to do.
    fn finish(&mut self) -> bool {
        let mut state = self.shared.lock();
        if state.stopping {
            return true;
        }
        if !state.restored {
            return false;
        }
        let complete: Vec<u64> =
            state.spaces.iter().filter(|(_, space)| space.held() == 0).map(|(key, _)| *key).collect();
        for key in complete {
            let Some(space) = state.spaces.remove(&key) else { continue };
            if let Err(errno) = self.epoll.delete(space.faults.as_fd()) {
                log::debug!("userfaultfd of process {}: {errno}", space.pid());
            }
        }
        // A fork may still be on its way while a space is there, not afterwards.
        state.drained = state.spaces.is_empty();
        let is_drained = state.drained;
        drop(state);
        if is_drained {
            self.shared.changed.notify_all();
        }
        is_drained && self.criu.is_none()
    }
}

fn bind(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(MemoryError::file(path)(error));
        }
        _ => {}
    }
    UnixListener::bind(path).map_err(MemoryError::file(path))
}

fn call(call: &'static str) -> impl FnOnce(nix::errno::Errno) -> MemoryError {
    move |errno| SysError::Call { call, errno }.into()
}

const DOORBELL: u64 = 0;
const LISTENER: u64 = 1;
const CRIU: u64 = 2;
const SPACES: u64 = 16;
/// For the rest of a message whose first byte is there.
const HEAR_LIMIT: Duration = Duration::from_secs(10);
/// How long after a fault the fill keeps to small pieces.
const QUIET_MS: u64 = 5;
