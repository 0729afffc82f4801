//! The program by a small interpreter, and the real kernel where it lets us.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::process::Command;

use super::*;

const MAKE: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

const NOTHING: DeviceRule =
    DeviceRule { allow: false, kind: None, major: None, minor: None, read: true, write: true, make: true };

const fn character(allow: bool, major: u32, minor: Option<u32>) -> DeviceRule {
    let kind = Some(DeviceKind::Character);
    DeviceRule { allow, kind, major: Some(major), minor, read: true, write: true, make: true }
}

/// Runs the program as the kernel would, for one access.
fn allows(rules: &[DeviceRule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
    let program = compile(rules);
    let context = [access << 16 | kind, major, minor];
    let mut registers = [0_u32; 7];
    let mut at = 0;
    loop {
        let step = program[at];
        let (to, from) = (usize::from(step.registers & 15), usize::from(step.registers >> 4));
        let immediate = step.immediate.cast_unsigned();
        let jump = match step.code {
            LOAD_WORD => {
                registers[to] = context[usize::try_from(step.offset).unwrap() / 4];
                false
            }
            MOVE => {
                registers[to] = registers[from];
                false
            }
            MOVE_IMMEDIATE => {
                registers[to] = immediate;
                false
            }
            AND => {
                registers[to] &= immediate;
                false
            }
            SHIFT_RIGHT => {
                registers[to] >>= immediate;
                false
            }
            JUMP_IF_NOT => registers[to] != registers[from],
            JUMP_IF_NOT_IMMEDIATE => registers[to] != immediate,
            JUMP_IF_IMMEDIATE => registers[to] == immediate,
            EXIT => return registers[0] == 1,
            other => panic!("operation {other:#x}"),
        };
        at += 1;
        if jump {
            at += usize::try_from(step.offset).unwrap();
        }
    }
}

#[test]
fn the_last_rule_that_speaks_of_an_access_decides() {
    let rules = [NOTHING, character(true, 1, None), character(false, 1, Some(5))];
    assert!(allows(&rules, CHARACTER, READ, 1, 3));
    assert!(!allows(&rules, CHARACTER, READ, 1, 5));
    assert!(!allows(&rules, CHARACTER, READ, 2, 3));
    assert!(!allows(&rules, BLOCK, READ, 1, 3));
    assert!(!allows(&[], CHARACTER, READ, 1, 3));
    assert!(allows(&[DeviceRule { allow: true, ..NOTHING }], BLOCK, MAKE | READ | WRITE, 8, 0));
}

#[test]
fn an_access_is_allowed_as_a_whole_and_denied_for_any_part() {
    let all = DeviceRule { allow: true, ..NOTHING };
    let read_only = DeviceRule { write: false, make: false, ..all };
    assert!(allows(&[read_only], CHARACTER, READ, 1, 3));
    assert!(!allows(&[read_only], CHARACTER, READ | WRITE, 1, 3));
    let no_write = DeviceRule { read: false, make: false, ..NOTHING };
    assert!(allows(&[all, no_write], CHARACTER, READ, 1, 3));
    assert!(!allows(&[all, no_write], CHARACTER, READ | WRITE, 1, 3));
}

#[test]
fn numbers_above_31_bits_are_compared() {
    assert!(allows(&[character(true, u32::MAX, None)], CHARACTER, READ, u32::MAX, 0));
    assert!(!allows(&[character(true, u32::MAX, None)], CHARACTER, READ, 1, 0));
}

/// A version 2 hierarchy, if this machine mounts one (alone or beside version 1).
fn unified() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.find(|fields| fields[2] == "cgroup2").map(|fields| PathBuf::from(fields[1]))
}

#[test]
fn a_process_in_the_cgroup_opens_what_is_allowed_only() {
    let Some(parent) = unified().filter(|_| nix::unistd::geteuid().is_root()) else {
        eprintln!("SKIP: needs root and a mounted cgroup2 hierarchy");
        return;
    };
    let cgroup = parent.join(format!("godwit-test-devices-{}", std::process::id()));
    if let Err(error) = fs::create_dir(&cgroup) {
        eprintln!("SKIP: {}: {error}", cgroup.display());
        return;
    }
    let attached = attach(&cgroup, &[NOTHING, character(true, 1, Some(3))]);
    let opens = |device: &str| {
        let script = format!("echo $$ > {}/cgroup.procs && exec < {device}", cgroup.display());
        Command::new("sh")
            .args(["-c", &script])
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap()
            .success()
    };
    let seen = (opens("/dev/null"), opens("/dev/zero"));
    fs::remove_dir(&cgroup).unwrap();
    attached.unwrap();
    assert_eq!(seen, (true, false));
    OpenOptions::new().read(true).open("/dev/zero").unwrap();
}

#[test]
fn a_directory_that_is_no_cgroup_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let error = attach(directory.path(), &[NOTHING]).unwrap_err();
    assert!(matches!(error, SysError::Call { .. }), "{error}");
    assert!(matches!(attach(Path::new("/absent"), &[]), Err(SysError::File { .. })));
}
