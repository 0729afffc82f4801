//! The argument of a PAGEMAP_SCAN that another process made, read and answered in the kernel's place.

use nix::errno::Errno;

use crate::page_range::PageRange;
use crate::pagemap_scan::{Categories, Region, Scan, ScanArgument};
use crate::{Result, SysError, foreign_memory};

/// What was asked.
#[derive(Debug, Clone, Copy)]
pub struct Argument {
    /// The pages asked about.
    pub range: PageRange,
    /// What was asked of them.
    pub scan: Scan,
    /// Whether flags were set, so that more was asked than to look.
    pub has_flags: bool,
    /// Room for so many regions.
    pub regions_max: usize,
    /// Stop after so many pages; 0 is no limit.
    pub pages_max: u64,
    raw: ScanArgument,
}

impl Argument {
    /// Reads the argument at `address` of the process `pid`.
    ///
    /// # Errors
    /// [`SysError::Call`] with what the kernel would have answered for it: `EFAULT`, `EINVAL`.
    pub fn read(pid: i32, address: u64) -> Result<Self> {
        let invalid = || SysError::Call { call: "ioctl(PAGEMAP_SCAN)", errno: Errno::EINVAL };
        let mut words = [0_u64; WORDS];
        let mut bytes = [0_u8; WORDS * 8];
        foreign_memory::read_exact(pid, address, &mut bytes)?;
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let [
            size,
            flags,
            start,
            end,
            walk_end,
            regions,
            regions_max,
            pages_max,
            inverted,
            all_of,
            any_of,
            report,
        ] = words;
        if size != size_of::<ScanArgument>() as u64 {
            return Err(invalid());
        }
        let raw = ScanArgument {
            size,
            flags,
            start,
            end,
            walk_end,
            regions,
            regions_max,
            pages_max,
            inverted,
            all_of,
            any_of,
            report,
        };
        let bits = Categories::from_bits;
        let scan = Scan {
            protect: false,
            inverted: bits(inverted),
            all_of: bits(all_of),
            any_of: bits(any_of),
            report: bits(report),
        };
        Ok(Self {
            range: PageRange::new(start, end).ok_or_else(invalid)?,
            scan,
            has_flags: flags != 0,
            regions_max: usize::try_from(regions_max).map_err(|_| invalid())?,
            pages_max,
            raw,
        })
    }

    /// Writes `regions` and where the walk ended back to where it was read from.
    ///
    /// # Errors
    /// [`SysError::Call`] with `EFAULT` when the caller's memory cannot be written, with `EINVAL` when it is
    /// this process's own, or there is less room than regions.
    pub fn answer(&self, pid: i32, address: u64, regions: &[Region], walk_end: u64) -> Result<()> {
        if regions.len() > self.regions_max || group(pid)? == own() {
            return Err(SysError::Call { call: "ioctl(PAGEMAP_SCAN)", errno: Errno::EINVAL });
        }
        let mut bytes = Vec::with_capacity(size_of_val(regions));
        for region in regions {
            for word in [region.start, region.end, region.categories.bits()] {
                bytes.extend(word.to_ne_bytes());
            }
        }
        if !bytes.is_empty() {
            // SAFETY: another process's memory, as was checked above.
            unsafe { foreign_memory::write_exact(pid, self.raw.regions, &bytes) }?;
        }
        let place = address + WALK_END_OFFSET;
        // SAFETY: as above.
        unsafe { foreign_memory::write_exact(pid, place, &walk_end.to_ne_bytes()) }
    }
}

/// The process that the thread `thread` belongs to.
///
/// # Errors
/// [`SysError::NoProcess`].
pub fn group(thread: i32) -> Result<i32> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Tgid:"));
    line.and_then(|value| value.trim().parse().ok()).ok_or(SysError::NoProcess { pid: thread })
}

fn own() -> i32 {
    nix::unistd::getpid().as_raw()
}

const WORDS: usize = size_of::<ScanArgument>() / 8;
const WALK_END_OFFSET: u64 = std::mem::offset_of!(ScanArgument, walk_end) as u64;
