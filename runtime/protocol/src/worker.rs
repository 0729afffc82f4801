//! What a migration worker tells the shim, and is told by it: one JSON object a line.
//!
//! ```text
//! worker ──progress…──► committing ──► committed{report} ──(waits for `release`)──► cleans up the source
//!        └────────────────────────────► failed{failure}
//! target's: progress…─► restored{pid} ─progress…─► filled
//! ```
//! `committing` is written before COMMIT is sent: a shim whose worker dies without that line may thaw the
//! container, one that has read it must ask the target first.

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::phase::Phase;
use crate::report::{Report, Round};
use crate::request::{MigrationId, Mode};

/// A line from a worker to its shim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// How far the migration is.
    Progress {
        /// The latest state.
        snapshot: Snapshot,
    },
    /// COMMIT is about to be sent: from here the target has to be asked before the container may be thawed.
    Committing,
    /// The target runs the container (or, for a dry run, nothing is in the way).
    Committed {
        /// What came of it.
        report: Box<Report>,
    },
    /// The migration ended without doing what was asked.
    Failed {
        /// What went wrong and where the container is.
        failure: Failure,
    },
    /// The target worker restored the container and it runs.
    Restored {
        /// Process id of the container's init on the target.
        pid: i32,
    },
    /// All of the container's memory is on the target: what becomes of its worker from here on does not matter to it.
    Filled,
}

/// A line from the shim to the source's worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Give up if COMMIT has not been sent.
    Cancel,
    /// The client has its answer: remove the source's task, container and snapshot.
    Release,
}

/// How far a migration is; what `Migrate.Status` returns as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The migration's name.
    pub migration: MigrationId,
    /// The container.
    pub id: String,
    /// When pages travel.
    pub mode: Mode,
    /// Where it stands.
    pub phase: Phase,
    /// Milliseconds since the worker started.
    pub elapsed_ms: u64,
    /// Bytes sent so far.
    pub sent_bytes: u64,
    /// Bytes expected to be sent in all, as far as it is known.
    pub expected_bytes: u64,
    /// Bytes a second, over the last second.
    pub rate_bytes_per_s: u64,
    /// The latest round of pre-copy that ended, if any has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round: Option<Round>,
    /// How it ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// The end of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum Ended {
    /// It did what was asked.
    Well {
        /// What came of it.
        report: Box<Report>,
    },
    /// It did not.
    Badly {
        /// What went wrong and where the container is.
        failure: Failure,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_have_the_shapes_both_sides_agreed_on() {
        let json = |value: &Command| serde_json::to_string(value).unwrap();
        assert_eq!(json(&Command::Cancel), r#"{"command":"cancel"}"#);
        assert_eq!(serde_json::to_string(&Event::Committing).unwrap(), r#"{"event":"committing"}"#);
        assert_eq!(
            serde_json::to_string(&Event::Restored { pid: 7 }).unwrap(),
            r#"{"event":"restored","pid":7}"#
        );
        assert_eq!(serde_json::to_string(&Event::Filled).unwrap(), r#"{"event":"filled"}"#);
    }
}
