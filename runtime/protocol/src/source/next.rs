//! The transitions of the source, state by state.

use std::time::Duration;

use super::{
    ASK_PAUSE, Action, Course, End, Event, FREEZE_TRIES, Failure, Fate, FateAnswer, Moved, Pass, PeerEvent,
    Resumed, RoundSent, Side, State, Stopwatch, Tick, failure,
};
use crate::phase::Phase;
use crate::policy::Verdict;

type Next = (State, Vec<Action>);

/// Returns the state after `event` and what to do on the way into it.
pub(super) fn next(state: State, course: &mut Course, event: Event, now: Tick) -> Next {
    match state {
        State::Committing { watch } => committing(watch, course, event, now),
        State::Asking { watch } => asking(watch, course, &event, now),
        State::Serving { moved } => serving(moved, course, &event),
        State::Rejoining { moved } => rejoining(moved, course, &event),
        State::Killing { moved, released } => killing(moved, released, &event),
        State::AwaitingRelease { moved } => match event {
            Event::Release | Event::Deadline => (State::CleaningUp { moved }, vec![Action::CleanUp]),
            _ => (State::AwaitingRelease { moved }, vec![]),
        },
        State::CleaningUp { moved } => match event {
            Event::CleanedUp => (State::Done { end: End::Migrated(moved) }, vec![]),
            _ => (State::CleaningUp { moved }, vec![]),
        },
        State::Burying { failure } => burying(failure, &event),
        State::RollingBack { failure } => rolling_back(failure, event),
        State::Settling { tries } if event == Event::Deadline => freeze(tries, now),
        State::Done { end } => (State::Done { end }, vec![]),
        revocable => match give_up(&revocable, &event) {
            Some(next) => next,
            None => go_on(revocable, course, event, now),
        },
    }
}

/// The way ahead, up to COMMIT. Local events out of place come from threads that were overtaken: they are
/// ignored. Messages out of place roll back.
fn go_on(state: State, course: &mut Course, event: Event, now: Tick) -> Next {
    match (state, event) {
        (
            state @ (State::AwaitingRootfs
            | State::OpeningStreams
            | State::Scanning { .. }
            | State::SendingRound { .. }),
            event,
        ) => copying(state, course, event, now),
        (State::Connecting { dry_run }, Event::LinkUp) => {
            (State::Negotiating { dry_run }, vec![Action::SendOffer])
        }
        (State::Negotiating { dry_run: true }, Event::Peer(PeerEvent::Accepted(_))) => {
            (State::Done { end: End::Checked }, vec![Action::ReportChecked])
        }
        (State::Negotiating { dry_run: false }, Event::Peer(PeerEvent::Accepted(way))) => {
            course.take(way);
            (State::Preparing, vec![Action::SendBlobs])
        }
        (State::Preparing, Event::Peer(PeerEvent::Preparing(_))) => (State::Preparing, vec![]),
        (State::Preparing, Event::Peer(PeerEvent::Ready)) => (State::CopyingRootfs, vec![Action::SendRootfs]),
        (State::CopyingRootfs, Event::RootfsSent) => (State::AwaitingRootfs, vec![]),
        (State::Freezing { tries, .. }, Event::Unsettled { cause }) => unsettled(tries, &cause),
        (State::Freezing { mut watch, .. }, Event::Froze) => {
            watch.frozen(now);
            (State::Dumping { watch }, vec![Action::Dump { leave_pages: course.leaves_pages() }])
        }
        (State::Dumping { mut watch }, Event::Dumped) => {
            watch.dumped(now);
            (State::Transferring { watch, confirmed: false }, vec![])
        }
        (
            state @ (State::Transferring { .. }
            | State::AwaitingReceipt { .. }
            | State::Restoring { .. }
            | State::Confirming { .. }),
            event,
        ) => dumped(state, event, now),
        // The target takes the final pass and the last pages beside the images: the words for them may come at any
        // time until it has received everything, and nothing depends on them.
        (
            state @ State::Dumping { .. },
            Event::Peer(PeerEvent::RootfsApplied(Pass::Final) | PeerEvent::RoundReceived(_)),
        ) => (state, vec![]),
        (state, event) => elsewhere(state, &event),
    }
}

/// From the dump to COMMIT, which waits for the target, and for what was dumped to be confirmed.
fn dumped(state: State, event: Event, now: Tick) -> Next {
    match (state, event) {
        (State::Transferring { watch, .. }, Event::Confirmed) => {
            (State::Transferring { watch, confirmed: true }, vec![])
        }
        (State::AwaitingReceipt { watch, .. }, Event::Confirmed) => {
            (State::AwaitingReceipt { watch, confirmed: true }, vec![])
        }
        (State::Restoring { watch, .. }, Event::Confirmed) => {
            (State::Restoring { watch, confirmed: true }, vec![])
        }
        (State::Confirming { watch }, Event::Confirmed) => {
            (State::Committing { watch }, vec![Action::Commit])
        }
        (State::Transferring { watch, confirmed }, Event::StateSent) => {
            (State::AwaitingReceipt { watch, confirmed }, vec![])
        }
        (
            state @ (State::Transferring { .. } | State::AwaitingReceipt { .. }),
            Event::Peer(PeerEvent::RootfsApplied(Pass::Final) | PeerEvent::RoundReceived(_)),
        ) => (state, vec![]),
        (State::AwaitingReceipt { mut watch, confirmed }, Event::Peer(PeerEvent::Received)) => {
            watch.transferred(now);
            (State::Restoring { watch, confirmed }, vec![])
        }
        (State::Restoring { mut watch, confirmed }, Event::Peer(PeerEvent::Restored)) => {
            watch.restored(now);
            if confirmed {
                (State::Committing { watch }, vec![Action::Commit])
            } else {
                (State::Confirming { watch }, vec![])
            }
        }
        (state, event) => elsewhere(state, &event),
    }
}

/// From the applied root to the freeze: the streams, and the rounds.
fn copying(state: State, course: &mut Course, event: Event, now: Tick) -> Next {
    match (state, event) {
        (State::AwaitingRootfs, Event::Peer(PeerEvent::RootfsApplied(Pass::Live))) => {
            if course.way.is_ours() {
                (State::OpeningStreams, vec![Action::OpenStreams])
            } else {
                freeze(0, now)
            }
        }
        (State::OpeningStreams, Event::StreamsOpen) => {
            if course.way.has_rounds() {
                course.begin_rounds(now);
                (State::Scanning { round: 0 }, vec![Action::Scan])
            } else {
                freeze(0, now)
            }
        }
        (State::Scanning { round }, Event::Scanned { pages, hot_pages }) => {
            match course.scanned(pages, hot_pages, now) {
                Verdict::NextRound => {
                    let state = State::SendingRound { round, sent: None, received: false };
                    (state, vec![Action::SendRound { round, hold_back: course.holds_back() }])
                }
                Verdict::SwitchOver | Verdict::GoPostcopy => freeze(0, now),
                Verdict::Abort { cause } => roll_back(&State::Scanning { round }, Side::Source, cause, true),
            }
        }
        (State::SendingRound { round, sent: None, received }, Event::RoundSent(sent)) => {
            sending(round, Some(sent), received, course, now)
        }
        (
            State::SendingRound { round, sent, received: false },
            Event::Peer(PeerEvent::RoundReceived(number)),
        ) if number == round => sending(round, sent, true, course, now),
        (state, event) => elsewhere(state, &event),
    }
}

fn sending(round: u32, sent: Option<RoundSent>, received: bool, course: &mut Course, now: Tick) -> Next {
    match sent {
        Some(sent) if received => {
            course.ended(round, sent, now);
            (State::Scanning { round: round + 1 }, vec![Action::Scan])
        }
        _ => (State::SendingRound { round, sent, received }, vec![]),
    }
}

/// The downtime begins with the try that succeeds.
fn freeze(tries: u32, now: Tick) -> Next {
    let tries = tries + 1;
    (State::Freezing { watch: Stopwatch::freeze(now), tries }, vec![Action::Freeze])
}

fn unsettled(tries: u32, cause: &str) -> Next {
    if tries < FREEZE_TRIES {
        return (State::Settling { tries }, vec![]);
    }
    let cause = format!("{cause}, at each of {tries} tries to freeze it");
    roll_back(&State::Settling { tries }, Side::Source, cause, true)
}

/// What has no place in this state.
fn elsewhere(state: State, event: &Event) -> Next {
    match event {
        Event::Peer(event) => {
            let cause = out_of_place(event, &state);
            roll_back(&state, Side::Target, cause, true)
        }
        _ => (state, vec![]),
    }
}

/// The ways out before COMMIT, the same in every state; `None` if `event` is none of them.
fn give_up(state: &State, event: &Event) -> Option<Next> {
    let (side, cause, tell) = match event {
        Event::Peer(PeerEvent::Rejected { detail } | PeerEvent::Aborted { detail }) => {
            (Side::Target, detail.clone(), false)
        }
        Event::Peer(PeerEvent::Nonsense { what }) => (Side::Target, what.clone(), true),
        Event::LinkLost { cause } => (Side::Target, cause.clone(), false),
        Event::Failed { cause } => (Side::Source, cause.clone(), true),
        Event::Cancel => (Side::Source, "it was cancelled".to_owned(), true),
        Event::Deadline => (Side::Source, took_too_long(state), true),
        _ => return None,
    };
    Some(roll_back(state, side, cause, tell))
}

fn committing(watch: Stopwatch, course: &Course, event: Event, now: Tick) -> Next {
    match event {
        Event::Peer(PeerEvent::Resumed(resumed)) if course.way.is_ours() => {
            (State::Serving { moved: moved(watch, resumed, now) }, vec![Action::Serve])
        }
        Event::Peer(PeerEvent::Resumed(resumed)) => kill(moved(watch, resumed, now)),
        Event::Peer(PeerEvent::Aborted { detail }) => {
            roll_back(&State::Committing { watch }, Side::Target, detail, false)
        }
        // Whatever else the target says, or the end of the link: what it decided is in its record.
        Event::Peer(_) | Event::LinkLost { .. } | Event::Failed { .. } | Event::Deadline => ask(watch, false),
        _ => (State::Committing { watch }, vec![]),
    }
}

fn asking(watch: Stopwatch, course: &Course, event: &Event, now: Tick) -> Next {
    match event {
        Event::Answered(FateAnswer::Filling) if course.leaves_pages() => {
            rejoin(moved(watch, Resumed::default(), now), course, Duration::ZERO)
        }
        Event::Answered(FateAnswer::Here | FateAnswer::Filling) => {
            kill(moved(watch, Resumed::default(), now))
        }
        Event::Answered(FateAnswer::NotHere) => {
            let cause = "the link was lost before the target could resume the container".to_owned();
            roll_back(&State::Asking { watch }, Side::Target, cause, false)
        }
        Event::Answered(FateAnswer::Lost) => bury(),
        Event::Answered(FateAnswer::Pending) | Event::AskFailed { .. } => ask(watch, true),
        Event::Deadline => {
            let state = State::Asking { watch };
            let cause = "the target cannot be asked whether it runs the container: bring its agent back, then \
                         migrate again to the same target";
            let failure = failure(state.phase(), Side::Target, Fate::Unknown, cause.to_owned());
            let actions = vec![Action::LeaveFrozen, Action::ReportFailed { failure: failure.clone() }];
            (State::Done { end: End::Failed(failure) }, actions)
        }
        // The old link may still speak; the record is what counts, and its answer is on the way.
        _ => (State::Asking { watch }, vec![]),
    }
}

fn ask(watch: Stopwatch, again: bool) -> Next {
    let pause = if again { ASK_PAUSE } else { Duration::ZERO };
    (State::Asking { watch }, vec![Action::AskFate { pause }])
}

/// The container runs on the target, and the source is kept for the pages that the target lacks, if it does.
fn serving(moved: Moved, course: &mut Course, event: &Event) -> Next {
    if matches!(event, Event::Failed { .. }) {
        course.failed_to_serve();
    }
    match event {
        Event::Peer(PeerEvent::MemoryComplete(memory)) => {
            kill(Moved { memory: Some(memory.clone()), ..moved })
        }
        Event::Peer(_) | Event::LinkLost { .. } | Event::Failed { .. } => {
            rejoin(moved, course, course.rejoin_pause())
        }
        Event::Deadline if !course.leaves_pages() => rejoin(moved, course, ASK_PAUSE),
        _ => (State::Serving { moved }, vec![]),
    }
}

fn rejoining(moved: Moved, course: &mut Course, event: &Event) -> Next {
    match event {
        Event::Rejoined => {
            course.rejoined();
            (State::Serving { moved }, vec![Action::Serve])
        }
        // The last page came, and only the word for it was lost, or is late: there is nobody to join any more.
        Event::Answered(FateAnswer::Here) => kill(moved),
        Event::Answered(FateAnswer::Filling) if !course.leaves_pages() => kill(moved),
        Event::Peer(PeerEvent::MemoryComplete(memory)) => {
            kill(Moved { memory: Some(memory.clone()), ..moved })
        }
        // A target that knows nothing of what has run there has lost its record, and all that ran, with its memory.
        Event::Answered(FateAnswer::Lost | FateAnswer::NotHere) => bury(),
        Event::Answered(FateAnswer::Filling | FateAnswer::Pending) | Event::AskFailed { .. } => {
            rejoin(moved, course, ASK_PAUSE)
        }
        Event::Deadline => {
            let cause = "the target cannot be asked what became of the container, which has run there and may lack \
                         memory; its tasks are kept frozen here: bring the target's agent back, then migrate again \
                         to the same target"
                .to_owned();
            let failure = failure(Phase::Filling, Side::Target, Fate::Unknown, cause);
            let actions = vec![Action::LeaveFrozen, Action::ReportFailed { failure: failure.clone() }];
            (State::Done { end: End::Failed(failure) }, actions)
        }
        _ => (State::Rejoining { moved }, vec![]),
    }
}

fn rejoin(moved: Moved, course: &Course, pause: Duration) -> Next {
    (State::Rejoining { moved }, vec![Action::Rejoin { pause, reopen: course.can_serve() }])
}

/// The container has run on the target, and is no more: what is here is older than what others have seen of it.
fn bury() -> Next {
    let cause = "the container was ended on the target, where it had begun to run without all of its memory; what was \
                 frozen here is older and was ended as well, but its record and writable layer are kept: start it \
                 anew from them"
        .to_owned();
    let failure = failure(Phase::Filling, Side::Target, Fate::Lost, cause);
    (State::Burying { failure }, vec![Action::Kill])
}

fn burying(failure: Failure, event: &Event) -> Next {
    match event {
        Event::Killed => {
            let actions = vec![Action::ReportFailed { failure: failure.clone() }];
            (State::Done { end: End::Failed(failure) }, actions)
        }
        _ => (State::Burying { failure }, vec![]),
    }
}

fn moved(watch: Stopwatch, resumed: Resumed, now: Tick) -> Moved {
    Moved { downtime: watch.resumed(now), resumed, at: now, memory: None }
}

fn kill(moved: Moved) -> Next {
    (State::Killing { moved, released: false }, vec![Action::Kill])
}

fn killing(moved: Moved, released: bool, event: &Event) -> Next {
    match event {
        Event::Killed if released => {
            (State::CleaningUp { moved }, vec![Action::ReportMoved, Action::CleanUp])
        }
        Event::Killed => (State::AwaitingRelease { moved }, vec![Action::ReportMoved]),
        Event::Release => (State::Killing { moved, released: true }, vec![]),
        _ => (State::Killing { moved, released }, vec![]),
    }
}

fn rolling_back(failure: Failure, event: Event) -> Next {
    let failure = match event {
        Event::RolledBack => failure,
        Event::RollbackFailed { cause } => Failure {
            fate: Fate::Lost,
            cause: format!("{}; and the container could not be made to go on: {cause}", failure.cause),
            ..failure
        },
        _ => return (State::RollingBack { failure }, vec![]),
    };
    let actions = vec![Action::ReportFailed { failure: failure.clone() }];
    (State::Done { end: End::Failed(failure) }, actions)
}

fn roll_back(state: &State, side: Side, cause: String, tell: bool) -> Next {
    let tell = tell.then(|| cause.clone());
    let failure = failure(state.phase(), side, Fate::RunningOnSource, cause);
    (State::RollingBack { failure }, vec![Action::RollBack { tell }])
}

fn took_too_long(state: &State) -> String {
    let limit_s = state.time_max(false).map_or(0, |limit| limit.as_secs());
    format!("{} took longer than {limit_s} s", state.phase())
}

fn out_of_place(event: &PeerEvent, state: &State) -> String {
    format!("the target said {} while the source was {}", event.label(), state.label())
}
