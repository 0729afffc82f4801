//! Which devices the processes of a cgroup (version 2) may make, read and write.
//!
//! Version 2 has no file for that: the kernel asks a BPF program that is attached to the cgroup. The rules are
//! compiled to one, last rule first, because the last rule that speaks of an access decides:
//!
//! ```text
//! r2 = kind, r3 = access asked for, r4 = major, r5 = minor
//! per rule:  does it speak of this access?  no: on to the next  yes: r0 = allow or deny; exit
//! r0 = deny; exit
//! ```

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::{Result, SysError};

/// Kind of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Block devices.
    Block,
    /// Character devices.
    Character,
}

/// One rule; what is `None` stands for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRule {
    /// Whether to allow what the rule speaks of, or to deny it.
    pub allow: bool,
    /// Kind of device.
    pub kind: Option<DeviceKind>,
    /// Major number.
    pub major: Option<u32>,
    /// Minor number.
    pub minor: Option<u32>,
    /// Reading.
    pub read: bool,
    /// Writing.
    pub write: bool,
    /// Making device files.
    pub make: bool,
}

/// Confines the cgroup at `directory` to what `rules` allow. What no rule speaks of is denied.
///
/// Filters add up: with one already attached, here or above, an access must pass all of them.
///
/// # Errors
/// [`SysError::File`] when the directory cannot be opened, [`SysError::Call`] when the kernel refuses the
/// program (it must run as root) or the directory is no version 2 cgroup.
pub fn attach(directory: &Path, rules: &[DeviceRule]) -> Result<()> {
    let cgroup = File::open(directory).map_err(SysError::file(directory))?;
    let program = load(&compile(rules))?;
    let mut attributes = AttachAttributes {
        target_fd: cgroup.as_raw_fd(),
        program_fd: program.as_fd().as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, "bpf(BPF_PROG_ATTACH)", &mut attributes).map(|_| ())
}

fn load(program: &[Instruction]) -> Result<OwnedFd> {
    let call = "bpf(BPF_PROG_LOAD)";
    let license = c"Apache-2.0";
    let count = u32::try_from(program.len()).map_err(|_| SysError::Call { call, errno: Errno::E2BIG })?;
    let mut attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        count,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..LoadAttributes::default()
    };
    let fd = bpf(BPF_PROG_LOAD, call, &mut attributes)?;
    // SAFETY: the kernel has just returned `fd` to this call, nothing else owns it; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_int, call: &'static str, attributes: &mut T) -> Result<i32> {
    // SAFETY: `attributes` is a `#[repr(C)]` prefix of the kernel's union for this command, and its length is
    // passed; what it points to (program, license) is only read, and outlives the call.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    let answer = Errno::result(answer).map_err(SysError::call(call))?;
    i32::try_from(answer).map_err(|_| SysError::Call { call, errno: Errno::EBADF })
}

#[repr(C)]
#[derive(Debug, Default)]
struct LoadAttributes {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Debug)]
struct AttachAttributes {
    target_fd: i32,
    program_fd: i32,
    attach_type: u32,
    flags: u32,
}

/// One instruction as the kernel takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

/// The program for `rules`.
fn compile(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE, ACCESS, KIND, 0, 0),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(*rule));
    }
    program.extend(verdict(false));
    program
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [instruction(MOVE_IMMEDIATE, RESULT, 0, 0, i32::from(allow)), instruction(EXIT, 0, 0, 0, 0)]
}

/// A rule's tests, each of which jumps behind the rule when it does not speak of the access.
///
/// It allows an access only when all of it is allowed, and denies it when any of it is denied.
fn compile_rule(rule: DeviceRule) -> Vec<Instruction> {
    let mut tests = Vec::new();
    if let Some(kind) = rule.kind {
        let number = if kind == DeviceKind::Block { 1 } else { 2 };
        tests.push(instruction(JUMP_IF_NOT_IMMEDIATE, KIND, 0, 0, number));
    }
    let mask = i32::from(rule.make) | i32::from(rule.read) << 1 | i32::from(rule.write) << 2;
    tests.push(instruction(MOVE, SCRATCH, ACCESS, 0, 0));
    tests.push(instruction(AND, SCRATCH, 0, 0, mask));
    tests.push(if rule.allow {
        instruction(JUMP_IF_NOT, SCRATCH, ACCESS, 0, 0)
    } else {
        instruction(JUMP_IF_IMMEDIATE, SCRATCH, 0, 0, 0)
    });
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number {
            // The comparison is of 32 bits: a number's sign bit is as good as any.
            tests.push(instruction(JUMP_IF_NOT_IMMEDIATE, register, 0, 0, number.cast_signed()));
        }
    }
    tests.extend(verdict(rule.allow));
    let length = tests.len();
    for (index, test) in tests.iter_mut().enumerate() {
        if matches!(test.code, JUMP_IF_NOT | JUMP_IF_NOT_IMMEDIATE | JUMP_IF_IMMEDIATE) {
            // At most nine instructions, so the distance always fits.
            test.offset = i16::try_from(length - index - 1).unwrap_or(i16::MAX);
        }
    }
    tests
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

// Registers.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

// Operations, all on 32 bits.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbc;
const MOVE_IMMEDIATE: u8 = 0xb4;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_IF_NOT: u8 = 0x5e;
const JUMP_IF_NOT_IMMEDIATE: u8 = 0x56;
const JUMP_IF_IMMEDIATE: u8 = 0x16;
const EXIT: u8 = 0x95;

#[cfg(test)]
#[path = "device_filter_tests.rs"]
mod tests;
