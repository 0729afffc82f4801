//! Running commands to their end, and processes known by pid.
//!
//! A pid may come to belong to somebody else: [`Daemon`] therefore keeps the start time beside the pid
//! and never signals a process whose start time differs.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{BedError, Result};

/// Runs a command to its end with an empty standard input and returns what it wrote to standard output.
///
/// # Errors
/// [`BedError::Start`] when it cannot be started, [`BedError::Command`] when it ends with another status than 0.
pub fn run(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        return Err(BedError::Command {
            command: line(command),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end with an empty standard input, whatever its status.
///
/// # Errors
/// [`BedError::Start`] when it cannot be started.
pub fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().map_err(|source| BedError::Start { command: line(command), source })
}

/// Polls `condition` until it holds or `timeout` has passed, and returns whether it held.
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL);
    }
}

/// A process of a node that outlives the command that started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Process id in the machine's pid namespace.
    pub pid: i32,
    /// Start time in clock ticks since boot, as `/proc/PID/stat` has it.
    started_ticks: u64,
}

impl Daemon {
    /// Returns the process that has this pid now, or `None` when there is none or it is a zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, so fields are counted from the last parenthesis:
        // state is the 3rd field of stat(5) and the first after it, starttime the 22nd.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        if matches!(state, "Z" | "X") {
            return None;
        }
        let started_ticks = fields.nth(18)?.parse().ok()?;
        Some(Self { pid, started_ticks })
    }

    /// Returns whether it still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal, unless the process has ended.
    pub fn signal(self, signal: Signal) {
        if self.is_alive() {
            // The process may end between the two calls; there is nothing to do about it then.
            let _ended = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Ends it with `signal`, and with SIGKILL when it is still there after ten seconds.
    pub fn stop(self, signal: Signal) {
        self.signal(signal);
        if !wait_until(STOP, || !self.is_alive()) {
            self.signal(Signal::SIGKILL);
            wait_until(STOP, || !self.is_alive());
        }
    }
}

fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

const POLL: Duration = Duration::from_millis(10);
const STOP: Duration = Duration::from_secs(10);
