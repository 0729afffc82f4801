//! The source's transitions as a table, the oracle for [`super::Source::step`].

use super::*;
use crate::policy::Verdict;
use crate::transitions::{Row, assert_drawn, assert_tried};

/// State, event, guard, next state, actions. What is not here follows [`rule`].
const TRANSITIONS: &[Row] = &[
    ("Connecting", "LinkUp", "", "Negotiating", &["SendOffer"]),
    ("Negotiating", "Accepted", "dry run", "Done", &["ReportChecked"]),
    ("Negotiating", "Accepted", "no dry run", "Preparing", &["SendBlobs"]),
    ("Preparing", "Ready", "", "CopyingRootfs", &["SendRootfs"]),
    ("CopyingRootfs", "RootfsSent", "", "AwaitingRootfs", &[]),
    ("AwaitingRootfs", "RootfsApplied", "in images", "Freezing", &["Freeze"]),
    ("AwaitingRootfs", "RootfsApplied", "ours", "OpeningStreams", &["OpenStreams"]),
    ("OpeningStreams", "StreamsOpen", "no rounds", "Freezing", &["Freeze"]),
    ("OpeningStreams", "StreamsOpen", "rounds", "Scanning", &["Scan"]),
    ("Scanning", "Scanned", "next round", "SendingRound", &["SendRound"]),
    ("Scanning", "Scanned", "switch over", "Freezing", &["Freeze"]),
    ("Scanning", "Scanned", "give up", "RollingBack", &["RollBack"]),
    ("SendingRound", "RoundSent", "not received", "SendingRound", &[]),
    ("SendingRound", "RoundSent", "received", "Scanning", &["Scan"]),
    ("SendingRound", "RoundReceived", "not sent", "SendingRound", &[]),
    ("SendingRound", "RoundReceived", "sent", "Scanning", &["Scan"]),
    ("Freezing", "Froze", "", "Dumping", &["Dump"]),
    ("Freezing", "Unsettled", "tries left", "Settling", &[]),
    ("Freezing", "Unsettled", "last try", "RollingBack", &["RollBack"]),
    ("Settling", "Deadline", "", "Freezing", &["Freeze"]),
    ("Dumping", "Dumped", "", "Transferring", &[]),
    ("Transferring", "StateSent", "", "AwaitingReceipt", &[]),
    ("AwaitingReceipt", "Received", "", "Restoring", &[]),
    ("Transferring", "Confirmed", "", "Transferring", &[]),
    ("AwaitingReceipt", "Confirmed", "", "AwaitingReceipt", &[]),
    ("Restoring", "Confirmed", "", "Restoring", &[]),
    ("Restoring", "Restored", "confirmed", "Committing", &["Commit"]),
    ("Restoring", "Restored", "not confirmed", "Confirming", &[]),
    ("Confirming", "Confirmed", "", "Committing", &["Commit"]),
    ("Committing", "Resumed", "in images", "Killing", &["Kill"]),
    ("Committing", "Resumed", "ours", "Serving", &["Serve"]),
    ("Committing", "Aborted", "", "RollingBack", &["RollBack"]),
    ("Committing", "LinkLost", "", "Asking", &["AskFate"]),
    ("Committing", "Failed", "", "Asking", &["AskFate"]),
    ("Committing", "Deadline", "", "Asking", &["AskFate"]),
    ("Asking", "Here", "", "Killing", &["Kill"]),
    ("Asking", "Filling", "all sent", "Killing", &["Kill"]),
    ("Asking", "Filling", "pages left", "Rejoining", &["Rejoin"]),
    ("Asking", "NotHere", "", "RollingBack", &["RollBack"]),
    ("Asking", "Pending", "", "Asking", &["AskFate"]),
    ("Asking", "AskFailed", "", "Asking", &["AskFate"]),
    ("Asking", "Lost", "", "Burying", &["Kill"]),
    ("Asking", "Deadline", "", "Done", &["LeaveFrozen", "ReportFailed"]),
    ("Serving", "MemoryComplete", "", "Killing", &["Kill"]),
    ("Serving", "LinkLost", "", "Rejoining", &["Rejoin"]),
    ("Serving", "Failed", "", "Rejoining", &["Rejoin"]),
    ("Serving", "Deadline", "all sent", "Rejoining", &["Rejoin"]),
    ("Rejoining", "Rejoined", "", "Serving", &["Serve"]),
    ("Rejoining", "Here", "", "Killing", &["Kill"]),
    ("Rejoining", "Filling", "all sent", "Killing", &["Kill"]),
    ("Rejoining", "Filling", "pages left", "Rejoining", &["Rejoin"]),
    ("Rejoining", "Lost", "", "Burying", &["Kill"]),
    ("Rejoining", "NotHere", "", "Burying", &["Kill"]),
    ("Rejoining", "MemoryComplete", "", "Killing", &["Kill"]),
    ("Rejoining", "Pending", "", "Rejoining", &["Rejoin"]),
    ("Rejoining", "AskFailed", "", "Rejoining", &["Rejoin"]),
    ("Rejoining", "Deadline", "", "Done", &["LeaveFrozen", "ReportFailed"]),
    ("Burying", "Killed", "", "Done", &["ReportFailed"]),
    ("Killing", "Killed", "released", "CleaningUp", &["ReportMoved", "CleanUp"]),
    ("Killing", "Killed", "not released", "AwaitingRelease", &["ReportMoved"]),
    ("Killing", "Release", "", "Killing", &[]),
    ("AwaitingRelease", "Release", "", "CleaningUp", &["CleanUp"]),
    ("AwaitingRelease", "Deadline", "", "CleaningUp", &["CleanUp"]),
    ("CleaningUp", "CleanedUp", "", "Done", &[]),
    ("RollingBack", "RolledBack", "", "Done", &["ReportFailed"]),
    ("RollingBack", "RollbackFailed", "", "Done", &["ReportFailed"]),
];

const REVOCABLE: [&str; 15] = [
    "Connecting",
    "Negotiating",
    "Preparing",
    "CopyingRootfs",
    "AwaitingRootfs",
    "OpeningStreams",
    "Scanning",
    "SendingRound",
    "Freezing",
    "Settling",
    "Dumping",
    "Transferring",
    "AwaitingReceipt",
    "Restoring",
    "Confirming",
];

/// The rules of the module's documentation for what is not in the table.
fn rule(from: &'static str, event: &Event) -> (&'static str, &'static [&'static str]) {
    let from_peer = matches!(event, Event::Peer(_));
    let way_out = ["LinkLost", "Failed", "Cancel", "Deadline"].contains(&event.label());
    let welcome = match event.label() {
        "Preparing" => from == "Preparing",
        "FinalApplied" | "RoundReceived" => ["Dumping", "Transferring", "AwaitingReceipt"].contains(&from),
        _ => false,
    };
    match from {
        _ if welcome => (from, &[]),
        _ if REVOCABLE.contains(&from) && (from_peer || way_out) => ("RollingBack", &["RollBack"]),
        "Committing" if from_peer => ("Asking", &["AskFate"]),
        "Serving" if from_peer => ("Rejoining", &["Rejoin"]),
        _ => (from, &[]),
    }
}

/// What the guards of a migration look at beside state and event.
#[derive(Debug, Clone)]
struct Given {
    way: Way,
    leaves_pages: bool,
    verdict: Verdict,
}

impl Given {
    fn all() -> Vec<Self> {
        let verdicts = [
            Verdict::NextRound,
            Verdict::SwitchOver,
            Verdict::GoPostcopy,
            Verdict::Abort { cause: "it does not converge".to_owned() },
        ];
        let ways = [Way::InImages, Way::Native, Way::Precopy, Way::Postcopy, Way::Hybrid, Way::Auto];
        let mut all = Vec::new();
        for (way, leaves_pages) in ways.into_iter().flat_map(|way| [(way, false), (way, true)]) {
            let given = |verdict: &Verdict| Self { way, leaves_pages, verdict: verdict.clone() };
            all.extend(verdicts.iter().map(given));
        }
        all
    }

    fn holds(&self, guard: &str, state: &State, event: &Event) -> bool {
        let due = match (state, event) {
            (State::SendingRound { sent: None, .. }, Event::RoundSent(_)) => true,
            (
                State::SendingRound { round, received: false, .. },
                Event::Peer(PeerEvent::RoundReceived(number)),
            ) => number == round,
            _ => false,
        };
        let have = |sent: bool, received: bool| {
            due && matches!(
                state,
                State::SendingRound { sent: before, received: had, .. }
                    if (before.is_some(), *had) == (sent, received)
            )
        };
        match guard {
            "" => true,
            "dry run" => matches!(state, State::Negotiating { dry_run: true }),
            "no dry run" => matches!(state, State::Negotiating { dry_run: false }),
            "in images" => self.way == Way::InImages,
            "ours" => self.way != Way::InImages,
            "rounds" => matches!(self.way, Way::Precopy | Way::Hybrid | Way::Auto),
            "no rounds" => !self.holds("rounds", state, event),
            "next round" => self.verdict == Verdict::NextRound,
            "switch over" => matches!(self.verdict, Verdict::SwitchOver | Verdict::GoPostcopy),
            "give up" => matches!(self.verdict, Verdict::Abort { .. }),
            "not sent" | "not received" => have(false, false),
            "sent" => have(true, false),
            "received" => have(false, true),
            "tries left" => matches!(state, State::Freezing { tries, .. } if *tries < FREEZE_TRIES),
            "last try" => !self.holds("tries left", state, event),
            "pages left" => self.leaves_pages,
            "all sent" => !self.leaves_pages,
            "confirmed" => matches!(state, State::Restoring { confirmed: true, .. }),
            "not confirmed" => matches!(state, State::Restoring { confirmed: false, .. }),
            "released" => matches!(state, State::Killing { released: true, .. }),
            "not released" => matches!(state, State::Killing { released: false, .. }),
            other => panic!("nobody knows when [{other}] holds"),
        }
    }
}

fn a_move() -> Moved {
    let resumed = Resumed::default();
    Moved { downtime: DowntimeParts::default(), resumed, at: Tick(0), memory: None }
}

/// Every state, in every form that makes a difference.
fn states() -> Vec<State> {
    let watch = || Stopwatch::freeze(Tick(0));
    let failed = failure(Phase::Frozen, Side::Source, Fate::RunningOnSource, "no".to_owned());
    let sent = Some(RoundSent::default());
    vec![
        State::Connecting { dry_run: false },
        State::Negotiating { dry_run: false },
        State::Negotiating { dry_run: true },
        State::Preparing,
        State::CopyingRootfs,
        State::AwaitingRootfs,
        State::OpeningStreams,
        State::Scanning { round: 3 },
        State::SendingRound { round: 3, sent: None, received: false },
        State::SendingRound { round: 3, sent, received: false },
        State::SendingRound { round: 3, sent: None, received: true },
        State::Freezing { watch: watch(), tries: 1 },
        State::Freezing { watch: watch(), tries: FREEZE_TRIES },
        State::Settling { tries: 1 },
        State::Dumping { watch: watch() },
        State::Transferring { watch: watch(), confirmed: false },
        State::AwaitingReceipt { watch: watch(), confirmed: false },
        State::Restoring { watch: watch(), confirmed: false },
        State::Restoring { watch: watch(), confirmed: true },
        State::Confirming { watch: watch() },
        State::Committing { watch: watch() },
        State::Asking { watch: watch() },
        State::Serving { moved: a_move() },
        State::Rejoining { moved: a_move() },
        State::Killing { moved: a_move(), released: false },
        State::Killing { moved: a_move(), released: true },
        State::AwaitingRelease { moved: a_move() },
        State::CleaningUp { moved: a_move() },
        State::Burying { failure: failed.clone() },
        State::RollingBack { failure: failed.clone() },
        State::Done { end: End::Failed(failed) },
    ]
}

fn events() -> Vec<Event> {
    let text = || "why".to_owned();
    let peer = [
        PeerEvent::Accepted(Way::Native),
        PeerEvent::Rejected { detail: text() },
        PeerEvent::Preparing(PreparingStep::Image),
        PeerEvent::Ready,
        PeerEvent::RootfsApplied(Pass::Live),
        PeerEvent::RootfsApplied(Pass::Final),
        PeerEvent::RoundReceived(3),
        PeerEvent::RoundReceived(2),
        PeerEvent::Received,
        PeerEvent::Restored,
        PeerEvent::Resumed(Resumed::default()),
        PeerEvent::MemoryComplete(TargetMemory::default()),
        PeerEvent::Aborted { detail: text() },
        PeerEvent::Nonsense { what: text() },
    ];
    let mut events = vec![
        Event::LinkUp,
        Event::RootfsSent,
        Event::StreamsOpen,
        Event::Scanned { pages: 7, hot_pages: 3 },
        Event::RoundSent(RoundSent::default()),
        Event::Froze,
        Event::Unsettled { cause: text() },
        Event::Dumped,
        Event::Confirmed,
        Event::StateSent,
        Event::Answered(FateAnswer::Here),
        Event::Answered(FateAnswer::Filling),
        Event::Answered(FateAnswer::NotHere),
        Event::Answered(FateAnswer::Pending),
        Event::Answered(FateAnswer::Lost),
        Event::AskFailed { cause: text() },
        Event::Rejoined,
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

/// The row of the table that speaks of this; at most one does.
fn row(given: &Given, state: &State, event: &Event) -> Option<usize> {
    let speaks = |(_, (from, on, guard, ..)): &(usize, &Row)| {
        *from == state.label() && *on == event.label() && given.holds(guard, state, event)
    };
    let mut rows = TRANSITIONS.iter().enumerate().filter(speaks).map(|(index, _)| index);
    let row = rows.next();
    assert_eq!(rows.next(), None, "two rows for {state:?} on {event:?}");
    row
}

#[test]
fn every_state_takes_every_event_as_the_table_says() {
    let mut tried = [false; TRANSITIONS.len()];
    for given in Given::all() {
        for index in 0..states().len() {
            for event in events() {
                let state = states().swap_remove(index);
                let from = state.label();
                let (to, actions) = match row(&given, &state, &event) {
                    Some(row) => {
                        tried[row] = true;
                        (TRANSITIONS[row].3, TRANSITIONS[row].4)
                    }
                    None => rule(from, &event),
                };
                let course = Course::amid(given.way, given.leaves_pages, given.verdict.clone());
                let step = Source { state, course, entered: Tick(0) }.step(event.clone(), Tick(9));
                let taken: Vec<_> = step.actions.iter().map(Action::label).collect();
                assert_eq!((step.state.label(), &taken[..]), (to, actions), "{from} on {event:?}, {given:?}");
            }
        }
    }
    assert_tried(TRANSITIONS, &tried);
}

#[test]
fn no_name_is_left_out_of_the_table() {
    let tested: Vec<_> = states()
        .iter()
        .map(State::label)
        .chain(events().iter().map(Event::label))
        .chain(TRANSITIONS.iter().flat_map(|(.., actions)| *actions).copied())
        .collect();
    let named = include_str!("labels.rs").split('"').skip(1).step_by(2);
    let missing: Vec<_> = named.filter(|name| !tested.contains(name) && *name != "Connect").collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_diagram_in_the_documentation_is_the_table() {
    assert_drawn(include_str!("../source.rs"), TRANSITIONS);
}

#[test]
fn pages_are_left_by_post_copy_and_when_the_policy_says_so() {
    let leaves = |way: Way, verdict: Verdict| {
        let mut course = Course::begin(Settings::default());
        course.take(way);
        if way.has_rounds() {
            course = Course::amid(way, course.leaves_pages(), verdict);
            drop(course.scanned(7, 0, Tick(5)));
        }
        let state = State::Freezing { watch: Stopwatch::freeze(Tick(0)), tries: 1 };
        let step = Source { state, course, entered: Tick(0) }.step(Event::Froze, Tick(9));
        step.actions == [Action::Dump { leave_pages: true }]
    };
    for way in [Way::InImages, Way::Native, Way::Precopy, Way::Postcopy, Way::Hybrid, Way::Auto] {
        assert_eq!(leaves(way, Verdict::SwitchOver), way == Way::Postcopy);
        assert_eq!(leaves(way, Verdict::GoPostcopy), way == Way::Postcopy || way.has_rounds());
    }
}

#[test]
fn a_worker_in_the_place_of_a_dead_one_does_not_kill_what_the_target_may_need() {
    let resolve = || Source::resolve(Tick(0)).state;
    let step = resolve().step(Event::Answered(FateAnswer::Filling), Tick(1));
    assert_eq!(step.actions, [Action::Rejoin { pause: Duration::ZERO, reopen: true }]);
    assert_eq!(step.state.step(Event::Answered(FateAnswer::Here), Tick(2)).actions, [Action::Kill]);
    assert_eq!(resolve().step(Event::Answered(FateAnswer::Here), Tick(1)).actions, [Action::Kill]);
}

#[test]
fn the_target_is_looked_for_at_once_and_then_more_slowly_and_no_more_pages_are_promised_than_can_be_given() {
    let mut source =
        Source { state: State::Serving { moved: a_move() }, course: Course::unknown(), entered: Tick(0) };
    for round in 0..SERVE_TRIES {
        let step = source.step(Event::Failed { cause: "unreadable".to_owned() }, Tick(1));
        let pause = if round == 0 { Duration::ZERO } else { ASK_PAUSE };
        let reopen = round + 1 < SERVE_TRIES;
        assert_eq!(step.actions, [Action::Rejoin { pause, reopen }]);
        source = step.state.step(Event::Rejoined, Tick(2)).state;
    }
}

#[test]
fn what_is_lost_on_the_target_never_goes_on_here() {
    let moved = a_move();
    for state in [State::Rejoining { moved }, State::Asking { watch: Stopwatch::freeze(Tick(0)) }] {
        let source = Source { state, course: Course::unknown(), entered: Tick(0) };
        let step = source.step(Event::Answered(FateAnswer::Lost), Tick(1));
        assert_eq!(step.actions, [Action::Kill]);
        let step = step.state.step(Event::LinkLost { cause: "late".to_owned() }, Tick(2));
        assert_eq!(step.actions, []);
        let step = step.state.step(Event::Killed, Tick(3));
        let Some(End::Failed(failure)) = step.state.end() else { panic!("{step:?}") };
        assert_eq!((failure.fate, failure.side), (Fate::Lost, Side::Target));
    }
}

#[test]
fn the_deadline_counts_from_the_entry_into_the_state() {
    let source = Source::begin(Settings::default(), Tick(5)).state;
    let due = |limit: Duration, from: u64| Some(Tick(from + u64::try_from(limit.as_nanos()).unwrap()));
    assert_eq!(source.deadline(), due(CONNECT_MAX, 5));
    let source = source.step(Event::Froze, Tick(6)).state;
    assert_eq!(source.deadline(), due(CONNECT_MAX, 5));
    let source = source.step(Event::LinkUp, Tick(7)).state;
    assert_eq!(source.deadline(), due(NEGOTIATE_MAX, 7));
}

#[test]
fn the_text_of_a_deadline_names_the_phase_and_the_time() {
    let step = Source::begin(Settings::default(), Tick(0)).state.step(Event::Deadline, Tick(1));
    assert_eq!(
        step.actions,
        [Action::RollBack { tell: Some("connecting took longer than 30 s".to_owned()) }]
    );
}
