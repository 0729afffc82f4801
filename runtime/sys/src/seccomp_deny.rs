//! Refusing system calls to a program, to see how it does without them.
//!
//! The filter is inherited by everything the program starts, and cannot be taken off. x86-64 only: a call by any
//! other convention passes.
//!
//! Source: seccomp(2).

use nix::errno::Errno;

use crate::{Result, SysError};

/// A system call that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denial {
    /// Its number.
    pub call: i64,
    /// For a call such as `ioctl`: only with this as its second argument, of which the lower half is compared.
    pub request: Option<u32>,
    /// What it ends with.
    pub errno: Errno,
}

impl Denial {
    /// A kernel or policy without userfaultfd.
    pub const USERFAULTFD: Self = Self { call: libc::SYS_userfaultfd, request: None, errno: Errno::EPERM };
    /// A kernel that is older than 6.7.
    pub const PAGEMAP_SCAN: Self =
        Self { call: libc::SYS_ioctl, request: Some(SCAN_REQUEST), errno: Errno::ENOTTY };
    /// A policy without user notifications of seccomp.
    pub const SECCOMP_LISTENER: Self =
        Self { call: libc::SYS_seccomp, request: Some(LISTENER_FLAG), errno: Errno::EACCES };

    /// Instructions that answer the call, and fall through for any other.
    fn instructions(self) -> Vec<libc::sock_filter> {
        // Numbers of calls are small; one that is not matches nothing.
        let call = u32::try_from(self.call).unwrap_or(u32::MAX);
        let errno = libc::SECCOMP_RET_ERRNO | (self.errno as u32 & libc::SECCOMP_RET_DATA);
        let refuse = statement(libc::BPF_RET | libc::BPF_K, errno, 0, 0);
        let mut program = vec![statement(LOAD, NUMBER_OFFSET, 0, 0)];
        match self.request {
            None => program.push(statement(EQUAL, call, 0, 1)),
            Some(request) => program.extend([
                statement(EQUAL, call, 0, 3),
                statement(LOAD, REQUEST_OFFSET, 0, 0),
                statement(EQUAL, request, 0, 1),
            ]),
        }
        program.push(refuse);
        program
    }
}

/// Refuses these calls to the calling thread and what it starts.
///
/// # Errors
/// [`SysError::Call`]: `EACCES` without CAP_SYS_ADMIN.
pub fn deny(denials: &[Denial]) -> Result<()> {
    let mut program =
        vec![statement(LOAD, ARCHITECTURE_OFFSET, 0, 0), statement(EQUAL, AUDIT_ARCH_X86_64, 1, 0)];
    let allow = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0);
    program.push(allow);
    program.extend(denials.iter().flat_map(|denial| denial.instructions()));
    program.push(allow);
    let count = u16::try_from(program.len());
    let count = count.map_err(|_| SysError::Call { call: "seccomp", errno: Errno::EINVAL })?;
    let program = libc::sock_fprog { len: count, filter: program.as_mut_ptr() };
    // SAFETY: `program` describes that many instructions, which live until the call returns.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    Errno::result(answer).map(drop).map_err(SysError::call("seccomp"))
}

fn statement(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    // The classes and modes of BPF all fit.
    libc::sock_filter { code: (code & 0xffff) as u16, jt, jf, k }
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
/// Offsets in `struct seccomp_data`; of the second argument the lower half.
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const REQUEST_OFFSET: u32 = 24;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const SCAN_REQUEST: u32 = 0xc060_6610;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`, alone.
const LISTENER_FLAG: u32 = 1 << 3;

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::process::Command;

    use super::*;
    use crate::arena::Arena;
    use crate::page_range::PAGE_BYTES;
    use crate::pagemap_scan::{Pagemap, Region, Scan};
    use crate::seccomp_notify::Filter;
    use crate::userfaultfd::Userfaultfd;

    #[test]
    fn what_is_denied_fails_and_the_rest_goes_on() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP: a filter without no_new_privs needs CAP_SYS_ADMIN");
            return;
        }
        // In a thread of its own, which takes the filter along.
        let seen = std::thread::spawn(|| {
            let arena = Arena::map(PAGE_BYTES).unwrap();
            let before = Userfaultfd::for_arena(&arena).is_ok();
            deny(&[Denial::USERFAULTFD, Denial::PAGEMAP_SCAN, Denial::SECCOMP_LISTENER]).unwrap();
            let own = i32::try_from(std::process::id()).unwrap();
            let pagemap = Pagemap::open(own).unwrap();
            let scan = pagemap.scan(arena.range(), Scan::default(), &mut [Region::default()]);
            let mut command = Command::new("/proc/self/no-program");
            let filter = Filter::attach(&mut command).unwrap();
            let spawned = command.spawn();
            drop(filter);
            (before, Userfaultfd::for_arena(&arena).map(drop), scan.map(drop), spawned.unwrap_err().kind())
        });
        let (before, faults, scan, filter) = seen.join().unwrap();
        let errno = |result: Result<()>| match result {
            Err(SysError::Call { errno, .. }) => Some(errno),
            _ => None,
        };
        if before {
            assert_eq!(errno(faults), Some(Errno::EPERM));
        }
        assert_eq!(errno(scan), Some(Errno::ENOTTY));
        assert_eq!(filter, ErrorKind::PermissionDenied);
    }
}
