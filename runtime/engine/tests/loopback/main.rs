//! Both workers, an agent and a wire that can be cut, in one process: the container and CRIU are pretended.
//!
//! Goal: wherever the connection breaks, and whatever is refused, exactly one side ends up with the container, the
//! report or failure says which, and both trees hold what they should.
//! Method: bytes go through a proxy that cuts the connection after a given number of them in either direction.
//!
//! Needs root, because images live in a tmpfs.

#![expect(clippy::unwrap_used, reason = "a test world that cannot be set up ends the test")]

mod pretend;
mod restore;
mod world;

use godwit_protocol::failure::{Fate, Side};
use godwit_protocol::phase::Phase;
use godwit_protocol::report::Outcome;
use godwit_protocol::source::End;
use godwit_protocol::worker::Event;

use crate::pretend::{DumpFailure, LAST_FILE, Tasks};
use crate::world::{Direction, Plan, World};

fn may_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIP needs root: images live in a tmpfs");
    }
    root
}

#[test]
fn a_container_moves_with_its_files_and_pages() {
    if !may_run() {
        return;
    }
    let mut world = World::new(Plan::default());
    let end = world.migrate();
    assert!(matches!(end, End::Migrated(_)), "{end:?}");
    assert_eq!(world.tasks(), (Tasks::Gone, Tasks::Running));
    assert_eq!(world.file_on_target("live"), b"written before");
    assert_eq!(world.file_on_target("final"), LAST_FILE);
    assert!(world.pages_match());
    assert!(world.cleaned_up());

    let report = world.report().unwrap();
    assert_eq!((report.outcome, report.fate), (Outcome::Migrated, Fate::RunningOnTarget));
    assert!((report.downtime.total_ms() - report.downtime_ms).abs() < 1.0);
    assert_eq!(report.pages.total, world.page_bytes() / 4096);
    assert_eq!(report.bytes.memory, world.page_bytes());
    assert!(report.bytes.wire > report.bytes.memory + report.bytes.rootfs);
    assert!(report.total_ms >= report.downtime_ms);
}

#[test]
fn the_commit_is_announced_before_it_is_made_and_phases_come_in_order() {
    if !may_run() {
        return;
    }
    let mut world = World::new(Plan::default());
    world.migrate();
    let events = world.events();
    let committing = events.iter().position(|event| matches!(event, Event::Committing)).unwrap();
    let committed = events.iter().position(|event| matches!(event, Event::Committed { .. })).unwrap();
    assert!(committing < committed);
    let phases: Vec<Phase> = events
        .iter()
        .filter_map(|event| match event {
            Event::Progress { snapshot } => Some(snapshot.phase),
            _ => None,
        })
        .collect();
    assert!(phases.is_sorted(), "{phases:?}");
    assert_eq!(phases.first(), Some(&Phase::Connecting));
}

#[test]
fn a_dry_run_leaves_everything_as_it_is() {
    if !may_run() {
        return;
    }
    let mut world = World::new(Plan { dry_run: true, ..Plan::default() });
    assert_eq!(world.migrate(), End::Checked);
    assert_eq!(world.tasks(), (Tasks::Running, Tasks::Gone));
    assert!(!world.cleaned_up());
    assert_eq!(world.report().unwrap().outcome, Outcome::Checked);
}

#[test]
fn a_refused_offer_names_its_reason() {
    if !may_run() {
        return;
    }
    let mut world = World::new(Plan { reject: Some("the name is taken"), ..Plan::default() });
    let failure = world.fail();
    assert_eq!(failure.cause, "the name is taken");
    assert_eq!((failure.side, failure.phase), (Side::Target, Phase::Negotiating));
    world.check(failure.fate);
}

#[test]
fn a_freeze_that_finds_something_under_way_is_tried_again() {
    if !may_run() {
        return;
    }
    let mut world = World::new(Plan { unsettled: 3, ..Plan::default() });
    assert!(matches!(world.migrate(), End::Migrated(_)));
    world.check(Fate::RunningOnTarget);
}

#[test]
fn what_never_settles_leaves_the_container_on_the_source() {
    if !may_run() {
        return;
    }
    let mut world = World::new(Plan { unsettled: u32::MAX, ..Plan::default() });
    let failure = world.fail();
    assert!(failure.cause.contains("something is under way"), "{failure}");
    assert_eq!((failure.side, failure.phase), (Side::Source, Phase::Frozen));
    world.check(failure.fate);
}

#[test]
fn a_failed_dump_or_restore_leaves_the_container_on_the_source() {
    if !may_run() {
        return;
    }
    for (fails, cause) in [
        (DumpFailure::Before, "a pretended dump failed"),
        (DumpFailure::Behind, "a pretended task had changed"),
    ] {
        let mut world = World::new(Plan { dump_fails: Some(fails), ..Plan::default() });
        let failure = world.fail();
        assert!(failure.cause.contains(cause), "{failure}");
        assert_eq!((failure.side, failure.fate), (Side::Source, Fate::RunningOnSource));
        world.check(failure.fate);
    }

    let mut world = World::new(Plan { restore_fails: true, ..Plan::default() });
    let failure = world.fail();
    assert!(failure.cause.contains("pretended restore"), "{failure}");
    assert_eq!((failure.side, failure.fate), (Side::Target, Fate::RunningOnSource));
    world.check(failure.fate);
}

#[test]
fn a_cancelled_migration_goes_back() {
    if !may_run() {
        return;
    }
    for at in [Phase::Preparing, Phase::CopyingRootfs, Phase::Frozen, Phase::Restoring] {
        let mut world = World::new(Plan { cancel_at: Some(at), ..Plan::default() });
        let failure = world.fail();
        assert!(failure.cause.contains("cancelled"), "{at}: {failure}");
        world.check(failure.fate);
    }
}

#[test]
fn wherever_the_wire_is_cut_exactly_one_side_has_the_container() {
    if !may_run() {
        return;
    }
    let whole = World::measure();
    let mut fates = [0, 0];
    for (direction, bytes) in [(Direction::ToTarget, whole.0), (Direction::ToSource, whole.1)] {
        // Every byte of the last frames counts; before them a cut here and there will do.
        let dense = bytes.saturating_sub(90)..=bytes;
        let sparse = (0..bytes).step_by(usize::try_from(bytes / 24).unwrap().max(7));
        for at in sparse.chain(dense.step_by(6)) {
            let mut world = World::new(Plan { cut: Some((direction, at)), ..Plan::default() });
            let fate = match world.migrate() {
                End::Migrated(_) => Fate::RunningOnTarget,
                End::Failed(failure) => failure.fate,
                End::Checked => unreachable!("no dry run"),
            };
            world.check(fate);
            fates[usize::from(fate == Fate::RunningOnTarget)] += 1;
        }
    }
    // The question about the fate has both answers.
    assert!(fates.iter().all(|count| *count > 0), "{fates:?}");
}
