//! Making a userfaultfd inside another task, and taking it out.
//!
//! A userfaultfd belongs to the address space of the task that makes it, so tracking a running process needs
//! one system call made *by that process*:
//! ```text
//! seize ─ interrupt ─ stop ─┬─ keep registers, signal mask, rseq area
//!                           ├─ userfaultfd(2) at an existing `syscall` instruction ─ pidfd_getfd(2)
//!                           ├─ close(2)
//!                           └─ all put back ─ detach          (the task stood still for some 0.1 to 0.4 ms)
//! ```
//! Invariants:
//! - No byte of the task's code is changed: a `syscall` instruction is looked up, in the vDSO first.
//! - A task that sat in a system call sits in it again afterwards: the last stop is one from which the kernel
//!   itself applies its restart rules to the old registers. epoll_wait(2) and its kin, which the kernel ends
//!   with `EINTR` at any stop, are restarted here, which is the same as a call made an instant later.
//! - No signal is lost, reordered or handled early: all are blocked meanwhile; `SIGSTOP`, which cannot be,
//!   is delivered. A stopped task is stopped again when it is let go.
//! - A task in a restartable sequence is aborted out of it by the kernel as after any preemption.
//! - A filter of seccomp(2) is suspended meanwhile or the task is left alone: one that kills never sees the
//!   call.
//! - The time to the stop is bounded; a task that does not stop (vfork(2), uninterruptible sleep, a frozen
//!   version 1 cgroup) is let go untouched and named.
//!
//! Left open: when the calling process is killed within those tenths of a millisecond, the task goes on with
//! foreign registers, as with every debugger. And a sibling thread that forks within them leaves a copy of
//! the descriptor in its child, which a check for userfaultfds before the dump finds.
//!
//! x86-64 only. Sources: ptrace(2); kernel/ptrace.c, kernel/signal.c, kernel/rseq.c and
//! arch/x86/kernel/signal.c of 6.18; that the end must be a stop inside the kernel's signal code is the rule
//! by which debuggers call functions in a program that was stopped in a system call.

mod tracee;

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::SysError;
use crate::foreign_fd;
use crate::foreign_scan::group;
use crate::pidfd::PidFd;
use tracee::Tracee;

/// Why a task was not injected. The task is as it was.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// It ended, before or meanwhile.
    #[error("process {pid} has ended")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// All its threads have ended, its parent has not reaped it.
    #[error("process {pid} is a zombie")]
    Zombie {
        /// The process.
        pid: i32,
    },
    /// A debugger holds it.
    #[error("process {pid} is traced by process {by}")]
    Traced {
        /// The process.
        pid: i32,
        /// The tracer.
        by: i32,
    },
    /// It runs 32-bit code.
    #[error("process {pid} runs 32-bit code")]
    Compat {
        /// The process.
        pid: i32,
    },
    /// It has a seccomp filter that may not be suspended.
    #[error("process {pid} has a seccomp filter, and suspending it needs CAP_SYS_ADMIN")]
    Filtered {
        /// The process.
        pid: i32,
    },
    /// No thread of it reached a stop in time.
    #[error("process {pid} did not stop within {limit_ms} ms (state {state})")]
    NotStopping {
        /// The process.
        pid: i32,
        /// State letter of proc(5): D sleeps in the kernel, also in vfork(2) or in a frozen cgroup.
        state: char,
        /// How long it was given.
        limit_ms: u128,
    },
    /// It has no `syscall` instruction in executable memory.
    #[error("process {pid} has no system call instruction")]
    NoInstruction {
        /// The process.
        pid: i32,
    },
    /// The system call never ran, a signal came in its place.
    #[error("process {pid} got signal {signal} in place of a system call")]
    Intercepted {
        /// The process.
        pid: i32,
        /// Number of the signal.
        signal: i32,
    },
    /// The kernel refused the task what it was made to ask for.
    #[error("process {pid}: {call}: {errno}")]
    Refused {
        /// The process.
        pid: i32,
        /// The system call.
        call: &'static str,
        /// The answer.
        errno: Errno,
    },
    /// Something on our own side failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Injected {
    /// The descriptor; the task itself no longer has it.
    pub fd: OwnedFd,
    /// How long the task stood still.
    pub stopped: Duration,
}

/// Makes a userfaultfd (user mode only, non-blocking) in the process `pid` and takes it out.
///
/// `limit` bounds the wait for the task to stop, over all threads that are tried. Blocks; a thread of its own
/// does the tracing, so that nothing stays attached whatever happens. No other thread of this process may
/// reap children it does not know (`waitpid(-1)`) meanwhile.
///
/// # Errors
/// [`InjectError`]; the process is then as it was.
pub fn userfaultfd(pid: i32, limit: Duration) -> Result<Injected, InjectError> {
    std::thread::scope(|scope| scope.spawn(|| any_thread(pid, limit)).join()).unwrap_or_else(|panic| {
        std::panic::resume_unwind(panic);
    })
}

/// Tries thread after thread, the leader first: one that cannot be stopped does not stand for all.
fn any_thread(pid: i32, limit: Duration) -> Result<Injected, InjectError> {
    let deadline = Instant::now() + limit;
    let threads = threads(pid)?;
    let count = u32::try_from(threads.len()).unwrap_or(u32::MAX).max(1);
    let mut failure = InjectError::Zombie { pid };
    for thread in threads {
        // An equal share each, but what is left for the last.
        let share = (limit / count).max(SHARE_MIN);
        let until = deadline.min(Instant::now() + share);
        match one_thread(pid, thread, until, limit) {
            Err(InjectError::Zombie { .. }) => {}
            Err(error @ (InjectError::NotStopping { .. } | InjectError::Gone { .. })) => failure = error,
            answer => return answer,
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(failure)
}

fn one_thread(pid: i32, thread: i32, until: Instant, limit: Duration) -> Result<Injected, InjectError> {
    let status = Status::read(pid, thread)?;
    if matches!(status.state, 'Z' | 'X') {
        return Err(InjectError::Zombie { pid });
    }
    if status.tracer != 0 {
        return Err(InjectError::Traced { pid, by: status.tracer });
    }
    // Before the stop, which it would lengthen.
    let instruction = syscall_instruction(pid)?;
    let mut tracee = match Tracee::seize(pid, thread, status.filtered) {
        Err(InjectError::Sys(SysError::Call { errno: Errno::EPERM, .. })) => {
            // Somebody else may have been faster.
            return Err(match Status::read(pid, thread)?.tracer {
                0 => SysError::Call { call: "ptrace(PTRACE_SEIZE)", errno: Errno::EPERM }.into(),
                by => InjectError::Traced { pid, by },
            });
        }
        other => other?,
    };
    if !tracee.stop(until)? {
        let state = Status::read(pid, thread)?.state;
        return Err(InjectError::NotStopping { pid, state, limit_ms: limit.as_millis() });
    }
    let answer = match instruction {
        Some(instruction) => exchange(&mut tracee, pid, thread, instruction),
        None => Err(InjectError::NoInstruction { pid }),
    };
    let stopped = tracee.release()?;
    Ok(Injected { fd: answer?, stopped })
}

fn exchange(tracee: &mut Tracee, pid: i32, thread: i32, instruction: u64) -> Result<OwnedFd, InjectError> {
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs()) | USER_MODE_ONLY;
    let number = tracee.system_call(instruction, libc::SYS_userfaultfd, flags)?;
    let number = RawFd::try_from(number)
        .ok()
        .filter(|number| *number >= 0)
        .ok_or_else(|| refused(pid, "userfaultfd", number))?;
    let taken = take(pid, thread, number);
    let closed = tracee.system_call(instruction, libc::SYS_close, u64::from(number.unsigned_abs()))?;
    if closed != 0 {
        return Err(refused(pid, "close", closed));
    }
    taken
}

fn refused(pid: i32, call: &'static str, answer: i64) -> InjectError {
    let errno = i32::try_from(answer.saturating_neg()).map_or(Errno::UnknownErrno, Errno::from_raw);
    InjectError::Refused { pid, call, errno }
}

fn take(pid: i32, thread: i32, number: RawFd) -> Result<OwnedFd, InjectError> {
    // A thread can have descriptors of its own; a pidfd for it needs kernel 6.9.
    let fd = match open_thread(thread) {
        Some(process) if thread != pid => foreign_fd::duplicate(process, number)?,
        _ => foreign_fd::duplicate(PidFd::open(pid)?, number)?,
    };
    let link = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let name = fs::read_link(&link).map_err(SysError::file(link))?;
    if name.as_os_str() == "anon_inode:[userfaultfd]" {
        Ok(fd)
    } else {
        Err(SysError::Call { call: "pidfd_getfd", errno: Errno::EBADF }.into())
    }
}

fn open_thread(thread: i32) -> Option<OwnedFd> {
    // PIDFD_THREAD
    let flags = libc::O_EXCL;
    // SAFETY: pidfd_open takes two integers.
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_open, thread, flags) };
    let raw = RawFd::try_from(answer).ok().filter(|raw| *raw >= 0)?;
    // SAFETY: the kernel has just returned `raw` to this call, nothing else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn threads(pid: i32) -> Result<Vec<i32>, InjectError> {
    let gone = |_| InjectError::Gone { pid };
    let mut threads: Vec<i32> = fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(gone)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    // The leader first.
    threads.sort_by_key(|thread| (*thread != pid, *thread));
    threads.truncate(THREADS_MAX);
    Ok(threads)
}

/// Finds `syscall` (0f 05) in executable memory. The bytes may stand inside another instruction: jumped to,
/// they are one all the same.
fn syscall_instruction(pid: i32) -> Result<Option<u64>, InjectError> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|_| InjectError::Gone { pid })?;
    let mut candidates: Vec<(u64, u64, bool)> = text.lines().filter_map(executable).collect();
    candidates.sort_by_key(|(.., is_vdso)| !is_vdso);
    for (start, end, _) in candidates {
        let length = usize::try_from(end.saturating_sub(start)).unwrap_or(0).min(SEARCH_BYTES);
        let mut code = vec![0; length];
        if crate::foreign_memory::read_exact(pid, start, &mut code).is_err() {
            continue;
        }
        if let Some(offset) = code.windows(2).position(|pair| pair == [0x0f, 0x05]) {
            return Ok(Some(start + offset as u64));
        }
    }
    Ok(None)
}

/// Start, end and whether it is the vDSO, when a line of `/proc/PID/maps` is readable, executable and private.
fn executable(line: &str) -> Option<(u64, u64, bool)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let name = fields.nth(3).unwrap_or("");
    if !permissions.starts_with("r-x") || name == "[vsyscall]" {
        return None;
    }
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?, name == "[vdso]"))
}

/// What `/proc/PID/task/TID/status` says of a thread.
#[derive(Debug)]
struct Status {
    state: char,
    tracer: i32,
    filtered: bool,
}

impl Status {
    fn read(pid: i32, thread: i32) -> Result<Self, InjectError> {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"))
            .map_err(|_| InjectError::Gone { pid })?;
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map_or("", str::trim)
        };
        Ok(Self {
            state: field("State").chars().next().unwrap_or('?'),
            // A thread traces, a user looks for a process.
            tracer: field("TracerPid").parse().map_or(0, |thread| group(thread).unwrap_or(thread)),
            filtered: !matches!(field("Seccomp"), "0" | ""),
        })
    }
}

const USER_MODE_ONLY: u64 = 1;
/// The vDSO has 2 pages; libraries have an instruction near their start.
const SEARCH_BYTES: usize = 1 << 20;
const THREADS_MAX: usize = 8;
/// Below this a thread on a busy machine would not get to its stop.
const SHARE_MIN: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests;
