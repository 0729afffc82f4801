//! Facts about processes from `/proc`, and the end of those that came to nothing.

use std::fs;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

/// Start time of the process in clock ticks since boot; `None` when it does not exist.
pub(crate) fn start_ticks(pid: i32) -> Option<u64> {
    stat(pid).map(|stat| stat.start_ticks)
}

/// Whether the process exists, has not ended, and (where known) is the one that started at `start_ticks`.
pub(crate) fn is_alive(pid: i32, start_ticks: Option<u64>) -> bool {
    stat(pid).is_some_and(|stat| {
        !matches!(stat.state, b'Z' | b'X' | b'x') && start_ticks.is_none_or(|ticks| ticks == stat.start_ticks)
    })
}

/// Reaps what a failed `create` or `exec` has forked, as far as it ends within a second.
///
/// A zombie in a container's PID namespace keeps the container's init from ending, and whoever inherits it
/// may not reap what it never heard of.
pub(crate) fn reap_failed() {
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(2)),
            Ok(_) | Err(Errno::EINTR) => {}
            // ECHILD: none is left.
            Err(_) => return,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    start_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads state (field 3) and start time (field 22). The name before them is the process's own choice and may
/// hold spaces, brackets and anything else, so the fields are counted from the last bracket.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let bracket = text.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(text.get(bracket + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, start_ticks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let line = b"7 (a) Z 1 2) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(parse_stat(line), Some(Stat { state: b'S', start_ticks: 4242 }));
        assert_eq!(parse_stat(b"7 (cut"), None);
        assert_eq!(parse_stat(b"7 (cut) S 1"), None);
    }

    #[test]
    fn this_process_lives_and_started_once() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let ticks = start_ticks(pid);
        assert!(ticks.is_some());
        assert!(is_alive(pid, ticks));
        assert!(!is_alive(pid, Some(1)));
        assert!(!is_alive(-1, None));
    }
}
