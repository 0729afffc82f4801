//! One restored address space: its userfaultfd, its ledger, and what is done with both.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::userfaultfd::{Event, Installed, Stop, Userfaultfd};

use super::ledger::{Claim, Ledger, State};
use super::{Lent, PageSource};
use crate::{MemoryError, Result};

/// What was done, over all spaces.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) faults: AtomicU64,
    pub(super) installed_on_fault: AtomicU64,
    pub(super) installed_behind: AtomicU64,
    pub(super) zeroed: AtomicU64,
    pub(super) present_already: AtomicU64,
}

/// The pages of one process at the source, shared by the spaces that came of it.
struct Origin {
    pid: i32,
    source: Arc<dyn PageSource>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.source.finish(self.pid);
    }
}

/// See the module.
pub(super) struct Space {
    origin: Arc<Origin>,
    pub(super) faults: Userfaultfd,
    ledger: RwLock<Ledger>,
    /// Faults that could not be answered yet.
    kept: Mutex<Vec<u64>>,
    cursor: AtomicU64,
    exited: AtomicBool,
    /// Since when only pages have come that no mapping takes.
    unregistered: Mutex<Option<Instant>>,
}

/// What one step of the fill came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// Pages were installed; there may be more.
    More,
    /// Not now: the address space is changing.
    Later,
    /// Nothing is left.
    Nothing,
}

impl Space {
    pub(super) fn new(pid: i32, source: Arc<dyn PageSource>, faults: Userfaultfd, ledger: Ledger) -> Self {
        Self::of(Arc::new(Origin { pid, source }), faults, ledger)
    }

    fn of(origin: Arc<Origin>, faults: Userfaultfd, ledger: Ledger) -> Self {
        Self {
            origin,
            faults,
            ledger: RwLock::new(ledger),
            kept: Mutex::default(),
            cursor: AtomicU64::new(0),
            exited: AtomicBool::new(false),
            unregistered: Mutex::default(),
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.origin.pid
    }

    /// Pages its source still has for it.
    pub(super) fn held(&self) -> u64 {
        if self.exited.load(Ordering::Acquire) { 0 } else { self.read().held() }
    }

    /// Whether this is the last space that came of its process.
    fn is_last(&self) -> bool {
        Arc::strong_count(&self.origin) == 1
    }

    /// Reads what the kernel has to say, applies changes, and answers faults; returns forked children.
    /// True with it when something is left to be tried again.
    pub(super) fn serve(&self, counters: &Counters, pages_max: u64) -> Result<(Vec<Self>, bool)> {
        let mut children = Vec::new();
        let mut faults = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        loop {
            // Nobody installs between the reading of a change and the ledger's knowing it.
            let mut ledger = self.write();
            let events = self.faults.read_events()?;
            if events.is_empty() {
                break;
            }
            for event in events {
                match event {
                    Event::Fault { address, .. } => faults.push(address),
                    other => children.extend(self.apply(&mut ledger, other)),
                }
            }
        }
        let mut kept = Vec::new();
        for address in faults {
            counters.faults.fetch_add(1, Ordering::Relaxed);
            if !self.answer(address, counters, pages_max)? {
                counters.faults.fetch_sub(1, Ordering::Relaxed);
                kept.push(address);
            }
        }
        let is_left = !kept.is_empty();
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).extend(kept);
        Ok((children, is_left))
    }

    /// Installs the next pages behind the task's back.
    pub(super) fn fill(&self, counters: &Counters, pages_max: u64) -> Result<Filled> {
        if self.exited.load(Ordering::Acquire) {
            return Ok(Filled::Nothing);
        }
        let ledger = self.read();
        let Some(claim) = ledger.claim_next(self.cursor.load(Ordering::Relaxed), pages_max) else {
            // What others have claimed comes back, or is done, in a moment.
            return Ok(if ledger.held() == 0 { Filled::Nothing } else { Filled::Later });
        };
        self.cursor.store(claim.pages.end(), Ordering::Relaxed);
        let stop = self.install(&ledger, claim, &counters.installed_behind, counters)?;
        drop(ledger);
        Ok(match stop {
            Some(Stop::Changing) => Filled::Later,
            Some(Stop::Exited) => Filled::Nothing,
            _ => Filled::More,
        })
    }

    fn apply(&self, ledger: &mut Ledger, event: Event) -> Option<Self> {
        let released = match event {
            Event::Fault { .. } => Vec::new(),
            Event::Remove(pages) => ledger.drop_pages(pages),
            Event::Unmap(pages) => ledger.unmap(pages),
            Event::Remap { from, to } => ledger.remap(from, to),
            Event::Fork(faults) => return Some(Self::of(self.origin.clone(), faults, ledger.fork())),
        };
        if self.is_last() {
            for pages in released {
                self.origin.source.release(self.pid(), pages);
            }
        }
        None
    }

    /// Answers one fault; false when it has to be tried again after reading events.
    fn answer(&self, address: u64, counters: &Counters, pages_max: u64) -> Result<bool> {
        let page = PageRange::page_at(address);
        loop {
            let ledger = self.read();
            if let Some(claim) = ledger.claim_at(address, pages_max) {
                let stop = self.install(&ledger, claim, &counters.installed_on_fault, counters)?;
                match stop {
                    Some(Stop::Changing) => return Ok(false),
                    // The page itself was there, or went in before a later one stopped it: look again.
                    _ if ledger.state(address) != State::Held => {}
                    Some(Stop::Exited) => return Ok(true),
                    _ => continue,
                }
                self.faults.wake(page)?;
                return Ok(true);
            }
            if ledger.state(address) == State::Busy {
                // A fill thread is at it. Should it fail, the page is held again and ours.
                drop(ledger);
                std::thread::yield_now();
                continue;
            }
            // Never there, dropped, or installed and gone since (MADV_FREE): zeros.
            let Installed { stop, .. } = self.faults.zero(page)?;
            match stop {
                Some(Stop::Changing) => return Ok(false),
                Some(Stop::Exists) => self.faults.wake(page)?,
                Some(Stop::Exited) => self.exit(),
                // The mapping went, and whoever waits looks again.
                Some(Stop::NotRegistered) => self.faults.wake(page)?,
                None => {
                    counters.zeroed.fetch_add(1, Ordering::Relaxed);
                }
            }
            return Ok(true);
        }
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
        // An installation stays within one mapping: where two meet, it is tried in smaller pieces.
        let mut piece = claim.pages.bytes();
        let lent = self.origin.source.lend(self.pid(), origin, &mut |lent| {
            while done < claim.pages.bytes() {
                piece = piece.min(claim.pages.bytes() - done);
                let answer = self.copy(claim.pages.start(), done, piece, lent)?;
                done += answer.bytes;
                counter.fetch_add(answer.bytes / PAGE_BYTES, Ordering::Relaxed);
                stop = answer.stop;
                match stop {
                    None => piece *= 2,
                    Some(Stop::Exists) => {
                        done += PAGE_BYTES;
                        counters.present_already.fetch_add(1, Ordering::Relaxed);
                        stop = None;
                    }
                    Some(Stop::NotRegistered) if piece > PAGE_BYTES => {
                        piece = (piece / 2).next_multiple_of(PAGE_BYTES);
                    }
                    Some(_) => break,
                }
            }
            Ok(())
        });
        // Given back before it counts as done, so that complete means given back as well.
        if let Some(pages) = PageRange::new(origin.start(), origin.start() + done)
            && self.is_last()
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
            _ if done > 0 => *self.lock_unregistered() = None,
            _ => {}
        }
        Ok(stop)
    }

    /// While an address space changes, the kernel may find that a mapping is not there before it finds that it
    /// is changing. Only when it stays away for long was it never restored.
    fn check_patience(&self, address: u64) -> Result<()> {
        let mut since = self.lock_unregistered();
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

    fn lock_unregistered(&self) -> MutexGuard<'_, Option<Instant>> {
        self.unregistered.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A change of an address space takes as long as its events wait to be read, and they are read at once.
const PATIENCE: Duration = Duration::from_secs(1);
