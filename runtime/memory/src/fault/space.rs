//! One restored address space: its userfaultfd, its ledger, and what is done with both.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::userfaultfd::{EVENTS_MAX, Event, Installed, Stop, Userfaultfd};

use super::latency::Histogram;
use super::ledger::{Claim, Lacking, Ledger, State};
use super::origin::Origin;
use super::server::Filling;
use super::{FaultConfig, Lent};
use crate::{MemoryError, PageSet, Result};

/// How all spaces are served, and what was done.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) config: FaultConfig,
    pub(super) counters: Counters,
}

/// What was done, over all spaces.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Waits that ended without another machine.
    pub(super) local: Histogram,
    /// Waits for remote pages.
    pub(super) network: Histogram,
    pub(super) requested: AtomicU64,
    pub(super) installed_on_fault: AtomicU64,
    pub(super) installed_behind: AtomicU64,
    pub(super) zeroed: AtomicU64,
    pub(super) present_already: AtomicU64,
}

/// See the module.
pub(super) struct Space {
    origin: Arc<Origin>,
    pub(super) faults: Userfaultfd,
    ledger: RwLock<Ledger>,
    /// Faults that could not be answered yet, to be tried again.
    kept: Mutex<Vec<Missed>>,
    /// Faults that wait for remote pages. Locked before the ledger.
    waiting: Mutex<Vec<Missed>>,
    /// What arrived and is not installed yet, a hint to the fill.
    ready: Mutex<VecDeque<PageRange>>,
    cursor: AtomicU64,
    exited: AtomicBool,
    /// Since when only pages have come that no mapping takes.
    unregistered: Mutex<Option<Instant>>,
}

/// A fault that is not answered.
#[derive(Debug, Clone, Copy)]
struct Missed {
    address: u64,
    since: Instant,
    /// Whether it had to wait for a remote page.
    network: bool,
}

/// What became of a fault.
#[derive(Debug, Clone, Copy)]
enum Answered {
    Done {
        network: bool,
    },
    /// To be tried again after reading events.
    Later(Missed),
    /// A remote page was asked for; its arrival is the answer.
    Waiting,
}

/// What one step of the fill came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// Pages were installed; there may be more.
    More,
    /// Not now: the address space is changing.
    Later,
    /// There is nothing to install.
    Nothing,
}

impl Space {
    /// A space that came of `origin`, which knows it from here on.
    pub(super) fn new(origin: Arc<Origin>, faults: Userfaultfd, ledger: Ledger) -> Arc<Self> {
        let space = Arc::new(Self {
            origin,
            faults,
            ledger: RwLock::new(ledger),
            kept: Mutex::default(),
            waiting: Mutex::default(),
            ready: Mutex::default(),
            cursor: AtomicU64::new(0),
            exited: AtomicBool::new(false),
            unregistered: Mutex::default(),
        });
        space.origin.add(&space);
        space
    }

    pub(super) fn pid(&self) -> i32 {
        self.origin.pid
    }

    /// Pages its source has for it.
    pub(super) fn held(&self) -> u64 {
        if self.has_exited() { 0 } else { self.read().held() }
    }

    /// Pages that are still at the other machine.
    pub(super) fn remote(&self) -> u64 {
        if self.has_exited() { 0 } else { self.read().remote() }
    }

    /// Pages it is still to get, from wherever.
    pub(super) fn outstanding(&self) -> u64 {
        if self.has_exited() { 0 } else { self.read().outstanding() }
    }

    /// Whether pages are to be filled in before others.
    pub(super) fn has_ready(&self) -> bool {
        !lock(&self.ready).is_empty()
    }

    /// Has pages filled in before others, if they are held. Before the task has run: it has moved nothing yet.
    pub(super) fn prefer(&self, pages: PageRange) {
        lock(&self.ready).push_back(pages);
    }

    /// Whether faults are left to be tried again.
    pub(super) fn has_kept(&self) -> bool {
        !lock(&self.kept).is_empty()
    }

    /// Finds out whether the space has gone. Nothing tells, unless somebody installs.
    pub(super) fn check_alive(&self) -> Result<()> {
        if !self.faults.is_alive()? {
            self.exit();
        }
        Ok(())
    }

    /// Reads what the kernel has to say, applies changes, and answers faults; returns forked children.
    ///
    /// Goes on after an error, and returns the first one.
    pub(super) fn serve(&self, service: &Service) -> (Vec<Arc<Self>>, Result<()>) {
        let mut children = Vec::new();
        let mut missed = std::mem::take(&mut *lock(&self.kept));
        let (mut is_changed, mut answer) = (false, Ok(()));
        loop {
            // Nobody installs between the reading of a change and the ledger's knowing it.
            let mut ledger = self.write();
            let events = match self.faults.read_events() {
                Ok(events) => events,
                Err(error) => {
                    answer = Err(error.into());
                    break;
                }
            };
            // What comes after these is told again: a further look would have to wait once more for those who install.
            let is_last = events.len() < EVENTS_MAX;
            for event in events {
                match event {
                    Event::Fault { address, .. } => {
                        missed.push(Missed { address, since: Instant::now(), network: false });
                    }
                    other => {
                        is_changed = true;
                        children.extend(self.apply(&mut ledger, other));
                    }
                }
            }
            if is_last {
                break;
            }
        }
        if is_changed {
            missed.extend(self.take_waiting(|state| !is_remote(state)));
        }
        for missed in missed {
            let settled = self.settle_fault(missed, service);
            answer = answer.and(settled);
        }
        (children, answer)
    }

    /// Installs the next pages behind the task's back, of those that may be filled in.
    pub(super) fn fill(&self, service: &Service, pages_max: u64, filling: Filling) -> Result<Filled> {
        if self.has_exited() {
            return Ok(Filled::Nothing);
        }
        let ledger = self.read();
        let next = || match filling {
            Filling::All => ledger.claim_next(self.cursor.load(Ordering::Relaxed), pages_max),
            Filling::WorkingSet | Filling::No => None,
        };
        let Some(claim) = self.claim_ready(&ledger, pages_max).or_else(next) else {
            // What others have claimed comes back, or is done, in a moment.
            return Ok(if ledger.held() == 0 { Filled::Nothing } else { Filled::Later });
        };
        self.cursor.store(claim.pages.end(), Ordering::Relaxed);
        let counters = &service.counters;
        let stop = self.install(&ledger, claim, &counters.installed_behind, counters)?;
        drop(ledger);
        Ok(match stop {
            Some(Stop::Changing) => Filled::Later,
            Some(Stop::Exited) => Filled::Nothing,
            _ => Filled::More,
        })
    }

    /// What has not come, as long as nothing arrives.
    pub(super) fn lacking(&self) -> Lacking {
        if self.has_exited() { Lacking::default() } else { self.read().lacking() }
    }

    /// Somebody else asked for `origin`, named as the source names it.
    pub(super) fn mark_requested(&self, origin: PageRange) {
        self.read().mark_requested(origin);
    }

    /// The contents of `origin`, named as the source names it, are in the source: who waits gets them. Returns what
    /// of it this space does not need.
    pub(super) fn arrived(&self, origin: PageRange, service: &Service) -> Result<PageSet> {
        if self.has_exited() {
            return Ok([origin].into_iter().collect());
        }
        let arrived = self.read().arrive(origin);
        lock(&self.ready).extend(&arrived.held);
        let held: PageSet = arrived.held.into_iter().collect();
        if !held.is_empty() {
            for missed in self.take_waiting(|state| !is_remote(state)) {
                self.settle_fault(missed, service)?;
            }
        }
        Ok(arrived.unneeded)
    }

    /// The contents of `origin`, named as the source names it, are here: they go into the task at once, and what cannot
    /// go there is kept in the source. False, and nothing is done, where another space may need them as well.
    pub(super) fn bring(&self, origin: PageRange, contents: &[u8], service: &Service) -> Result<bool> {
        if self.has_exited() {
            return Ok(true);
        }
        let ledger = self.read();
        // With the ledger in hand no fork becomes known, and of one that is not, the kernel tells every installation.
        if !self.origin.is_last() {
            return Ok(false);
        }
        let mut answer = Ok(());
        for claim in ledger.claim_arriving(origin) {
            let first = usize::try_from(claim.origin - origin.start()).unwrap_or(usize::MAX);
            let end = first.saturating_add(usize::try_from(claim.pages.bytes()).unwrap_or(usize::MAX));
            let installed = self.install_arriving(&ledger, claim, &contents[first..end], &service.counters);
            answer = answer.and(installed);
        }
        drop(ledger);
        for missed in self.take_waiting(|state| !is_remote(state)) {
            if self.read().state(missed.address) == State::Installed {
                // The installation has woken whoever waited.
                service.counters.network.record(missed.since.elapsed());
            } else {
                let settled = self.settle_fault(missed, service);
                answer = answer.and(settled);
            }
        }
        answer.map(|()| true)
    }

    fn apply(&self, ledger: &mut Ledger, event: Event) -> Option<Arc<Self>> {
        let released = match event {
            Event::Fault { .. } => Vec::new(),
            Event::Remove(pages) => ledger.drop_pages(pages),
            Event::Unmap(pages) => ledger.unmap(pages),
            Event::Remap { from, to } => ledger.remap(from, to),
            Event::Fork(faults) => return Some(Self::new(self.origin.clone(), faults, ledger.fork())),
        };
        if self.origin.is_last() {
            for pages in released {
                self.origin.source.release(self.pid(), pages);
            }
        }
        None
    }

    /// Answers a fault, or sees to it that it is answered later.
    fn settle_fault(&self, missed: Missed, service: &Service) -> Result<()> {
        match self.answer(missed, service) {
            Ok(Answered::Done { network }) => {
                let counters = &service.counters;
                let histogram = if network { &counters.network } else { &counters.local };
                histogram.record(missed.since.elapsed());
                Ok(())
            }
            Ok(Answered::Later(missed)) => {
                lock(&self.kept).push(missed);
                Ok(())
            }
            Ok(Answered::Waiting) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn answer(&self, mut missed: Missed, service: &Service) -> Result<Answered> {
        let Missed { address, .. } = missed;
        let page = PageRange::page_at(address);
        let counters = &service.counters;
        loop {
            let done = Answered::Done { network: missed.network };
            let ledger = self.read();
            if let Some(claim) = ledger.claim_at(address, service.config.fault_pages.max(1)) {
                let stop = self.install(&ledger, claim, &counters.installed_on_fault, counters)?;
                match stop {
                    Some(Stop::Changing) => return Ok(Answered::Later(missed)),
                    // The page itself was there, or went in before a later one stopped it: look again.
                    _ if ledger.state(address) != State::Held => {}
                    Some(Stop::Exited) => return Ok(done),
                    _ => continue,
                }
                self.faults.wake(page)?;
                return Ok(done);
            }
            match ledger.state(address) {
                // Between the claim and here it was given back.
                State::Held => {}
                State::Busy => {
                    // Another thread is at it; nobody is once the ledger is exclusive. Should it fail, the page is
                    // held and ours. This thread may be preferred to that one, and must not spin.
                    drop(ledger);
                    drop(self.write());
                }
                State::Remote | State::Requested => {
                    let wanted = ledger.request(address, service.config.request_pages);
                    drop(ledger);
                    missed.network = true;
                    let waits = self.wait_for(missed);
                    for pages in wanted {
                        counters.requested.fetch_add(pages.pages(), Ordering::Relaxed);
                        self.origin.request(pages);
                    }
                    if waits {
                        return Ok(Answered::Waiting);
                    }
                }
                // Never there, dropped, or installed and gone since (MADV_FREE).
                State::Absent | State::Dropped | State::Installed => {
                    let is_answered = self.zero(page, counters)?;
                    return Ok(if is_answered { done } else { Answered::Later(missed) });
                }
            }
        }
    }

    /// Answers with zeros; false when it has to be tried again after reading events.
    fn zero(&self, page: PageRange, counters: &Counters) -> Result<bool> {
        let Installed { stop, .. } = self.faults.zero(page)?;
        match stop {
            Some(Stop::Changing) => return Ok(false),
            Some(Stop::Exited) => self.exit(),
            // There, or the mapping went: whoever waits looks again.
            Some(Stop::Exists | Stop::NotRegistered) => self.faults.wake(page)?,
            None => {
                counters.zeroed.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(true)
    }

    /// Lets a fault wait for its remote page; false when that has arrived, or gone, meanwhile.
    fn wait_for(&self, missed: Missed) -> bool {
        // Who brings the page marks it in the ledger, and looks here afterwards.
        let mut waiting = lock(&self.waiting);
        let waits = is_remote(self.read().state(missed.address));
        if waits {
            waiting.push(missed);
        }
        waits
    }

    /// Takes out the waiting faults whose page's state is such.
    fn take_waiting(&self, such: impl Fn(State) -> bool) -> Vec<Missed> {
        let mut waiting = lock(&self.waiting);
        if waiting.is_empty() {
            return Vec::new();
        }
        let ledger = self.read();
        waiting.extract_if(.., |missed| such(ledger.state(missed.address))).collect()
    }

    /// Claims pages of those that arrived last.
    fn claim_ready(&self, ledger: &Ledger, pages_max: u64) -> Option<Claim> {
        let mut ready = lock(&self.ready);
        while let Some(range) = ready.pop_front() {
            // Some of it may have been installed for a fault.
            for page in range.chunks(1) {
                let rest = (range.end() - page.start()) / PAGE_BYTES;
                let Some(claim) = ledger.claim_at(page.start(), pages_max.min(rest)) else { continue };
                if let Some(rest) = PageRange::new(claim.pages.end(), range.end()) {
                    ready.push_front(rest);
                }
                return Some(claim);
            }
        }
        None
    }

    /// Installs claimed pages that have just come, and settles them, whatever comes: what cannot be installed now is
    /// held from here on.
    fn install_arriving(
        &self,
        ledger: &Ledger,
        claim: Claim,
        contents: &[u8],
        counters: &Counters,
    ) -> Result<()> {
        let mut done = 0;
        let counter = &counters.installed_behind;
        let stop = self.install_lent(claim, Lent::Bytes(contents), &mut done, counter, counters);
        let mut kept = Ok(());
        if let Some(rest) = PageRange::new(claim.origin + done, claim.origin_pages().end()) {
            let part = usize::try_from(done).ok().and_then(|done| contents.get(done..)).unwrap_or_default();
            kept = self.origin.source.keep(self.pid(), rest, part);
            lock(&self.ready).extend(PageRange::new(claim.pages.start() + done, claim.pages.end()));
        }
        ledger.settle_arriving(claim, done / PAGE_BYTES);
        if stop? == Some(Stop::Exited) {
            self.exit();
        }
        kept
    }

    /// Installs what was claimed and settles it, whatever comes.
    fn install(
        &self,
        ledger: &Ledger,
        claim: Claim,
        counter: &AtomicU64,
        counters: &Counters,
    ) -> Result<Option<Stop>> {
        let origin = claim.origin_pages();
        let (mut done, mut stop) = (0, None);
        let lent = self.origin.source.lend(self.pid(), origin, &mut |lent| {
            stop = self.install_lent(claim, lent, &mut done, counter, counters)?;
            Ok(())
        });
        // Given back before it counts as done, so that complete means given back as well.
        if let Some(pages) = PageRange::new(origin.start(), origin.start() + done)
            && self.origin.is_last()
        {
            self.origin.source.release(self.pid(), pages);
        }
        ledger.settle(claim, done / PAGE_BYTES);
        lent?;
        match stop {
            Some(Stop::Exited) => self.exit(),
            Some(Stop::NotRegistered) => {
                self.check_patience(claim.pages.start() + done)?;
                return Ok(Some(Stop::Changing));
            }
            _ if done > 0 => *lock(&self.unregistered) = None,
            _ => {}
        }
        Ok(stop)
    }

    /// Installs what was claimed; `done` is how many bytes of it are in the task, also after an error.
    fn install_lent(
        &self,
        claim: Claim,
        lent: Lent<'_>,
        done: &mut u64,
        counter: &AtomicU64,
        counters: &Counters,
    ) -> Result<Option<Stop>> {
        // An installation stays within one mapping: where two meet, it is tried in smaller pieces.
        let mut piece = claim.pages.bytes();
        while *done < claim.pages.bytes() {
            piece = piece.min(claim.pages.bytes() - *done);
            let answer = self.copy(claim.pages.start(), *done, piece, lent)?;
            *done += answer.bytes;
            counter.fetch_add(answer.bytes / PAGE_BYTES, Ordering::Relaxed);
            match answer.stop {
                None => piece *= 2,
                Some(Stop::Exists) => {
                    *done += PAGE_BYTES;
                    counters.present_already.fetch_add(1, Ordering::Relaxed);
                }
                Some(Stop::NotRegistered) if piece > PAGE_BYTES => {
                    piece = (piece / 2).next_multiple_of(PAGE_BYTES);
                }
                stop => return Ok(stop),
            }
        }
        Ok(None)
    }

    /// While an address space changes, the kernel may find that a mapping is not there before it finds that it
    /// is changing. Only when it stays away for long was it never restored.
    fn check_patience(&self, address: u64) -> Result<()> {
        let mut since = lock(&self.unregistered);
        if since.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
            return Ok(());
        }
        Err(MemoryError::NotInstalled {
            pid: self.pid(),
            address,
            pages: 1,
            reason: "criu restored no lazy memory there".to_owned(),
        })
    }

    /// Installs `bytes` bytes at `done` behind `start`, which is where the lent pages begin.
    fn copy(&self, start: u64, done: u64, bytes: u64, lent: Lent<'_>) -> Result<Installed> {
        Ok(match lent {
            Lent::Window(window, offset) => {
                self.faults.copy_from_window(start + done, window, offset + done, bytes)?
            }
            Lent::Bytes(contents) => {
                let part = usize::try_from(done).ok().zip(usize::try_from(done + bytes).ok());
                let part = part.and_then(|(from, to)| contents.get(from..to));
                let short =
                    || MemoryError::Plan { pid: self.pid(), what: "a source lent too little".to_owned() };
                self.faults.copy(start + done, part.ok_or_else(short)?)?
            }
        })
    }

    fn has_exited(&self) -> bool {
        self.exited.load(Ordering::Acquire)
    }

    fn exit(&self) {
        self.exited.store(true, Ordering::Release);
    }

    fn read(&self) -> RwLockReadGuard<'_, Ledger> {
        self.ledger.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Ledger> {
        self.ledger.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        self.origin.leave();
    }
}

fn is_remote(state: State) -> bool {
    matches!(state, State::Remote | State::Requested)
}

/// What these locks protect is whole between any two statements, so a panic elsewhere does no harm to it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A change of an address space takes as long as its events wait to be read, and they are read at once.
const PATIENCE: Duration = Duration::from_secs(1);
