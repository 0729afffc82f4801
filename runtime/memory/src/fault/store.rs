//! Pages in memory that wait for their tasks.
//!
//! The store is some windows (memfds) of virtual length, used in blocks of [`LEND_BYTES`]: pages that are near
//! each other in a process are near each other in a window, so bulk is installed straight from it in large
//! pieces. A page received again takes its old place. Memory is taken page by page as they come and given
//! back as they are installed, so source and task together never hold much more than the pages themselves.
//!
//! The kernel writes to a memfd under a lock of the file. So blocks are spread over [`SHARDS`] windows, each with
//! an index and a lock of its own, by the same rule by which pages are spread over streams: threads that receive
//! different streams seldom meet.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::window::Window;

use super::{LEND_BYTES, Lent, PageSource};
use crate::{MemoryError, PageSet, Result};

/// [`PageSource`] of pages that have been received.
#[derive(Debug)]
pub struct MemoryStore {
    shards: Vec<Shard>,
    /// Pages that it may still take.
    room_pages: AtomicU64,
}

#[derive(Debug)]
struct Shard {
    window: Window,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    /// By process and block number of the address.
    blocks: BTreeMap<(i32, u64), Block>,
    free: Vec<u64>,
    next: u64,
}

#[derive(Debug)]
struct Block {
    /// Where it starts in the window.
    offset: u64,
    /// Which of its pages are there.
    pages: [u64; WORDS],
    /// How many are writing to it.
    writers: u32,
}

/// Room for pages of one block, until they are written.
struct Reserved {
    offset: u64,
    /// Pages taken from the store's room for it.
    pages: u64,
}

impl MemoryStore {
    /// A store for at most `bytes_max` bytes of pages; it takes no memory until pages come.
    ///
    /// # Errors
    /// [`MemoryError::Sys`].
    pub fn new(bytes_max: u64) -> Result<Self> {
        Self::over(bytes_max, |bytes| Ok(Window::new(c"godwit-pages", bytes)?))
    }

    /// A store whose pages wait in files without a name in `directory`, not in memory.
    ///
    /// # Errors
    /// [`MemoryError::Sys`].
    pub fn on_storage(directory: &Path, bytes_max: u64) -> Result<Self> {
        Self::over(bytes_max, |bytes| Ok(Window::on_storage(directory, bytes)?))
    }

    fn over(bytes_max: u64, window: impl Fn(u64) -> Result<Window>) -> Result<Self> {
        let room_pages = bytes_max / PAGE_BYTES;
        // Enough for pages that lie far apart, each alone in its block; only addresses are spent on it.
        let window_bytes = room_pages.saturating_mul(LEND_BYTES).clamp(LEND_BYTES, WINDOW_BYTES_MAX);
        let shard = |_| Ok(Shard { window: window(window_bytes)?, index: Mutex::default() });
        let shards = (0..SHARDS).map(shard).collect::<Result<_>>()?;
        Ok(Self { shards, room_pages: AtomicU64::new(room_pages) })
    }

    /// Takes the memory for `bytes` bytes of pages before they come: then it need not be found while a container
    /// stands still. What is taken and not needed goes with the store; where there is not enough, pages take theirs as
    /// they come.
    pub fn take_ahead(&self, bytes: u64) {
        let room_bytes = self.room_pages.load(Ordering::Relaxed).saturating_mul(PAGE_BYTES);
        let blocks = bytes.min(room_bytes) / LEND_BYTES / SHARDS as u64;
        let take = |window: &Window| -> Result<()> {
            // In steps: the kernel holds the file for as long as one takes.
            for block in 0..blocks.min(window.bytes() / LEND_BYTES) {
                window.reserve(block * LEND_BYTES, LEND_BYTES)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            for Shard { window, .. } in &self.shards {
                scope.spawn(move || {
                    if let Err(error) = take(window) {
                        log::debug!("memory is taken as pages come: {error}");
                    }
                });
            }
        });
    }

    /// Keeps the contents of pages of `pid` from `address` on.
    ///
    /// # Errors
    /// [`MemoryError::Plan`] when `contents` are no whole pages, or the store is full; [`MemoryError::Sys`].
    pub fn put(&self, pid: i32, address: u64, contents: &[u8]) -> Result<()> {
        let refused = |what: &str| MemoryError::Plan { pid, what: what.to_owned() };
        let end = address.checked_add(contents.len() as u64);
        let range =
            end.and_then(|end| PageRange::new(address, end)).ok_or_else(|| refused("no whole pages"))?;
        let mut rest = contents;
        for part in parts(range) {
            let shard = self.shard(pid, part);
            let reserved = shard.lock().reserve(pid, part, shard.window.bytes(), &self.room_pages);
            let reserved = reserved.ok_or_else(|| refused("store is full"))?;
            let (now, later) =
                rest.split_at(usize::try_from(part.bytes()).unwrap_or(rest.len()).min(rest.len()));
            let written = shard.window.write(reserved.offset, now);
            let back = shard.lock().commit(pid, part, &reserved, written.is_ok());
            self.room_pages.fetch_add(back, Ordering::Relaxed);
            written?;
            rest = later;
        }
        Ok(())
    }

    /// Forgets pages that are zero or absent now; of a large range, only what is there takes time.
    pub fn forget(&self, pid: i32, pages: PageRange) {
        let (first, last) = (pages.start() / LEND_BYTES, (pages.end() - 1) / LEND_BYTES);
        if first == last {
            return self.forget_part(self.shard(pid, pages), pid, pages);
        }
        for shard in &self.shards {
            let numbers: Vec<u64> = shard
                .lock()
                .blocks
                .range((pid, first)..=(pid, last))
                .map(|((_, number), _)| *number)
                .collect();
            for number in numbers {
                let block = PageRange::new(number * LEND_BYTES, (number + 1) * LEND_BYTES);
                if let Some(part) = block.and_then(|block| block.intersection(pages)) {
                    self.forget_part(shard, pid, part);
                }
            }
        }
    }

    /// The pages of `pid` that are there.
    pub fn pages(&self, pid: i32) -> PageSet {
        let mut blocks: Vec<(u64, [u64; WORDS])> = Vec::new();
        for shard in &self.shards {
            let index = shard.lock();
            let own = index.blocks.range((pid, 0)..=(pid, u64::MAX));
            blocks.extend(own.map(|((_, number), block)| (*number, block.pages)));
        }
        blocks.sort_unstable_by_key(|(number, _)| *number);
        let runs = blocks.iter().flat_map(|(number, pages)| {
            let start = number * LEND_BYTES;
            runs(pages).filter_map(move |(first, end)| {
                PageRange::new(start + first * PAGE_BYTES, start + end * PAGE_BYTES)
            })
        });
        runs.collect()
    }

    /// Memory the store takes now.
    ///
    /// # Errors
    /// [`MemoryError::Sys`].
    pub fn resident_bytes(&self) -> Result<u64> {
        self.shards.iter().map(|shard| Ok(shard.window.resident_bytes()?)).sum()
    }

    /// Forgets pages of one block.
    fn forget_part(&self, shard: &Shard, pid: i32, part: PageRange) {
        // Under the lock: a block that became free may be another's at once.
        let mut index = shard.lock();
        if let Some((offset, pages)) = index.remove(pid, part) {
            if let Err(error) = shard.window.punch(offset, part.bytes()) {
                log::debug!("pages of process {pid} not given back: {error}");
            }
            self.room_pages.fetch_add(pages, Ordering::Relaxed);
        }
    }

    /// The shard of a part of one block.
    fn shard(&self, pid: i32, part: PageRange) -> &Shard {
        let block = (part.start() / LEND_BYTES).wrapping_add(u64::from(pid.unsigned_abs()));
        let mixed = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.shards[usize::try_from(mixed).unwrap_or(0) % self.shards.len()]
    }
}

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Index> {
        // A panic between two changes of it leaves at worst a page without contents, which lending refuses.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageSource for MemoryStore {
    fn lend(
        &self,
        pid: i32,
        pages: PageRange,
        install: &mut dyn FnMut(Lent<'_>) -> Result<()>,
    ) -> Result<()> {
        let shard = self.shard(pid, pages);
        let offset = shard.lock().find(pid, pages);
        let offset =
            offset.ok_or_else(|| MemoryError::Plan { pid, what: format!("pages {pages} are not here") })?;
        install(Lent::Window(&shard.window, offset))
    }

    fn keep(&self, pid: i32, pages: PageRange, contents: &[u8]) -> Result<()> {
        self.put(pid, pages.start(), contents)
    }

    fn release(&self, pid: i32, pages: PageRange) {
        self.forget(pid, pages);
    }

    fn finish(&self, pid: i32) {
        if let Some(all) = PageRange::new(0, 1 << 63) {
            self.forget(pid, all);
        }
    }
}

impl Index {
    /// Finds room for pages of one block and keeps it until they are committed.
    fn reserve(
        &mut self,
        pid: i32,
        part: PageRange,
        window_bytes: u64,
        room_pages: &AtomicU64,
    ) -> Option<Reserved> {
        let number = part.start() / LEND_BYTES;
        let present = self.blocks.get(&(pid, number)).map_or(0, |block| block.count(part));
        let pages = part.pages() - present;
        let take = |room: u64| room.checked_sub(pages);
        room_pages.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        let reserved = self.block(pid, number, window_bytes).map(|block| {
            block.writers += 1;
            Reserved { offset: block.offset + part.start() % LEND_BYTES, pages }
        });
        if reserved.is_none() {
            room_pages.fetch_add(pages, Ordering::Relaxed);
        }
        reserved
    }

    /// The block of that number, made if it is not there and the window has room.
    fn block(&mut self, pid: i32, number: u64, window_bytes: u64) -> Option<&mut Block> {
        if !self.blocks.contains_key(&(pid, number)) {
            let offset = self.free.pop().or_else(|| {
                let offset = self.next;
                (offset + LEND_BYTES <= window_bytes).then(|| {
                    self.next += LEND_BYTES;
                    offset
                })
            })?;
            self.blocks.insert((pid, number), Block { offset, pages: [0; WORDS], writers: 0 });
        }
        self.blocks.get_mut(&(pid, number))
    }

    /// Marks reserved pages as there, if they were written; returns the pages of room that were not needed.
    fn commit(&mut self, pid: i32, part: PageRange, reserved: &Reserved, written: bool) -> u64 {
        let Some(block) = self.blocks.get_mut(&(pid, part.start() / LEND_BYTES)) else { return 0 };
        block.writers -= 1;
        let before = block.count(part);
        if written {
            block.set(part, true);
        }
        // Another may have written the same pages meanwhile, and paid for them as well.
        reserved.pages.saturating_sub(block.count(part) - before)
    }

    /// Where pages of one block are, if all of them are there.
    fn find(&self, pid: i32, part: PageRange) -> Option<u64> {
        let block = self.blocks.get(&(pid, part.start() / LEND_BYTES))?;
        (block.count(part) == part.pages()).then_some(block.offset + part.start() % LEND_BYTES)
    }

    /// Marks pages of one block as gone and returns where they were, and how many.
    fn remove(&mut self, pid: i32, part: PageRange) -> Option<(u64, u64)> {
        let number = part.start() / LEND_BYTES;
        let block = self.blocks.get_mut(&(pid, number))?;
        let pages = block.count(part);
        block.set(part, false);
        let offset = block.offset;
        if block.pages == [0; WORDS] && block.writers == 0 {
            self.blocks.remove(&(pid, number));
            self.free.push(offset);
        }
        Some((offset + part.start() % LEND_BYTES, pages))
    }
}

impl Block {
    /// Numbers of pages in the block; `None` when they are not all in it.
    fn range(&self, part: PageRange) -> Option<std::ops::Range<u64>> {
        let first = part.start() % LEND_BYTES / PAGE_BYTES;
        (first + part.pages() <= PAGES_PER_BLOCK).then_some(first..first + part.pages())
    }

    /// How many of these pages are there.
    fn count(&self, part: PageRange) -> u64 {
        self.range(part).unwrap_or_default().map(|page| u64::from(has(&self.pages, page))).sum()
    }

    fn set(&mut self, part: PageRange, on: bool) {
        for page in self.range(part).unwrap_or_default() {
            if let Some(word) = usize::try_from(page / 64).ok().and_then(|word| self.pages.get_mut(word)) {
                let bit = 1 << (page % 64);
                *word = if on { *word | bit } else { *word & !bit };
            }
        }
    }
}

fn has(pages: &[u64; WORDS], page: u64) -> bool {
    let word = usize::try_from(page / 64).ok().and_then(|word| pages.get(word));
    word.is_some_and(|word| word & (1 << (page % 64)) != 0)
}

/// The runs of pages that are there, as first page and end. A word at a time: a container waits for it, with all of its
/// memory here.
fn runs(pages: &[u64; WORDS]) -> impl Iterator<Item = (u64, u64)> {
    (0_u64..).step_by(64).zip(pages).flat_map(|(base, word)| {
        let mut at = 0;
        std::iter::from_fn(move || {
            let rest = |at| word.checked_shr(at).unwrap_or(0);
            let first = at + rest(at).trailing_zeros();
            at = first + rest(first).trailing_ones();
            (at > first).then(|| (base + u64::from(first), base + u64::from(at)))
        })
    })
}

/// Cuts a range at multiples of [`LEND_BYTES`].
fn parts(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut start = range.start();
    std::iter::from_fn(move || {
        let boundary = (start / LEND_BYTES + 1) * LEND_BYTES;
        let part = PageRange::new(start, boundary.min(range.end()))?;
        start = part.end();
        Some(part)
    })
}

const PAGES_PER_BLOCK: u64 = LEND_BYTES / PAGE_BYTES;
const WORDS: usize = 8;

/// Windows of a store: more than there are usually streams.
const SHARDS: usize = 8;

/// Address space of one window; all of them take a sixteenth of what a process has.
const WINDOW_BYTES_MAX: u64 = 1 << 40;

const _: () = assert!(WORDS as u64 * 64 == PAGES_PER_BLOCK);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(store: &MemoryStore, pid: i32, pages: PageRange) -> Result<Vec<u8>> {
        let mut found = vec![0; usize::try_from(pages.bytes()).unwrap()];
        store.lend(pid, pages, &mut |lent| {
            let Lent::Window(window, offset) = lent else { unreachable!("a store lends its window") };
            Ok(window.read(offset, &mut found)?)
        })?;
        Ok(found)
    }

    #[test]
    fn pages_across_blocks_are_kept_replaced_and_given_back() {
        let store = MemoryStore::new(16 << 20).unwrap();
        let start = LEND_BYTES - PAGE_BYTES;
        store.put(7, start, &[1; 3 * 4096]).unwrap();
        store.put(7, start + PAGE_BYTES, &[2; 4096]).unwrap();
        store.put(8, start, &[3; 4096]).unwrap();
        assert_eq!(store.resident_bytes().unwrap(), 4 * PAGE_BYTES);
        assert_eq!(store.pages(7).pages(), 3);
        let page = |index: u64| PageRange::page_at(start + index * PAGE_BYTES);
        let read = |pid, index| bytes(&store, pid, page(index)).map(|bytes| bytes[4095]).ok();
        assert_eq!(
            [read(7, 0), read(7, 1), read(7, 2), read(8, 0), read(8, 1)],
            [Some(1), Some(2), Some(1), Some(3), None]
        );
        store.release(7, page(1));
        assert_eq!(read(7, 1), None);
        assert_eq!(store.resident_bytes().unwrap(), 3 * PAGE_BYTES);
        store.finish(7);
        assert_eq!(store.resident_bytes().unwrap(), PAGE_BYTES);
        assert_eq!((store.pages(7).pages(), store.pages(8).pages()), (0, 1));
    }

    proptest! {
        #[test]
        fn runs_are_what_is_there(words in any::<[u64; WORDS]>(), mask in any::<[u64; WORDS]>(), whole in any::<bool>()) {
            // Long runs and short ones.
            let pages = std::array::from_fn(|word| if whole { words[word] | mask[word] << 9 | mask[word] >> 9 } else { words[word] & mask[word] });
            for pages in [pages, [0; WORDS], [u64::MAX; WORDS]] {
                let found: Vec<u64> = runs(&pages).flat_map(|(first, end)| first..end).collect();
                let expected: Vec<u64> = (0..PAGES_PER_BLOCK).filter(|page| has(&pages, *page)).collect();
                prop_assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn memory_taken_ahead_serves_the_pages_that_come() {
        let store = MemoryStore::new(64 << 20).unwrap();
        store.take_ahead(8 << 20);
        assert_eq!(store.resident_bytes().unwrap(), 0, "not a block for each shard");
        store.take_ahead(40 << 20);
        assert_eq!(store.resident_bytes().unwrap(), 32 << 20);
        store.put(7, LEND_BYTES, &[1; 4096]).unwrap();
        assert_eq!(store.resident_bytes().unwrap(), 32 << 20);
        assert_eq!(bytes(&store, 7, PageRange::page_at(LEND_BYTES)).unwrap(), [1; 4096]);
        store.finish(7);
        assert_eq!(store.resident_bytes().unwrap(), 30 << 20, "a block is given back whole");
        store.take_ahead(1 << 30);
        assert_eq!(store.resident_bytes().unwrap(), 64 << 20, "no more than its room");
    }

    #[test]
    fn a_full_store_refuses_and_a_freed_block_is_used_again() {
        let store = MemoryStore::new(3 * PAGE_BYTES).unwrap();
        let is_refused = |address, pages: usize| match store.put(1, address, &vec![1; pages * 4096]) {
            Err(MemoryError::Plan { pid: 1, .. }) => true,
            answer => answer.map(|()| false).unwrap(),
        };
        assert!(!is_refused(0, 2) && !is_refused(1 << 40, 1));
        // What is there already takes no more room, whatever it is written with.
        assert!(!is_refused(0, 2) && !is_refused(1 << 40, 1));
        assert!(is_refused(2 * PAGE_BYTES, 1) && is_refused(PAGE_BYTES, 2) && is_refused(1 << 41, 1));
        store.forget(1, PageRange::page_at(0));
        assert!(!is_refused(1 << 41, 1));
        assert!(is_refused(0, 1));
        store.finish(1);
        assert_eq!(store.resident_bytes().unwrap(), 0);
        assert!(!is_refused(LEND_BYTES - PAGE_BYTES, 3));
        assert!(is_refused(0, 1));
    }

    #[test]
    fn a_range_without_end_is_forgotten_in_the_time_that_its_pages_take() {
        let store = MemoryStore::new(1 << 20).unwrap();
        for block in 0..20 {
            store.put(3, block << 42, &[1; 8192]).unwrap();
        }
        let all = |first| PageRange::new(first, 1 << 56).unwrap();
        store.forget(3, all((7 << 42) + PAGE_BYTES));
        assert_eq!(store.pages(3).pages(), 15);
        assert_eq!(store.resident_bytes().unwrap(), 15 * PAGE_BYTES);
        (0..100_000).for_each(|_| store.forget(3, all(PAGE_BYTES)));
        assert_eq!(store.pages(3).ranges(), [PageRange::page_at(0)]);
    }
}
