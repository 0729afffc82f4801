//! What this host is, as far as it matters to a container that moves.

use std::{fs, process::Command};

use containerd_client::services::v1::version_client::VersionClient;
use godwit_protocol::offer::NodeFacts;

use crate::{client::Containerd, error::NodeError};

/// Gathers the facts. What cannot be found out is left empty: the preflight says what it lacks.
#[must_use]
pub fn gather(containerd: Option<&Containerd>) -> NodeFacts {
    NodeFacts {
        host: proc_line("/proc/sys/kernel/hostname"),
        arch: std::env::consts::ARCH.to_owned(),
        kernel: proc_line("/proc/sys/kernel/osrelease"),
        criu: criu_version(),
        godwit: env!("CARGO_PKG_VERSION").to_owned(),
        containerd: containerd.and_then(|containerd| containerd.version().ok()),
        cgroup_version: cgroup_version(),
        cpu_flags: cpu_flags(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        memory_available_bytes: memory_available_bytes(
            &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        ),
    }
}

impl Containerd {
    /// Returns containerd's version.
    ///
    /// # Errors
    /// [`NodeError`] if it does not say.
    pub fn version(&self) -> Result<String, NodeError> {
        let request = self.request(());
        let answer =
            self.call("ask containerd for its version", VersionClient::new(self.channel()).version(request))?;
        Ok(answer.version)
    }
}

fn proc_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Returns the version that `criu --version` prints (`Version: 4.1.1`), if there is a CRIU in the path.
fn criu_version() -> Option<String> {
    let output = Command::new("criu").arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().find_map(|line| Some(line.strip_prefix("Version:")?.trim().to_owned()))
}

/// A unified hierarchy at the usual place means version 2; the hybrid layout counts as 1.
fn cgroup_version() -> u8 {
    use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

    match statfs("/sys/fs/cgroup") {
        Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC => 2,
        _ => 1,
    }
}

fn cpu_flags(cpuinfo: &str) -> String {
    let flags = |line: &str| {
        let (key, flags) = line.split_once(':')?;
        matches!(key.trim(), "flags" | "Features").then(|| flags.trim().to_owned())
    };
    cpuinfo.lines().find_map(flags).unwrap_or_default()
}

fn memory_available_bytes(meminfo: &str) -> u64 {
    let kib =
        |line: &str| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    meminfo.lines().find_map(kib).map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn procfs_is_read_as_the_kernel_writes_it() {
        assert_eq!(cpu_flags("processor\t: 0\nflags\t\t: fpu vme avx2\nbugs\t: x\n"), "fpu vme avx2");
        assert_eq!(cpu_flags("processor : 0\nFeatures : fp asimd\n"), "fp asimd");
        assert_eq!(cpu_flags(""), "");
        let meminfo = "MemTotal:       24 kB\nMemFree: 3 kB\nMemAvailable:   20480 kB\n";
        assert_eq!(memory_available_bytes(meminfo), 20_480 * 1024);
        assert_eq!(memory_available_bytes("MemTotal: 1 kB"), 0);
    }

    #[test]
    fn this_host_has_facts() {
        let facts = gather(None);
        assert!(!facts.arch.is_empty() && !facts.kernel.is_empty());
        assert!(facts.memory_available_bytes > 0);
    }
}
