//! The target worker's half of a migration as a state machine: what to do next, and never how.
//!
//! ```text
//! CopyingRootfs --Applied--> Receiving
//! Receiving --RoundComplete--> Receiving
//! Receiving --FinalApplied [first]--> Receiving
//! Receiving --Complete [files final]--> Restoring
//! Restoring --Held--> Holding
//! Holding --Commit--> Deciding
//! Deciding --Recorded--> Resuming
//! Deciding --Barred--> Aborting
//! Deciding --Failed--> Aborting
//! Resuming --Running--> Recording
//! Resuming --Failed--> Aborting
//! Recording --Recorded [in images]--> Done
//! Recording --Recorded [ours]--> Filling
//! Recording --Recorded [filled]--> Done
//! Recording --Recorded [link lost]--> Stranded
//! Recording --Barred--> Aborting
//! Recording --Failed--> Aborting
//! Filling --Filled--> Done
//! Filling --Failed--> Aborting
//! Filling --LinkLost [pages lacking]--> Stranded
//! Filling --Abort [pages lacking]--> Stranded
//! Filling --Nonsense [pages lacking]--> Stranded
//! Filling --Rejoined--> Filling
//! Stranded --Filled--> Done
//! Stranded --Arrived--> Filling
//! Stranded --Failed--> Aborting
//! Stranded --Rejoined--> Filling
//! Stranded --Deadline--> Aborting
//! Aborting --Undone--> Done
//! Aborting --UndoFailed--> Done
//! ```
//! Beside these, in every state before `Deciding`: `Failed`, `LinkLost`, `Abort`, `Nonsense`, `Deadline`, and a
//! `Commit` out of place lead to `Aborting`. From `Deciding` on the link does not matter any more, but for pages that
//! only the source has: while tasks wait for them the source may come back over a new link, for a short time. Anything
//! else out of place is ignored. The table in `target/table.rs` says the same, and a test holds all three together.
//!
//! Invariants:
//! - The container is resumed only after the record has gone from undecided to committed.
//! - `Resumed` is sent only after the record says resumed, or filling while pages are still to be put in place, and
//!   `MemoryComplete` only after it says resumed; `Abort` is sent only after everything that was restored is
//!   gone and the record says aborted. So whatever the source hears, over the link or from the record, is final.

use std::time::Duration;

use crate::failure::{Failure, Fate, Side};
use crate::fate::Decision;
use crate::phase::Phase;
use crate::report::{TargetMemory, Tick};
use crate::rootfs::Pass;

/// The state of the target's worker.
#[derive(Debug)]
pub struct Target {
    state: State,
    pages: Pages,
    entered: Tick,
}

/// What is known of the container's memory, beside the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    /// Whether pages are put in place after the container runs.
    fills: bool,
    /// Whether none is at the source alone any more.
    arrived: bool,
}

/// Where the worker stands, with what it knows there.
#[derive(Debug)]
enum State {
    CopyingRootfs,
    Receiving { final_applied: bool },
    Restoring,
    Holding,
    Deciding { early: Early },
    Resuming { early: Early },
    Recording { pid: i32, early: Early },
    Filling { pid: i32 },
    Stranded { pid: i32 },
    Aborting { failure: Failure },
    Done { end: End },
}

/// What came before the record could say that the container runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Early {
    /// A small container has all of its pages before the record is written.
    filled: Option<TargetMemory>,
    link_lost: bool,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The container runs here.
    Resumed {
        /// Process id of its init.
        pid: i32,
    },
    /// It does not.
    Failed(Failure),
}

/// What happens to the target's worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A pass over the writable layer has come to its end and has been applied.
    Applied(Pass),
    /// A whole round of pages has come on every stream.
    RoundComplete(u32),
    /// Every image has come and matches the manifest, and every page that is not left at the source.
    Complete,
    /// CRIU holds the container restored and stopped.
    Held,
    /// The source commits.
    Commit,
    /// The record has been asked to take a step, and holds this now.
    Recorded(Decision),
    /// The container runs.
    Running {
        /// Process id of its init.
        pid: i32,
    },
    /// Every page has come, or is told to be no more; some may still have to be put into their tasks.
    Arrived,
    /// Every page is in its task.
    Filled(TargetMemory),
    /// The source is back over a new link. What becomes of the old one is not told any more.
    Rejoined,
    /// Nothing of the container is left here, and the record says aborted if it can.
    Undone,
    /// That could not be made sure.
    UndoFailed {
        /// Why.
        cause: String,
    },
    /// An action failed on this side.
    Failed {
        /// Why.
        cause: String,
    },
    /// The source gives up.
    Abort {
        /// Why.
        detail: String,
    },
    /// The source said something else, or bytes that are no message.
    Nonsense {
        /// What it was.
        what: String,
    },
    /// The link broke.
    LinkLost {
        /// Why.
        cause: String,
    },
    /// The time of [`Target::deadline`] has come.
    Deadline,
}

/// What the engine is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell the source that the worker takes the writable layer, and take it and the images from here on.
    /// Answered by `Applied` for each pass, then `Complete`.
    SendReady,
    /// Tell the source that a pass has been applied.
    SendApplied(Pass),
    /// Tell the source that a round has come.
    SendRoundReceived(u32),
    /// Tell the source that everything has come.
    SendReceived,
    /// Let CRIU restore and hold the container. Answered by `Held`.
    Restore,
    /// Tell the source that the container is held.
    SendRestored,
    /// Ask the record to take this step. Answered by `Recorded`, or `Failed`.
    Record(Decision),
    /// Let CRIU resume the container. Answered by `Running`.
    Resume,
    /// Tell the source and the shim that the container runs.
    ReportResumed {
        /// Process id of its init.
        pid: i32,
    },
    /// Tell the source and the shim that every page is in its task.
    ReportFilled(TargetMemory),
    /// Close the link and every stream, so that the source notices and comes back over new ones.
    DropLink,
    /// Tell the source what is lacking, over the new link.
    SendLacking,
    /// Kill the container, which lacks pages that will not come, then record that it is lost. Answered by `Undone` or
    /// `UndoFailed`.
    Destroy,
    /// Kill what was restored, then record that it is aborted, then tell the source. Answered by `Undone` or
    /// `UndoFailed`; in the latter case the source is told nothing.
    Undo {
        /// What the source is told, if it can be told anything.
        tell: Option<String>,
    },
    /// Report the failure to the shim.
    ReportFailed {
        /// What went wrong.
        failure: Failure,
    },
}

/// A state and what is to be done on the way into it.
#[derive(Debug)]
#[must_use = "the actions have to be executed"]
pub struct Step {
    /// The new state.
    pub state: Target,
    /// What to do, in order.
    pub actions: Vec<Action>,
}

/// Time for which the source may be silent while its container runs.
pub const COPY_ROOTFS_MAX: Duration = Duration::from_secs(7200);
/// Time for one round of pages, or for the freeze, the dump and the transfer. The source's own limits are tighter.
pub const RECEIVE_MAX: Duration = Duration::from_secs(7200);
/// Time for CRIU to restore.
pub const RESTORE_MAX: Duration = Duration::from_secs(300);
/// Time for which the source is awaited while tasks lack pages that only it has. Tasks that miss one sleep, but a
/// container that sleeps can still be had back, and a network is repaired, or a worker replaced, within it.
pub const STRANDED_MAX: Duration = Duration::from_secs(120);
/// Time for the source to answer that the container is held.
pub const HOLD_MAX: Duration = Duration::from_secs(60);

impl Target {
    /// Begins when the worker has the link. `fills` says that pages are put in place after the container runs.
    pub fn begin(fills: bool, now: Tick) -> Step {
        let pages = Pages { fills, arrived: false };
        let state = Self { state: State::CopyingRootfs, pages, entered: now };
        Step { state, actions: vec![Action::SendReady] }
    }

    /// Takes one event. Total: whatever comes in whatever state, there is a next state.
    pub fn step(self, event: Event, now: Tick) -> Step {
        let Self { state, mut pages, entered } = self;
        let before = state.label();
        // However many rounds there are: each has its time.
        let again = matches!(event, Event::RoundComplete(_));
        pages.arrived |= matches!(event, Event::Arrived);
        let (state, actions) = next(state, pages, event);
        let entered = if state.label() == before && !again { entered } else { now };
        Step { state: Self { state, pages, entered }, actions }
    }

    /// Returns the phase for logs and failures.
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
        let limit = self.state.time_max()?;
        Some(Tick(self.entered.0.saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX))))
    }

    /// Returns how it ended, once it has.
    #[must_use]
    pub const fn end(&self) -> Option<&End> {
        match &self.state {
            State::Done { end } => Some(end),
            _ => None,
        }
    }
}

impl State {
    const fn label(&self) -> &'static str {
        match self {
            Self::CopyingRootfs => "CopyingRootfs",
            Self::Receiving { .. } => "Receiving",
            Self::Restoring => "Restoring",
            Self::Holding => "Holding",
            Self::Deciding { .. } => "Deciding",
            Self::Resuming { .. } => "Resuming",
            Self::Recording { .. } => "Recording",
            Self::Filling { .. } => "Filling",
            Self::Stranded { .. } => "Stranded",
            Self::Aborting { .. } => "Aborting",
            Self::Done { .. } => "Done",
        }
    }

    const fn phase(&self) -> Phase {
        match self {
            Self::CopyingRootfs => Phase::CopyingRootfs,
            Self::Receiving { .. } => Phase::Frozen,
            Self::Restoring | Self::Holding => Phase::Restoring,
            Self::Deciding { .. } | Self::Resuming { .. } | Self::Recording { .. } => Phase::Committing,
            Self::Filling { .. } | Self::Stranded { .. } => Phase::Filling,
            Self::Aborting { failure } => failure.phase,
            Self::Done { .. } => Phase::Done,
        }
    }

    const fn time_max(&self) -> Option<Duration> {
        match self {
            Self::CopyingRootfs => Some(COPY_ROOTFS_MAX),
            Self::Receiving { .. } => Some(RECEIVE_MAX),
            Self::Restoring => Some(RESTORE_MAX),
            Self::Holding => Some(HOLD_MAX),
            Self::Stranded { .. } => Some(STRANDED_MAX),
            Self::Deciding { .. }
            | Self::Resuming { .. }
            | Self::Recording { .. }
            | Self::Filling { .. }
            | Self::Aborting { .. }
            | Self::Done { .. } => None,
        }
    }
}

type Next = (State, Vec<Action>);

fn next(state: State, pages: Pages, event: Event) -> Next {
    match state {
        State::Deciding { .. } | State::Resuming { .. } | State::Recording { .. } => {
            decided(state, pages, event)
        }
        State::Filling { pid } | State::Stranded { pid } => filling(state, pid, pages.arrived, event),
        State::Aborting { failure } => aborting(failure, event),
        State::Done { end } => (State::Done { end }, vec![]),
        revocable => match give_up(&revocable, &event) {
            Some(next) => next,
            None => go_on(revocable, &event),
        },
    }
}

/// The way ahead, up to COMMIT.
fn go_on(state: State, event: &Event) -> Next {
    match (state, event) {
        (State::CopyingRootfs, Event::Applied(Pass::Live)) => {
            (State::Receiving { final_applied: false }, vec![Action::SendApplied(Pass::Live)])
        }
        (State::Receiving { final_applied: false }, Event::Applied(Pass::Final)) => {
            (State::Receiving { final_applied: true }, vec![Action::SendApplied(Pass::Final)])
        }
        (state @ State::Receiving { .. }, Event::RoundComplete(round)) => {
            (state, vec![Action::SendRoundReceived(*round)])
        }
        (State::Receiving { final_applied: true }, Event::Complete) => {
            (State::Restoring, vec![Action::SendReceived, Action::Restore])
        }
        // The source's word decides when these come, so they are its breach of the protocol.
        (state, Event::Applied(_) | Event::Complete | Event::RoundComplete(_)) => {
            let cause = format!("the source sent {} while the target was {}", event.label(), state.label());
            abort(&state, Side::Source, cause, true)
        }
        (State::Restoring, Event::Held) => (State::Holding, vec![Action::SendRestored]),
        (State::Holding, Event::Commit) => {
            (State::Deciding { early: Early::default() }, vec![Action::Record(Decision::Committed)])
        }
        (state, Event::Commit) => {
            let cause = format!("the source committed while the target was {}", state.label());
            abort(&state, Side::Source, cause, true)
        }
        (state, _) => (state, vec![]),
    }
}

/// The ways out before COMMIT, the same in every state; `None` if `event` is none of them.
fn give_up(state: &State, event: &Event) -> Option<Next> {
    let (side, cause, tell) = match event {
        Event::Failed { cause } => (Side::Target, cause.clone(), true),
        Event::Abort { detail } => (Side::Source, detail.clone(), false),
        Event::Nonsense { what } => (Side::Source, what.clone(), true),
        Event::LinkLost { cause } => (Side::Source, cause.clone(), false),
        Event::Deadline => {
            let limit_s = state.time_max().map_or(0, |limit| limit.as_secs());
            (Side::Source, format!("{} took longer than {limit_s} s", state.phase()), true)
        }
        _ => return None,
    };
    Some(abort(state, side, cause, tell))
}

/// From the decision on: the link does not matter any more, only the record and the container.
fn decided(state: State, pages: Pages, event: Event) -> Next {
    let Pages { fills, arrived } = pages;
    match (state, event) {
        (State::Deciding { early }, Event::Recorded(Decision::Committed)) => {
            (State::Resuming { early }, vec![Action::Resume])
        }
        (State::Resuming { early }, Event::Running { pid }) => {
            let decision = if fills { Decision::Filling } else { Decision::Resumed };
            (State::Recording { pid, early }, vec![Action::Record(decision)])
        }
        (State::Recording { pid, early }, Event::Recorded(Decision::Filling)) if fills => {
            let (state, mut actions) = match early {
                Early { filled: Some(memory), .. } => filled(pid, memory),
                Early { link_lost: true, .. } if !arrived => {
                    (State::Stranded { pid }, vec![Action::DropLink])
                }
                Early { .. } => (State::Filling { pid }, vec![]),
            };
            actions.insert(0, Action::ReportResumed { pid });
            (state, actions)
        }
        (State::Recording { pid, .. }, Event::Recorded(Decision::Resumed)) if !fills => {
            (State::Done { end: End::Resumed { pid } }, vec![Action::ReportResumed { pid }])
        }
        (state @ (State::Deciding { .. } | State::Recording { .. }), Event::Recorded(_)) => {
            let cause = "the source asked before the commit came, and was told that it may go on".to_owned();
            abort(&state, Side::Target, cause, true)
        }
        (state, Event::Failed { cause }) => abort(&state, Side::Target, cause, true),
        (mut state, event) => {
            if let State::Deciding { early } | State::Resuming { early } | State::Recording { early, .. } =
                &mut state
            {
                early.note(&event);
            }
            (state, vec![])
        }
    }
}

impl Early {
    fn note(&mut self, event: &Event) {
        match event {
            Event::Filled(memory) => self.filled = Some(memory.clone()),
            Event::LinkLost { .. } | Event::Abort { .. } | Event::Nonsense { .. } => self.link_lost = true,
            _ => {}
        }
    }
}

fn filled(pid: i32, memory: TargetMemory) -> Next {
    // The record first: if the word to the source is lost, the record's answer is the same.
    let actions = vec![Action::Record(Decision::Resumed), Action::ReportFilled(memory)];
    (State::Done { end: End::Resumed { pid } }, actions)
}

/// The container runs, and pages are put in place behind it.
fn filling(state: State, pid: i32, arrived: bool, event: Event) -> Next {
    let cause = match (&state, event) {
        (_, Event::Filled(memory)) => return filled(pid, memory),
        (State::Stranded { .. }, Event::Arrived) => return (State::Filling { pid }, vec![]),
        (_, Event::Rejoined) => return (State::Filling { pid }, vec![Action::SendLacking]),
        (_, Event::Failed { cause }) => cause,
        (State::Filling { .. }, Event::LinkLost { .. } | Event::Abort { .. } | Event::Nonsense { .. })
            if !arrived =>
        {
            return (State::Stranded { pid }, vec![Action::DropLink]);
        }
        (State::Stranded { .. }, Event::Deadline) => {
            "the link to the source was lost, and with it pages that the container lacks".to_owned()
        }
        _ => return (state, vec![]),
    };
    // Without its pages the container cannot go on: every task that misses one waits for ever.
    let failure = Failure { side: Side::Target, phase: Phase::Filling, fate: Fate::Lost, cause };
    (State::Aborting { failure }, vec![Action::Destroy])
}

fn aborting(failure: Failure, event: Event) -> Next {
    let failure = match event {
        Event::Undone => failure,
        // What is left here may still run: the source must not be told that it may go on.
        Event::UndoFailed { cause } => Failure {
            fate: Fate::Unknown,
            cause: format!("{}; and what was restored could not be removed: {cause}", failure.cause),
            ..failure
        },
        _ => return (State::Aborting { failure }, vec![]),
    };
    let actions = vec![Action::ReportFailed { failure: failure.clone() }];
    (State::Done { end: End::Failed(failure) }, actions)
}

fn abort(state: &State, side: Side, cause: String, tell: bool) -> Next {
    let tell = tell.then(|| cause.clone());
    let failure = Failure { side, phase: state.phase(), fate: Fate::RunningOnSource, cause };
    (State::Aborting { failure }, vec![Action::Undo { tell }])
}

impl Event {
    /// Returns the event's name.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Applied(Pass::Live) => "Applied",
            Self::Applied(Pass::Final) => "FinalApplied",
            Self::Complete => "Complete",
            Self::Held => "Held",
            Self::Commit => "Commit",
            Self::Recorded(Decision::Committed | Decision::Filling | Decision::Resumed) => "Recorded",
            Self::Recorded(Decision::Aborted | Decision::Undecided | Decision::Lost) => "Barred",
            Self::Running { .. } => "Running",
            Self::RoundComplete(_) => "RoundComplete",
            Self::Arrived => "Arrived",
            Self::Filled(_) => "Filled",
            Self::Rejoined => "Rejoined",
            Self::Undone => "Undone",
            Self::UndoFailed { .. } => "UndoFailed",
            Self::Failed { .. } => "Failed",
            Self::Abort { .. } => "Abort",
            Self::Nonsense { .. } => "Nonsense",
            Self::LinkLost { .. } => "LinkLost",
            Self::Deadline => "Deadline",
        }
    }
}

impl Action {
    /// Returns the action's name.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::SendReady => "SendReady",
            Self::SendApplied(_) => "SendApplied",
            Self::SendRoundReceived(_) => "SendRoundReceived",
            Self::ReportFilled(_) => "ReportFilled",
            Self::DropLink => "DropLink",
            Self::SendLacking => "SendLacking",
            Self::Destroy => "Destroy",
            Self::SendReceived => "SendReceived",
            Self::Restore => "Restore",
            Self::SendRestored => "SendRestored",
            Self::Record(_) => "Record",
            Self::Resume => "Resume",
            Self::ReportResumed { .. } => "ReportResumed",
            Self::Undo { .. } => "Undo",
            Self::ReportFailed { .. } => "ReportFailed",
        }
    }
}

#[cfg(test)]
#[path = "target/table.rs"]
mod table;
