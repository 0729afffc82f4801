//! How much memory the tasks of a container hold.

use std::fs;

/// Returns the resident memory that would have to be sent for the process, in bytes: private and shared memory,
/// not the pages of files that the target has as well.
///
/// A process that is gone by now holds none.
#[must_use]
pub(crate) fn resident_bytes(pid: u32) -> u64 {
    resident_of_status(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default())
}

fn resident_of_status(status: &str) -> u64 {
    status
        .lines()
        .filter_map(|line| line.strip_prefix("RssAnon:").or_else(|| line.strip_prefix("RssShmem:")))
        .filter_map(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .fold(0, |sum, kib| sum.saturating_add(kib.saturating_mul(1024)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_and_shared_pages_count_and_file_pages_do_not() {
        let status = "VmRSS:\t 900 kB\nRssAnon:\t     100 kB\nRssFile:\t 700 kB\nRssShmem:\t  100 kB\n";
        assert_eq!(resident_of_status(status), 200 * 1024);
        assert_eq!(resident_of_status("Name: x"), 0);
        assert!(resident_bytes(std::process::id()) > 0);
    }
}
