//! The source's half of a migration as a state machine: what to do next, and never how.
//!
//! ```text
//! Connecting --LinkUp--> Negotiating
//! Negotiating --Accepted [dry run]--> Done
//! Negotiating --Accepted [no dry run]--> Preparing
//! Preparing --Ready--> CopyingRootfs
//! CopyingRootfs --RootfsSent--> AwaitingRootfs
//! AwaitingRootfs --RootfsApplied [in images]--> Freezing
//! AwaitingRootfs --RootfsApplied [ours]--> OpeningStreams
//! OpeningStreams --StreamsOpen [no rounds]--> Freezing
//! OpeningStreams --StreamsOpen [rounds]--> Scanning
//! Scanning --Scanned [next round]--> SendingRound
//! Scanning --Scanned [switch over]--> Freezing
//! Scanning --Scanned [give up]--> RollingBack
//! SendingRound --RoundSent [not received]--> SendingRound
//! SendingRound --RoundSent [received]--> Scanning
//! SendingRound --RoundReceived [not sent]--> SendingRound
//! SendingRound --RoundReceived [sent]--> Scanning
//! Freezing --Froze--> Dumping
//! Freezing --Unsettled [tries left]--> Settling
//! Freezing --Unsettled [last try]--> RollingBack
//! Settling --Deadline--> Freezing
//! Dumping --Dumped--> Transferring
//! Transferring --StateSent--> AwaitingReceipt
//! AwaitingReceipt --Received--> Restoring
//! Transferring --Confirmed--> Transferring
//! AwaitingReceipt --Confirmed--> AwaitingReceipt
//! Restoring --Confirmed--> Restoring
//! Restoring --Restored [confirmed]--> Committing
//! Restoring --Restored [not confirmed]--> Confirming
//! Confirming --Confirmed--> Committing
//! Committing --Resumed [in images]--> Killing
//! Committing --Resumed [ours]--> Serving
//! Committing --Aborted--> RollingBack
//! Committing --LinkLost--> Asking
//! Committing --Failed--> Asking
//! Committing --Deadline--> Asking
//! Asking --Here--> Killing
//! Asking --Filling [all sent]--> Killing
//! Asking --Filling [pages left]--> Rejoining
//! Asking --NotHere--> RollingBack
//! Asking --Pending--> Asking
//! Asking --AskFailed--> Asking
//! Asking --Lost--> Burying
//! Asking --Deadline--> Done
//! Serving --MemoryComplete--> Killing
//! Serving --LinkLost--> Rejoining
//! Serving --Failed--> Rejoining
//! Serving --Deadline [all sent]--> Rejoining
//! Rejoining --Rejoined--> Serving
//! Rejoining --Here--> Killing
//! Rejoining --Filling [all sent]--> Killing
//! Rejoining --Filling [pages left]--> Rejoining
//! Rejoining --Lost--> Burying
//! Rejoining --NotHere--> Burying
//! Rejoining --MemoryComplete--> Killing
//! Rejoining --Pending--> Rejoining
//! Rejoining --AskFailed--> Rejoining
//! Rejoining --Deadline--> Done
//! Burying --Killed--> Done
//! Killing --Killed [released]--> CleaningUp
//! Killing --Killed [not released]--> AwaitingRelease
//! Killing --Release--> Killing
//! AwaitingRelease --Release--> CleaningUp
//! AwaitingRelease --Deadline--> CleaningUp
//! CleaningUp --CleanedUp--> Done
//! RollingBack --RolledBack--> Done
//! RollingBack --RollbackFailed--> Done
//! ```
//! Beside these, in every state before `Committing`: `Rejected`, `Aborted`, `LinkLost`, `Failed`, `Cancel`,
//! `Deadline` (but in `Settling`, where it is what is waited for) and any message of the target that has no place there lead to `RollingBack`. In `Committing` and
//! `Serving` a message out of place means that the link cannot be trusted, as if it were lost. Anything else out of
//! place is ignored. The table in `source/table.rs` says the same, and a test holds all three together.
//!
//! Invariants:
//! - COMMIT is sent once, on the way into `Committing`, and only when what was dumped has been confirmed: CRIU may be
//!   told what was read before the freeze. Before it every failure ends in `RunningOnSource`; after
//!   it the source goes on only when the target has said that it does not and will not run the container, and
//!   kills its own only when the target has said that it does, or that it did and cannot any more: what ran elsewhere
//!   since may never go on here.
//! - The source's tasks, and with them its pages, are kept until the target has said that it lacks none.
//! - Time is an argument. A state has at most one deadline ([`Source::deadline`]).
//! - The tasks are thawed only where nothing has been dumped (`Settling`), or for good.
//! - What a state knows is in its variant; the downtime is measured by a stopwatch that exists from the request to
//!   freeze to the answer to COMMIT.

use std::time::Duration;

use crate::failure::{Failure, Fate, Side};
use crate::fate::FateAnswer;
use crate::phase::Phase;
use crate::plan::Way;
use crate::report::{DowntimeParts, Round, Stopwatch, TargetMemory, Tick};
use crate::request::Limits;
use crate::rootfs::Pass;
use crate::wire::message::{Resumed, Step as PreparingStep};

pub use course::RoundSent;

use course::Course;

/// The state of the source.
#[derive(Debug)]
pub struct Source {
    state: State,
    course: Course,
    entered: Tick,
}

/// What a migration is begun with.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Whether only the preflight is wanted.
    pub dry_run: bool,
    /// What bounds the rounds.
    pub limits: Limits,
    /// What a switchover costs beside the pages, from earlier moves on this host.
    pub fixed: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { dry_run: false, limits: Limits::default(), fixed: Duration::from_millis(200) }
    }
}

/// Where the source stands, with what it knows there.
#[derive(Debug)]
enum State {
    Connecting { dry_run: bool },
    Negotiating { dry_run: bool },
    Preparing,
    CopyingRootfs,
    AwaitingRootfs,
    OpeningStreams,
    Scanning { round: u32 },
    SendingRound { round: u32, sent: Option<RoundSent>, received: bool },
    Freezing { watch: Stopwatch, tries: u32 },
    Settling { tries: u32 },
    Dumping { watch: Stopwatch },
    Transferring { watch: Stopwatch, confirmed: bool },
    AwaitingReceipt { watch: Stopwatch, confirmed: bool },
    Restoring { watch: Stopwatch, confirmed: bool },
    Confirming { watch: Stopwatch },
    Committing { watch: Stopwatch },
    Asking { watch: Stopwatch },
    Serving { moved: Moved },
    Rejoining { moved: Moved },
    Killing { moved: Moved, released: bool },
    AwaitingRelease { moved: Moved },
    CleaningUp { moved: Moved },
    Burying { failure: Failure },
    RollingBack { failure: Failure },
    Done { end: End },
}

/// What is known of a container that runs on the target.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    /// The parts of the downtime.
    pub downtime: DowntimeParts,
    /// What the target's worker said; all zero if the answer came from the target's record.
    pub resumed: Resumed,
    /// When the answer came.
    pub at: Tick,
    /// What the target said when it had every page; none if CRIU moved them, or the link was lost before.
    pub memory: Option<TargetMemory>,
}

/// How a migration ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// Only the preflight was asked for, and nothing is in the way.
    Checked,
    /// The container runs on the target.
    Migrated(Moved),
    /// It does not, or it is not known.
    Failed(Failure),
}

/// What happens to the source.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The link is open and the hellos agree.
    LinkUp,
    /// The target spoke.
    Peer(PeerEvent),
    /// The live pass over the writable layer has been sent, up to the frame that ends it: this event has to come
    /// before the target can answer that frame.
    RootfsSent,
    /// Every stream for pages is open.
    StreamsOpen,
    /// So many pages were written since the scan before, or are there at all.
    Scanned {
        /// Pages to be sent.
        pages: u64,
        /// Those of them that were written in each of the last scans, as many as the limits say.
        hot_pages: u64,
    },
    /// A round has been sent. May come before or after the target says that it has it.
    RoundSent(RoundSent),
    /// Every task is frozen.
    Froze,
    /// Every task was frozen, and runs again: something was under way that cannot be dumped, and that settles when the
    /// tasks run.
    Unsettled {
        /// What it was.
        cause: String,
    },
    /// CRIU has written everything and waits for the word to kill or to let go on.
    Dumped,
    /// What CRIU was told of the tasks is true of them as they are frozen. Comes after `Dumped`.
    Confirmed,
    /// The images and the final pass have been sent, up to the manifest: this event has to come before the target
    /// can answer it.
    StateSent,
    /// The target's agent answered the question about the fate.
    Answered(FateAnswer),
    /// The target could not be asked, or reached again.
    AskFailed {
        /// Why.
        cause: String,
    },
    /// The link and the streams are open again, and the target has said what it lacks.
    Rejoined,
    /// The source's tasks are gone.
    Killed,
    /// The client has its answer, or nobody waits for one.
    Release,
    /// The source's task, record and snapshot are gone, as far as they could be removed.
    CleanedUp,
    /// The container runs on the source as before.
    RolledBack,
    /// The container could not be made to run on.
    RollbackFailed {
        /// Why.
        cause: String,
    },
    /// An action failed on this side.
    Failed {
        /// Why.
        cause: String,
    },
    /// The link broke.
    LinkLost {
        /// Why.
        cause: String,
    },
    /// The user gave up.
    Cancel,
    /// The time of [`Source::deadline`] has come.
    Deadline,
}

/// A message of the target, as far as it decides anything.
#[derive(Debug, Clone, PartialEq)]
pub enum PeerEvent {
    /// The agent takes the container, and pages travel this way.
    Accepted(Way),
    /// The agent declines.
    Rejected {
        /// What is in the way.
        detail: String,
    },
    /// The agent is at this step.
    Preparing(PreparingStep),
    /// The worker takes the writable layer.
    Ready,
    /// The worker has applied a pass over the writable layer.
    RootfsApplied(Pass),
    /// The worker has a whole round.
    RoundReceived(u32),
    /// The worker has everything.
    Received,
    /// The worker holds the container restored and stopped.
    Restored,
    /// The container runs on the target.
    Resumed(Resumed),
    /// Every page is in its task.
    MemoryComplete(TargetMemory),
    /// The target gives up, and nothing of the container runs there, or will.
    Aborted {
        /// Why.
        detail: String,
    },
    /// Anything else, or bytes that are no message.
    Nonsense {
        /// What it was.
        what: String,
    },
}

/// What the engine is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Open the link. Answered by `LinkUp` or `Failed`.
    Connect,
    /// Send the offer.
    SendOffer,
    /// Send the blobs that the agent lacks.
    SendBlobs,
    /// Send the live pass over the writable layer, and start CRIU meanwhile. Answered by `RootfsSent`.
    SendRootfs,
    /// Open the streams for pages. Answered by `StreamsOpen`.
    OpenStreams,
    /// Find what was written since the last time; the first time, all there is. Answered by `Scanned`.
    Scan,
    /// Send what the last scan found. Answered by `RoundSent`, and by the target.
    SendRound {
        /// Its number.
        round: u32,
        /// Whether hot pages are left to the freeze.
        hold_back: bool,
    },
    /// Freeze every task. Answered by `Froze`, or by `Unsettled`.
    Freeze,
    /// Let CRIU dump, and send images, the final pass and the rest of the pages while it does. Answered by
    /// `Dumped`, then `StateSent` and `Confirmed`.
    Dump {
        /// Whether the rest of the pages is left to travel after the container runs on the target.
        leave_pages: bool,
    },
    /// Say that the commit begins, then send COMMIT.
    Commit,
    /// Ask the target's agent over a new connection, after a pause. Answered by `Answered` or `AskFailed`.
    AskFate {
        /// How long to wait before.
        pause: Duration,
    },
    /// Give the target all pages it lacks. Those that it asks for it gets since `Dump`: CRIU's restore misses some, too.
    Serve,
    /// Close link and streams, so that a target that lacks pages does not wait for this side in vain. Then ask the
    /// target's agent, after a pause, and if it says `Filling` and `reopen` is wanted, open link and streams again
    /// and learn what the target lacks. Answered by `Rejoined`, `Answered` or `AskFailed`.
    Rejoin {
        /// How long to wait before.
        pause: Duration,
        /// Whether pages are left here that can be given.
        reopen: bool,
    },
    /// Let CRIU kill the tasks, or kill them without it; there is no way back. Answered by `Killed`.
    Kill,
    /// Report that the container has moved.
    ReportMoved,
    /// Remove the source's task, record and snapshot. Answered by `CleanedUp`.
    CleanUp,
    /// Stop what is under way, tell the target, let CRIU go and thaw the container. Answered by `RolledBack` or
    /// `RollbackFailed`.
    RollBack {
        /// What the target is told, if it is to be told anything.
        tell: Option<String>,
    },
    /// Leave the container frozen and let go of it: another worker will ask again.
    LeaveFrozen,
    /// Report that only the preflight was asked for and nothing is in the way.
    ReportChecked,
    /// Report the failure.
    ReportFailed {
        /// What went wrong and where the container is.
        failure: Failure,
    },
}

/// A state and what is to be done on the way into it.
#[derive(Debug)]
#[must_use = "the actions have to be executed"]
pub struct Step {
    /// The new state.
    pub state: Source,
    /// What to do, in order.
    pub actions: Vec<Action>,
}

/// Time for opening the link.
pub const CONNECT_MAX: Duration = Duration::from_secs(30);
/// Time for the preflight of the target.
pub const NEGOTIATE_MAX: Duration = Duration::from_secs(120);
/// Time for blobs, unpacking and creating the incoming task. The container runs meanwhile.
pub const PREPARE_MAX: Duration = Duration::from_secs(3600);
/// Time for the live pass over the writable layer. The container runs meanwhile.
pub const COPY_ROOTFS_MAX: Duration = Duration::from_secs(3600);
/// Time for the streams to open.
pub const OPEN_STREAMS_MAX: Duration = Duration::from_secs(30);
/// Time for one round of pages. The container runs meanwhile. A dead link is found sooner, by TCP.
pub const ROUND_MAX: Duration = Duration::from_secs(3600);
/// Time for the tasks to freeze.
pub const FREEZE_MAX: Duration = Duration::from_secs(10);
/// How often a freeze is tried that finds something under way.
pub const FREEZE_TRIES: u32 = 100;
/// Time for CRIU to dump. Generous: the pages of a large container are written in it.
pub const DUMP_MAX: Duration = Duration::from_secs(600);
/// Time for the rest of the transfer after the dump. A dead link is found sooner, by TCP.
pub const TRANSFER_MAX: Duration = Duration::from_secs(1800);
/// Time for the target to restore, and for what was dumped to be confirmed after that.
pub const RESTORE_MAX: Duration = Duration::from_secs(300);
/// Time for the target to answer COMMIT, before it is asked over a connection of its own.
pub const RESUME_MAX: Duration = Duration::from_secs(20);
/// Time for which the target is asked, before the container is left frozen for another worker to ask.
pub const ASK_MAX: Duration = Duration::from_secs(120);
/// Time for the target to put the last page in its place when it has them all.
pub const FILL_MAX: Duration = Duration::from_secs(300);
/// Time for which the target is tried again while its container lacks pages, or may lack them. It gives up sooner
/// itself: longer than that it is not reached at all.
pub const REJOIN_MAX: Duration = Duration::from_secs(600);
/// Pause between two questions.
pub const ASK_PAUSE: Duration = Duration::from_millis(500);
/// How often pages are given, if that fails on this side.
pub const SERVE_TRIES: u32 = 10;
/// Time that the client has to fetch the report before the source is cleaned up.
pub const RELEASE_MAX: Duration = Duration::from_secs(10);

impl Source {
    /// Begins a migration.
    pub fn begin(settings: Settings, now: Tick) -> Step {
        let state = State::Connecting { dry_run: settings.dry_run };
        Self::enter(state, Course::begin(settings), vec![Action::Connect], now)
    }

    /// Begins in the place of a worker that died after it had said that it commits: the target is asked.
    ///
    /// The downtime of such a migration is measured from here, since nobody knows when it began.
    pub fn resolve(now: Tick) -> Step {
        let state = State::Asking { watch: Stopwatch::freeze(now) };
        let course = Course::unknown();
        Self::enter(state, course, vec![Action::AskFate { pause: Duration::ZERO }], now)
    }

    /// Takes one event. Total: whatever comes in whatever state, there is a next state.
    pub fn step(self, event: Event, now: Tick) -> Step {
        let Self { state, mut course, entered } = self;
        let before = state.label();
        let (state, actions) = next::next(state, &mut course, event, now);
        let entered = if state.label() == before { entered } else { now };
        Step { state: Self { state, course, entered }, actions }
    }

    /// Returns the phase for logs, progress and failures.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// Returns the state's name for logs.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        self.state.label()
    }

    /// Returns when [`Event::Deadline`] is due, if ever.
    #[must_use]
    pub fn deadline(&self) -> Option<Tick> {
        let limit = self.state.time_max(self.course.leaves_pages())?;
        Some(Tick(self.entered.0.saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX))))
    }

    /// Returns what is known of the moved container, once it runs on the target.
    #[must_use]
    pub const fn moved(&self) -> Option<&Moved> {
        match &self.state {
            State::Serving { moved }
            | State::Rejoining { moved }
            | State::Killing { moved, .. }
            | State::AwaitingRelease { moved }
            | State::CleaningUp { moved } => Some(moved),
            State::Done { end: End::Migrated(moved) } => Some(moved),
            _ => None,
        }
    }

    /// Returns the rounds of pre-copy so far.
    #[must_use]
    pub fn rounds(&self) -> &[Round] {
        &self.course.rounds
    }

    /// Returns the downtime that was expected when the switchover was decided; none without rounds.
    #[must_use]
    pub const fn expected_downtime(&self) -> Option<Duration> {
        self.course.expected
    }

    /// Returns how it ended, once it has.
    #[must_use]
    pub const fn end(&self) -> Option<&End> {
        match &self.state {
            State::Done { end } => Some(end),
            _ => None,
        }
    }

    const fn enter(state: State, course: Course, actions: Vec<Action>, now: Tick) -> Step {
        Step { state: Self { state, course, entered: now }, actions }
    }
}

impl State {
    const fn phase(&self) -> Phase {
        match self {
            Self::Connecting { .. } => Phase::Connecting,
            Self::Negotiating { .. } => Phase::Negotiating,
            Self::Preparing => Phase::Preparing,
            Self::CopyingRootfs | Self::AwaitingRootfs => Phase::CopyingRootfs,
            Self::OpeningStreams | Self::Scanning { .. } | Self::SendingRound { .. } => Phase::CopyingMemory,
            // The tasks run for some of it, if need be.
            Self::Freezing { .. }
            | Self::Settling { .. }
            | Self::Dumping { .. }
            | Self::Transferring { .. }
            | Self::AwaitingReceipt { .. } => Phase::Frozen,
            Self::Restoring { .. } | Self::Confirming { .. } => Phase::Restoring,
            Self::Committing { .. } | Self::Asking { .. } => Phase::Committing,
            Self::Serving { .. } | Self::Rejoining { .. } | Self::Burying { .. } => Phase::Filling,
            Self::Killing { .. } | Self::AwaitingRelease { .. } => Phase::Committed,
            Self::CleaningUp { .. } => Phase::CleaningUp,
            // A rollback belongs to the phase that failed, until it is over.
            Self::RollingBack { failure } => failure.phase,
            Self::Done { .. } => Phase::Done,
        }
    }

    const fn time_max(&self, leaves_pages: bool) -> Option<Duration> {
        match self {
            Self::OpeningStreams => Some(OPEN_STREAMS_MAX),
            Self::Scanning { .. } | Self::SendingRound { .. } => Some(ROUND_MAX),
            Self::Serving { .. } if !leaves_pages => Some(FILL_MAX),
            Self::Rejoining { .. } => Some(REJOIN_MAX),
            Self::Connecting { .. } => Some(CONNECT_MAX),
            Self::Negotiating { .. } => Some(NEGOTIATE_MAX),
            Self::Preparing => Some(PREPARE_MAX),
            Self::CopyingRootfs | Self::AwaitingRootfs => Some(COPY_ROOTFS_MAX),
            Self::Freezing { .. } => Some(FREEZE_MAX),
            Self::Settling { tries } => Some(settle_pause(*tries)),
            Self::Dumping { .. } => Some(DUMP_MAX),
            Self::Transferring { .. } | Self::AwaitingReceipt { .. } => Some(TRANSFER_MAX),
            Self::Restoring { .. } | Self::Confirming { .. } => Some(RESTORE_MAX),
            Self::Committing { .. } => Some(RESUME_MAX),
            Self::Asking { .. } => Some(ASK_MAX),
            Self::AwaitingRelease { .. } => Some(RELEASE_MAX),
            // What is to be undone or finished has no way out but to be done.
            // Pages that only the source has are served for as long as it takes.
            Self::Serving { .. }
            | Self::Killing { .. }
            | Self::CleaningUp { .. }
            | Self::Burying { .. }
            | Self::RollingBack { .. }
            | Self::Done { .. } => None,
        }
    }
}

/// How long the tasks run between two tries to freeze them. It varies, so as not to meet the same moment of what they do
/// again and again, and is short: what waits for a task that runs is gone within a time slice.
const fn settle_pause(tries: u32) -> Duration {
    Duration::from_millis(1 + 3 * (tries as u64 % 7))
}

fn failure(phase: Phase, side: Side, fate: Fate, cause: String) -> Failure {
    Failure { side, phase, fate, cause }
}

mod course;
mod labels;
mod next;

#[cfg(test)]
#[path = "source/table.rs"]
mod table;
