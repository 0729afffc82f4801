//! `binary://` stdio: a program that takes a container's output by pipes.
//!
//! The program gets stdout as descriptor 3, stderr as 4, and closes 5 when it is ready; the name and
//! namespace of the container are in its environment, which is otherwise empty, and the query of the address
//! is its command line (`binary:///usr/bin/log?--file&/x` runs `log --file /x`).
//!
//! Those three numbers are fixed, and the shim may not do anything between fork and exec: so
//! [`reserve_descriptors`] takes them at the very start of the process, and a start of a logger puts its pipes
//! there for the moment of the fork. Nothing else is forked meanwhile, as the shim's children are all started
//! on its one thread.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use godwit_sys::pidfd::PidFd;
use nix::{fcntl::OFlag, libc, unistd};
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::oneshot, time::timeout};

use super::Owner;
use crate::{
    error::{Result, ShimError},
    reaper::Exit,
};

const FIRST: i32 = 3;
const READY_LIMIT: Duration = Duration::from_secs(10);
/// A logger that ends by itself at the end of its input gets this long before it is told to.
const GRACE: Duration = Duration::from_millis(200);
const STOP_LIMIT: Duration = Duration::from_secs(12);

static RESERVED: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

/// Takes descriptors 3, 4 and 5; to be called before anything else opens one.
///
/// # Errors
/// When `/dev/null` cannot be opened. That the numbers are taken shows later, when a logger is asked for.
pub(crate) fn reserve_descriptors() -> std::io::Result<()> {
    let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..3 {
        reserved.push(File::open("/dev/null")?.into());
    }
    Ok(())
}

/// A `binary://` address.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LoggerUri {
    program: String,
    arguments: Vec<String>,
    /// Whether the program has to write a byte before it closes 5.
    strict: bool,
}

impl LoggerUri {
    /// Reads `uri`; nothing if it is of another scheme.
    pub(super) fn parse(uri: &str) -> Result<Option<Self>> {
        let (strict, rest) = match (uri.strip_prefix("binary://"), uri.strip_prefix("binary-v2://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Ok(None),
        };
        let bad = |reason| ShimError::BadStdio { uri: uri.to_owned(), reason };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let decode = |text: &str| percent_decode(text).ok_or_else(|| bad("it is not percent-encoded UTF-8"));
        let mut arguments = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let pair = pair.replace('+', " ");
            let (key, value) = pair.split_once('=').unwrap_or((&pair, ""));
            arguments.push(decode(key)?);
            // As in containerd: a key without a value still has one, the empty one.
            arguments.push(decode(value)?);
        }
        let program = decode(path)?;
        if !program.starts_with('/') {
            return Err(bad("its path is not absolute"));
        }
        Ok(Some(Self { program, arguments, strict }))
    }
}

/// A running logging program.
#[derive(Debug)]
pub(super) struct Logger {
    pid: i32,
    ended: oneshot::Receiver<Exit>,
}

impl Logger {
    /// Starts the program and waits until it is ready; returns its inputs for stdout and stderr.
    pub(super) async fn start(uri: &LoggerUri, owner: &Owner) -> Result<(Self, [OwnedFd; 2])> {
        let new_pipe = || std::io::pipe().map_err(ShimError::io("make a pipe"));
        let (out_reader, out_writer) = new_pipe()?;
        let (err_reader, err_writer) = new_pipe()?;
        let (ready_reader, ready_writer) = new_pipe()?;
        let mut command = Command::new(&uri.program);
        command.args(&uri.arguments).env_clear();
        command.env("CONTAINER_ID", &owner.id).env("CONTAINER_NAMESPACE", &owner.namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let started = {
            let theirs = [OwnedFd::from(out_reader), err_reader.into(), ready_writer.into()];
            let _placed = Placed::new(&theirs)?;
            owner.reaper.spawn(&mut command)
        };
        let (pid, ended) = started.map_err(ShimError::io(format!("run {}", uri.program)))?;
        let logger = Self { pid, ended };
        let mut ready =
            pipe::Receiver::from_owned_fd(ready_reader.into()).map_err(ShimError::io("use a pipe"))?;
        let mut byte = [0];
        let read = timeout(READY_LIMIT, ready.read(&mut byte)).await;
        let failure = match read {
            Ok(Ok(0)) if uri.strict => ShimError::io("start the logging program")(std::io::Error::other(
                "it did not say that it is ready",
            )),
            Ok(Ok(_)) => return Ok((logger, [out_writer.into(), err_writer.into()])),
            Ok(Err(source)) => ShimError::io("wait for the logging program")(source),
            Err(_) => ShimError::TimedOut { what: "the logging program to be ready" },
        };
        logger.signal(libc::SIGKILL);
        Err(failure)
    }

    /// Waits until the program ends, and makes it end if it does not.
    pub(super) async fn stop(mut self) {
        if timeout(GRACE, &mut self.ended).await.is_ok() {
            return;
        }
        self.signal(libc::SIGTERM);
        if timeout(STOP_LIMIT, &mut self.ended).await.is_err() {
            log::warn!("logging program {} does not end, killing it", self.pid);
            self.signal(libc::SIGKILL);
        }
    }

    fn signal(&self, signal: i32) {
        // Our own child that nothing has collected yet, or nobody: its exit would have been received.
        if let Err(error) = PidFd::open(self.pid).and_then(|process| process.send_signal(signal)) {
            log::debug!("failed to signal logging program {}: {error}", self.pid);
        }
    }
}

/// Pipes under the fixed numbers, inheritable, until dropped.
struct Placed;

impl Placed {
    fn new(pipes: &[OwnedFd; 3]) -> Result<Self> {
        let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
        let fixed = reserved.iter().zip(FIRST..).all(|(fd, number)| fd.as_raw_fd() == number);
        if reserved.len() != pipes.len() || !fixed {
            let taken = std::io::Error::other("descriptors 3 to 5 were taken when the shim started");
            return Err(ShimError::io("start the logging program")(taken));
        }
        for (pipe, place) in pipes.iter().zip(reserved.iter_mut()) {
            unistd::dup2(pipe, place).map_err(ShimError::errno("place a pipe"))?;
        }
        Ok(Self)
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
        match File::open("/dev/null") {
            Ok(null) => {
                for place in reserved.iter_mut() {
                    if let Err(errno) = unistd::dup3(&null, place, OFlag::O_CLOEXEC) {
                        log::error!("failed to take back descriptor {}: {errno}", place.as_raw_fd());
                    }
                }
            }
            // Closed rather than kept: a pipe that stays would never end.
            Err(_) => reserved.clear(),
        }
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_is_the_command_line() {
        let uri = LoggerUri::parse("binary:///usr/bin/log?--file=%2Fvar%2Fx+y&-v").unwrap().unwrap();
        assert_eq!(uri.program, "/usr/bin/log");
        assert_eq!(uri.arguments, ["--file", "/var/x y", "-v", ""]);
        assert!(!uri.strict);
        assert!(LoggerUri::parse("binary-v2:///l").unwrap().unwrap().strict);
    }

    #[test]
    fn other_schemes_are_left_alone_and_broken_ones_refused() {
        assert_eq!(LoggerUri::parse("/run/fifo").unwrap(), None);
        assert_eq!(LoggerUri::parse("file:///x").unwrap(), None);
        LoggerUri::parse("binary://relative").unwrap_err();
        LoggerUri::parse("binary:///x?%zz").unwrap_err();
    }
}
