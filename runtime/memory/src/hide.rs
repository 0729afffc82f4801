//! A child, criu, to which given pages of given processes look empty.
//!
//! CRIU asks the kernel by PAGEMAP_SCAN which pages of a task are there, and dumps those. The child's calls of
//! it come here instead ([`godwit_sys::seccomp_notify`]); what is answered is the kernel's answer for the
//! ranges that are not hidden, so that a region partly hidden is split. Bulk memory that godwit moves itself
//! is thus neither dumped nor even walked over, and no CRIU is patched.
//! ```text
//! prepare(&mut command) ─ spawn ─ start() ─ … ─ hide(pid, pages) ─ … dump … ─ stop()
//! ```
//! Invariants:
//! - Only questions for resident pages are filtered. One for guard pages passes: guards of a hidden range
//!   still reach CRIU's images.
//! - A failure here is an error of the child's call, and so of the dump. Nothing unfiltered gets through.
//! - The supervisor is a thread of its own; it ends with the child or with [`Supervisor::stop`].
//! - The filter is inherited by what the child starts. It is for dumps; a restore would put it on the
//!   restored tasks.
//!
//! Kernels before 6.7 have no PAGEMAP_SCAN, CRIU reads `/proc/PID/pagemap` there; without CAP_SYS_ADMIN, or by a policy,
//! filters are refused. [`probe`] says so.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use godwit_sys::foreign_fd;
use godwit_sys::foreign_scan::{self, Argument};
use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::pagemap_scan::{Categories, Pagemap, Region, Scan};
use godwit_sys::pidfd::PidFd;
use godwit_sys::seccomp_notify::{Answer, Call, Filter, Listener, Waited};
use godwit_sys::{Result as SysResult, SysError};
use nix::errno::Errno;

use crate::{MemoryError, PageSet, Result};

/// What is hidden, by process; shared between its owner and the supervisor.
#[derive(Debug, Clone, Default)]
pub struct Hidden {
    pages: Arc<Mutex<BTreeMap<i32, Arc<PageSet>>>>,
}

impl Hidden {
    /// Hides `pages` of `pid`, in place of what was hidden of it before.
    pub fn set(&self, pid: i32, pages: PageSet) {
        self.lock().insert(pid, Arc::new(pages));
    }

    fn of(&self, pid: i32) -> Option<Arc<PageSet>> {
        self.lock().get(&pid).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<i32, Arc<PageSet>>> {
        // Each change is one insertion: a panic elsewhere leaves nothing half done.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the supervisor did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Answered {
    /// Calls answered here.
    pub filtered: u64,
    /// Calls left to the kernel.
    pub passed: u64,
    /// Calls that were answered with an error.
    pub failed: u64,
}

/// A command that will be filtered.
#[derive(Debug)]
pub struct Prepared {
    filter: Filter,
}

/// Says why hiding would not work here.
///
/// # Errors
/// [`MemoryError::Unavailable`].
pub fn probe() -> Result<()> {
    let unavailable = |reason: String| MemoryError::Unavailable { what: "hiding memory from criu", reason };
    let own = i32::try_from(std::process::id()).map_err(|error| unavailable(error.to_string()))?;
    let page = PageRange::page_at(0x1_0000);
    let scan = Scan { any_of: RESIDENT, report: RESIDENT, ..Scan::default() };
    Pagemap::open(own)
        .and_then(|pagemap| pagemap.scan(page, scan, &mut [Region::default()]))
        .map_err(|error| unavailable(format!("kernel 6.7 is needed ({error})")))?;
    // The filter is put on ahead of the program, so a program that does not exist tells what becomes of the filter.
    let mut command = Command::new(NO_PROGRAM);
    let prepared = prepare(&mut command)?;
    let spawned = command.spawn();
    drop(prepared);
    match spawned {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(unavailable(format!("a filter of system calls is refused ({error})")))
        }
        _ => Ok(()),
    }
}

/// Makes `command` a filtered one. Spawn it, then call [`Prepared::start`].
///
/// # Errors
/// [`MemoryError::Sys`]. Where [`probe`] fails the spawn does.
pub fn prepare(command: &mut Command) -> Result<Prepared> {
    Ok(Prepared { filter: Filter::attach(command)? })
}

impl Prepared {
    /// Starts to supervise the spawned child.
    ///
    /// # Errors
    /// [`MemoryError::Sys`] when the child is not there.
    pub fn start(self, hidden: Hidden) -> Result<Supervisor> {
        let listener = self.filter.listener()?;
        let (interrupt, theirs) = UnixStream::pair().map_err(MemoryError::file("socketpair"))?;
        let thread = std::thread::Builder::new()
            .name("hide".into())
            .spawn(move || supervise(&listener, &theirs, &hidden))
            .map_err(MemoryError::file("thread"))?;
        Ok(Supervisor { interrupt, thread: Some(thread) })
    }
}

/// Answers the child's calls until it ends. Dropped early, the child's next call fails.
#[derive(Debug)]
pub struct Supervisor {
    interrupt: UnixStream,
    thread: Option<JoinHandle<Result<Answered>>>,
}

impl Supervisor {
    /// Stops answering and returns what was done.
    ///
    /// # Errors
    /// Why the supervisor ended early, if it did.
    pub fn stop(mut self) -> Result<Answered> {
        self.end()
    }

    fn end(&mut self) -> Result<Answered> {
        let Some(thread) = self.thread.take() else { return Ok(Answered::default()) };
        // Fails when the thread has ended already, which is what is wanted.
        let _sent = self.interrupt.write(&[0]);
        thread.join().map_err(|_| MemoryError::Thread { name: "hide" })?
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::warn!("failed to hide memory: {error}");
        }
    }
}

fn supervise(listener: &Listener, interrupt: &UnixStream, hidden: &Hidden) -> Result<Answered> {
    let mut answered = Answered::default();
    loop {
        let call = match listener.wait_call(interrupt)? {
            Waited::Call(call) => call,
            Waited::Ended | Waited::Interrupted => return Ok(answered),
        };
        let answer = match answer(listener, call, hidden) {
            Ok(answer) => answer,
            Err(error) => {
                log::warn!("failed to answer a scan of process {}: {error}", call.pid);
                Answer::Error(errno_of(&error))
            }
        };
        match answer {
            Answer::Value(_) => answered.filtered += 1,
            Answer::Kernel => answered.passed += 1,
            Answer::Error(_) => answered.failed += 1,
        }
        listener.respond(call, answer)?;
    }
}

fn answer(listener: &Listener, call: Call, hidden: &Hidden) -> SysResult<Answer> {
    let caller = foreign_scan::group(call.pid)?;
    let Some(subject) = subject(caller, call.fd) else { return Ok(Answer::Kernel) };
    let Some(pages) = hidden.of(subject) else { return Ok(Answer::Kernel) };
    let argument = Argument::read(call.pid, call.argument)?;
    if !argument.scan.any_of.intersects(RESIDENT) || argument.has_flags {
        return Ok(Answer::Kernel);
    }
    let pagemap = Pagemap::from_fd(foreign_fd::duplicate(PidFd::open(caller)?, call.fd)?);
    // All that was read is the caller's only if it still waits.
    if !listener.is_waiting(call) {
        return Err(SysError::NoProcess { pid: call.pid });
    }
    let mut regions = vec![Region::default(); argument.regions_max.min(REGIONS_MAX)];
    let (count, walk_end) = visible(&pagemap, &argument, &pages, &mut regions)?;
    argument.answer(call.pid, call.argument, &regions[..count], walk_end)?;
    Ok(Answer::Value(i64::try_from(count).unwrap_or(i64::MAX)))
}

/// Scans what of the asked range is not hidden; returns the number of regions and where the walk ended.
fn visible(
    pagemap: &Pagemap,
    argument: &Argument,
    hidden: &PageSet,
    regions: &mut [Region],
) -> SysResult<(usize, u64)> {
    let asked: PageSet = [argument.range].into_iter().collect();
    let (mut count, mut pages) = (0, 0);
    for range in asked.difference(hidden).ranges() {
        let mut rest = Some(*range);
        while let Some(range) = rest {
            if count == regions.len() || (argument.pages_max > 0 && pages >= argument.pages_max) {
                return Ok((count, range.start()));
            }
            // Each region has at least one page, so a limit on pages is one on regions as well.
            let scanned = pagemap.scan(range, argument.scan, &mut regions[count..])?;
            for region in &mut regions[count..count + scanned.count] {
                pages += (region.end - region.start) / PAGE_BYTES;
            }
            count += scanned.count;
            rest = PageRange::new(scanned.walk_end, range.end());
        }
    }
    Ok((count, argument.range.end()))
}

/// The process whose page tables descriptor `fd` of `caller` shows: the link's last two parts.
fn subject(caller: i32, fd: i32) -> Option<i32> {
    let link = fs::read_link(format!("/proc/{caller}/fd/{fd}")).ok()?;
    let mut parts = link.to_str()?.rsplit('/');
    (parts.next()? == "pagemap").then_some(())?;
    parts.next()?.parse().ok()
}

fn errno_of(error: &SysError) -> Errno {
    match error {
        SysError::Call { errno, .. } => *errno,
        SysError::NoProcess { .. } => Errno::ESRCH,
        _ => Errno::EIO,
    }
}

const NO_PROGRAM: &str = "/proc/self/no-program";
const RESIDENT: Categories = Categories::PRESENT.with(Categories::SWAPPED);
/// CRIU has room for 2 MiB of pages, one region each, in the worst case; this is 16 times that.
const REGIONS_MAX: usize = 1 << 13;
