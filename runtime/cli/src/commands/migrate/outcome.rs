//! What came of a migration: text or JSON, and the exit code.

use godwit_node::NodeError;
use godwit_protocol::report::Outcome as ReportOutcome;
use godwit_protocol::{Failure, Fate, MigrationId, MigrationRequest, Mode, Phase, Report, Side};
use serde::Serialize;

use super::progress::bytes;
use crate::commands::{print_json, print_line};
use crate::error::Result;

/// How it ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// As asked.
    Moved(Box<Report>),
    /// The shim says that it failed.
    Failed {
        /// How, and where the container is.
        failure: Failure,
        /// Whether the user had given up, so that nothing is in the way of another attempt.
        cancelled: bool,
    },
    /// It failed without the shim's word.
    Stopped(Stopped),
}

/// A failure that this command found by itself.
#[derive(Debug)]
pub(super) struct Stopped {
    /// Where the container is; `None` if there is none that runs, or containerd cannot be asked.
    pub(super) fate: Option<Fate>,
    /// The side on which the cause lies.
    pub(super) side: Side,
    /// How far it came.
    pub(super) phase: Phase,
    /// What happened and what to do about it.
    pub(super) cause: String,
    /// Whether nothing was even tried.
    pub(super) refused: bool,
}

impl Stopped {
    /// Something is in the way.
    pub(super) fn refused(fate: Option<Fate>, cause: String) -> Self {
        Self { fate, side: Side::Source, phase: Phase::Connecting, cause, refused: true }
    }

    /// The container or its containerd is not there.
    pub(super) fn untouched(error: &NodeError) -> Self {
        Self::refused(None, error.to_string())
    }

    /// This command failed before it asked for anything.
    pub(super) fn before(cause: String) -> Self {
        Self { refused: false, ..Self::refused(Some(Fate::RunningOnSource), cause) }
    }
}

/// A failure as `--json` prints it.
#[derive(Debug, Serialize)]
struct FailureObject<'a> {
    id: &'a str,
    migration: &'a MigrationId,
    mode: Mode,
    outcome: &'static str,
    fate: Option<Fate>,
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorObject<'a> {
    side: Side,
    phase: Phase,
    cause: &'a str,
}

impl Outcome {
    /// Prints it: JSON on stdout, or the report on stdout and a failure on stderr.
    ///
    /// # Errors
    /// When stdout is closed.
    pub(super) fn print(
        &self,
        id: &str,
        request: &MigrationRequest,
        migration: &MigrationId,
        json: bool,
    ) -> Result<()> {
        let (fate, side, phase, cause) = match self {
            Self::Moved(report) if json => return print_json(report),
            Self::Moved(report) => return print_line(&text(report, &request.host)),
            Self::Failed { failure, .. } => (Some(failure.fate), failure.side, failure.phase, &failure.cause),
            Self::Stopped(stopped) => (stopped.fate, stopped.side, stopped.phase, &stopped.cause),
        };
        if json {
            let error = ErrorObject { side, phase, cause };
            let mode = request.mode;
            return print_json(&FailureObject { id, migration, mode, outcome: "failed", fate, error });
        }
        match self {
            Self::Failed { failure, .. } => eprintln!("godwit: {failure}"),
            _ => match fate {
                Some(fate) => eprintln!("godwit: {cause}; {fate}"),
                None => eprintln!("godwit: {cause}"),
            },
        }
        Ok(())
    }

    /// Returns the exit code that `--help` documents.
    pub(super) fn exit_code(&self) -> u8 {
        let (fate, refused) = match self {
            Self::Moved(_) => return MOVED,
            Self::Failed { failure, cancelled } => {
                (Some(failure.fate), failure.phase == Phase::Negotiating && !cancelled)
            }
            Self::Stopped(stopped) => (stopped.fate, stopped.refused),
        };
        match fate {
            Some(Fate::RunningOnSource) | None if refused => REFUSED,
            Some(Fate::RunningOnSource) | None => FAILED,
            Some(Fate::RunningOnTarget | Fate::Lost | Fate::Unknown) => LOOK,
        }
    }
}

fn text(report: &Report, target: &str) -> String {
    let Report { id, total_ms, downtime_ms, downtime, pages, bytes: sent, cpu_s, .. } = report;
    if report.outcome == ReportOutcome::Checked {
        return format!("{id} could move to {target}: nothing is in the way");
    }
    format!(
        "{id} moved to {target} in {total_ms:.0} ms and was down for {downtime_ms:.1} ms\n\
         down   {:.1} freeze, {:.1} state dump, {:.1} transfer, {:.1} restore, {:.1} resume (ms)\n\
         pages  {} ({} sent, {} zero)\n\
         bytes  {} memory, {} state, {} files, {} on the wire, {} written to disk\n\
         cpu    {:.2} s here, {:.2} s there",
        downtime.freeze_ms,
        downtime.state_dump_ms,
        downtime.transfer_ms,
        downtime.restore_ms,
        downtime.resume_ms,
        pages.total,
        pages.normal,
        pages.zero,
        bytes(sent.memory),
        bytes(sent.state),
        bytes(sent.rootfs),
        bytes(sent.wire),
        bytes(report.disk_bytes_written),
        cpu_s.source,
        cpu_s.target,
    )
}

const MOVED: u8 = 0;
const FAILED: u8 = 1;
const LOOK: u8 = 3;
const REFUSED: u8 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(phase: Phase, fate: Fate) -> u8 {
        exit_code(phase, fate, false)
    }

    fn exit_code(phase: Phase, fate: Fate, cancelled: bool) -> u8 {
        let failure = Failure { side: Side::Target, phase, fate, cause: String::new() };
        Outcome::Failed { failure, cancelled }.exit_code()
    }

    #[test]
    fn the_exit_code_says_where_the_container_is() {
        assert_eq!(failed(Phase::Connecting, Fate::RunningOnSource), 1);
        assert_eq!(failed(Phase::Negotiating, Fate::RunningOnSource), 4);
        assert_eq!(failed(Phase::Restoring, Fate::RunningOnSource), 1);
        assert_eq!(failed(Phase::Committing, Fate::Unknown), 3);
        assert_eq!(failed(Phase::Committing, Fate::Lost), 3);
        assert_eq!(exit_code(Phase::Negotiating, Fate::RunningOnSource, true), 1);
        let refused = Stopped::refused(None, String::new());
        assert_eq!(Outcome::Stopped(refused).exit_code(), 4);
        let stopped = Stopped::before(String::new());
        assert_eq!(Outcome::Stopped(stopped).exit_code(), 1);
    }

    #[test]
    fn a_failure_is_one_object_of_the_documented_shape() {
        let migration = "m".to_owned().try_into().unwrap();
        let object = FailureObject {
            id: "web",
            migration: &migration,
            mode: Mode::Native,
            outcome: "failed",
            fate: Some(Fate::RunningOnSource),
            error: ErrorObject { side: Side::Target, phase: Phase::Negotiating, cause: "no criu" },
        };
        assert_eq!(
            serde_json::to_string(&object).unwrap(),
            r#"{"id":"web","migration":"m","mode":"native","outcome":"failed","fate":"running_on_source","error":{"side":"target","phase":"negotiating","cause":"no criu"}}"#
        );
    }
}
