//! Which pages of a process are there, and which were written: `PAGEMAP_SCAN` and `/proc/PID/pagemap`.
//!
//! One scan can both report the pages written since they were last write-protected and protect them again,
//! atomically per page, so no write is lost between two scans ([`Scan::protect`]). It needs kernel 6.7 and a
//! range registered with a userfaultfd that has WP_ASYNC. Without that flag the scan only looks.
//!
//! A [`Pagemap`] belongs to the memory the process had when it was opened: after an exec it reports nothing.
//! Open it anew for every round.
//!
//! Sources: kernel Documentation/admin-guide/mm/pagemap.rst and fs/proc/task_mmu.c (6.7 to 6.18).

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use crate::page_range::{PAGE_BYTES, PageRange};
use crate::{Result, SysError};

/// What a page is, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Categories(u64);

impl Categories {
    /// The mapping can be write-protected asynchronously.
    pub const WP_ALLOWED: Self = Self(1 << 0);
    /// Written since it was last write-protected.
    pub const WRITTEN: Self = Self(1 << 1);
    /// Backed by a file, not by memory of the process's own.
    pub const FILE: Self = Self(1 << 2);
    /// In memory.
    pub const PRESENT: Self = Self(1 << 3);
    /// In swap.
    pub const SWAPPED: Self = Self(1 << 4);
    /// The kernel's page of zeros.
    pub const ZERO: Self = Self(1 << 5);
    /// Part of a huge page.
    pub const HUGE: Self = Self(1 << 6);
    /// A guard page (`MADV_GUARD_INSTALL`): it holds nothing and must not be touched. Kernels before 6.15 have no such
    /// category, and refuse a scan that names it; see [`Scan::report`].
    pub const GUARD: Self = Self(1 << 8);

    /// Both.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those in `self` that are not in `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether any of `other` is in `self`.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The bits as the kernel numbers them.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// From the kernel's bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// Adjacent pages of one kind.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// What the pages are, as far as it was asked for.
    pub categories: Categories,
}

const _: () = assert!(size_of::<Region>() == 24);

/// A question to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scan {
    /// Protect the pages reported as [`Categories::WRITTEN`] again. The range must be registered for it.
    pub protect: bool,
    /// Categories whose meaning is turned round before matching.
    pub inverted: Categories,
    /// A page must have all of these.
    pub all_of: Categories,
    /// A page must have one of these, if any is given.
    pub any_of: Categories,
    /// What is reported of a page. [`Categories::GUARD`] may be asked for on any kernel, and is reported of no page
    /// where the kernel does not know it.
    pub report: Categories,
}

/// How far one call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanned {
    /// Number of regions written to the start of the buffer.
    pub count: usize,
    /// Everything below this address was looked at.
    pub walk_end: u64,
}

/// The page tables of one process, as a file.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the page tables of `pid`.
    ///
    /// # Errors
    /// [`SysError::NoProcess`], [`SysError::File`].
    pub fn open(pid: i32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/pagemap"));
        match File::open(&path) {
            Ok(file) => Ok(Self { file }),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                Err(SysError::NoProcess { pid })
            }
            Err(error) => Err(SysError::file(path)(error)),
        }
    }

    /// Takes over an open `/proc/PID/pagemap`.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { file: File::from(fd) }
    }

    /// Scans `range` once into `buffer`; ends early when the buffer is full.
    ///
    /// # Errors
    /// [`SysError::Call`]: `EPERM` when `protect` was asked for and something in the range is not registered
    /// for it (pages below it may have been protected), `ENOTTY` or `EINVAL` when the kernel has no such call, `ESRCH`
    /// when the process has ended since it was opened.
    pub fn scan(&self, range: PageRange, scan: Scan, buffer: &mut [Region]) -> Result<Scanned> {
        let asks_in_vain = scan.report.intersects(Categories::GUARD) && !knows_guard_pages();
        let report = if asks_in_vain { scan.report.without(Categories::GUARD) } else { scan.report };
        self.ask(range, Scan { report, ..scan }, buffer)
    }

    fn ask(&self, range: PageRange, scan: Scan, buffer: &mut [Region]) -> Result<Scanned> {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: if scan.protect { WP_MATCHING | CHECK_WPASYNC } else { 0 },
            start: range.start(),
            end: range.end(),
            walk_end: 0,
            regions: buffer.as_mut_ptr().addr() as u64,
            regions_max: buffer.len() as u64,
            pages_max: 0,
            inverted: scan.inverted.0,
            all_of: scan.all_of.0,
            any_of: scan.any_of.0,
            report: scan.report.0,
        };
        // SAFETY: the request reads and writes one `ScanArgument` and writes at most `regions_max` regions to
        // the borrowed buffer, where any bytes are valid regions.
        let answer = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let count = Errno::result(answer).map_err(SysError::call("ioctl(PAGEMAP_SCAN)"))?;
        let count = usize::try_from(count).unwrap_or(0).min(buffer.len());
        Ok(Scanned { count, walk_end: argument.walk_end.clamp(range.start(), range.end()) })
    }

    /// Scans all of `range` and hands every region to `each`, in order; one that crosses a multiple of 64 MiB
    /// comes in parts.
    ///
    /// The kernel keeps the process from mapping memory while it walks, 7 ms for each GiB that is there and 20 where all
    /// is written, so it is asked for a piece at a time. Who asks again at once overtakes those that wait, for 4 ms each
    /// time, so there is a pause in between. Where nothing is there, which takes no time, pieces grow.
    ///
    /// # Errors
    /// As [`Pagemap::scan`]. Regions handed over before the failure are true; the rest is unknown.
    pub fn scan_all(
        &self,
        range: PageRange,
        scan: Scan,
        buffer: &mut [Region],
        mut each: impl FnMut(PageRange, Categories),
    ) -> Result<()> {
        let mut rest = Some(range);
        let mut piece_bytes = PIECE_BYTES;
        while let Some(range) = rest {
            let piece = up_to_multiple(range, piece_bytes);
            let mut scanned = self.scan(piece, scan, buffer)?;
            if scanned.walk_end == range.start() && piece != range {
                // It begins with a huge page larger than itself, which can only be protected as a whole.
                scanned = self.scan(range, scan, buffer)?;
            }
            for region in &buffer[..scanned.count] {
                if let Some(pages) = PageRange::new(region.start, region.end) {
                    each(pages, region.categories);
                }
            }
            // A kernel that makes no progress would keep us here for ever.
            if scanned.walk_end == range.start() {
                return Err(SysError::Call { call: "ioctl(PAGEMAP_SCAN)", errno: Errno::EPROTO });
            }
            rest = PageRange::new(scanned.walk_end, range.end());
            if scanned.count == 0 {
                piece_bytes = piece_bytes.saturating_mul(2);
            } else {
                piece_bytes = PIECE_BYTES;
                if rest.is_some() {
                    thread::sleep(PAUSE);
                }
            }
        }
        Ok(())
    }

    /// Reads the raw entries of the pages from `start` on, one per element of `entries`; the number read.
    ///
    /// # Errors
    /// [`SysError::File`].
    pub fn entries(&self, start: u64, entries: &mut [Entry]) -> Result<usize> {
        let mut bytes = vec![0; entries.len() * 8];
        let read =
            self.file.read_at(&mut bytes, start / PAGE_BYTES * 8).map_err(SysError::file("pagemap"))?;
        let mut count = 0;
        for (entry, word) in entries.iter_mut().zip(bytes[..read].as_chunks::<8>().0) {
            *entry = Entry(u64::from_ne_bytes(*word));
            count += 1;
        }
        Ok(count)
    }
}

/// The part of `range` before the next multiple of `bytes`.
fn up_to_multiple(range: PageRange, bytes: u64) -> PageRange {
    let end = (range.start() / bytes + 1).saturating_mul(bytes);
    PageRange::new(range.start(), end.min(range.end())).unwrap_or(range)
}

/// Whether this kernel tells guard pages apart, found out on a page of our own.
fn knows_guard_pages() -> bool {
    static KNOWS: OnceLock<bool> = OnceLock::new();
    *KNOWS.get_or_init(|| {
        let Ok(file) = File::open("/proc/self/pagemap") else { return true };
        let scan = Scan { report: Categories::GUARD, ..Scan::default() };
        let answer = Pagemap { file }.ask(PageRange::page_at(0x1_0000), scan, &mut [Region::default()]);
        // What is wrong otherwise is for whoever scans in earnest to hear.
        !matches!(answer, Err(SysError::Call { errno: Errno::EINVAL, .. }))
    })
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// One entry of `/proc/PID/pagemap`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(pub u64);

impl Entry {
    /// Written since the soft-dirty bits were cleared. Never set on a kernel without soft-dirty.
    pub const fn soft_dirty(self) -> bool {
        self.0 & (1 << 55) != 0
    }

    /// In memory or in swap, and not a page of a file.
    pub const fn occupied(self) -> bool {
        self.0 & (1 << 63 | 1 << 62) != 0 && self.0 & (1 << 61) == 0
    }
}

/// The argument of `PAGEMAP_SCAN` as it stands in memory, for those who answer it in the kernel's place.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ScanArgument {
    /// Size of this structure.
    pub size: u64,
    /// `PM_SCAN_*`.
    pub flags: u64,
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// Where the walk ended; written by the kernel.
    pub walk_end: u64,
    /// Address of the regions.
    pub regions: u64,
    /// Room for so many.
    pub regions_max: u64,
    /// Stop after so many pages; 0 is no limit.
    pub pages_max: u64,
    /// [`Scan::inverted`].
    pub inverted: u64,
    /// [`Scan::all_of`].
    pub all_of: u64,
    /// [`Scan::any_of`].
    pub any_of: u64,
    /// [`Scan::report`].
    pub report: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96);

/// `_IOWR('f', 16, struct pm_scan_arg)`
pub(crate) const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// What [`Pagemap::scan_all`] asks for at once: pages that the kernel walks in about a millisecond. A multiple of the usual
/// huge pages, for a part of one would be torn from it.
const PIECE_BYTES: u64 = 64 << 20;
/// For whoever waits to take the lock.
const PAUSE: Duration = Duration::from_micros(50);
const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::userfaultfd::{Features, Mode, Userfaultfd};

    const WRITTEN: Scan = Scan {
        protect: true,
        inverted: Categories(0),
        all_of: Categories::WRITTEN,
        any_of: Categories::PRESENT.with(Categories::SWAPPED),
        report: Categories::WRITTEN.with(Categories::ZERO),
    };

    fn own() -> Pagemap {
        Pagemap::open(i32::try_from(std::process::id()).unwrap()).unwrap()
    }

    fn written(arena: &Arena) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let mut buffer = [Region::default(); 3];
        own()
            .scan_all(arena.range(), WRITTEN, &mut buffer, |pages, _| {
                found.push(((pages.start() - arena.range().start()) / PAGE_BYTES, pages.pages()));
            })
            .unwrap();
        found
    }

    #[test]
    fn a_process_that_has_ended_since_is_none() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pagemap = Pagemap::open(i32::try_from(child.id()).unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let all = PageRange::new(PAGE_BYTES, 1 << 40).unwrap();
        let answer = pagemap.scan(all, Scan::default(), &mut [Region::default(); 4]);
        assert!(
            matches!(answer, Err(SysError::Call { errno: Errno::ESRCH | Errno::ENOTTY, .. })),
            "{answer:?}"
        );
    }

    #[test]
    fn what_is_scanned_in_pieces_is_found_once_and_in_order() {
        let pages = PIECE_BYTES / PAGE_BYTES;
        let arena = Arena::map(16 * PIECE_BYTES).unwrap();
        let first = arena.range().start().next_multiple_of(PIECE_BYTES) - arena.range().start();
        let first = first / PAGE_BYTES;
        let faults = Userfaultfd::for_arena(&arena).unwrap();
        faults
            .enable(Features::WP_ASYNC.with(Features::WP_UNPOPULATED).with(Features::PAGEFAULT_WP))
            .unwrap();
        let _faults = faults.register(Mode::WriteProtect).unwrap();
        // On both sides of a border, behind a gap of pieces, and in the last page.
        let stored = [first, first + pages - 1, first + pages, first + 11 * pages + 7, 16 * pages - 1];
        for page in stored {
            arena.store(page * 512, 1);
        }
        assert_eq!(written(&arena), stored.map(|page| (page, 1)));
        assert_eq!(written(&arena), []);
    }

    #[test]
    fn pieces_end_at_multiples_and_with_the_range() {
        let range = |start: u64, end: u64| PageRange::new(start * PAGE_BYTES, end * PAGE_BYTES).unwrap();
        for (bytes, whole, piece) in [
            (8, range(3, 30), range(3, 8)),
            (8, range(8, 30), range(8, 16)),
            (8, range(8, 9), range(8, 9)),
            (u64::MAX / PAGE_BYTES, range(8, 30), range(8, 30)),
        ] {
            assert_eq!(up_to_multiple(whole, bytes * PAGE_BYTES), piece);
        }
    }

    #[test]
    fn each_write_is_reported_once_even_with_a_small_buffer() {
        let arena = Arena::map(64 * PAGE_BYTES).unwrap();
        let faults = Userfaultfd::for_arena(&arena).unwrap();
        faults
            .enable(Features::WP_ASYNC.with(Features::WP_UNPOPULATED).with(Features::PAGEFAULT_WP))
            .unwrap();
        for page in [0, 1, 5, 9, 20, 40, 63] {
            arena.store(page * 512, 1);
        }
        let _faults = faults.register(Mode::WriteProtect).unwrap();
        assert_eq!(written(&arena), [(0, 2), (5, 1), (9, 1), (20, 1), (40, 1), (63, 1)]);
        assert_eq!(written(&arena), []);
        arena.store(5 * 512, 2);
        arena.store(7 * 512, 2);
        assert_eq!(written(&arena), [(5, 1), (7, 1)]);
        arena.discard(PageRange::page_at(arena.range().start() + 5 * PAGE_BYTES)).unwrap();
        assert_eq!(written(&arena), []);
        assert_eq!(arena.load(5 * 512), 0);
        assert_eq!(written(&arena), [(5, 1)], "the page of zeros is new");
    }

    /// On any kernel, those before 6.15 included, which know no guard pages.
    #[test]
    fn guard_pages_may_be_asked_for_where_there_are_none() {
        let arena = Arena::map(2 * PAGE_BYTES).unwrap();
        arena.store(0, 1);
        let scan = Scan { protect: false, report: Categories::PRESENT.with(Categories::GUARD), ..WRITTEN };
        let scan = Scan { all_of: Categories::PRESENT, ..scan };
        let mut buffer = [Region::default(); 4];
        let scanned = own().scan(arena.range(), scan, &mut buffer).unwrap();
        assert_eq!((scanned.count, buffer[0].categories), (1, Categories::PRESENT));
    }

    #[test]
    fn a_range_that_is_not_registered_is_refused() {
        let arena = Arena::map(PAGE_BYTES).unwrap();
        let answer = own().scan(arena.range(), WRITTEN, &mut [Region::default(); 4]);
        assert!(matches!(answer, Err(SysError::Call { errno: Errno::EPERM, .. })), "{answer:?}");
    }

    #[test]
    fn entries_tell_what_is_there() {
        let arena = Arena::map(3 * PAGE_BYTES).unwrap();
        arena.store(512, 1);
        let mut entries = [Entry::default(); 3];
        assert_eq!(own().entries(arena.range().start(), &mut entries).unwrap(), 3);
        assert_eq!(entries.map(Entry::occupied), [false, true, false]);
    }
}
