//! Tracking by asynchronous write protection.
//!
//! A userfaultfd made inside the process registers its private anonymous mappings for write protection that
//! the kernel lifts by itself at the first write (WP_ASYNC). One PAGEMAP_SCAN per mapping then reports what is
//! there and what of it was written, and protects the written pages again, each atomically.
//!
//! No list of registered mappings is kept. The scan itself refuses a mapping that is not registered (`EPERM`),
//! and only the kernel knows at that moment: a mapping that went and came back, moved, or was forked has lost
//! its registration, one that was split or merged with its like has kept it. A refused mapping is registered
//! and reported whole, since the refused scan may have protected part of it without telling.
//!
//! Maps and page tables are opened anew for each collection: both belong to the memory a process had when they
//! were opened, and an exec replaces it. An exec between two steps yields too little now and all of it next
//! time; the last collection, with everything frozen, has no such gap.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::{Duration, Instant};

use godwit_sys::SysError;
use godwit_sys::arena::Arena;
use godwit_sys::inject::{self, InjectError};
use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::pagemap_scan::{Categories, Pagemap, Region, Scan};
use godwit_sys::pidfd::PidFd;
use godwit_sys::userfaultfd::{Features, Mode, Userfaultfd};
use nix::errno::Errno;

use super::{Armed, Collection, Delta, DirtyTracker, Found};
use crate::{MemoryError, PageSet, Result, maps};

/// [`DirtyTracker`] for kernel 6.7 and later.
#[derive(Debug)]
pub struct WpAsyncTracker {
    stop_limit: Duration,
    spaces: BTreeMap<i32, Space>,
    buffer: Vec<Region>,
}

/// What is known of one process.
#[derive(Debug)]
struct Space {
    process: PidFd,
    /// `None` while it cannot be tracked.
    faults: Option<Userfaultfd>,
    /// What collections reported and have not taken back.
    reported: PageSet,
}

impl WpAsyncTracker {
    /// Makes a tracker after trying on this process's own memory that the kernel can do it. `stop_limit`
    /// bounds how long a process is asked to stop for its injection.
    ///
    /// # Errors
    /// [`MemoryError::Unavailable`] on kernels before 6.7, or where userfaultfd is forbidden.
    pub fn new(stop_limit: Duration) -> Result<Self> {
        probe()?;
        Ok(Self { stop_limit, spaces: BTreeMap::new(), buffer: vec![Region::default(); REGIONS] })
    }

    /// Makes sure that `pid` is followed, if it can be and is not `frozen`; false when it has ended.
    fn attend(&mut self, pid: i32, frozen: bool, armed: &mut Armed) -> Result<bool> {
        if let Some(space) = self.spaces.get(&pid)
            && space.process.wait_exit(Duration::ZERO)?
        {
            // The id may have a new owner by now, whom the next collection attends to.
            self.spaces.remove(&pid);
            return Ok(false);
        }
        let space = match self.spaces.entry(pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => match PidFd::open(pid) {
                Ok(process) => place.insert(Space { process, faults: None, reported: PageSet::new() }),
                Err(SysError::NoProcess { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
            },
        };
        // After an exec the old memory is gone, and the userfaultfd with it.
        let is_armed = match &space.faults {
            Some(faults) => faults.is_alive()?,
            None => false,
        };
        if is_armed {
            return Ok(true);
        }
        space.faults = None;
        if frozen {
            return Ok(true);
        }
        match inject::userfaultfd(pid, self.stop_limit) {
            Ok(injected) => {
                armed.stopped.push((pid, injected.stopped));
                let faults = Userfaultfd::from_fd(injected.fd);
                faults.enable(features())?;
                space.faults = Some(faults);
                Ok(true)
            }
            Err(
                InjectError::Gone { .. }
                | InjectError::Zombie { .. }
                | InjectError::Sys(SysError::NoProcess { .. }),
            ) => {
                self.spaces.remove(&pid);
                Ok(false)
            }
            Err(error) => {
                armed.untracked.push((pid, error.to_string()));
                Ok(true)
            }
        }
    }

    fn scan(&mut self, pid: i32) -> Result<Option<Delta>> {
        let Some(space) = self.spaces.get_mut(&pid) else { return Ok(None) };
        let found = match scan_space(pid, space.faults.as_ref(), &mut self.buffer) {
            Ok(found) => found,
            // What it had is gone with it, or, after an exec under our hands, comes next time.
            Err(MemoryError::Sys(SysError::NoProcess { .. })) => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(found.into_delta(pid, &mut space.reported)))
    }
}

impl DirtyTracker for WpAsyncTracker {
    fn arm(&mut self, processes: &[i32]) -> Result<Armed> {
        let mut armed = Armed::default();
        for pid in processes {
            if self.attend(*pid, false, &mut armed)?
                && let Some(faults) = self.spaces.get(pid).and_then(|space| space.faults.as_ref())
            {
                // What fails here is reported whole by the first collection and tried again there.
                for range in maps::private_anonymous(*pid).unwrap_or_default() {
                    if let Err(error) = faults.register(range, Mode::WriteProtect) {
                        log::debug!("process {pid}: {range} not registered: {error}");
                    }
                }
            }
        }
        Ok(armed)
    }

    fn collect(&mut self, processes: &[i32]) -> Result<Collection> {
        self.collect_all(processes, false)
    }

    fn collect_frozen(&mut self, processes: &[i32]) -> Result<Collection> {
        self.collect_all(processes, true)
    }
}

impl WpAsyncTracker {
    fn collect_all(&mut self, processes: &[i32], frozen: bool) -> Result<Collection> {
        let mut collection = Collection::default();
        let known: Vec<i32> = self.spaces.keys().copied().collect();
        for pid in processes {
            if self.attend(*pid, frozen, &mut collection.armed)? {
                let begin = Instant::now();
                collection.deltas.extend(self.scan(*pid)?);
                collection.scan += begin.elapsed();
            }
        }
        let is_here = |pid: &i32| collection.deltas.iter().any(|delta| delta.pid == *pid);
        collection.gone = known.into_iter().filter(|pid| !is_here(pid)).collect();
        for pid in &collection.gone {
            self.spaces.remove(pid);
        }
        Ok(collection)
    }
}

/// All that a process has.
pub(super) fn everything(pid: i32) -> Result<Found> {
    scan_space(pid, None, &mut vec![Region::default(); REGIONS])
}

fn scan_space(pid: i32, faults: Option<&Userfaultfd>, buffer: &mut [Region]) -> Result<Found> {
    let ranges = maps::private_anonymous(pid)?;
    let pagemap = Pagemap::open(pid)?;
    let mut found = Found::default();
    for range in ranges {
        scan_mapping(&pagemap, faults, range, buffer, &mut found).map_err(|error| match error {
            // It has let its memory go: an open pagemap does not keep it.
            MemoryError::Sys(SysError::Call { errno: Errno::ESRCH, .. }) => {
                SysError::NoProcess { pid }.into()
            }
            error => error,
        })?;
    }
    Ok(found)
}

fn scan_mapping(
    pagemap: &Pagemap,
    faults: Option<&Userfaultfd>,
    range: PageRange,
    buffer: &mut [Region],
    found: &mut Found,
) -> Result<()> {
    if let Some(faults) = faults {
        // Kept apart until the whole mapping is known to be tracked.
        let mut regions = Vec::new();
        match pagemap.scan_all(range, PROTECT, buffer, |pages, kind| regions.push((pages, kind))) {
            Ok(()) => {
                for (pages, kind) in regions {
                    found.add(pages, kind, kind.contains(Categories::WRITTEN));
                }
                return Ok(());
            }
            Err(SysError::Call { errno: Errno::EPERM, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if faults.register(range, Mode::WriteProtect).is_ok() {
            let mut regions = Vec::new();
            if pagemap.scan_all(range, PROTECT, buffer, |pages, kind| regions.push((pages, kind))).is_ok() {
                for (pages, kind) in regions {
                    found.add(pages, kind, true);
                }
                return Ok(());
            }
        }
    }
    let look = Scan { protect: false, ..PROTECT };
    let before = found.present.pages();
    pagemap.scan_all(range, look, buffer, |pages, kind| found.add(pages, kind, true))?;
    found.untracked_pages += found.present.pages() - before;
    Ok(())
}

impl Found {
    fn add(&mut self, pages: PageRange, kind: Categories, is_dirty: bool) {
        if kind.contains(Categories::GUARD) {
            return;
        }
        self.present.insert(pages);
        if is_dirty {
            let set = if kind.contains(Categories::ZERO) { &mut self.zero } else { &mut self.dirty };
            set.insert(pages);
        }
    }
}

/// Tries the whole chain on a page of our own.
fn probe() -> Result<()> {
    let unavailable = |error: SysError| MemoryError::Unavailable {
        what: "tracking by write protection (WP_ASYNC, PAGEMAP_SCAN; kernel 6.7)",
        reason: error.to_string(),
    };
    let arena = Arena::map(2 * PAGE_BYTES)?;
    let faults = Userfaultfd::for_arena(&arena).map_err(unavailable)?;
    faults.enable(features()).map_err(unavailable)?;
    arena.store(0, 1);
    let _faults = faults.register(Mode::WriteProtect).map_err(unavailable)?;
    let own = i32::try_from(std::process::id()).map_err(|_| unavailable(SysError::NoProcess { pid: 0 }))?;
    let pagemap = Pagemap::open(own)?;
    let written = || -> Result<u64> {
        let mut pages = 0;
        let count = |range: PageRange, kind: Categories| {
            pages += if kind.contains(Categories::WRITTEN) { range.pages() } else { 0 };
        };
        let mut buffer = [Region::default(); 4];
        pagemap.scan_all(arena.range(), PROTECT, &mut buffer, count).map_err(unavailable)?;
        Ok(pages)
    };
    let (first, second) = (written()?, written()?);
    arena.store(0, 2);
    let third = written()?;
    if (first, second, third) == (1, 0, 1) {
        Ok(())
    } else {
        let reason = format!("one page written was reported as {first}, then {second}, then {third}");
        Err(MemoryError::Unavailable { what: "tracking by write protection", reason })
    }
}

fn features() -> Features {
    Features::WP_ASYNC.with(Features::WP_UNPOPULATED).with(Features::PAGEFAULT_WP)
}

/// All that is there, and what of it was written; the written is protected again.
const PROTECT: Scan = Scan {
    protect: true,
    inverted: Categories::from_bits(0),
    all_of: Categories::from_bits(0),
    any_of: Categories::PRESENT.with(Categories::SWAPPED),
    report: Categories::WRITTEN.with(Categories::ZERO).with(Categories::GUARD),
};
/// 384 KiB of buffer.
const REGIONS: usize = 1 << 14;
