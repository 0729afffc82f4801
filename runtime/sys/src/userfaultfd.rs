//! userfaultfd(2): page faults of an address space as something one can read, answer and turn off.
//!
//! Two uses, two owners:
//! - *tracking*: a descriptor made inside the tracked task ([`crate::inject`]) with [`Features::WP_ASYNC`].
//!   Write protection is then lifted by the kernel itself at the first write, no event is ever read, and
//!   [`crate::pagemap_scan`] tells which pages were written.
//! - *serving*: a descriptor that CRIU made in a restored task and handed over. Faults on missing pages and
//!   changes of the address space arrive as [`Event`]s, pages are installed with [`Userfaultfd::copy`].
//!
//! Invariants a caller can lean on: an [`Event::Fork`] owns the child's descriptor; a failed or partial
//! installation says how far it came and why it stopped ([`Installed`]), and nothing is retried in here
//! except what the kernel asks to continue.
//!
//! The structures and numbers are those of the kernel's include/uapi/linux/userfaultfd.h up to 6.18; the
//! rules for each error are those of mm/userfaultfd.c and fs/userfaultfd.c there.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::arena::Arena;
use crate::page_range::{PAGE_BYTES, PageRange};
use crate::window::Window;
use crate::{Result, SysError};

/// What a descriptor shall be able to do, and what the kernel can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u64);

impl Features {
    /// Faults say whether they hit write protection.
    pub const PAGEFAULT_WP: Self = Self(1 << 0);
    /// [`Event::Fork`] is sent, and the child's memory stays registered.
    pub const EVENT_FORK: Self = Self(1 << 1);
    /// [`Event::Remap`] is sent, and moved memory stays registered.
    pub const EVENT_REMAP: Self = Self(1 << 2);
    /// [`Event::Remove`] is sent.
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// [`Event::Unmap`] is sent.
    pub const EVENT_UNMAP: Self = Self(1 << 6);
    /// Pages never touched can be write-protected (kernel 6.4).
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// The kernel lifts write protection itself (kernel 6.7).
    pub const WP_ASYNC: Self = Self(1 << 15);

    /// Both.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Which faults of a range are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Faults on pages that are not there.
    Missing,
    /// Writes to pages that are write-protected.
    WriteProtect,
}

/// One message of the kernel.
#[derive(Debug)]
pub enum Event {
    /// A task waits for the page at this address.
    Fault {
        /// Start of the page.
        address: u64,
        /// Whether it wants to write.
        write: bool,
    },
    /// The process forked; the descriptor is for the child's address space.
    Fork(Userfaultfd),
    /// Memory moved within the address space.
    Remap {
        /// Where it was.
        from: PageRange,
        /// First address of where it is.
        to: u64,
    },
    /// Pages were dropped (`MADV_DONTNEED`, `MADV_REMOVE`), the mapping stays: what is read next is zero.
    Remove(PageRange),
    /// The mapping went.
    Unmap(PageRange),
}

/// Why an installation ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The next page is there already (`EEXIST`).
    Exists,
    /// The address space is being changed: read the events, then go on (`EAGAIN`).
    Changing,
    /// The next page is in no mapping registered with this descriptor (`ENOENT`).
    NotRegistered,
    /// The address space is gone (`ESRCH`).
    Exited,
}

/// How far an installation came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// Bytes installed from the start of the range.
    pub bytes: u64,
    /// Why it stopped there; `None` when all is done.
    pub stop: Option<Stop>,
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Takes over a descriptor that another process made, or CRIU sent.
    ///
    /// Whether it is one shows at the first call. The address space it belongs to must not be this process's
    /// own: the calls below put pages where Rust assumes that nothing changes. Use [`Arena`] for that.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Makes one for the memory of `arena`, which is built for being changed from outside.
    ///
    /// Every range given to the result must lie in the arena; others are refused by the methods of
    /// [`ArenaFaults`].
    ///
    /// # Errors
    /// [`SysError::Call`]: `ENOSYS` without support in the kernel, `EPERM` when a policy forbids it.
    pub fn for_arena(arena: &Arena) -> Result<ArenaFaults> {
        // User mode only: needs no privilege.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: the call takes one integer.
        let answer = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let raw = Errno::result(answer).map_err(SysError::call("userfaultfd"))?;
        let raw =
            RawFd::try_from(raw).map_err(|_| SysError::Call { call: "userfaultfd", errno: Errno::EBADF })?;
        // SAFETY: the kernel has just returned `raw` to this call, nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(ArenaFaults { faults: Self { fd }, range: arena.range() })
    }

    /// Settles what the descriptor can do; to be called once, before anything else.
    ///
    /// # Errors
    /// [`SysError::Call`] with `EINVAL` when the kernel lacks one of `features` or was asked before.
    pub fn enable(&self, features: Features) -> Result<Features> {
        let mut argument = Api { api: API, features: features.0, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one `Api`, whose layout is checked below.
        unsafe { request(self.fd.as_fd(), UFFDIO_API, "ioctl(UFFDIO_API)", &raw mut argument) }?;
        Ok(Features(argument.features))
    }

    /// Starts to handle faults of `range`; all of it must be mapped.
    ///
    /// # Errors
    /// [`SysError::Call`]: `EBUSY` when another descriptor has it, `EINVAL` when something in it is not
    /// mapped or cannot be handled, `ENOMEM` when the address space is gone.
    pub fn register(&self, range: PageRange, mode: Mode) -> Result<()> {
        let mode = match mode {
            Mode::Missing => 1 << 0,
            Mode::WriteProtect => 1 << 1,
        };
        let mut argument = Register { range: range.into(), mode, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes one `Register`.
        unsafe { request(self.fd.as_fd(), UFFDIO_REGISTER, "ioctl(UFFDIO_REGISTER)", &raw mut argument) }
    }

    /// Ends the handling of faults in `range` and lets those who wait in it go on.
    ///
    /// # Errors
    /// [`SysError::Call`]: `EINVAL` when something in it is not mapped, `ENOMEM` when the address space is gone.
    pub fn unregister(&self, range: PageRange) -> Result<()> {
        let mut argument = Range::from(range);
        // SAFETY: UFFDIO_UNREGISTER reads one `Range`.
        unsafe { request(self.fd.as_fd(), UFFDIO_UNREGISTER, "ioctl(UFFDIO_UNREGISTER)", &raw mut argument) }
    }

    /// Lets those who wait for a page of `range` look again.
    ///
    /// # Errors
    /// [`SysError::Call`].
    pub fn wake(&self, range: PageRange) -> Result<()> {
        let mut argument = Range::from(range);
        // SAFETY: UFFDIO_WAKE reads one `Range`.
        unsafe { request(self.fd.as_fd(), UFFDIO_WAKE, "ioctl(UFFDIO_WAKE)", &raw mut argument) }
    }

    /// Write-protects `range`, or lifts the protection.
    ///
    /// # Errors
    /// [`SysError::Call`]: `ENOENT` when something in it is not registered, `EAGAIN` while the address space
    /// changes, `ESRCH` when it is gone.
    pub fn write_protect(&self, range: PageRange, on: bool) -> Result<()> {
        let mut argument = WriteProtect { range: range.into(), mode: u64::from(on) };
        // SAFETY: UFFDIO_WRITEPROTECT reads one `WriteProtect`.
        unsafe {
            request(self.fd.as_fd(), UFFDIO_WRITEPROTECT, "ioctl(UFFDIO_WRITEPROTECT)", &raw mut argument)
        }
    }

    /// Whether the address space still exists. It goes when its last task exits or execs.
    ///
    /// # Errors
    /// [`SysError::Call`] when the descriptor is no userfaultfd.
    pub fn is_alive(&self) -> Result<bool> {
        // UFFDIO_CONTINUE maps pages of shared memory only. In a page that can hold none the kernel refuses
        // it whatever is mapped there, but looks first whether the address space is alive.
        let page = PageRange::page_at(LOWEST_ADDRESS);
        let mut argument = Continue { range: page.into(), mode: 0, mapped: 0 };
        // SAFETY: UFFDIO_CONTINUE reads and writes one `Continue`.
        let answer =
            unsafe { request(self.fd.as_fd(), UFFDIO_CONTINUE, "ioctl(UFFDIO_CONTINUE)", &raw mut argument) };
        match answer {
            Ok(())
            | Err(SysError::Call {
                errno: Errno::ENOENT | Errno::EINVAL | Errno::EAGAIN | Errno::EFAULT | Errno::EEXIST,
                ..
            }) => Ok(true),
            Err(SysError::Call { errno: Errno::ESRCH, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Installs `pages` from address `to` on and wakes those who wait for them.
    ///
    /// # Errors
    /// [`SysError::Call`] for what is no [`Stop`] (`ENOMEM`, `EFAULT`, `EINVAL`).
    ///
    /// # Panics
    /// When `pages` is empty or no multiple of the page size: the caller's slicing is wrong.
    pub fn copy(&self, to: u64, pages: &[u8]) -> Result<Installed> {
        self.copy_from_address(to, pages.as_ptr().addr() as u64, pages.len() as u64)
    }

    /// Installs `bytes` bytes of `window`, from `offset` on, like [`Userfaultfd::copy`].
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`]; `EFAULT` when the window is shorter.
    pub fn copy_from_window(&self, to: u64, window: &Window, offset: u64, bytes: u64) -> Result<Installed> {
        let from = window
            .address(offset, bytes)
            .ok_or(SysError::Call { call: "ioctl(UFFDIO_COPY)", errno: Errno::EFAULT })?;
        self.copy_from_address(to, from, bytes)
    }

    /// Makes `range` pages of zeros and wakes those who wait for them.
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`].
    pub fn zero(&self, range: PageRange) -> Result<Installed> {
        self.install(range.bytes(), |done| {
            let rest = Range { start: range.start() + done, len: range.bytes() - done };
            let mut argument = ZeroPage { range: rest, mode: 0, zeroed: 0 };
            // SAFETY: UFFDIO_ZEROPAGE reads and writes one `ZeroPage`.
            let answer = unsafe {
                request(self.fd.as_fd(), UFFDIO_ZEROPAGE, "ioctl(UFFDIO_ZEROPAGE)", &raw mut argument)
            };
            (answer, argument.zeroed)
        })
    }

    /// Reads what waits, at most [`EVENTS_MAX`] messages, without blocking; an empty answer means nothing does.
    ///
    /// # Errors
    /// [`SysError::Call`], and with `EPROTO` when the kernel sends what it does not document.
    pub fn read_events(&self) -> Result<Vec<Event>> {
        let mut messages = [Message::default(); EVENTS_MAX];
        let room = size_of_val(&messages);
        // SAFETY: the buffer is `room` bytes of plain integers, and any bytes make a valid `Message`.
        let answer = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), room) };
        let length = match Errno::result(answer) {
            Ok(length) => length.unsigned_abs(),
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return Err(SysError::Call { call: "read(userfaultfd)", errno }),
        };
        messages.iter().take(length / size_of::<Message>()).map(Message::event).collect()
    }

    fn copy_from_address(&self, to: u64, from: u64, bytes: u64) -> Result<Installed> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE_BYTES), "whole pages are installed");
        self.install(bytes, |done| {
            let mut argument =
                Copy { to: to + done, from: from + done, len: bytes - done, mode: 0, copied: 0 };
            // SAFETY: UFFDIO_COPY reads and writes one `Copy`. It reads `from`, which callers take from a
            // borrowed slice or a mapped window of at least `bytes` bytes, and writes to the address space of
            // the descriptor, which is not this process's or lies in an arena.
            let answer =
                unsafe { request(self.fd.as_fd(), UFFDIO_COPY, "ioctl(UFFDIO_COPY)", &raw mut argument) };
            (answer, argument.copied)
        })
    }

    /// Calls `step` with the bytes done so far until all are done or the kernel gives a reason to stop.
    fn install(&self, bytes: u64, mut step: impl FnMut(u64) -> (Result<()>, i64)) -> Result<Installed> {
        let mut done = 0;
        while done < bytes {
            let (answer, progress) = step(done);
            let errno = match answer {
                Ok(()) => Errno::EAGAIN,
                Err(SysError::Call { errno, .. }) => errno,
                Err(error) => return Err(error),
            };
            if let Ok(progress @ 1..) = u64::try_from(progress) {
                // Some pages were installed; why it ended there is answered by the next attempt.
                done += progress.min(bytes - done);
                continue;
            }
            let stop = match errno {
                Errno::EEXIST => Stop::Exists,
                Errno::EAGAIN => Stop::Changing,
                Errno::ENOENT => Stop::NotRegistered,
                Errno::ESRCH => Stop::Exited,
                Errno::EINTR => continue,
                errno => return Err(SysError::Call { call: "ioctl(UFFDIO_COPY or ZEROPAGE)", errno }),
            };
            return Ok(Installed { bytes: done, stop: Some(stop) });
        }
        Ok(Installed { bytes: done, stop: None })
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A userfaultfd of this process that reaches one arena only.
#[derive(Debug)]
pub struct ArenaFaults {
    faults: Userfaultfd,
    range: PageRange,
}

impl ArenaFaults {
    /// [`Userfaultfd::enable`].
    ///
    /// # Errors
    /// The same.
    pub fn enable(&self, features: Features) -> Result<Features> {
        self.faults.enable(features)
    }

    /// Registers the whole arena and gives the descriptor out. What it can reach stays the arena: a range
    /// has to be registered before anything is done to it, and nobody else registers with it.
    ///
    /// # Errors
    /// [`Userfaultfd::register`].
    pub fn register(self, mode: Mode) -> Result<Userfaultfd> {
        self.faults.register(self.range, mode)?;
        Ok(self.faults)
    }
}

/// Most messages read at once.
pub const EVENTS_MAX: usize = 64;

const API: u64 = 0xAA;
const USER_MODE_ONLY: i32 = 1;
/// vm.mmap_min_addr as every distribution sets it; below it the kernel answers before it looks.
const LOWEST_ADDRESS: u64 = 0x10000;

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

impl From<PageRange> for Range {
    fn from(range: PageRange) -> Self {
        Self { start: range.start(), len: range.bytes() }
    }
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct Continue {
    range: Range,
    mode: u64,
    mapped: i64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

/// `struct uffd_msg`: the event, three reserved fields, and 24 bytes that depend on the event.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

const _: () = assert!(size_of::<Message>() == 32);
const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<Copy>() == 40);
const _: () = assert!(size_of::<ZeroPage>() == 32 && size_of::<WriteProtect>() == 24);

impl Message {
    fn event(&self) -> Result<Event> {
        let strange = || SysError::Call { call: "read(userfaultfd)", errno: Errno::EPROTO };
        let range = |start: u64, end: u64| PageRange::new(start, end).ok_or_else(strange);
        let [first, second, third] = self.words;
        Ok(match self.event {
            0x12 => Event::Fault { address: second - second % PAGE_BYTES, write: first & 1 != 0 },
            0x13 => {
                let raw = RawFd::try_from(first & 0xffff_ffff).map_err(|_| strange())?;
                // SAFETY: the kernel installed `raw` in this process when it delivered the message, and the
                // message is read once, so nothing else owns it. It inherits close-on-exec from its parent.
                Event::Fork(Userfaultfd { fd: unsafe { OwnedFd::from_raw_fd(raw) } })
            }
            0x14 => Event::Remap {
                from: range(first, first.checked_add(third).ok_or_else(strange)?)?,
                to: second,
            },
            0x15 => Event::Remove(range(first, second)?),
            0x16 => Event::Unmap(range(first, second)?),
            _ => return Err(strange()),
        })
    }
}

const fn number(direction: u64, function: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (API << 8) | function
}

const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const UFFDIO_REGISTER: u64 = number(READ_WRITE, 0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: u64 = number(READ, 0x01, size_of::<Range>());
const UFFDIO_WAKE: u64 = number(READ, 0x02, size_of::<Range>());
const UFFDIO_COPY: u64 = number(READ_WRITE, 0x03, size_of::<Copy>());
const UFFDIO_ZEROPAGE: u64 = number(READ_WRITE, 0x04, size_of::<ZeroPage>());
const UFFDIO_WRITEPROTECT: u64 = number(READ_WRITE, 0x06, size_of::<WriteProtect>());
const UFFDIO_CONTINUE: u64 = number(READ_WRITE, 0x07, size_of::<Continue>());
const UFFDIO_API: u64 = number(READ_WRITE, 0x3f, size_of::<Api>());

/// # Safety
/// `argument` points to what the request `number` reads and writes, and the effect of the request on the
/// address space behind `fd` breaks nothing that Rust relies on.
unsafe fn request<T>(fd: BorrowedFd<'_>, number: u64, call: &'static str, argument: *mut T) -> Result<()> {
    // SAFETY: the caller's promise.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) };
    Errno::result(answer).map(drop).map_err(SysError::call(call))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(arena: &Arena) -> Userfaultfd {
        let faults = Userfaultfd::for_arena(arena).unwrap();
        faults.enable(Features::EVENT_REMOVE.with(Features::EVENT_UNMAP)).unwrap();
        faults.register(Mode::Missing).unwrap()
    }

    #[test]
    fn the_requests_have_the_kernels_numbers() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(UFFDIO_COPY, 0xc028_aa03);
    }

    #[test]
    fn copied_and_zeroed_pages_are_there_and_a_second_copy_stops_at_them() {
        let arena = Arena::map(4 * PAGE_BYTES).unwrap();
        let faults = missing(&arena);
        let start = arena.range().start();
        let page = |index: u64| PageRange::page_at(start + index * PAGE_BYTES);
        assert_eq!(
            faults.copy(start + PAGE_BYTES, &[7; 4096]).unwrap(),
            Installed { bytes: 4096, stop: None }
        );
        assert_eq!(faults.zero(page(3)).unwrap().stop, None);
        let pages = [9; 4 * 4096];
        let answer = faults.copy(start, &pages).unwrap();
        assert_eq!(answer, Installed { bytes: 4096, stop: Some(Stop::Exists) });
        assert_eq!(faults.copy(page(2).start(), &pages[..4096]).unwrap().stop, None);
        let words: Vec<u64> = (0..4).map(|index| arena.load(index * 512)).collect();
        assert_eq!(words, [0x0909_0909_0909_0909, 0x0707_0707_0707_0707, 0x0909_0909_0909_0909, 0]);
    }

    #[test]
    fn a_fault_is_read_and_ends_when_its_page_comes() {
        let arena = Arena::map(PAGE_BYTES).unwrap();
        let faults = missing(&arena);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| arena.load(1));
            let address = loop {
                match faults.read_events().unwrap().as_slice() {
                    [] => std::thread::yield_now(),
                    [Event::Fault { address, write: false }] => break *address,
                    other => panic!("unexpected {other:?}"),
                }
            };
            assert_eq!(address, arena.range().start());
            faults.copy(address, &[3; 4096]).unwrap();
            assert_eq!(reader.join().unwrap(), 0x0303_0303_0303_0303);
        });
    }

    #[test]
    fn a_copy_during_a_change_is_refused_until_the_event_is_read() {
        let arena = Arena::map(2 * PAGE_BYTES).unwrap();
        let faults = missing(&arena);
        let range = arena.range();
        faults.copy(range.start(), &[3; 4096]).unwrap();
        std::thread::scope(|scope| {
            let changer = scope.spawn(|| arena.discard(range).unwrap());
            while faults.copy(range.start() + PAGE_BYTES, &[5; 4096]).unwrap().stop != Some(Stop::Changing) {
                faults.copy(range.start() + PAGE_BYTES, &[5; 4096]).unwrap();
                std::thread::yield_now();
            }
            assert!(
                matches!(faults.read_events().unwrap()[..], [Event::Remove(removed)] if removed == range)
            );
            changer.join().unwrap();
        });
        assert_eq!(faults.zero(range).unwrap().stop, None);
        assert_eq!(arena.load(0), 0);
    }

    #[test]
    fn an_address_that_is_not_registered_is_named() {
        let (arena, other) = (Arena::map(PAGE_BYTES).unwrap(), Arena::map(PAGE_BYTES).unwrap());
        let faults = missing(&arena);
        let answer = faults.copy(other.range().start(), &[1; 4096]).unwrap();
        assert_eq!(answer, Installed { bytes: 0, stop: Some(Stop::NotRegistered) });
        assert!(faults.is_alive().unwrap());
    }
}
