//! One process of the source, and the address spaces that came of it: its own, and those of children forked since.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use godwit_sys::page_range::PageRange;

use super::ledger::Lacking;
use super::space::{Service, Space};
use super::{PageSource, Requester};
use crate::{PageSet, Result};

/// What the spaces of one process share.
pub(super) struct Origin {
    pub(super) pid: i32,
    pub(super) source: Arc<dyn PageSource>,
    requester: Option<Arc<dyn Requester>>,
    /// Only ever added to.
    spaces: Mutex<Vec<Weak<Space>>>,
    alive: AtomicUsize,
}

impl Origin {
    pub(super) fn new(
        pid: i32,
        source: Arc<dyn PageSource>,
        requester: Option<Arc<dyn Requester>>,
    ) -> Arc<Self> {
        Arc::new(Self { pid, source, requester, spaces: Mutex::default(), alive: AtomicUsize::new(0) })
    }

    /// Adds a space. A child has to be added while its parent's ledger is held exclusively.
    pub(super) fn add(&self, space: &Arc<Space>) {
        self.alive.fetch_add(1, Ordering::AcqRel);
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(space));
    }

    /// A space that was added is gone.
    pub(super) fn leave(&self) {
        self.alive.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether only one space is left, so that what it does not need nobody needs.
    pub(super) fn is_last(&self) -> bool {
        self.alive.load(Ordering::Acquire) <= 1
    }

    /// Asks for pages, which are `Requested` in one space already, on behalf of all.
    pub(super) fn request(&self, pages: PageRange) {
        self.for_each(|space| space.mark_requested(pages));
        // A plan with remote pages and nobody to ask is refused at the start.
        if let Some(requester) = &self.requester {
            requester.request(self.pid, pages);
        }
    }

    /// Has pages filled in before others.
    pub(super) fn prefer(&self, pages: PageRange) {
        self.for_each(|space| space.prefer(pages));
    }

    /// What has not come, of what any of its spaces needs. Nothing may arrive meanwhile.
    pub(super) fn lacking(&self) -> Lacking {
        let mut lacking = Lacking::default();
        self.for_each(|space| lacking.join(&space.lacking()));
        lacking
    }

    /// The contents of pages have come, and go into the one space that there is. None, and nothing is done, when
    /// there are several, which may all need them.
    pub(super) fn bring(
        &self,
        pages: PageRange,
        contents: &[u8],
        service: &Service,
    ) -> Result<Option<Arc<Space>>> {
        let mut alive: Vec<Arc<Space>> = {
            let spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner);
            spaces.iter().filter_map(Weak::upgrade).collect()
        };
        let Some(space) = alive.pop().filter(|_| alive.is_empty()) else { return Ok(None) };
        let is_taken = space.bring(pages, contents, service)?;
        Ok(is_taken.then_some(space))
    }

    /// The contents of pages have come, and are in the source.
    pub(super) fn arrived(&self, pages: PageRange, service: &Service) -> Result<()> {
        let mut unneeded: PageSet = [pages].into_iter().collect();
        let mut answer = Ok(());
        self.for_each(|space| match space.arrived(pages, service) {
            Ok(others) => unneeded = unneeded.intersection(&others),
            // The first of them.
            Err(error) if answer.is_ok() => answer = Err(error),
            Err(error) => log::error!("failed to install pages that came: {error}"),
        });
        if self.is_last() {
            unneeded.ranges().iter().for_each(|range| self.source.release(self.pid, *range));
        }
        answer
    }

    /// Calls `visit` for each space, also for children that are forked meanwhile: a child is in the list before its
    /// parent's ledger, of which it has a copy, can be changed again.
    fn for_each(&self, mut visit: impl FnMut(&Arc<Space>)) {
        let mut seen = 0;
        loop {
            let new: Vec<Weak<Space>> = {
                let spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner);
                spaces[seen..].to_vec()
            };
            if new.is_empty() {
                return;
            }
            seen += new.len();
            new.iter().filter_map(Weak::upgrade).for_each(|space| visit(&space));
        }
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.source.finish(self.pid);
        if let Some(requester) = &self.requester {
            requester.finished(self.pid);
        }
    }
}
