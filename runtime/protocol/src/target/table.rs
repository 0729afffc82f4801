//! The target's transitions as a table, the oracle for [`super::Target::step`].

use super::*;

/// State, event, next state, actions. What is not here follows [`rule`].
const TRANSITIONS: &[(&str, &str, &str, &[&str])] = &[
    ("CopyingRootfs", "Applied", "Receiving", &["SendApplied"]),
    ("Receiving", "Complete", "Restoring", &["SendReceived", "Restore"]),
    ("Restoring", "Held", "Holding", &["SendRestored"]),
    ("Holding", "Commit", "Deciding", &["Record"]),
    ("Deciding", "Recorded", "Resuming", &["Resume"]),
    ("Deciding", "Barred", "Aborting", &["Undo"]),
    ("Deciding", "Failed", "Aborting", &["Undo"]),
    ("Resuming", "Running", "Recording", &["Record"]),
    ("Resuming", "Failed", "Aborting", &["Undo"]),
    ("Recording", "Recorded", "Done", &["ReportResumed"]),
    ("Recording", "Barred", "Aborting", &["Undo"]),
    ("Recording", "Failed", "Aborting", &["Undo"]),
    ("Aborting", "Undone", "Done", &["ReportFailed"]),
    ("Aborting", "UndoFailed", "Done", &["ReportFailed"]),
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
        "Complete",
    ];
    if revocable && way_out.contains(&event.label()) { ("Aborting", &["Undo"]) } else { (state, &[]) }
}

/// One state of every kind. The record's answer to `Deciding` is "committed", to `Recording` "resumed".
fn states() -> Vec<(State, Decision)> {
    let failure = || Failure {
        side: Side::Target,
        phase: Phase::Restoring,
        fate: Fate::RunningOnSource,
        cause: "no".to_owned(),
    };
    vec![
        (State::CopyingRootfs, Decision::Committed),
        (State::Receiving { final_applied: true }, Decision::Committed),
        (State::Restoring, Decision::Committed),
        (State::Holding, Decision::Committed),
        (State::Deciding, Decision::Committed),
        (State::Resuming, Decision::Committed),
        (State::Recording { pid: 7 }, Decision::Resumed),
        (State::Aborting { failure: failure() }, Decision::Committed),
        (State::Done { end: End::Failed(failure()) }, Decision::Committed),
    ]
}

fn events(recorded: Decision) -> Vec<Event> {
    let text = || "why".to_owned();
    vec![
        Event::Applied(Pass::Live),
        Event::Applied(Pass::Final),
        Event::Complete,
        Event::Held,
        Event::Commit,
        Event::Recorded(recorded),
        Event::Recorded(Decision::Aborted),
        Event::Running { pid: 7 },
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
    for index in 0..states().len() {
        for event in events(states()[index].1) {
            let state = states().swap_remove(index).0;
            let from = state.label();
            let entry = TRANSITIONS.iter().find(|(state, on, ..)| *state == from && *on == event.label());
            let (to, actions) =
                entry.map_or_else(|| rule(from, &event), |(_, _, to, actions)| (*to, *actions));
            let step = Target { state, entered: Tick(0) }.step(event.clone(), Tick(9));
            let taken: Vec<_> = step.actions.iter().map(Action::label).collect();
            assert_eq!((step.state.label(), &taken[..]), (to, actions), "{from} on {}", event.label());
        }
    }
}

#[test]
fn images_without_the_final_pass_are_refused() {
    let receiving = || Target::begin(Tick(0)).state.step(Event::Applied(Pass::Live), Tick(1)).state;
    assert_eq!(receiving().step(Event::Complete, Tick(2)).state.label(), "Aborting");
    let step = receiving().step(Event::Applied(Pass::Final), Tick(2));
    assert_eq!(step.actions, [Action::SendApplied(Pass::Final)]);
    assert_eq!(step.state.step(Event::Complete, Tick(3)).state.label(), "Restoring");
}

#[test]
fn the_diagram_in_the_documentation_is_the_table() {
    let drawn: Vec<_> = include_str!("../target.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.contains("-->"))
        .collect();
    let listed: Vec<_> =
        TRANSITIONS.iter().map(|(from, event, to, _)| format!("{from} --{event}--> {to}")).collect();
    assert_eq!(drawn, listed);
}
