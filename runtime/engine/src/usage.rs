//! What a worker and its CRIU have cost so far: processor time and bytes written to storage.
//!
//! Both come from the kernel's own accounts, which a process inherits from children it has waited for, so they
//! are complete once CRIU has been reaped. Writing to a tmpfs is not writing to storage.

use std::fs;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};

/// The cost of this process and of its children that have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Processor time in user and kernel mode, in microseconds.
    pub cpu_us: u64,
    /// Bytes that were caused to be written to storage.
    pub disk_bytes_written: u64,
    /// Most memory that this process has had at a time, in bytes.
    pub peak_bytes: u64,
}

impl Usage {
    /// Reads the accounts. A kernel without one of them leaves it at zero.
    #[must_use]
    pub fn so_far() -> Self {
        let io = fs::read_to_string("/proc/self/io").unwrap_or_default();
        let cpu = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN].into_iter().map(|who| {
            getrusage(who)
                .map_or(0, |usage| microseconds(usage.user_time()) + microseconds(usage.system_time()))
        });
        let peak_kb = getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.max_rss());
        let peak_bytes = u64::try_from(peak_kb).unwrap_or(0) * 1024;
        Self { cpu_us: cpu.sum(), disk_bytes_written: written(&io), peak_bytes }
    }
}

fn microseconds(time: TimeVal) -> u64 {
    u64::try_from(time.num_microseconds()).unwrap_or(0)
}

/// Returns `write_bytes` of `/proc/PID/io` (proc_pid_io(5)): what the process caused to be sent to storage.
fn written(io: &str) -> u64 {
    io.lines().find_map(|line| line.strip_prefix("write_bytes:")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_account_is_read_by_name() {
        let io = "rchar: 1\nwchar: 2\nwrite_bytes: 4096\ncancelled_write_bytes: 5\n";
        assert_eq!(written(io), 4096);
        assert_eq!(written(""), 0);
    }

    #[test]
    fn work_costs_processor_time() {
        let before = Usage::so_far();
        let mut sum = 0_u64;
        while Usage::so_far().cpu_us < before.cpu_us + 1000 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(Usage::so_far().cpu_us > before.cpu_us);
    }
}
