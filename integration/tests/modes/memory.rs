//! Programs that treat memory in every way, each moved in every mode.

use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, skip};
use godwit_protocol::Mode;
use godwit_protocol::report::Report;

use super::claim::{answer, flags_of, move_by, start};
use super::setting::Setting;
use super::storm::Storm;

/// Makes a case of a program and a mode.
macro_rules! moved {
    ($kind:ident by $mode:ident) => {
        Case::new(concat!("every_page_of_", stringify!($kind), "_arrives_by_", stringify!($mode)), |stage| {
            arrives(stage, Storm::of(stringify!($kind)), mode(stringify!($mode)))
        })
    };
}

/// Makes the cases of a program: those of modes named first in every run, the others when everything runs.
macro_rules! in_modes {
    ($($kind:ident: $($now:ident),+; $($later:ident),*.)+) => {
        vec![$($(moved!($kind by $now),)+ $(moved!($kind by $later).slow(),)*)+]
    };
}

/// Makes a case of moving to and fro ten times for each program.
macro_rules! ten_times {
    ($($kind:ident)+) => {
        [$(Case::new(concat!(stringify!($kind), "_goes_to_and_fro_ten_times"), |stage| {
            goes_to_and_fro_ten_times(stage, stringify!($kind))
        }).slow()),+]
    };
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = in_modes! {
        single: native, precopy, postcopy, hybrid, auto; .
        threads: postcopy; native, precopy, hybrid, auto.
        processes: precopy; native, postcopy, hybrid, auto.
        forks: hybrid, precopy; native, postcopy, auto.
        maps: precopy, postcopy; native, hybrid, auto.
        discards: hybrid, precopy; native, postcopy, auto.
        moves: precopy, postcopy; native, hybrid, auto.
        shared: precopy; native, postcopy, hybrid, auto.
        thp: postcopy, precopy; native, hybrid, auto.
        vmas: hybrid; native, precopy, postcopy, auto.
        sparse: postcopy; native, precopy, hybrid, auto.
        stacks: precopy, hybrid; native, postcopy, auto.
    };
    cases.extend([
        case!(huge_pages_arrive_by_precopy).alone(),
        case!(huge_pages_go_to_and_fro_ten_times).alone().slow(),
        case!(a_hundred_thousand_mappings_go_to_and_fro_ten_times).alone().slow(),
        case!(container_goes_to_and_fro_by_every_mode_in_turn),
        case!(program_that_changes_flags_all_the_time_is_moved_at_the_second_attempt),
    ]);
    cases.extend(
        ten_times! { single threads processes forks maps discards moves shared thp vmas sparse stacks },
    );
    cases
}

/// Moves a program while it works, and has it check all of its memory at the target.
fn arrives(stage: &Stage, storm: Storm, mode: Mode) -> Outcome {
    let container = storm.run_on(&stage.a)?;
    let before = storm.counts(&container)?;
    let (moved, report) = move_by(&container, &stage.b, mode)?;
    assert!(report.pages.total > 0);
    if ANONYMOUS.contains(&storm.kind) {
        assert_travelled(&report, mode, before.pages());
    }
    storm.assert_whole(&moved, &before)
}

/// Claims that a program's `pages` pages, all written at every moment, were seen when the mode says.
fn assert_travelled(report: &Report, mode: Mode, pages: u64) {
    let json = serde_json::to_string(report).unwrap_or_default();
    assert!(report.pages.normal >= pages, "it has {pages} pages: {json}");
    if let Some(first) = report.rounds.first() {
        assert!(first.dirty_pages >= pages, "it has {pages} pages, and the first round is of all: {json}");
    }
    if mode == Mode::Postcopy && report.streams > 0 {
        assert!(report.faults.network.count > 0, "its pages were left at the source: {json}");
    }
}

fn huge_pages_arrive_by_precopy(stage: &Stage) -> Outcome {
    with_huge_pages(|storm| arrives(stage, storm, Mode::Precopy))
}

fn huge_pages_go_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    with_huge_pages(|storm| goes_to_and_fro(stage, storm, &ten_times()))
}

/// Runs a case on a program with huge pages, for which there are as many at each end; both ends are here.
fn with_huge_pages(case: impl FnOnce(Storm) -> Outcome) -> Outcome {
    let pool = match Setting::at_least("vm.nr_hugepages", 2 * HUGE_PAGES) {
        Ok(pool) => pool,
        Err(why) => return skip(format!("there are no huge pages: {why}")),
    };
    let outcome = case(Storm { pages: HUGE_PAGES * 512, ..Storm::of("huge") });
    drop(pool);
    outcome
}

fn a_hundred_thousand_mappings_go_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    let storm = Storm { count: 100_000, ..Storm::of("vmas") };
    let limit = match Setting::at_least("vm.max_map_count", 2 * storm.count) {
        Ok(limit) => limit,
        Err(why) => return skip(format!("a process may not have so many mappings: {why}")),
    };
    let outcome = goes_to_and_fro(stage, storm, &ten_times());
    drop(limit);
    outcome
}

/// Memory of two kinds: what changes all the time, and what forks.
fn container_goes_to_and_fro_by_every_mode_in_turn(stage: &Stage) -> Outcome {
    goes_to_and_fro(stage, Storm::of("threads"), &Mode::ALL[..4])
}

/// The flags of a mapping are read before the freeze, and looked at again before the commit. Whether they are the same
/// then is chance here, the first time; from then on they are read in the freeze.
fn program_that_changes_flags_all_the_time_is_moved_at_the_second_attempt(stage: &Stage) -> Outcome {
    let storm = Storm::of("flags");
    let mut place = storm.run_on(&stage.a)?;
    for (turn, mode) in Mode::ALL.into_iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let counts = storm.counts(&place)?;
        let first = start(place.site(), place.id(), &target.host(), mode, flags_of(mode))?;
        let first = answer(first)?;
        if first.text("outcome") == "migrated" {
            place = Container::adopt(target, place.id());
        } else {
            let cause = first.failed()?;
            assert!(cause.contains("changed the flags of its memory"), "{cause}");
            storm.await_passes(&place, &counts, 2)?;
            place = move_by(&place, target, mode)?.0;
        }
        storm.assert_whole(&place, &counts)?;
    }
    Ok(())
}

fn goes_to_and_fro_ten_times(stage: &Stage, kind: &'static str) -> Outcome {
    goes_to_and_fro(stage, Storm::of(kind), &ten_times())
}

/// Returns the modes of going to and fro ten times: each has four of the twenty moves, in another order each time.
pub(super) fn ten_times() -> Vec<Mode> {
    (0..20).map(|turn| Mode::ALL[turn * (1 + turn / 5) % 5]).collect()
}

fn goes_to_and_fro(stage: &Stage, storm: Storm, modes: &[Mode]) -> Outcome {
    let mut place = storm.run_on(&stage.a)?;
    let mut counts = storm.counts(&place)?;
    for (turn, mode) in modes.iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let (moved, _) = move_by(&place, target, *mode)?;
        counts = storm.await_passes(&moved, &counts, 2)?;
        place = moved;
    }
    Ok(())
}

/// Kinds whose memory is private and anonymous, every page of it written before anything else happens.
const ANONYMOUS: [&str; 3] = ["single", "threads", "processes"];
const HUGE_PAGES: u64 = 4;

/// Returns the mode of a name.
fn mode(name: &str) -> Mode {
    Mode::ALL.into_iter().find(|mode| mode.to_string() == name).expect("cases name modes")
}
