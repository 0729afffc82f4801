//! The server, and the threads that fill pages in.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use godwit_sys::{SysError, process};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::events::Events;
use super::handover::SOCKET_NAME;
use super::latency::Latency;
use super::ledger::{Lacking, Ledger};
use super::origin::Origin;
use super::space::{Counters, Filled, Service, Space};
use super::{Keeper, LEND_BYTES, PageSource, Requester, SpacePlan};
use crate::{MemoryError, PAGE_BYTES, PageRange, Result};

/// How a server works.
#[derive(Debug, Clone, Copy)]
pub struct FaultConfig {
    /// Threads that fill pages in.
    pub fill_threads: usize,
    /// Pages installed at once while no task waits.
    pub fill_pages: u64,
    /// Pages installed at once when one is missed, and by the fill shortly after.
    pub fault_pages: u64,
    /// Pages asked for at once when a remote one is missed: the block of so many that it lies in.
    pub request_pages: u64,
}

impl Default for FaultConfig {
    /// As many threads as cores, up to 4; 2 MiB, which are a block of the store and given back in one step, and for
    /// which a task that happens to miss a page of just these waits a millisecond or two; 64 KiB in need; 32 KiB from
    /// the other machine, which take a quarter of a millisecond at 1 Gb/s.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { fill_threads: cores.min(4), fill_pages: FILL_PAGES, fault_pages: 16, request_pages: 8 }
    }
}

/// What a server has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Tasks that CRIU handed over, and their children since.
    pub spaces: u64,
    /// Pages their source still has.
    pub held_pages: u64,
    /// Pages that have not arrived yet.
    pub remote_pages: u64,
    /// Pages that were asked for because one was missed.
    pub requested_pages: u64,
    /// Faults answered from what was here, and how long those took.
    pub local: Latency,
    /// Faults answered by what was asked for.
    pub network: Latency,
    /// Pages installed because one was missed.
    pub installed_on_fault_pages: u64,
    /// Pages filled in.
    pub installed_behind_pages: u64,
    /// Pages of zeros made because one was missed.
    pub zeroed_pages: u64,
    /// Pages that were there when theirs came.
    pub present_already_pages: u64,
}

/// Serves the pages of one restore. Stopped on drop; tasks whose pages are not all there then find zeros, unless
/// somebody keeps duplicates of the userfaultfds.
#[derive(Debug)]
pub struct FaultServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

pub(super) struct Shared {
    pub(super) service: Service,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) requester: Option<Arc<dyn Requester>>,
    pub(super) keeper: Option<Arc<dyn Keeper>>,
    state: Mutex<State>,
    pub(super) changed: Condvar,
    /// Wakes the event thread.
    pub(super) doorbell: EventFd,
    begin: Instant,
    /// When a fault was last seen, in ms since `begin`, plus one.
    fault_ms: AtomicU64,
}

/// What may be filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Filling {
    /// Nothing: CRIU has not registered all memory yet.
    #[default]
    No,
    /// What was pushed to the front.
    WorkingSet,
    /// Everything.
    All,
}

#[derive(Default)]
pub(super) struct State {
    /// Pages of tasks that CRIU has not handed over yet.
    pub(super) plan: BTreeMap<i32, Ledger>,
    /// What CRIU has handed over, as long as anything of it is left.
    pub(super) origins: BTreeMap<i32, Weak<Origin>>,
    pub(super) spaces: BTreeMap<u64, Arc<Space>>,
    pub(super) spaces_seen: u64,
    pub(super) restored: bool,
    pub(super) filling: Filling,
    pub(super) stopping: bool,
    pub(super) drained: bool,
    failure: Option<MemoryError>,
}

impl FaultServer {
    /// Listens in `directory`, CRIU's working directory for the restore, and serves the pages of `plan` (by the ids
    /// that processes have in the container): from `source` what is held, by way of `requester` what is remote.
    /// `keeper` gets a duplicate of each userfaultfd. Pages not in the plan are zeros.
    ///
    /// # Errors
    /// [`MemoryError::Plan`] for remote pages without a requester, [`MemoryError::File`] when the socket cannot be
    /// made, [`MemoryError::Sys`].
    pub fn start(
        directory: &Path,
        plan: &BTreeMap<i32, SpacePlan>,
        source: Arc<dyn PageSource>,
        requester: Option<Arc<dyn Requester>>,
        keeper: Option<Arc<dyn Keeper>>,
        config: FaultConfig,
    ) -> Result<Self> {
        if let (Some((pid, _)), None) = (plan.iter().find(|(_, plan)| !plan.remote.is_empty()), &requester) {
            return Err(MemoryError::Plan { pid: *pid, what: "remote pages and nobody to ask".to_owned() });
        }
        let path = directory.join(SOCKET_NAME);
        let listener = bind(&path)?;
        let doorbell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(call("eventfd"))?;
        let plan = plan.iter().map(|(pid, plan)| (*pid, Ledger::new(plan))).collect();
        let shared = Arc::new(Shared {
            service: Service { config, counters: Counters::default() },
            source,
            requester,
            keeper,
            state: Mutex::new(State { plan, ..State::default() }),
            changed: Condvar::new(),
            doorbell,
            begin: Instant::now(),
            fault_ms: AtomicU64::new(0),
        });
        let mut server = Self { shared: shared.clone(), threads: Vec::new() };
        let events = Events::new(shared, listener)?;
        server.spawn("faults", move |_| {
            prefer_this_thread();
            events.run();
        })?;
        for _ in 0..config.fill_threads.max(1) {
            server.spawn("fill", |shared| shared.fill())?;
        }
        Ok(server)
    }

    /// The contents of `pages` of `space`, named as the source names them, are in the page source. Those who wait for
    /// them get them before this returns, the fill does the rest; pages that nobody needs are released there.
    ///
    /// May be called from any thread, at any time, and more than once for a page.
    pub fn arrived(&self, space: i32, pages: PageRange) {
        self.shared.arrived(space, pages);
    }

    /// The contents of `pages` of `space`, named as the source names them, have come. Into their task they go at once
    /// where they can, without standing in the page source in between; what cannot is kept there, and then it is as if
    /// it had [`FaultServer::arrived`].
    ///
    /// May be called from any thread, at any time, and more than once for a page.
    ///
    /// # Errors
    /// [`MemoryError::Plan`] when `contents` are not those of as many pages, or the page source has no room for what has
    /// to be kept; [`MemoryError::Sys`].
    pub fn bring(&self, space: i32, pages: PageRange, contents: &[u8]) -> Result<()> {
        if contents.len() as u64 != pages.bytes() {
            let what = format!("{} bytes for {} pages", contents.len(), pages.pages());
            return Err(MemoryError::Plan { pid: space, what });
        }
        self.shared.bring(space, pages, contents)
    }

    /// What has not come, by process: what is to be sent, and asked for, again when the other machine was lost and is
    /// back. Nothing may arrive while this is called.
    pub fn lacking(&self) -> BTreeMap<i32, Lacking> {
        let state = self.shared.lock();
        let mut lacking: BTreeMap<i32, Lacking> =
            state.plan.iter().map(|(pid, ledger)| (*pid, ledger.lacking())).collect();
        let origins: Vec<Arc<Origin>> = state.origins.values().filter_map(Weak::upgrade).collect();
        drop(state);
        lacking.extend(origins.iter().map(|origin| (origin.pid, origin.lacking())));
        lacking.retain(|_, lacking| !lacking.pages.is_empty());
        lacking
    }

    /// Duplicates of all userfaultfds there are now, each with the process it came of.
    ///
    /// # Errors
    /// [`MemoryError::File`] when no descriptor is left.
    pub fn descriptors(&self) -> Result<Vec<(i32, OwnedFd)>> {
        let state = self.shared.lock();
        let duplicate = |space: &Arc<Space>| {
            let fd = space.faults.as_fd().try_clone_to_owned().map_err(MemoryError::file("userfaultfd"))?;
            Ok((space.pid(), fd))
        };
        state.spaces.values().map(duplicate).collect()
    }

    /// Begins to fill in pages that the tasks will want first, named as the source names them, and no others yet. CRIU
    /// must have registered all memory, which it has when it asks before resuming the tasks.
    pub fn begin_working_set(&self, working_set: &[(i32, PageRange)]) {
        let mut state = self.shared.lock();
        for (pid, pages) in working_set {
            if let Some(origin) = state.origins.get(pid).and_then(Weak::upgrade) {
                origin.prefer(*pages);
            }
        }
        if state.filling == Filling::No {
            state.filling = Filling::WorkingSet;
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Waits until what is to be filled in first is in its tasks, but for what a thread has in hand; false when `limit`
    /// passed first.
    pub fn wait_working_set(&self, limit: Duration) -> bool {
        let is_left = |state: &mut State| {
            state.filling == Filling::WorkingSet && state.spaces.values().any(|space| space.has_ready())
        };
        let state = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(state, limit, is_left);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Begins to fill pages in before CRIU says that all is restored: once it has registered all memory, as for
    /// [`FaultServer::begin_working_set`].
    pub fn begin_fill(&self) {
        self.shared.lock().filling = Filling::All;
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
        let counters = &self.shared.service.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = self.shared.lock();
        let sum = |of_ledger: fn(&Ledger) -> u64, of_space: fn(&Space) -> u64| {
            let planned: u64 = state.plan.values().map(of_ledger).sum();
            planned + state.spaces.values().map(|space| of_space(space)).sum::<u64>()
        };
        Progress {
            spaces: state.spaces_seen,
            held_pages: sum(Ledger::held, Space::held),
            remote_pages: sum(Ledger::remote, Space::remote),
            requested_pages: read(&counters.requested),
            local: counters.local.summary(),
            network: counters.network.summary(),
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
        formatter.debug_struct("Shared").field("config", &self.service.config).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ring(&self) {
        if let Err(errno) = self.doorbell.write(1) {
            log::error!("doorbell of the fault server: {errno}");
        }
    }

    /// The first failure is the one that counts; serving goes on as well as it can.
    pub(super) fn fail(&self, error: MemoryError) {
        log::error!("failed to serve pages: {error}");
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    pub(super) fn saw_fault(&self) {
        self.fault_ms.store(self.elapsed_ms() + 1, Ordering::Relaxed);
    }

    fn bring(&self, pid: i32, pages: PageRange, contents: &[u8]) -> Result<()> {
        let origin = {
            let state = self.lock();
            // Before, criu has not registered all memory yet.
            let origin = state.origins.get(&pid).filter(|_| state.filling == Filling::All);
            origin.and_then(Weak::upgrade)
        };
        let taken = origin.map(|origin| origin.bring(pages, contents, &self.service)).transpose()?.flatten();
        let Some(space) = taken else {
            self.source.keep(pid, pages, contents)?;
            self.arrived(pid, pages);
            return Ok(());
        };
        if space.held() > 0 {
            self.changed.notify_all();
        }
        if space.has_kept() || space.outstanding() == 0 {
            self.ring();
        }
        Ok(())
    }

    fn arrived(&self, pid: i32, pages: PageRange) {
        let origin = {
            let state = self.lock();
            if let Some(ledger) = state.plan.get(&pid) {
                // No task has it yet, so nobody waits. What is not in the plan, nobody needs.
                let unneeded = ledger.arrive(pages).unneeded;
                unneeded.ranges().iter().for_each(|range| self.source.release(pid, *range));
                return;
            }
            state.origins.get(&pid).and_then(Weak::upgrade)
        };
        let Some(origin) = origin else { return self.source.release(pid, pages) };
        if let Err(error) = origin.arrived(pages, &self.service) {
            self.fail(error);
        }
        drop(origin);
        let state = self.lock();
        let is_due = |space: &Arc<Space>| space.has_kept() || space.outstanding() == 0;
        let is_due = state.spaces.values().any(is_due);
        drop(state);
        self.changed.notify_all();
        if is_due {
            self.ring();
        }
    }

    /// Body of a fill thread.
    fn fill(&self) {
        let mut turn = 0_usize;
        loop {
            let (spaces, filling): (Vec<Arc<Space>>, _) = {
                let is_idle = |state: &mut State| {
                    let mut spaces = state.spaces.values();
                    let has_work = match state.filling {
                        Filling::No => false,
                        Filling::WorkingSet => spaces.any(|space| space.has_ready()),
                        Filling::All => spaces.any(|space| space.held() > 0),
                    };
                    !state.stopping && !has_work
                };
                let state =
                    self.changed.wait_while(self.lock(), is_idle).unwrap_or_else(PoisonError::into_inner);
                if state.stopping {
                    return;
                }
                (state.spaces.values().cloned().collect(), state.filling)
            };
            turn = turn.wrapping_add(1);
            if !self.fill_round(&spaces, turn, filling) {
                // Changes are read by the event thread; others' claims end in a moment.
                std::thread::sleep(Duration::from_micros(100));
            }
            if filling == Filling::WorkingSet {
                // With the lock taken, so that who waits has looked before this, or looks after it.
                drop(self.lock());
                self.changed.notify_all();
            }
        }
    }

    /// One step for each space, beginning with another each time; whether anything was done.
    fn fill_round(&self, spaces: &[Arc<Space>], turn: usize, filling: Filling) -> bool {
        let mut any = false;
        for index in 0..spaces.len() {
            let space = &spaces[(index + turn) % spaces.len()];
            match space.fill(&self.service, self.fill_pages(), filling) {
                Ok(filled) => any |= filled == Filled::More,
                Err(error) => {
                    self.fail(error);
                    return false;
                }
            }
            if space.outstanding() == 0 {
                self.ring();
            }
        }
        any
    }

    /// Large pieces when nobody waits, small ones while tasks miss pages.
    fn fill_pages(&self) -> u64 {
        let last = self.fault_ms.load(Ordering::Relaxed);
        let is_quiet = last == 0 || self.elapsed_ms() > last + QUIET_MS;
        let config = &self.service.config;
        if is_quiet { config.fill_pages } else { config.fault_pages }.max(1)
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Makes the calling thread, which does little and whom a task waits for, run before those that move pages in bulk.
/// Where that is not allowed it takes its turn.
pub fn prefer_this_thread() {
    if let Err(error) = process::prefer_this_thread() {
        log::debug!("faults are answered without a priority: {error}");
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

pub(super) fn call(call: &'static str) -> impl FnOnce(nix::errno::Errno) -> MemoryError {
    move |errno| SysError::Call { call, errno }.into()
}

/// As many as a source lends at once.
const FILL_PAGES: u64 = LEND_BYTES / PAGE_BYTES;

/// How long after a fault the fill keeps to small pieces.
const QUIET_MS: u64 = 5;
