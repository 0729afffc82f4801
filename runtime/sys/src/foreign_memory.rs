//! Memory of another process: reading and writing it without stopping it.
//!
//! process_vm_readv(2) copies straight between two address spaces, many ranges in one call. It stops at the
//! first page it cannot read and does not say why: the page may be gone, or only forbidden to its own process
//! (`PROT_NONE`, a common form of guard). `/proc/PID/mem` can read forbidden pages, so it is asked next; what
//! neither can read is reported as a hole and comes out as zeros.
//!
//! A process id can be reused. The caller must hold a [`PidFd`] of the process and check after reading that
//! it has not ended; then all that was read came from it.
//!
//! [`PidFd`]: crate::pidfd::PidFd

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::page_range::{PAGE_BYTES, PageRange};
use crate::{Result, SysError};

/// Reads the pages of `ranges` of the process `pid` into `buffer`, one after the other.
///
/// Returns the pages that could not be read; their place in the buffer is zeroed.
///
/// # Errors
/// [`SysError::NoProcess`], [`SysError::Call`] (`EPERM` without the right to trace the process).
///
/// # Panics
/// When `buffer` has not exactly the length of the ranges.
pub fn read_pages(pid: i32, ranges: &[PageRange], buffer: &mut [u8]) -> Result<Vec<PageRange>> {
    let wanted: u64 = ranges.iter().map(|range| range.bytes()).sum();
    assert_eq!(wanted, buffer.len() as u64, "the buffer holds the ranges exactly");
    let mut holes = Vec::new();
    let mut cursor = Cursor { ranges, skip: 0 };
    let mut done = 0;
    while done < buffer.len() {
        let remote = cursor.vectors();
        let read = read_vectored(pid, &remote, &mut buffer[done..])?;
        // Only whole pages count: what follows a partial page is read again.
        let read = read - read % page_usize();
        done += read;
        cursor.advance(read as u64);
        if read == 0 {
            let page = cursor.page();
            let place = &mut buffer[done..done + page_usize()];
            if !read_forbidden(pid, page, place)? {
                place.fill(0);
                push_page(&mut holes, page);
            }
            done += page_usize();
            cursor.advance(PAGE_BYTES);
        }
    }
    Ok(holes)
}

/// Reads bytes at `address` of the process `pid`; all or nothing.
///
/// # Errors
/// [`SysError::NoProcess`], [`SysError::Call`] (`EFAULT` when some of it is not there).
pub fn read_exact(pid: i32, address: u64, buffer: &mut [u8]) -> Result<()> {
    let remote = [vector(address, buffer.len() as u64)];
    if read_vectored(pid, &remote, buffer)? == buffer.len() {
        Ok(())
    } else {
        Err(SysError::Call { call: "process_vm_readv", errno: Errno::EFAULT })
    }
}

/// Writes bytes at `address` of the process `pid`; all or nothing.
///
/// # Safety
/// The memory must be another process's, or memory of this one that holds plain data nobody refers to.
///
/// # Errors
/// [`SysError::NoProcess`], [`SysError::Call`] (`EFAULT` when some of it is not there or cannot be written).
pub unsafe fn write_exact(pid: i32, address: u64, bytes: &[u8]) -> Result<()> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = vector(address, bytes.len() as u64);
    // SAFETY: the kernel only reads the local vector, which is the borrowed slice; what it writes to is the
    // caller's promise.
    let answer = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match Errno::result(answer) {
        Ok(written) if written.unsigned_abs() == bytes.len() => Ok(()),
        Ok(_) => Err(SysError::Call { call: "process_vm_writev", errno: Errno::EFAULT }),
        Err(Errno::ESRCH) => Err(SysError::NoProcess { pid }),
        Err(errno) => Err(SysError::Call { call: "process_vm_writev", errno }),
    }
}

/// Where reading stands in a list of ranges.
struct Cursor<'a> {
    ranges: &'a [PageRange],
    /// Bytes of the first range that are done.
    skip: u64,
}

impl Cursor<'_> {
    fn vectors(&self) -> Vec<libc::iovec> {
        let mut skip = self.skip;
        self.ranges
            .iter()
            .take(VECTORS_MAX)
            .map(|range| {
                let vector = vector(range.start() + skip, range.bytes() - skip);
                skip = 0;
                vector
            })
            .collect()
    }

    fn page(&self) -> PageRange {
        let start = self.ranges.first().map_or(0, |range| range.start());
        PageRange::page_at(start + self.skip)
    }

    fn advance(&mut self, bytes: u64) {
        self.skip += bytes;
        while let Some((first, rest)) = self.ranges.split_first() {
            if self.skip < first.bytes() {
                break;
            }
            self.skip -= first.bytes();
            self.ranges = rest;
        }
    }
}

fn read_vectored(pid: i32, remote: &[libc::iovec], buffer: &mut [u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the kernel writes to the local vector only, which is the borrowed buffer; remote addresses are
    // numbers that it checks.
    let answer = unsafe {
        libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0)
    };
    match Errno::result(answer) {
        Ok(read) => Ok(read.unsigned_abs()),
        Err(Errno::EFAULT) => Ok(0),
        Err(Errno::ESRCH) => Err(SysError::NoProcess { pid }),
        Err(errno) => Err(SysError::Call { call: "process_vm_readv", errno }),
    }
}

/// Reads one page that its own process may not; false when there is none.
fn read_forbidden(pid: i32, page: PageRange, place: &mut [u8]) -> Result<bool> {
    let path = PathBuf::from(format!("/proc/{pid}/mem"));
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            return Err(SysError::NoProcess { pid });
        }
        Err(error) => return Err(SysError::file(path)(error)),
    };
    Ok(file.read_exact_at(place, page.start()).is_ok())
}

fn push_page(holes: &mut Vec<PageRange>, page: PageRange) {
    if let Some(last) = holes.last_mut()
        && last.end() == page.start()
        && let Some(longer) = PageRange::new(last.start(), page.end())
    {
        *last = longer;
    } else {
        holes.push(page);
    }
}

fn vector(address: u64, bytes: u64) -> libc::iovec {
    let clip = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    libc::iovec { iov_base: std::ptr::without_provenance_mut(clip(address)), iov_len: clip(bytes) }
}

const fn page_usize() -> usize {
    4096
}

const _: () = assert!(page_usize() as u64 == PAGE_BYTES);

/// `UIO_MAXIOV`: most vectors in one call.
const VECTORS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;

    fn own() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn ranges_are_read_in_order_whatever_their_number() {
        let pages = 3000;
        let arena = Arena::map(2 * pages * PAGE_BYTES).unwrap();
        let start = arena.range().start();
        let ranges: Vec<_> =
            (0..pages).map(|page| PageRange::page_at(start + 2 * page * PAGE_BYTES)).collect();
        for page in 0..pages {
            arena.store(2 * page * 512, page);
        }
        let mut buffer = vec![0; ranges.len() * page_usize()];
        assert_eq!(read_pages(own(), &ranges, &mut buffer).unwrap(), []);
        for (page, bytes) in (0_u64..).zip(buffer.chunks(page_usize())) {
            assert_eq!(bytes[..8], page.to_ne_bytes());
        }
    }

    #[test]
    fn forbidden_pages_are_read_and_missing_ones_reported() {
        let arena = Arena::map(4 * PAGE_BYTES).unwrap();
        let gone = Arena::map(2 * PAGE_BYTES).unwrap();
        let (range, hole) = (arena.range(), gone.range());
        for page in 0..4 {
            arena.store(page * 512, page + 1);
        }
        arena.forbid(PageRange::page_at(range.start() + PAGE_BYTES), true).unwrap();
        drop(gone);
        let mut buffer = vec![0xee; 6 * page_usize()];
        assert_eq!(read_pages(own(), &[range, hole], &mut buffer).unwrap(), [hole]);
        let words: Vec<u8> = buffer.chunks(page_usize()).map(|page| page[0]).collect();
        assert_eq!(words, [1, 2, 3, 4, 0, 0]);
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        let page = [PageRange::page_at(0x1000)];
        let answer = read_pages(i32::MAX, &page, &mut [0; 4096]);
        assert!(matches!(answer, Err(SysError::NoProcess { pid: i32::MAX })));
    }
}
