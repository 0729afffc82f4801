//! The target's transitions as a table, the oracle for [`super::Target::step`].

use super::*;
use crate::transitions::{Row, assert_drawn, assert_tried};

/// State, event, guard, next state, actions. What is not here follows [`rule`].
const TRANSITIONS: &[Row] = &[
    ("CopyingRootfs", "Applied", "", "Receiving", &["SendApplied"]),
    ("Receiving", "RoundComplete", "", "Receiving", &["SendRoundReceived"]),
    ("Receiving", "FinalApplied", "first", "Receiving", &["SendApplied"]),
    ("Receiving", "Complete", "files final", "Restoring", &["SendReceived", "Restore"]),
    ("Restoring", "Held", "", "Holding", &["SendRestored"]),
    ("Holding", "Commit", "", "Deciding", &["Record"]),
    ("Deciding", "Recorded", "", "Resuming", &["Resume"]),
    ("Deciding", "Barred", "", "Aborting", &["Undo"]),
    ("Deciding", "Failed", "", "Aborting", &["Undo"]),
    ("Resuming", "Running", "", "Recording", &["Record"]),
    ("Resuming", "Failed", "", "Aborting", &["Undo"]),
    ("Recording", "Recorded", "in images", "Done", &["ReportResumed"]),
    ("Recording", "Recorded", "ours", "Filling", &["ReportResumed"]),
    ("Recording", "Recorded", "filled", "Done", &["ReportResumed", "Record", "ReportFilled"]),
    ("Recording", "Recorded", "link lost", "Stranded", &["ReportResumed", "DropLink"]),
    ("Recording", "Barred", "", "Aborting", &["Undo"]),
    ("Recording", "Failed", "", "Aborting", &["Undo"]),
    ("Filling", "Filled", "", "Done", &["Record", "ReportFilled"]),
    ("Filling", "Failed", "", "Aborting", &["Destroy"]),
    ("Filling", "LinkLost", "pages lacking", "Stranded", &["DropLink"]),
    ("Filling", "Abort", "pages lacking", "Stranded", &["DropLink"]),
    ("Filling", "Nonsense", "pages lacking", "Stranded", &["DropLink"]),
    ("Filling", "Rejoined", "", "Filling", &["SendLacking"]),
    ("Stranded", "Filled", "", "Done", &["Record", "ReportFilled"]),
    ("Stranded", "Arrived", "", "Filling", &[]),
    ("Stranded", "Failed", "", "Aborting", &["Destroy"]),
    ("Stranded", "Rejoined", "", "Filling", &["SendLacking"]),
    ("Stranded", "Deadline", "", "Aborting", &["Destroy"]),
    ("Aborting", "Undone", "", "Done", &["ReportFailed"]),
    ("Aborting", "UndoFailed", "", "Done", &["ReportFailed"]),
];

/// The rules of the module's documentation for what is not in the table.
fn rule(state: &'static str, event: &Event) -> (&'static str, &'static [&'static str]) {
    let revocable = ["CopyingRootfs", "Receiving", "Restoring", "Holding"].contains(&state);
    let way_out = [
        "Failed",
        "LinkLost",
        "Abort",
        "Nonsense",
        "Deadline",
        "Commit",
        "Applied",
        "FinalApplied",
        "RoundComplete",
        "Complete",
    ];
    if revocable && way_out.contains(&event.label()) { ("Aborting", &["Undo"]) } else { (state, &[]) }
}

fn holds(guard: &str, state: &State, pages: Pages) -> bool {
    let Pages { fills, arrived } = pages;
    let stranded = early(state) == Some(Early { filled: None, link_lost: true }) && !arrived;
    match guard {
        "" => true,
        "in images" => !fills,
        "ours" => fills && early(state).is_some_and(|early| early.filled.is_none()) && !stranded,
        "filled" => fills && early(state).is_some_and(|early| early.filled.is_some()),
        "link lost" => fills && stranded,
        "pages lacking" => !arrived,
        "first" => matches!(state, State::Receiving { final_applied: false }),
        "files final" => matches!(state, State::Receiving { final_applied: true }),
        other => panic!("nobody knows when [{other}] holds"),
    }
}

fn early(state: &State) -> Option<Early> {
    match state {
        State::Recording { early, .. } => Some(early.clone()),
        _ => None,
    }
}

/// Every state, in every form that makes a difference.
fn states() -> Vec<State> {
    let failure = || Failure {
        side: Side::Target,
        phase: Phase::Restoring,
        fate: Fate::RunningOnSource,
        cause: "no".to_owned(),
    };
    let early = Early::default;
    let filled = || Some(TargetMemory::default());
    vec![
        State::CopyingRootfs,
        State::Receiving { final_applied: false },
        State::Receiving { final_applied: true },
        State::Restoring,
        State::Holding,
        State::Deciding { early: early() },
        State::Resuming { early: early() },
        State::Recording { pid: 7, early: early() },
        State::Recording { pid: 7, early: Early { filled: filled(), ..early() } },
        State::Recording { pid: 7, early: Early { link_lost: true, ..early() } },
        State::Recording { pid: 7, early: Early { link_lost: true, filled: filled() } },
        State::Filling { pid: 7 },
        State::Stranded { pid: 7 },
        State::Aborting { failure: failure() },
        State::Done { end: End::Failed(failure()) },
    ]
}

/// What the record holds after the step that was asked for in `state`.
fn recorded(state: &State, Pages { fills, .. }: Pages) -> Decision {
    match state {
        State::Recording { .. } if fills => Decision::Filling,
        State::Recording { .. } => Decision::Resumed,
        _ => Decision::Committed,
    }
}

fn events(recorded: Decision) -> Vec<Event> {
    let text = || "why".to_owned();
    vec![
        Event::Applied(Pass::Live),
        Event::Applied(Pass::Final),
        Event::RoundComplete(3),
        Event::Complete,
        Event::Held,
        Event::Commit,
        Event::Recorded(recorded),
        Event::Recorded(Decision::Aborted),
        Event::Running { pid: 7 },
        Event::Arrived,
        Event::Filled(TargetMemory::default()),
        Event::Rejoined,
        Event::Undone,
        Event::UndoFailed { cause: text() },
        Event::Failed { cause: text() },
        Event::Abort { detail: text() },
        Event::Nonsense { what: text() },
        Event::LinkLost { cause: text() },
        Event::Deadline,
    ]
}

#[test]
fn every_state_takes_every_event_as_the_table_says() {
    let mut tried = [false; TRANSITIONS.len()];
    let every = [(false, false), (false, true), (true, false), (true, true)];
    let every = every.map(|(fills, arrived)| Pages { fills, arrived });
    for (pages, index) in every.into_iter().flat_map(|pages| (0..states().len()).map(move |i| (pages, i))) {
        for event in events(recorded(&states()[index], pages)) {
            let state = states().swap_remove(index);
            let from = state.label();
            let speaks = |&row: &usize| {
                let (of, on, guard, ..) = TRANSITIONS[row];
                of == from && on == event.label() && holds(guard, &state, pages)
            };
            let rows: Vec<_> = (0..TRANSITIONS.len()).filter(speaks).collect();
            assert!(rows.len() <= 1, "two rows for {state:?} on {event:?}");
            rows.iter().for_each(|row| tried[*row] = true);
            let row = rows.first().map(|row| TRANSITIONS[*row]);
            let (to, actions) = row.map_or_else(|| rule(from, &event), |(.., to, actions)| (to, actions));
            let step = Target { state, pages, entered: Tick(0) }.step(event.clone(), Tick(9));
            let taken: Vec<_> = step.actions.iter().map(Action::label).collect();
            assert_eq!((step.state.label(), &taken[..]), (to, actions), "{from} on {event:?}, {pages:?}");
        }
    }
    assert_tried(TRANSITIONS, &tried);
}

#[test]
fn no_name_is_left_out_of_the_table() {
    let tested: Vec<_> = states()
        .iter()
        .map(State::label)
        .chain(events(Decision::Committed).iter().map(Event::label))
        .chain(TRANSITIONS.iter().flat_map(|(.., actions)| *actions).copied())
        .collect();
    let arms = include_str!("../target.rs").lines().filter_map(|line| line.trim().split_once(" => \""));
    let missing: Vec<_> = arms
        .filter_map(|(_, name)| name.strip_suffix("\","))
        .filter(|name| !tested.contains(name) && *name != "SendReady")
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_diagram_in_the_documentation_is_the_table() {
    assert_drawn(include_str!("../target.rs"), TRANSITIONS);
}

#[test]
fn the_record_says_filling_until_the_last_page_is_in_its_task() {
    for (fills, decision) in [(false, Decision::Resumed), (true, Decision::Filling)] {
        let state = State::Resuming { early: Early::default() };
        let pages = Pages { fills, arrived: false };
        let target = Target { state, pages, entered: Tick(0) };
        let step = target.step(Event::Running { pid: 7 }, Tick(1));
        assert_eq!(step.actions, [Action::Record(decision)]);
    }
    let target = Target { state: State::Filling { pid: 7 }, pages: FILLS, entered: Tick(0) };
    let step = target.step(Event::Filled(TargetMemory::default()), Tick(1));
    assert_eq!(step.actions[0], Action::Record(Decision::Resumed));
    assert_eq!(step.state.end(), Some(&End::Resumed { pid: 7 }));
}

#[test]
fn every_round_has_its_time() {
    let target = Target::begin(true, Tick(0)).state.step(Event::Applied(Pass::Live), Tick(1)).state;
    let due = |from: u64| Some(Tick(from + u64::try_from(RECEIVE_MAX.as_nanos()).unwrap()));
    assert_eq!(target.deadline(), due(1));
    let target = target.step(Event::RoundComplete(0), Tick(2)).state;
    assert_eq!(target.deadline(), due(2));
    let target = target.step(Event::Applied(Pass::Final), Tick(3)).state;
    assert_eq!(target.deadline(), due(2));
}

#[test]
fn what_comes_before_the_record_is_written_is_not_forgotten() {
    let resuming =
        || Target { state: State::Resuming { early: Early::default() }, pages: FILLS, entered: Tick(0) };
    let end = |early: Event| {
        let target = resuming().step(early, Tick(1)).state.step(Event::Running { pid: 7 }, Tick(2)).state;
        target.step(Event::Recorded(Decision::Filling), Tick(3)).state.label()
    };
    assert_eq!(end(Event::Filled(TargetMemory::default())), "Done");
    assert_eq!(end(Event::LinkLost { cause: "gone".to_owned() }), "Stranded");
    assert_eq!(end(Event::Held), "Filling");
}

#[test]
fn a_target_that_has_every_page_needs_no_link() {
    let target = Target { state: State::Filling { pid: 7 }, pages: FILLS, entered: Tick(0) };
    let target = target.step(Event::Arrived, Tick(1)).state;
    let target = target.step(Event::LinkLost { cause: "gone".to_owned() }, Tick(2)).state;
    assert_eq!((target.label(), target.deadline()), ("Filling", None));
}

const FILLS: Pages = Pages { fills: true, arrived: false };
