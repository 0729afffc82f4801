//! Memory of this process that others may change behind the compiler's back.
//!
//! A userfaultfd, a discard or another thread may alter what stands in an [`Arena`] at any moment, so it is
//! never seen through a reference: words go in and out as relaxed atomics. Probes use it (does the kernel
//! track writes at all?), and so do programs whose memory is what a test is about.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use crate::page_range::{PAGE_BYTES, PageRange};
use crate::{Result, SysError};

/// What to tell the kernel about a part of an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_HUGEPAGE`: use huge pages.
    HugePage,
    /// `MADV_NOHUGEPAGE`: use none.
    NoHugePage,
    /// `MADV_FREE`: the contents may go when memory is short.
    Free,
    /// `MADV_PAGEOUT`: move the contents to swap.
    PageOut,
}

/// What stands behind an arena.
#[derive(Debug, Clone, Copy)]
pub enum Backing<'a> {
    /// Memory of this process alone.
    Private,
    /// Memory that children have in common with it.
    Shared,
    /// As [`Backing::Private`], out of the pool of huge pages (hugetlbfs).
    Huge,
    /// A file, as far as the arena is long; it has to be at least that long.
    File(&'a File),
    /// A System V segment of its own, which stays until its IPC namespace goes.
    SystemV,
}

/// A mapping, private and anonymous unless asked for otherwise, unmapped on drop.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<AtomicU64>,
    bytes: u64,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only reached through atomics.
unsafe impl Send for Arena {}
// SAFETY: as above; the kernel serialises what is done to the mapping itself.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `bytes` bytes, rounded up to whole pages (at least one).
    ///
    /// # Errors
    /// [`SysError::Call`].
    pub fn map(bytes: u64) -> Result<Self> {
        Self::map_on(Backing::Private, bytes)
    }

    /// Maps `bytes` bytes of `backing`, rounded up to whole pages (at least one), or huge pages.
    ///
    /// # Errors
    /// [`SysError::Call`], with `ENOMEM` when the pool of huge pages has not so many.
    pub fn map_on(backing: Backing<'_>, bytes: u64) -> Result<Self> {
        let unit = if matches!(backing, Backing::Huge) { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let bytes = bytes.max(1).checked_next_multiple_of(unit);
        let bytes = bytes.ok_or(SysError::Call { call: "mmap", errno: Errno::ENOMEM })?;
        let length = to_usize(bytes)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (flags, fd) = match backing {
            Backing::Private => (private | libc::MAP_NORESERVE, -1),
            Backing::Shared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
            // Reserved, so that a lack of huge pages shows here and not as a fatal signal later.
            Backing::Huge => (private | libc::MAP_HUGETLB, -1),
            Backing::File(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            Backing::SystemV => return Self::attach(bytes, length),
        };
        // SAFETY: without an address the kernel picks a free place, so no other memory is touched.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(SysError::Call { call: "mmap", errno: Errno::last() });
        }
        let base = NonNull::new(base.cast()).ok_or(SysError::Call { call: "mmap", errno: Errno::EFAULT })?;
        Ok(Self { base, bytes })
    }

    fn attach(bytes: u64, length: usize) -> Result<Self> {
        // SAFETY: a new segment is made, and no memory of this process is involved.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, length, libc::IPC_CREAT | 0o600) };
        let id = Errno::result(id).map_err(SysError::call("shmget"))?;
        // SAFETY: without an address the kernel picks a free place, so no other memory is touched.
        let base = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if base.addr() == usize::MAX {
            return Err(SysError::Call { call: "shmat", errno: Errno::last() });
        }
        let base = NonNull::new(base.cast()).ok_or(SysError::Call { call: "shmat", errno: Errno::EFAULT })?;
        Ok(Self { base, bytes })
    }

    /// Where it lies.
    ///
    /// # Panics
    /// Never: a mapping is whole pages and not empty.
    pub fn range(&self) -> PageRange {
        let start = self.base.addr().get() as u64;
        PageRange::new(start, start + self.bytes).expect("a mapping is whole pages, at least one")
    }

    /// Number of 64-bit words.
    pub fn words(&self) -> u64 {
        self.bytes / 8
    }

    /// The word with this index.
    ///
    /// # Panics
    /// When it is outside the arena.
    pub fn load(&self, word: u64) -> u64 {
        self.word(word).load(Ordering::Relaxed)
    }

    /// Writes the word with this index.
    ///
    /// # Panics
    /// When it is outside the arena.
    pub fn store(&self, word: u64, value: u64) {
        self.word(word).store(value, Ordering::Relaxed);
    }

    /// Drops the pages of `range` that lie in the arena (`MADV_DONTNEED`): they read as zero again.
    ///
    /// # Errors
    /// [`SysError::Call`].
    pub fn discard(&self, range: PageRange) -> Result<()> {
        self.advise_raw(range, libc::MADV_DONTNEED)
    }

    /// Gives the kernel advice on the pages of `range` that lie in the arena.
    ///
    /// # Errors
    /// [`SysError::Call`], with `EINVAL` for advice the kernel does not take.
    pub fn advise(&self, range: PageRange, advice: Advice) -> Result<()> {
        self.advise_raw(
            range,
            match advice {
                Advice::HugePage => libc::MADV_HUGEPAGE,
                Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
                Advice::Free => libc::MADV_FREE,
                Advice::PageOut => libc::MADV_PAGEOUT,
            },
        )
    }

    /// Forbids any access to the pages of `range` that lie in the arena, or allows it again. Touching
    /// forbidden pages ends the process with `SIGSEGV`.
    ///
    /// # Errors
    /// [`SysError::Call`].
    pub fn forbid(&self, range: PageRange, on: bool) -> Result<()> {
        let Some((address, length)) = self.part(range) else { return Ok(()) };
        let protection = if on { libc::PROT_NONE } else { libc::PROT_READ | libc::PROT_WRITE };
        // SAFETY: the part lies inside the mapping that this value owns; no reference into it exists.
        let answer = unsafe { libc::mprotect(address, length, protection) };
        Errno::result(answer).map(drop).map_err(SysError::call("mprotect"))
    }

    /// Locks the pages of `range` that lie in the arena (mlock(2)), until it is unmapped.
    ///
    /// # Errors
    /// [`SysError::Call`], with `ENOMEM` or `EPERM` beyond the limit of the process.
    pub fn lock(&self, range: PageRange) -> Result<()> {
        let Some((address, length)) = self.part(range) else { return Ok(()) };
        // SAFETY: the part lies inside the mapping that this value owns; locking changes no contents.
        let answer = unsafe { libc::mlock(address, length) };
        Errno::result(answer).map(drop).map_err(SysError::call("mlock"))
    }

    /// Moves the arena to another address (mremap(2)).
    ///
    /// # Errors
    /// [`SysError::Call`]; the arena is then gone or where it was, and lost to the caller in both cases.
    pub fn relocate(self) -> Result<Self> {
        let target = Self::map(self.bytes)?;
        let length = to_usize(self.bytes)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, to) = (self.base.as_ptr(), target.base.as_ptr());
        // SAFETY: both mappings have this length and are owned by the two values; the one at `to` is
        // replaced, the one at `from` goes, and `self` is forgotten below so that it is not unmapped twice.
        let answer = unsafe { libc::mremap(from.cast(), length, length, flags, to) };
        if answer == libc::MAP_FAILED {
            return Err(SysError::Call { call: "mremap", errno: Errno::last() });
        }
        std::mem::forget(self);
        Ok(target)
    }

    fn advise_raw(&self, range: PageRange, advice: i32) -> Result<()> {
        let Some((address, length)) = self.part(range) else { return Ok(()) };
        // SAFETY: the part lies inside the mapping that this value owns; no reference into it exists, and
        // its words are atomics for which any value is valid.
        let answer = unsafe { libc::madvise(address, length, advice) };
        Errno::result(answer).map(drop).map_err(SysError::call("madvise"))
    }

    fn part(&self, range: PageRange) -> Option<(*mut libc::c_void, usize)> {
        let part = self.range().intersection(range)?;
        let offset = usize::try_from(part.start() - self.range().start()).ok()?;
        let length = usize::try_from(part.bytes()).ok()?;
        Some((self.base.as_ptr().wrapping_byte_add(offset).cast(), length))
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        assert!(index < self.words(), "word {index} of {}", self.words());
        let index = usize::try_from(index).expect("a mapping's length fits a pointer");
        // SAFETY: the index was checked against the mapping's length.
        let word = unsafe { self.base.add(index) };
        // SAFETY: the mapping lives as long as `self`, is aligned to a page, and is only used as atomics.
        unsafe { word.as_ref() }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let Ok(length) = usize::try_from(self.bytes) else { return };
        // SAFETY: the mapping is owned by this value, and no reference into it outlives it.
        let answer = unsafe { libc::munmap(self.base.as_ptr().cast(), length) };
        debug_assert_eq!(answer, 0, "munmap of a mapping we own");
    }
}

fn to_usize(bytes: u64) -> Result<usize> {
    usize::try_from(bytes).map_err(|_| SysError::Call { call: "mmap", errno: Errno::ENOMEM })
}

const HUGE_PAGE_BYTES: u64 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_is_seen_through_every_mapping_of_it() {
        let file = crate::memfd::create(c"arena").unwrap();
        file.set_len(2 * PAGE_BYTES).unwrap();
        let [one, other] = [(); 2].map(|()| Arena::map_on(Backing::File(&file), 2 * PAGE_BYTES).unwrap());
        one.store(512, 7);
        assert_eq!((other.load(512), other.load(0)), (7, 0));
    }

    #[test]
    fn memory_of_every_kind_is_zero_and_can_be_written() {
        for backing in [Backing::Private, Backing::Shared, Backing::SystemV] {
            let arena = Arena::map_on(backing, 2 * PAGE_BYTES).unwrap();
            assert_eq!(arena.load(1023), 0);
            arena.store(1023, 9);
            assert_eq!(arena.load(1023), 9, "{backing:?}");
        }
    }

    #[test]
    fn words_survive_a_move_and_go_with_a_discard() {
        let arena = Arena::map(3 * PAGE_BYTES).unwrap();
        arena.store(512, 42);
        arena.store(1024, 43);
        let old = arena.range();
        let arena = arena.relocate().unwrap();
        assert_ne!(arena.range(), old);
        assert_eq!((arena.load(512), arena.load(1024)), (42, 43));
        arena.discard(PageRange::page_at(arena.range().start() + PAGE_BYTES)).unwrap();
        assert_eq!((arena.load(512), arena.load(1024)), (0, 43));
    }

    #[test]
    #[should_panic(expected = "word 512 of 512")]
    fn a_word_outside_is_refused() {
        Arena::map(1).unwrap().load(512);
    }
}
