//! The source's transitions as a table, the oracle for [`super::Source::step`].

use super::*;

/// State, event, next state, actions. What is not here follows [`rule`].
const TRANSITIONS: &[(&str, &str, &str, &[&str])] = &[
    ("Connecting", "LinkUp", "Negotiating", &["SendOffer"]),
    ("Negotiating", "Accepted", "Preparing", &["SendBlobs"]),
    ("Preparing", "Ready", "CopyingRootfs", &["SendRootfs"]),
    ("CopyingRootfs", "RootfsSent", "AwaitingRootfs", &[]),
    ("AwaitingRootfs", "RootfsApplied", "Freezing", &["Freeze"]),
    ("Freezing", "Froze", "Dumping", &["Dump"]),
    ("Dumping", "Dumped", "Transferring", &[]),
    ("Transferring", "StateSent", "AwaitingReceipt", &[]),
    ("AwaitingReceipt", "Received", "Restoring", &[]),
    ("Restoring", "Restored", "Committing", &["Commit"]),
    ("Committing", "Resumed", "Killing", &["Kill"]),
    ("Committing", "Aborted", "RollingBack", &["RollBack"]),
    ("Committing", "LinkLost", "Asking", &["AskFate"]),
    ("Committing", "Failed", "Asking", &["AskFate"]),
    ("Committing", "Deadline", "Asking", &["AskFate"]),
    ("Asking", "Here", "Killing", &["Kill"]),
    ("Asking", "NotHere", "RollingBack", &["RollBack"]),
    ("Asking", "Pending", "Asking", &["AskFate"]),
    ("Asking", "AskFailed", "Asking", &["AskFate"]),
    ("Asking", "Deadline", "Done", &["LeaveFrozen", "ReportFailed"]),
    ("Killing", "Killed", "AwaitingRelease", &["ReportMoved"]),
    ("AwaitingRelease", "Release", "CleaningUp", &["CleanUp"]),
    ("AwaitingRelease", "Deadline", "CleaningUp", &["CleanUp"]),
    ("CleaningUp", "CleanedUp", "Done", &[]),
    ("RollingBack", "RolledBack", "Done", &["ReportFailed"]),
    ("RollingBack", "RollbackFailed", "Done", &["ReportFailed"]),
];

const REVOCABLE: [&str; 10] = [
    "Connecting",
    "Negotiating",
    "Preparing",
    "CopyingRootfs",
    "AwaitingRootfs",
    "Freezing",
    "Dumping",
    "Transferring",
    "AwaitingReceipt",
    "Restoring",
];

/// The rules of the module's documentation for what is not in the table.
fn rule(state: &'static str, event: &Event) -> (&'static str, &'static [&'static str]) {
    let from_peer = matches!(event, Event::Peer(_));
    let way_out = ["LinkLost", "Failed", "Cancel", "Deadline"].contains(&event.label());
    let welcome = match event.label() {
        "Preparing" => state == "Preparing",
        "FinalApplied" => ["Dumping", "Transferring", "AwaitingReceipt"].contains(&state),
        _ => false,
    };
    match state {
        _ if welcome => (state, &[]),
        _ if REVOCABLE.contains(&state) && (from_peer || way_out) => ("RollingBack", &["RollBack"]),
        "Committing" if from_peer => ("Asking", &["AskFate"]),
        _ => (state, &[]),
    }
}

/// One state of every kind, by the way a migration reaches it.
fn states() -> Vec<State> {
    let watch = || Stopwatch::freeze(Tick(0));
    let moved = Moved { downtime: DowntimeParts::default(), resumed: Resumed::default() };
    let failed = failure(Phase::Frozen, Side::Source, Fate::RunningOnSource, "no".to_owned());
    vec![
        State::Connecting { dry_run: false },
        State::Negotiating { dry_run: false },
        State::Preparing,
        State::CopyingRootfs,
        State::AwaitingRootfs,
        State::Freezing { watch: watch() },
        State::Dumping { watch: watch() },
        State::Transferring { watch: watch() },
        State::AwaitingReceipt { watch: watch() },
        State::Restoring { watch: watch() },
        State::Committing { watch: watch() },
        State::Asking { watch: watch() },
        State::Killing { moved, released: false },
        State::AwaitingRelease { moved },
        State::CleaningUp { moved },
        State::RollingBack { failure: failed.clone() },
        State::Done { end: End::Failed(failed) },
    ]
}

fn events() -> Vec<Event> {
    let text = || "why".to_owned();
    let peer = [
        PeerEvent::Accepted,
        PeerEvent::Rejected { detail: text() },
        PeerEvent::Preparing(PreparingStep::Image),
        PeerEvent::Ready,
        PeerEvent::RootfsApplied(Pass::Live),
        PeerEvent::RootfsApplied(Pass::Final),
        PeerEvent::Received,
        PeerEvent::Restored,
        PeerEvent::Resumed(Resumed::default()),
        PeerEvent::Aborted { detail: text() },
        PeerEvent::Nonsense { what: text() },
    ];
    let mut events = vec![
        Event::LinkUp,
        Event::RootfsSent,
        Event::Froze,
        Event::Dumped,
        Event::StateSent,
        Event::Answered(FateAnswer::Here),
        Event::Answered(FateAnswer::NotHere),
        Event::Answered(FateAnswer::Pending),
        Event::AskFailed { cause: text() },
        Event::Killed,
        Event::Release,
        Event::CleanedUp,
        Event::RolledBack,
        Event::RollbackFailed { cause: text() },
        Event::Failed { cause: text() },
        Event::LinkLost { cause: text() },
        Event::Cancel,
        Event::Deadline,
    ];
    events.extend(peer.into_iter().map(Event::Peer));
    events
}

#[test]
fn every_state_takes_every_event_as_the_table_says() {
    let count = states().len();
    for index in 0..count {
        for event in events() {
            let state = states().swap_remove(index);
            let from = state.label();
            let entry = TRANSITIONS.iter().find(|(state, on, ..)| *state == from && *on == event.label());
            let (to, actions) =
                entry.map_or_else(|| rule(from, &event), |(_, _, to, actions)| (*to, *actions));
            let step = Source { state, entered: Tick(0) }.step(event.clone(), Tick(9));
            let taken: Vec<_> = step.actions.iter().map(Action::label).collect();
            assert_eq!((step.state.label(), &taken[..]), (to, actions), "{from} on {}", event.label());
        }
    }
}

#[test]
fn a_dry_run_ends_with_the_preflight() {
    let step = Source::begin(true, Tick(0)).state.step(Event::LinkUp, Tick(1));
    let step = step.state.step(Event::Peer(PeerEvent::Accepted), Tick(2));
    assert_eq!(step.actions, [Action::ReportChecked]);
    assert_eq!(step.state.end(), Some(&End::Checked));
}

#[test]
fn a_release_that_comes_early_is_not_forgotten() {
    let moved = Moved { downtime: DowntimeParts::default(), resumed: Resumed::default() };
    let source = Source { state: State::Killing { moved, released: false }, entered: Tick(0) };
    let step = source.step(Event::Release, Tick(1));
    assert!(step.actions.is_empty());
    assert_eq!(step.state.step(Event::Killed, Tick(2)).actions, [Action::ReportMoved, Action::CleanUp]);
}

#[test]
fn the_diagram_in_the_documentation_is_the_table() {
    let drawn: Vec<_> = include_str!("../source.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.contains("-->"))
        .collect();
    let listed: Vec<_> =
        TRANSITIONS.iter().map(|(from, event, to, _)| format!("{from} --{event}--> {to}")).collect();
    assert_eq!(drawn, listed);
}

#[test]
fn the_deadline_counts_from_the_entry_into_the_state() {
    let source = Source::begin(false, Tick(5)).state;
    let due = |limit: Duration, from: u64| Some(Tick(from + u64::try_from(limit.as_nanos()).unwrap()));
    assert_eq!(source.deadline(), due(CONNECT_MAX, 5));
    let source = source.step(Event::Froze, Tick(6)).state;
    assert_eq!(source.deadline(), due(CONNECT_MAX, 5));
    let source = source.step(Event::LinkUp, Tick(7)).state;
    assert_eq!(source.deadline(), due(NEGOTIATE_MAX, 7));
}

#[test]
fn the_text_of_a_deadline_names_the_phase_and_the_time() {
    let step = Source::begin(false, Tick(0)).state.step(Event::Deadline, Tick(1));
    assert_eq!(
        step.actions,
        [Action::RollBack { tell: Some("connecting took longer than 30 s".to_owned()) }]
    );
}
