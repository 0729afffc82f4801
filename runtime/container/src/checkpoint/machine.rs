//! What this machine can do for checkpoints and migrations.

use std::fs;

use godwit_criu::{Program, Session, Setup, Version};
use godwit_sys::arena::Arena;
use godwit_sys::userfaultfd::{Features, Userfaultfd};
use serde::Serialize;

use crate::cgroup;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Release of the running kernel.
    pub kernel: String,
    /// `v1`, `hybrid` or `v2`; hybrid is version 1 with an empty version 2 hierarchy beside it.
    pub cgroups: &'static str,
    /// CRIU, if it is usable at all.
    pub criu: Option<Criu>,
    /// Writes can be tracked by userfaultfd without stopping the writer (kernel 6.7).
    pub userfaultfd_wp_async: bool,
    /// Processes of other users can be dumped outside user namespaces.
    pub cap_sys_resource: bool,
    /// Whether containers can be checkpointed and restored here.
    pub ok: bool,
    /// What does not work, and what to do.
    pub problems: Vec<String>,
}

/// The CRIU that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Criu {
    /// The binary.
    pub path: String,
    /// What it says it is.
    pub version: String,
    /// Whether `criu check` is content.
    pub check: bool,
    /// Writes can be tracked by the soft-dirty bit, so that `--pre-dump` works.
    pub soft_dirty: bool,
    /// A restore can fetch memory on demand.
    pub lazy_pages: bool,
}

/// Looks at everything. Takes about 200 ms.
pub fn look() -> Machine {
    let mut problems = Vec::new();
    let mut ok = true;
    let cap_sys_resource = has_sys_resource();
    if !nix::unistd::Uid::effective().is_root() {
        problems.push("not root: checkpoint and restore need it".to_owned());
        ok = false;
    }
    let criu = match look_at_criu(&mut problems) {
        Ok(criu) => {
            ok &= criu.check;
            Some(criu)
        }
        Err(error) => {
            problems.push(error.to_string());
            ok = false;
            None
        }
    };
    if !cap_sys_resource {
        problems.push(
            "no CAP_SYS_RESOURCE: only processes of root, or in a user namespace, can be checkpointed"
                .to_owned(),
        );
    }
    Machine {
        kernel: kernel_release(),
        cgroups: cgroup_generation(),
        criu,
        userfaultfd_wp_async: has_wp_async(),
        cap_sys_resource,
        ok,
        problems,
    }
}

fn look_at_criu(problems: &mut Vec<String>) -> godwit_criu::Result<Criu> {
    let program = Program::find()?;
    let mut session = Session::start(&program, Setup::new())?;
    let version = session.version();
    // Without root CRIU cannot probe the kernel; `criu check` says so in its own words.
    let features = session.features().ok();
    drop(session);
    let check = program.check()?;
    if !check.ok {
        problems.extend(check.lines.iter().map(|line| format!("criu check: {line}")));
    }
    problems.extend(tcp_trouble(version));
    Ok(Criu {
        path: program.path().display().to_string(),
        version: version.to_string(),
        check: check.ok,
        soft_dirty: features.is_some_and(|features| features.memory_tracking),
        lazy_pages: features.is_some_and(|features| features.lazy_pages),
    })
}

/// Why processes with IP sockets, even listening ones, cannot be checkpointed here.
///
/// Linux 6.16 answers `SO_PASSCRED` and `SO_PASSSEC` only for the socket families that have them, which CRIU
/// knows since 4.2.
pub fn tcp_trouble(criu: Version) -> Option<String> {
    let kernel = kernel_release();
    let new_kernel = parse_release(&kernel).is_some_and(|release| release >= (6, 16));
    (new_kernel && criu < CRIU_KNOWS_6_16).then(|| {
        format!(
            "criu {criu} cannot checkpoint processes with IP sockets on kernel {kernel} (from 6.16 on); \
             install criu {CRIU_KNOWS_6_16} or newer"
        )
    })
}

/// Whether this process may look at the limits of any other.
pub(crate) fn has_sys_resource() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_some_and(|bits| bits & (1 << CAP_SYS_RESOURCE) != 0)
}

fn has_wp_async() -> bool {
    let wanted = Features::WP_ASYNC.with(Features::WP_UNPOPULATED);
    Arena::map(PAGE_BYTES)
        .and_then(|arena| Userfaultfd::for_arena(&arena)?.enable(wanted))
        .is_ok_and(|found| found.contains(wanted))
}

fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn parse_release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn cgroup_generation() -> &'static str {
    match cgroup::is_unified() {
        Ok(true) => "v2",
        Ok(false) if std::path::Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists() => "hybrid",
        Ok(false) => "v1",
        Err(_) => "none",
    }
}

const CRIU_KNOWS_6_16: Version = Version { major: 4, minor: 2, sublevel: 0 };
const CAP_SYS_RESOURCE: u32 = 24;
const PAGE_BYTES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_whatever_follows_the_numbers() {
        assert_eq!(parse_release("6.1.0-30-amd64"), Some((6, 1)));
        assert_eq!(parse_release("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(parse_release("7.0-rc1"), Some((7, 0)));
        assert_eq!(parse_release("unknown"), None);
    }
}
