//! A file, in memory unless it is wanted elsewhere, mapped so that the kernel can read pages straight out of it.
//!
//! Pages that wait to be installed stand in a memfd. [`Userfaultfd::copy_from_window`] takes them from the
//! mapping without a buffer in between, [`Window::punch`] gives their memory back. The process itself never
//! looks through the mapping: contents go in and out by pread(2) and pwrite(2), so there is no reference that
//! a concurrent write could invalidate.
//!
//! [`Userfaultfd::copy_from_window`]: crate::userfaultfd::Userfaultfd::copy_from_window

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::page_range::PAGE_BYTES;
use crate::{Result, SysError};

/// A memfd of fixed length and its mapping.
#[derive(Debug)]
pub struct Window {
    file: File,
    base: NonNull<libc::c_void>,
    bytes: u64,
}

// SAFETY: the mapping belongs to the process, and nothing here dereferences it.
unsafe impl Send for Window {}
// SAFETY: as above; the kernel serialises reads and writes of the file.
unsafe impl Sync for Window {}

impl Window {
    /// Makes a window of `bytes` bytes, rounded up to whole pages; it takes no memory until it is written.
    ///
    /// # Errors
    /// [`SysError::Call`], [`SysError::File`].
    pub fn new(name: &CStr, bytes: u64) -> Result<Self> {
        Self::over(crate::memfd::create(name)?, bytes)
    }

    /// Makes a window over a file on storage in `directory`, which has no name there and goes with the window.
    ///
    /// # Errors
    /// [`SysError::File`] where the file system has no files without a name, [`SysError::Call`].
    pub fn on_storage(directory: &Path, bytes: u64) -> Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
        Self::over(options.open(directory).map_err(SysError::file(directory))?, bytes)
    }

    fn over(file: File, bytes: u64) -> Result<Self> {
        let too_large = || SysError::Call { call: "mmap", errno: Errno::ENOMEM };
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES).ok_or_else(too_large)?;
        let length = usize::try_from(bytes).map_err(|_| too_large())?;
        file.set_len(bytes).map_err(SysError::file("memfd"))?;
        // SAFETY: without an address the kernel picks a free place, so no other memory is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(SysError::Call { call: "mmap", errno: Errno::last() });
        }
        let base = NonNull::new(base).ok_or_else(too_large)?;
        Ok(Self { file, base, bytes })
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Memory it takes at present.
    ///
    /// # Errors
    /// [`SysError::File`].
    pub fn resident_bytes(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(SysError::file("memfd"))?.blocks() * 512)
    }

    /// Writes `contents` at `offset`.
    ///
    /// # Errors
    /// [`SysError::File`]; `InvalidInput` when it would reach beyond the end.
    pub fn write(&self, offset: u64, contents: &[u8]) -> Result<()> {
        self.check(offset, contents.len() as u64)?;
        self.file.write_all_at(contents, offset).map_err(SysError::file("memfd"))
    }

    /// Reads into `buffer` from `offset` on.
    ///
    /// # Errors
    /// [`SysError::File`]; `InvalidInput` when it would reach beyond the end.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check(offset, buffer.len() as u64)?;
        self.file.read_exact_at(buffer, offset).map_err(SysError::file("memfd"))
    }

    /// Gives the memory of these bytes back; they read as zero afterwards.
    ///
    /// # Errors
    /// [`SysError::Call`].
    pub fn punch(&self, offset: u64, bytes: u64) -> Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, bytes)
    }

    /// Takes the memory of these bytes, so that writing them does not have to.
    ///
    /// # Errors
    /// [`SysError::Call`] when there is not enough; some may have been taken then.
    pub fn reserve(&self, offset: u64, bytes: u64) -> Result<()> {
        self.check(offset, bytes)?;
        self.allocate(FallocateFlags::empty(), offset, bytes)
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> Result<()> {
        let signed = |value: u64| {
            i64::try_from(value).map_err(|_| SysError::Call { call: "fallocate", errno: Errno::EFBIG })
        };
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self.file.as_fd(), mode, signed(offset)?, signed(bytes)?)
            .map_err(SysError::call("fallocate"))
    }

    /// The address of `bytes` bytes at `offset`, for the kernel to read; `None` when they are not all inside.
    pub(crate) fn address(&self, offset: u64, bytes: u64) -> Option<u64> {
        (offset.checked_add(bytes)? <= self.bytes).then(|| self.base.addr().get() as u64 + offset)
    }

    fn check(&self, offset: u64, bytes: u64) -> Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(SysError::file("memfd")(std::io::ErrorKind::InvalidInput.into())),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let Ok(length) = usize::try_from(self.bytes) else { return };
        // SAFETY: the mapping is owned by this value, and nothing dereferences it.
        let answer = unsafe { libc::munmap(self.base.as_ptr(), length) };
        debug_assert_eq!(answer, 0, "munmap of a mapping we own");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_by_writing_and_given_back_by_punching() {
        let window = Window::new(c"test", 64 * PAGE_BYTES).unwrap();
        assert_eq!(window.resident_bytes().unwrap(), 0);
        window.write(8 * PAGE_BYTES, &[1; 8192]).unwrap();
        assert_eq!(window.resident_bytes().unwrap(), 8192);
        let mut buffer = [0; 16];
        window.read(9 * PAGE_BYTES, &mut buffer).unwrap();
        assert_eq!(buffer, [1; 16]);
        window.punch(8 * PAGE_BYTES, 8192).unwrap();
        assert_eq!(window.resident_bytes().unwrap(), 0);
        window.read(9 * PAGE_BYTES, &mut buffer).unwrap();
        assert_eq!(buffer, [0; 16]);
    }

    #[test]
    fn memory_taken_ahead_is_there_and_zero_until_it_is_written() {
        let window = Window::new(c"test", 64 * PAGE_BYTES).unwrap();
        window.reserve(8 * PAGE_BYTES, 8192).unwrap();
        assert_eq!(window.resident_bytes().unwrap(), 8192);
        window.write(8 * PAGE_BYTES, &[1; 4096]).unwrap();
        let mut buffer = [7; 16];
        window.read(9 * PAGE_BYTES, &mut buffer).unwrap();
        assert_eq!((buffer, window.resident_bytes().unwrap()), ([0; 16], 8192));
        assert!(window.reserve(63 * PAGE_BYTES, 8192).is_err());
    }

    #[test]
    fn what_lies_beyond_the_end_is_refused() {
        let window = Window::new(c"test", PAGE_BYTES).unwrap();
        assert!(window.write(4090, &[0; 7]).is_err());
        assert!(window.read(u64::MAX, &mut [0]).is_err());
        assert!(window.address(0, PAGE_BYTES + 1).is_none());
    }
}
