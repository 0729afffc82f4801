//! Tracking by soft-dirty bits, for kernels before 6.7 that have them.
//!
//! Writing 4 to `/proc/PID/clear_refs` clears the bits of a whole process, pagemap's bit 55 shows what was
//! written since. Between reading the bits and clearing them a write would be lost without a trace, so the
//! processes are halted for that time, by whatever the caller gives (its cgroup's freezer): the halt grows
//! with memory, 8 bytes are read for each page.
//!
//! Two traps. The kernel takes the 4 even when it has no such bits: a probe writes a page and looks. And a
//! page that was dropped and then read is the kernel's page of zeros, present and clean, where something else
//! stood before: it is told by its frame number, which needs CAP_SYS_ADMIN, and reported as zero each time.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use godwit_sys::SysError;
use godwit_sys::arena::Arena;
use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::pagemap_scan::{Entry, Pagemap};
use godwit_sys::pidfd::PidFd;

use super::{Armed, Collection, DirtyTracker, Found};
use crate::{MemoryError, PageSet, Result, maps};

/// What the tracker needs of a kernel.
pub trait SoftDirtyKernel {
    /// Keeps the processes from running until it is dropped.
    type Halt;
    /// One life of a process: differs when the id has a new owner.
    type Life: PartialEq;

    /// Halts all processes that are followed.
    ///
    /// # Errors
    /// What the means of halting says.
    fn halt(&mut self) -> Result<Self::Halt>;

    /// The process that has `pid` now; `None` when there is none.
    ///
    /// # Errors
    /// [`MemoryError`].
    fn life(&self, pid: i32) -> Result<Option<Self::Life>>;

    /// The private anonymous mappings of a process.
    ///
    /// # Errors
    /// [`SysError::NoProcess`] when it has ended.
    fn mappings(&self, pid: i32) -> Result<Vec<PageRange>>;

    /// The page table entries of `range`.
    ///
    /// # Errors
    /// [`SysError::NoProcess`] when the process has ended.
    fn entries(&self, pid: i32, range: PageRange) -> Result<Vec<Entry>>;

    /// Clears the bits of a process.
    ///
    /// # Errors
    /// [`SysError::NoProcess`] when it has ended.
    fn clear(&mut self, pid: i32) -> Result<()>;

    /// Whether an entry is the page of zeros.
    fn is_zero(&self, entry: Entry) -> bool;
}

/// [`DirtyTracker`] for kernels with soft-dirty bits.
#[derive(Debug)]
pub struct SoftDirtyTracker<K: SoftDirtyKernel> {
    kernel: K,
    spaces: BTreeMap<i32, (K::Life, PageSet)>,
}

impl<K: SoftDirtyKernel> SoftDirtyTracker<K> {
    /// Makes a tracker over a kernel that has been probed.
    pub fn new(kernel: K) -> Self {
        Self { kernel, spaces: BTreeMap::new() }
    }

    /// The kernel it was made over.
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    fn scan(&mut self, pid: i32, is_new: bool) -> Result<Found> {
        let mut found = Found::default();
        for range in self.kernel.mappings(pid)? {
            for chunk in range.chunks(CHUNK_PAGES) {
                let entries = self.kernel.entries(pid, chunk)?;
                for (page, entry) in chunk.chunks(1).zip(entries) {
                    if !entry.occupied() {
                        continue;
                    }
                    found.present.insert(page);
                    if self.kernel.is_zero(entry) {
                        found.zero.insert(page);
                    } else if is_new || entry.soft_dirty() {
                        found.dirty.insert(page);
                    }
                }
            }
        }
        self.kernel.clear(pid)?;
        Ok(found)
    }
}

impl<K: SoftDirtyKernel> DirtyTracker for SoftDirtyTracker<K> {
    fn arm(&mut self, _processes: &[i32]) -> Result<Armed> {
        // A process's first collection reports all it has and clears its bits: nothing to do ahead of it.
        Ok(Armed::default())
    }

    fn collect_frozen(&mut self, processes: &[i32]) -> Result<Collection> {
        self.collect(processes)
    }

    fn collect(&mut self, processes: &[i32]) -> Result<Collection> {
        let mut collection = Collection::default();
        let mut before = std::mem::take(&mut self.spaces);
        let halt = self.kernel.halt()?;
        let begin = Instant::now();
        for pid in processes {
            let Some(life) = self.kernel.life(*pid)? else { continue };
            let reported = before.get(pid).filter(|(known, _)| *known == life).map(|(_, set)| set.clone());
            let found = match self.scan(*pid, reported.is_none()) {
                Ok(found) => found,
                Err(MemoryError::Sys(SysError::NoProcess { .. })) => continue,
                Err(error) => return Err(error),
            };
            // A new owner of an id takes over what was reported of the old one: it is absent in the new one.
            let stale = before.remove(pid).map(|(_, set)| set).unwrap_or_default();
            let mut reported = reported.unwrap_or(stale);
            collection.deltas.push(found.into_delta(*pid, &mut reported));
            self.spaces.insert(*pid, (life, reported));
        }
        collection.scan = begin.elapsed();
        drop(halt);
        collection.gone = before.into_keys().collect();
        Ok(collection)
    }
}

/// The real kernel, through procfs.
pub struct Procfs<H> {
    halt: H,
    zero_frame: u64,
}

impl<G, H: FnMut() -> Result<G>> Procfs<H> {
    /// Probes the kernel on a page of our own; `halt` stops the processes that are followed until what it
    /// returns is dropped.
    ///
    /// # Errors
    /// [`MemoryError::Unavailable`] without soft-dirty bits, or without CAP_SYS_ADMIN.
    pub fn new(halt: H) -> Result<Self> {
        let unavailable = |reason: &str| MemoryError::Unavailable {
            what: "tracking by soft-dirty bits",
            reason: reason.to_owned(),
        };
        let own = i32::try_from(std::process::id()).map_err(|_| unavailable("no process id"))?;
        let arena = Arena::map(2 * PAGE_BYTES)?;
        // Reading a page that was never written maps the page of zeros.
        arena.store(0, arena.load(512));
        clear_refs(own)?;
        let clean = entries(own, arena.range())?;
        arena.store(0, 1);
        let dirty = entries(own, arena.range())?;
        let (&[clean, _], &[dirty, zero]) = (clean.as_slice(), dirty.as_slice()) else {
            return Err(unavailable("no page tables"));
        };
        if clean.soft_dirty() || !dirty.soft_dirty() {
            return Err(unavailable("the kernel has no CONFIG_MEM_SOFT_DIRTY"));
        }
        let zero_frame = frame(zero);
        if zero_frame == 0 {
            return Err(unavailable("page frame numbers are hidden without CAP_SYS_ADMIN"));
        }
        Ok(Self { halt, zero_frame })
    }
}

impl<H> std::fmt::Debug for Procfs<H> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Procfs").field("zero_frame", &self.zero_frame).finish_non_exhaustive()
    }
}

impl<G, H: FnMut() -> Result<G>> SoftDirtyKernel for Procfs<H> {
    type Halt = G;
    /// When it started, in clock ticks since boot.
    type Life = u64;

    fn halt(&mut self) -> Result<G> {
        (self.halt)()
    }

    fn life(&self, pid: i32) -> Result<Option<u64>> {
        let path = PathBuf::from(format!("/proc/{pid}/stat"));
        match PidFd::open(pid) {
            Ok(_) => {}
            Err(SysError::NoProcess { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let Ok(text) = fs::read_to_string(&path) else { return Ok(None) };
        // The name, in brackets, may hold anything; the 22nd field is the 20th behind it.
        let field = text.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19));
        match field.and_then(|field| field.parse().ok()) {
            Some(ticks) => Ok(Some(ticks)),
            None => Err(MemoryError::Line { path, line: text }),
        }
    }

    fn mappings(&self, pid: i32) -> Result<Vec<PageRange>> {
        maps::private_anonymous(pid)
    }

    fn entries(&self, pid: i32, range: PageRange) -> Result<Vec<Entry>> {
        entries(pid, range)
    }

    fn clear(&mut self, pid: i32) -> Result<()> {
        clear_refs(pid)
    }

    fn is_zero(&self, entry: Entry) -> bool {
        frame(entry) == self.zero_frame
    }
}

/// All that a process has, for kernels that scan nothing. Which pages are zeros only their contents tell.
pub(super) fn everything(pid: i32) -> Result<Found> {
    let mut found = Found::default();
    for range in maps::private_anonymous(pid)? {
        for chunk in range.chunks(CHUNK_PAGES) {
            let entries = entries(pid, chunk)?;
            let pages = chunk.chunks(1).zip(entries).filter(|(_, entry)| entry.occupied());
            found.present.extend(pages.map(|(page, _)| page));
        }
    }
    found.dirty = found.present.clone();
    Ok(found)
}

fn entries(pid: i32, range: PageRange) -> Result<Vec<Entry>> {
    let count = usize::try_from(range.pages()).unwrap_or(usize::MAX);
    let mut entries = vec![Entry::default(); count];
    let read = Pagemap::open(pid)?.entries(range.start(), &mut entries)?;
    entries.truncate(read);
    Ok(entries)
}

fn clear_refs(pid: i32) -> Result<()> {
    let path = PathBuf::from(format!("/proc/{pid}/clear_refs"));
    match fs::write(&path, "4") {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            Err(SysError::NoProcess { pid }.into())
        }
        Err(error) => Err(MemoryError::file(path)(error)),
    }
}

/// The number of the page frame when the page is in memory, else 0.
fn frame(entry: Entry) -> u64 {
    if entry.0 & (1 << 63) == 0 { 0 } else { entry.0 & ((1 << 55) - 1) }
}

const CHUNK_PAGES: u64 = 1 << 16;
