//! Pages in memory that wait for their tasks.
//!
//! The store is one window (a memfd) of virtual length, used in blocks of [`LEND_BYTES`]: pages that are near
//! each other in a process are near each other in the window, so bulk is installed straight from it in large
//! pieces. A page received again takes its old place. Memory is taken page by page as they come and given
//! back as they are installed, so source and task together never hold much more than the pages themselves.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::window::Window;

use super::{LEND_BYTES, Lent, PageSource};
use crate::{MemoryError, PageSet, Result};

/// [`PageSource`] of pages that have been received.
#[derive(Debug)]
pub struct MemoryStore {
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

impl MemoryStore {
    /// A store for at most `bytes_max` bytes of address space; it takes no memory until pages come.
    ///
    /// # Errors
    /// [`MemoryError::Sys`].
    pub fn new(bytes_max: u64) -> Result<Self> {
        let window = Window::new(c"godwit-pages", bytes_max.max(1).next_multiple_of(LEND_BYTES))?;
        Ok(Self { window, index: Mutex::default() })
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
            let offset = self
                .lock()
                .reserve(pid, part, self.window.bytes())
                .ok_or_else(|| refused("store is full"))?;
            let (now, later) =
                rest.split_at(usize::try_from(part.bytes()).unwrap_or(rest.len()).min(rest.len()));
            let written = self.window.write(offset, now);
            self.lock().commit(pid, part, written.is_ok());
            written?;
            rest = later;
        }
        Ok(())
    }

    /// Forgets pages that are zero or absent now.
    pub fn forget(&self, pid: i32, pages: PageRange) {
        for part in parts(pages) {
            // Under the lock: a block that became free may be another's at once.
            let mut index = self.lock();
            if let Some(offset) = index.remove(pid, part)
                && let Err(error) = self.window.punch(offset, part.bytes())
            {
                log::debug!("pages of process {pid} not given back: {error}");
            }
        }
    }

    /// The pages of `pid` that are there.
    pub fn pages(&self, pid: i32) -> PageSet {
        let index = self.lock();
        let blocks = index.blocks.range((pid, 0)..=(pid, u64::MAX));
        blocks
            .flat_map(|((_, number), block)| {
                (0..PAGES_PER_BLOCK)
                    .filter(|page| block.has(*page))
                    .map(move |page| PageRange::page_at(number * LEND_BYTES + page * PAGE_BYTES))
            })
            .collect()
    }

    /// Memory the store takes now.
    ///
    /// # Errors
    /// [`MemoryError::Sys`].
    pub fn resident_bytes(&self) -> Result<u64> {
        Ok(self.window.resident_bytes()?)
    }

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
        let offset = self.lock().find(pid, pages);
        let offset =
            offset.ok_or_else(|| MemoryError::Plan { pid, what: format!("pages {pages} are not here") })?;
        install(Lent::Window(&self.window, offset))
    }

    fn release(&self, pid: i32, pages: PageRange) {
        self.forget(pid, pages);
    }

    fn finish(&self, pid: i32) {
        let numbers: Vec<u64> =
            self.lock().blocks.range((pid, 0)..=(pid, u64::MAX)).map(|((_, number), _)| *number).collect();
        for number in numbers {
            if let Some(block) = PageRange::new(number * LEND_BYTES, (number + 1) * LEND_BYTES) {
                self.forget(pid, block);
            }
        }
    }
}

impl Index {
    /// Finds room for pages of one block and keeps it until they are committed.
    fn reserve(&mut self, pid: i32, part: PageRange, limit_bytes: u64) -> Option<u64> {
        let number = part.start() / LEND_BYTES;
        if !self.blocks.contains_key(&(pid, number)) {
            let offset = self.free.pop().or_else(|| {
                let offset = self.next;
                (offset + LEND_BYTES <= limit_bytes).then(|| {
                    self.next += LEND_BYTES;
                    offset
                })
            })?;
            self.blocks.insert((pid, number), Block { offset, pages: [0; WORDS], writers: 0 });
        }
        let block = self.blocks.get_mut(&(pid, number))?;
        block.writers += 1;
        Some(block.offset + part.start() % LEND_BYTES)
    }

    /// Marks reserved pages as there, if they were written.
    fn commit(&mut self, pid: i32, part: PageRange, written: bool) {
        if let Some(block) = self.blocks.get_mut(&(pid, part.start() / LEND_BYTES)) {
            block.writers -= 1;
            if written {
                block.set(part, true);
            }
        }
    }

    /// Where pages of one block are, if all of them are there.
    fn find(&self, pid: i32, part: PageRange) -> Option<u64> {
        let block = self.blocks.get(&(pid, part.start() / LEND_BYTES))?;
        block.range(part)?.all(|page| block.has(page)).then_some(block.offset + part.start() % LEND_BYTES)
    }

    /// Marks pages of one block as gone and returns where they were.
    fn remove(&mut self, pid: i32, part: PageRange) -> Option<u64> {
        let number = part.start() / LEND_BYTES;
        let block = self.blocks.get_mut(&(pid, number))?;
        block.set(part, false);
        let offset = block.offset;
        if block.pages == [0; WORDS] && block.writers == 0 {
            self.blocks.remove(&(pid, number));
            self.free.push(offset);
        }
        Some(offset + part.start() % LEND_BYTES)
    }
}

impl Block {
    /// Numbers of pages in the block; `None` when they are not all in it.
    fn range(&self, part: PageRange) -> Option<std::ops::Range<u64>> {
        let first = part.start() % LEND_BYTES / PAGE_BYTES;
        (first + part.pages() <= PAGES_PER_BLOCK).then_some(first..first + part.pages())
    }

    fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|word| self.pages.get(word));
        word.is_some_and(|word| word & (1 << (page % 64)) != 0)
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
const _: () = assert!(WORDS as u64 * 64 == PAGES_PER_BLOCK);

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_full_store_refuses_and_a_freed_block_is_used_again() {
        let store = MemoryStore::new(LEND_BYTES).unwrap();
        store.put(1, 0, &[1; 4096]).unwrap();
        let answer = store.put(1, LEND_BYTES, &[1; 4096]);
        assert!(matches!(answer, Err(MemoryError::Plan { pid: 1, .. })), "{answer:?}");
        store.finish(1);
        store.put(1, LEND_BYTES, &[1; 4096]).unwrap();
    }
}
