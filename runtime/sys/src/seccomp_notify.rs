//! Answering one system call of a child in the kernel's place (seccomp(2) user notification, kernel 5.0).
//!
//! ```text
//! parent: Filter::attach(&mut command) ─ spawn ─ Filter::listener ─ wait_call ─ respond …
//! child:                       fork ─ seccomp filter ─ SCM_RIGHTS: listener ─ exec
//! ```
//! The filter hands over `ioctl(_, PAGEMAP_SCAN, _)` and lets everything else through. The child's own
//! children inherit it, so it must not be put on a program that starts tasks which live on. When nobody
//! listens any more the kernel answers `ENOSYS`: the program fails, it does not get unfiltered answers.
//!
//! x86-64 only. Sources: seccomp_unotify(2), seccomp(2).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::pagemap_scan::PAGEMAP_SCAN;
use crate::{Result, SysError, fdpass};

/// The parent's end of a child that is to be filtered.
#[derive(Debug)]
pub struct Filter {
    socket: OwnedFd,
}

/// A system call that waits for its answer.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Names it in [`Listener::respond`].
    pub id: u64,
    /// The thread that made it.
    pub pid: i32,
    /// The file descriptor it was made on.
    pub fd: RawFd,
    /// The address of its argument.
    pub argument: u64,
}

/// What the caller gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// This result.
    Value(i64),
    /// This error.
    Error(Errno),
    /// What the kernel says.
    Kernel,
}

/// What waiting ended with.
#[derive(Debug)]
pub enum Waited {
    /// A call.
    Call(Call),
    /// Every filtered task has ended.
    Ended,
    /// The other descriptor became readable.
    Interrupted,
}

impl Filter {
    /// Lets `command` put the filter on itself before it executes.
    ///
    /// # Errors
    /// [`SysError::Call`] when no descriptor is left. That the kernel refuses the filter shows when the
    /// command is spawned (`EACCES` or `EPERM` without CAP_SYS_ADMIN, `EINVAL` before kernel 5.0).
    pub fn attach(command: &mut Command) -> Result<Self> {
        let (socket, theirs) = fdpass::seqpacket_pair()?;
        let prepare = move || {
            let listener = install()?;
            send_fd(theirs.as_raw_fd(), listener.as_raw_fd())
        };
        // SAFETY: the closure runs between fork and exec; it makes system calls with arguments on its own
        // stack only, allocates nothing and takes no lock.
        unsafe { command.pre_exec(prepare) };
        Ok(Self { socket })
    }

    /// Takes the listener, once the command has been spawned.
    ///
    /// # Errors
    /// [`SysError::Closed`] when the command is gone and was never spawned.
    pub fn listener(self) -> Result<Listener> {
        let received = fdpass::receive(&self.socket, &mut [0; 1])?;
        let [fd] = <[OwnedFd; 1]>::try_from(received.fds).map_err(|_| SysError::Closed)?;
        Ok(Listener { fd })
    }
}

/// Where filtered calls arrive.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Waits for a call, or for `interrupt` to become readable or closed.
    ///
    /// # Errors
    /// [`SysError::Call`].
    pub fn wait_call(&self, interrupt: impl AsFd) -> Result<Waited> {
        loop {
            let mut fds = [
                PollFd::new(self.fd.as_fd(), PollFlags::POLLIN),
                PollFd::new(interrupt.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(SysError::Call { call: "poll", errno }),
                Ok(_) => {}
            }
            let [call, interrupted] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if !interrupted.is_empty() {
                return Ok(Waited::Interrupted);
            }
            if call.contains(PollFlags::POLLIN) {
                if let Some(call) = self.receive()? {
                    return Ok(Waited::Call(call));
                }
            } else if !call.is_empty() {
                return Ok(Waited::Ended);
            }
        }
    }

    /// Whether the call still waits: only then does what was read about its maker belong to it.
    pub fn is_waiting(&self, call: Call) -> bool {
        // SAFETY: the request reads the one integer it is given.
        let answer = unsafe {
            libc::ioctl(self.fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const call.id)
        };
        answer == 0
    }

    /// Answers a call. One that no longer waits is no error.
    ///
    /// # Errors
    /// [`SysError::Call`].
    pub fn respond(&self, call: Call, answer: Answer) -> Result<()> {
        let mut response = libc::seccomp_notif_resp { id: call.id, val: 0, error: 0, flags: 0 };
        match answer {
            Answer::Value(value) => response.val = value,
            Answer::Error(errno) => response.error = -(errno as i32),
            Answer::Kernel => response.flags = CONTINUE,
        }
        // SAFETY: the request reads one response.
        let answer =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut response) };
        match Errno::result(answer) {
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(SysError::Call { call: "ioctl(SECCOMP_IOCTL_NOTIF_SEND)", errno }),
        }
    }

    fn receive(&self) -> Result<Option<Call>> {
        // The kernel refuses a structure that is not all zeros.
        let mut request = MaybeUninit::<libc::seccomp_notif>::zeroed();
        // SAFETY: the request writes one notification.
        let answer =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, request.as_mut_ptr()) };
        match Errno::result(answer) {
            Ok(_) => {}
            // Its maker was killed, or a signal came.
            Err(Errno::ENOENT | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(SysError::Call { call: "ioctl(SECCOMP_IOCTL_NOTIF_RECV)", errno }),
        }
        // SAFETY: integers only, zeroed and then written by the kernel.
        let request = unsafe { request.assume_init() };
        let fd = RawFd::try_from(request.data.args[0] & 0xffff_ffff).unwrap_or(-1);
        let pid = i32::try_from(request.pid).unwrap_or(0);
        Ok(Some(Call { id: request.id, pid, fd, argument: request.data.args[2] }))
    }
}

/// Puts the filter on the calling thread. Async-signal-safe.
fn install() -> io::Result<OwnedFd> {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        // The classes and modes of BPF all fit.
        code: (code & 0xffff) as u16,
        jt,
        jf,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let mut program = [
        statement(load, ARCHITECTURE_OFFSET, 0, 0),
        statement(equal, AUDIT_ARCH_X86_64, 0, 5),
        statement(load, NUMBER_OFFSET, 0, 0),
        statement(equal, SYS_IOCTL, 0, 3),
        statement(load, REQUEST_OFFSET, 0, 0),
        statement(equal, SCAN_REQUEST, 0, 1),
        statement(answer, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
        statement(answer, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: 8, filter: program.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // SAFETY: `program` describes eight instructions that live until the call returns.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    let raw = Errno::result(answer)?;
    let raw = RawFd::try_from(raw).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just returned `raw` to this call, nothing else owns it. It is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Sends one descriptor with one byte. Async-signal-safe, which `fdpass` is not: it allocates.
fn send_fd(socket: RawFd, fd: RawFd) -> io::Result<()> {
    let mut byte = [0_u8];
    let mut vector = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = Control { header: [0; 2], fd, padding: 0 };
    let header = libc::cmsghdr {
        cmsg_len: size_of::<libc::cmsghdr>() + size_of::<RawFd>(),
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    control.header[0] = header.cmsg_len as u64;
    control.header[1] =
        u64::from(header.cmsg_level.unsigned_abs()) | (u64::from(header.cmsg_type.unsigned_abs()) << 32);
    // SAFETY: a message header is integers and pointers, for which zero is valid.
    let mut message = unsafe { MaybeUninit::<libc::msghdr>::zeroed().assume_init() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: the message points to a vector of one byte and to one control message, both on this stack.
    let answer = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) };
    Errno::result(answer).map(drop).map_err(io::Error::from)
}

/// A control message with one descriptor, as CMSG_SPACE lays it out on 64-bit.
#[repr(C)]
struct Control {
    header: [u64; 2],
    fd: RawFd,
    padding: u32,
}

const _: () = assert!(size_of::<Control>() == 24 && size_of::<libc::cmsghdr>() == 16);

/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`
const CONTINUE: u32 = 1;
/// Offsets in `struct seccomp_data`; of the second argument the lower half.
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const REQUEST_OFFSET: u32 = 24;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const SYS_IOCTL: u32 = 16;
const SCAN_REQUEST: u32 = 0xc060_6610;
const _: () = assert!(SCAN_REQUEST as u64 == PAGEMAP_SCAN && SYS_IOCTL as i64 == libc::SYS_ioctl);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_other_calls_pass_and_its_end_is_seen() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP: a filter without no_new_privs needs CAP_SYS_ADMIN");
            return;
        }
        let mut command = Command::new("true");
        let filter = Filter::attach(&mut command).unwrap();
        let mut child = command.spawn().unwrap();
        drop(command);
        let listener = filter.listener().unwrap();
        let (interrupt, _kept) = fdpass::seqpacket_pair().unwrap();
        assert!(matches!(listener.wait_call(&interrupt).unwrap(), Waited::Ended));
        assert!(child.wait().unwrap().success());
    }
}
