//! One traced thread: stopping it, making it call, letting it go as it was.

use std::ffi::{c_long, c_uint, c_void};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::InjectError;
use crate::{SysError, foreign_memory};

/// A seized thread. Detached on drop, with its own registers if it had been stopped.
pub(super) struct Tracee {
    pid: i32,
    thread: Pid,
    kept: Option<Kept>,
}

/// What the thread gets back.
struct Kept {
    registers: libc::user_regs_struct,
    signal_mask: u64,
    sequence: Option<Sequence>,
    since: Instant,
}

/// The critical section of a restartable sequence the thread is in.
#[derive(Clone, Copy)]
struct Sequence {
    address: u64,
    descriptor: u64,
}

/// What a wait reported.
enum Report {
    SystemCall,
    EventStop,
    Signal(i32),
    Ended,
}

impl Tracee {
    pub(super) fn seize(pid: i32, thread: i32, filtered: bool) -> Result<Self, InjectError> {
        let tracee = Self { pid, thread: Pid::from_raw(thread), kept: None };
        let good = ptrace::Options::PTRACE_O_TRACESYSGOOD;
        let suspend = good | ptrace::Options::from_bits_retain(SUSPEND_SECCOMP);
        let options = if filtered { suspend } else { good };
        match ptrace::seize(tracee.thread, options) {
            Ok(()) => Ok(tracee),
            // Told apart from a task that may not be traced at all by trying that; nothing has been resumed,
            // so no filter sees anything.
            Err(Errno::EPERM | Errno::EINVAL) if filtered => match ptrace::seize(tracee.thread, good) {
                Ok(()) => Err(InjectError::Filtered { pid }),
                Err(errno) => Err(tracee.failed("ptrace(PTRACE_SEIZE)", errno)),
            },
            Err(errno) => Err(tracee.failed("ptrace(PTRACE_SEIZE)", errno)),
        }
    }

    /// Brings the thread to a stop and keeps its state; false when it did not stop in time.
    pub(super) fn stop(&mut self, until: Instant) -> Result<bool, InjectError> {
        ptrace::interrupt(self.thread).map_err(|errno| self.failed("ptrace(PTRACE_INTERRUPT)", errno))?;
        loop {
            match self.wait(until)? {
                None => return Ok(false),
                Some(Report::EventStop) => break,
                // It was about to get a signal. It gets it, and stops right after.
                Some(Report::Signal(signal)) => self.resume(libc::PTRACE_CONT, signal)?,
                Some(Report::SystemCall) => self.resume(libc::PTRACE_CONT, 0)?,
                Some(Report::Ended) => return Err(InjectError::Gone { pid: self.pid }),
            }
        }
        let since = Instant::now();
        let mut registers =
            ptrace::getregs(self.thread).map_err(|errno| self.failed("ptrace(PTRACE_GETREGS)", errno))?;
        if registers.cs != CODE_64 {
            return Err(InjectError::Compat { pid: self.pid });
        }
        restart_interrupted_wait(&mut registers);
        let mut signal_mask = 0;
        self.signal_mask(GET_SIGMASK, &mut signal_mask)?;
        let sequence = self.sequence();
        self.kept = Some(Kept { registers, signal_mask, sequence, since });
        self.signal_mask(SET_SIGMASK, &mut u64::MAX.clone())?;
        Ok(true)
    }

    /// Lets the stopped thread make one system call with one argument.
    pub(super) fn system_call(
        &mut self,
        instruction: u64,
        number: c_long,
        argument: u64,
    ) -> Result<i64, InjectError> {
        let kept = self.kept.as_ref().expect("only a stopped thread is made to call");
        let mut registers = kept.registers;
        registers.rip = instruction;
        registers.rax = number.unsigned_abs();
        registers.rdi = argument;
        registers.rsi = 0;
        registers.rdx = 0;
        // Not in a system call: nothing to restart.
        registers.orig_rax = u64::MAX;
        self.set_registers(registers)?;
        let mut entered = false;
        let mut signal = 0;
        loop {
            self.resume(libc::PTRACE_SYSCALL, signal)?;
            signal = 0;
            match self.wait(Instant::now() + STEP_LIMIT)? {
                Some(Report::SystemCall) if entered => break,
                Some(Report::SystemCall) => entered = true,
                // A stop of the whole group, or a leftover of the interrupt.
                Some(Report::EventStop) => {}
                // Cannot be blocked and has no handler, so the registers of the moment do not matter.
                Some(Report::Signal(libc::SIGSTOP)) => signal = libc::SIGSTOP,
                Some(Report::Signal(signal)) => {
                    return Err(InjectError::Intercepted { pid: self.pid, signal });
                }
                Some(Report::Ended) => return Err(InjectError::Gone { pid: self.pid }),
                None => return Err(self.failed("waitpid", Errno::ETIMEDOUT)),
            }
        }
        let registers =
            ptrace::getregs(self.thread).map_err(|errno| self.failed("ptrace(PTRACE_GETREGS)", errno))?;
        Ok(registers.rax.cast_signed())
    }

    /// Lets the thread go on as if nothing had been; returns how long it stood still.
    pub(super) fn release(mut self) -> Result<Duration, InjectError> {
        let kept = self.kept.take().expect("only a stopped thread is released");
        let answer = self.give_back(&kept);
        if answer.is_err() {
            // Drop tries once more with the registers alone.
            self.kept = Some(kept);
            return answer.map(|()| Duration::ZERO);
        }
        Ok(kept.since.elapsed())
    }

    fn give_back(&self, kept: &Kept) -> Result<(), InjectError> {
        self.set_registers(kept.registers)?;
        // One more stop: inside the kernel's signal code, where a system call is restarted.
        ptrace::interrupt(self.thread).map_err(|errno| self.failed("ptrace(PTRACE_INTERRUPT)", errno))?;
        self.resume(libc::PTRACE_CONT, 0)?;
        let signal = loop {
            match self.wait(Instant::now() + STEP_LIMIT)? {
                Some(Report::EventStop) => break 0,
                Some(Report::Signal(signal)) => break signal,
                Some(Report::SystemCall) => self.resume(libc::PTRACE_CONT, 0)?,
                Some(Report::Ended) => return Err(InjectError::Gone { pid: self.pid }),
                None => return Err(self.failed("waitpid", Errno::ETIMEDOUT)),
            }
        };
        self.restore_sequence(kept.sequence);
        self.signal_mask(SET_SIGMASK, &mut kept.signal_mask.clone())?;
        self.request(libc::PTRACE_DETACH, std::ptr::null_mut(), without_provenance(signal))
            .map_err(|errno| self.failed("ptrace(PTRACE_DETACH)", errno))
    }

    fn set_registers(&self, registers: libc::user_regs_struct) -> Result<(), InjectError> {
        ptrace::setregs(self.thread, registers).map_err(|errno| self.failed("ptrace(PTRACE_SETREGS)", errno))
    }

    /// The critical section the thread is in, if any: running elsewhere makes the kernel forget it.
    fn sequence(&self) -> Option<Sequence> {
        let mut configuration = [0_u64; 3];
        let size = std::ptr::without_provenance_mut(size_of_val(&configuration));
        self.request(GET_RSEQ_CONFIGURATION, size, configuration.as_mut_ptr().cast()).ok()?;
        let address = configuration[0].checked_add(RSEQ_CS_OFFSET).filter(|_| configuration[0] != 0)?;
        let descriptor = self.read_word(address)?;
        (descriptor != 0).then_some(Sequence { address, descriptor })
    }

    /// Names the critical section again: the kernel finds the thread in it and aborts it.
    fn restore_sequence(&self, sequence: Option<Sequence>) {
        let Some(Sequence { address, descriptor }) = sequence else { return };
        if self.read_word(address) == Some(0) {
            // SAFETY: the memory is that of a traced thread, never this process's own.
            let answer = unsafe { foreign_memory::write_exact(self.pid, address, &descriptor.to_ne_bytes()) };
            if let Err(error) = answer {
                log::warn!("failed to restore a restartable sequence of process {}: {error}", self.pid);
            }
        }
    }

    fn read_word(&self, address: u64) -> Option<u64> {
        let mut word = [0; 8];
        foreign_memory::read_exact(self.pid, address, &mut word).ok()?;
        Some(u64::from_ne_bytes(word))
    }

    fn signal_mask(&self, request: c_uint, mask: &mut u64) -> Result<(), InjectError> {
        let size = std::ptr::without_provenance_mut(size_of::<u64>());
        self.request(request, size, std::ptr::from_mut(mask).cast())
            .map_err(|errno| self.failed("ptrace(PTRACE_SETSIGMASK)", errno))
    }

    fn resume(&self, request: c_uint, signal: i32) -> Result<(), InjectError> {
        self.request(request, std::ptr::null_mut(), without_provenance(signal))
            .map_err(|errno| self.failed("ptrace(PTRACE_CONT)", errno))
    }

    fn request(&self, request: c_uint, address: *mut c_void, data: *mut c_void) -> Result<(), Errno> {
        // SAFETY: of the requests made here, GETSIGMASK and GET_RSEQ_CONFIGURATION write to `data`, as many
        // bytes as `address` says, which is the size of what the caller points to; SETSIGMASK reads so many;
        // the others take `data` as a number. Nothing else of this process's memory is touched.
        let answer = unsafe { libc::ptrace(request, self.thread.as_raw(), address, data) };
        Errno::result(answer).map(drop)
    }

    /// Waits for the next report; `None` when none came in time. Spins at first: what is waited for is
    /// microseconds away, and every one of them the task stands still.
    fn wait(&self, until: Instant) -> Result<Option<Report>, InjectError> {
        let begin = Instant::now();
        loop {
            let mut status = 0;
            // SAFETY: `status` is a valid place for the answer.
            let answer =
                unsafe { libc::waitpid(self.thread.as_raw(), &raw mut status, libc::__WALL | libc::WNOHANG) };
            match Errno::result(answer) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(Some(report(status))),
                Err(Errno::ECHILD) => return Ok(Some(Report::Ended)),
                Err(errno) => return Err(self.failed("waitpid", errno)),
            }
            let now = Instant::now();
            if now >= until {
                return Ok(None);
            }
            if now - begin < SPIN {
                std::thread::yield_now();
            } else {
                sleep(PAUSE);
            }
        }
    }

    fn failed(&self, call: &'static str, errno: Errno) -> InjectError {
        match errno {
            Errno::ESRCH => InjectError::Gone { pid: self.pid },
            errno => SysError::Call { call, errno }.into(),
        }
    }
}

impl Drop for Tracee {
    /// A thread that is not stopped cannot be detached: the end of the tracing thread does it.
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            let registers = ptrace::setregs(self.thread, kept.registers);
            let mask = self.signal_mask(SET_SIGMASK, &mut kept.signal_mask.clone());
            if registers.is_err() || mask.is_err() {
                log::debug!("thread {} went before its registers were back", self.thread);
            }
        }
        if let Err(errno) = ptrace::detach(self.thread, None) {
            log::debug!("thread {} not detached: {errno}", self.thread);
        }
    }
}

/// The kernel ends these with `EINTR` at any stop, restartable or not. Run again they wait again; a signal
/// that is pending now is then one that came an instant before the call. A time limit begins anew.
fn restart_interrupted_wait(registers: &mut libc::user_regs_struct) {
    let number = c_long::try_from(registers.orig_rax).unwrap_or(-1);
    let is_wait = matches!(number, libc::SYS_epoll_wait | libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2);
    if is_wait && registers.rax.cast_signed() == -i64::from(libc::EINTR) {
        registers.rax = registers.orig_rax;
        registers.rip -= SYSCALL_BYTES;
    }
}

fn report(status: i32) -> Report {
    if !libc::WIFSTOPPED(status) {
        return Report::Ended;
    }
    match (status >> 16, libc::WSTOPSIG(status)) {
        (EVENT_STOP, _) => Report::EventStop,
        (0, SYSTEM_CALL_STOP) => Report::SystemCall,
        (0, signal) => Report::Signal(signal),
        // No other event was asked for.
        _ => Report::EventStop,
    }
}

fn without_provenance(signal: i32) -> *mut c_void {
    std::ptr::without_provenance_mut(usize::try_from(signal).unwrap_or(0))
}

/// Code segment of 64-bit user mode.
const CODE_64: u64 = 0x33;
const SYSCALL_BYTES: u64 = 2;
/// `PTRACE_O_SUSPEND_SECCOMP`
const SUSPEND_SECCOMP: i32 = 1 << 21;
const GET_SIGMASK: c_uint = 0x420a;
const SET_SIGMASK: c_uint = 0x420b;
const GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS_OFFSET: u64 = 8;
const EVENT_STOP: i32 = 128;
const SYSTEM_CALL_STOP: i32 = libc::SIGTRAP | 0x80;
/// For what only a dying machine does not do at once; a thread under way cannot be let go earlier.
const STEP_LIMIT: Duration = Duration::from_secs(30);
const SPIN: Duration = Duration::from_micros(500);
const PAUSE: Duration = Duration::from_micros(100);
