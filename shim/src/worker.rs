//! The seam to migration workers: how one is started, told, and listened to.
//!
//! ```text
//! shim ──stdin: {"command":"cancel"|"release"}──► godwit migrate-source ──events fd: {"event":…} a line──► shim
//! shim ──stdio: the container's ────────────────► godwit migrate-target ──events fd: {"event":…} a line──► shim
//! ```
//! A worker is a child in a process group of its own, and godwit's whatever runtime the container has.
//!
//! A worker has a CRIU, which outlives it for as long as it takes to let go of the container. It is in a process
//! group of its own and wipes its environment, so what tells that it has gone is a pipe ([`Lineage`]) that the
//! source's worker and all its descendants inherit without knowing: it ends when the last of them has.

mod source;
mod target;

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    path::Path,
};

use godwit_protocol::Failure;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::unix::pipe,
};

use crate::error::{Result, ShimError};

pub(crate) use source::{Order, Worker};
pub(crate) use target::{Incoming, TargetWorker, WorkerProcess};

/// Environment variable that tells which bundle a source's worker was started for.
pub(crate) const MARK: &str = "GODWIT_WORKER_OF";

/// Longest line a worker may write, in bytes.
const LINE_MAX: u64 = 1 << 20;

/// What a worker logs, as JSON lines, in the bundle.
const LOG: &str = "migrate.json";
/// What it prints.
const OUTPUT: &str = "migrate.log";

/// Tells when a worker and everything it has started have ended.
#[derive(Debug)]
pub(crate) struct Lineage(pipe::Receiver);

impl Lineage {
    fn new(reader: OwnedFd) -> Result<Self> {
        pipe::Receiver::from_owned_fd(reader).map(Self).map_err(ShimError::io("use a pipe"))
    }

    /// Waits until all have ended; may be asked again after that, and given up at any time.
    pub(crate) async fn gone(&mut self) {
        let mut nothing = [0; 64];
        // Nobody knows of the pipe, so nobody writes to it.
        while self.0.read(&mut nothing).await.is_ok_and(|length| length > 0) {}
    }
}

/// A line of a worker: [`godwit_protocol::worker::Event`], but what it reports is kept as it was written, and passed
/// on so. A worker may be newer than the shim that was started with its container, and say more.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// How far the migration is.
    Progress { snapshot: Map<String, Value> },
    /// COMMIT is about to be sent.
    Committing,
    /// The target runs the container.
    Committed { report: Value },
    /// The migration ended without doing what was asked.
    Failed { failure: Failed },
    /// The container is restored and runs.
    Restored { pid: i32 },
    /// All of its memory is here.
    Filled,
}

/// A failure, with whatever a worker says about it beyond what the shim acts on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failed {
    #[serde(flatten)]
    pub(crate) known: Failure,
    #[serde(flatten)]
    more: Map<String, Value>,
}

impl From<Failure> for Failed {
    fn from(known: Failure) -> Self {
        Self { known, more: Map::new() }
    }
}

/// A worker's events, in order.
#[derive(Debug)]
pub(crate) struct Events {
    lines: BufReader<pipe::Receiver>,
}

impl Events {
    /// Reads from the pipe `reader`.
    ///
    /// # Errors
    /// [`ShimError::Io`] when it is none.
    pub(crate) fn new(reader: OwnedFd) -> Result<Self> {
        let receiver = pipe::Receiver::from_owned_fd(reader).map_err(ShimError::io("use a pipe"))?;
        Ok(Self { lines: BufReader::with_capacity(1024, receiver) })
    }

    /// Returns the next event; nothing when the worker has closed its end.
    ///
    /// May be dropped while it waits only if the events are not asked for again.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.lines).take(LINE_MAX).read_until(b'\n', &mut line).await;
            match read {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => {
                    log::error!("failed to read a worker's events: {error}");
                    return None;
                }
            }
            match serde_json::from_slice(&line) {
                Ok(event) => return Some(event),
                // A newer worker may say more than this shim knows.
                Err(error) => log::warn!("a worker said what is not understood: {error}"),
            }
        }
    }
}

fn output_file(bundle: &Path) -> Result<File> {
    let path = bundle.join(OUTPUT);
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(ShimError::io(format!("open {}", path.display())))
}

#[cfg(test)]
mod tests {
    use godwit_protocol::{Fate, worker};

    use super::*;

    #[test]
    fn what_the_protocol_says_is_understood() {
        let read = |event: &worker::Event| {
            serde_json::from_value::<Event>(serde_json::to_value(event).unwrap()).unwrap()
        };
        assert!(matches!(read(&worker::Event::Committing), Event::Committing));
        assert!(matches!(read(&worker::Event::Restored { pid: 7 }), Event::Restored { pid: 7 }));
        assert!(matches!(read(&worker::Event::Filled), Event::Filled));
    }

    #[test]
    fn a_failure_keeps_what_is_not_known_of_it() {
        let text = r#"{"event":"failed","failure":{"cause":"c","fate":"lost","phase":"frozen","side":"source","x":{"y":[1]}}}"#;
        let Event::Failed { failure } = serde_json::from_str(text).unwrap() else { panic!("it failed") };
        assert_eq!(failure.known.fate, Fate::Lost);
        assert_eq!(serde_json::to_value(&failure).unwrap()["x"]["y"][0], 1);
    }
}
