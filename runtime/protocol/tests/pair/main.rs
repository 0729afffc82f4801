//! Both machines, an agent and a record in one small world with a clock of its own, and everything that can break.
//!
//! Goal: whatever breaks, at most one side can run the container at any moment; before COMMIT every failure ends
//! with the container running on the source; the source's tasks live as long as a living target lacks a page; and
//! the two sides agree as soon as the agent can be asked.
//! Method: actions take a random time and then answer with an event; frames take a random time and keep their
//! order on their connection; faults strike at the n-th frame, action or happening. Pages are only counted here
//! (`memory_world` moves them). A seed replays exactly.

mod checks;
mod source_side;
mod target_side;
mod world;

use std::time::Duration;

use godwit_protocol::failure::Fate;
use godwit_protocol::fate::FateAnswer;
use godwit_protocol::plan::Way;
use godwit_protocol::report::Tick;
use godwit_protocol::source::{self, Source};
use godwit_protocol::target::STRANDED_MAX;
use proptest::prelude::*;

use world::{Fault, World};

const WAYS: [Way; 6] = [Way::InImages, Way::Native, Way::Precopy, Way::Postcopy, Way::Hybrid, Way::Auto];

fn has_migrated(world: &World) -> bool {
    matches!(world.end, Some(source::End::Migrated(_)))
}

fn fate(world: &World) -> Option<Fate> {
    match &world.end {
        Some(source::End::Failed(failure)) => Some(failure.fate),
        _ => None,
    }
}

fn a_way() -> impl Strategy<Value = Way> {
    proptest::sample::select(&WAYS[..])
}

fn a_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (1..40u8).prop_map(Fault::LinkAtFrame),
        (1..30u8).prop_map(Fault::SourceActionFails),
        (1..20u8).prop_map(Fault::TargetActionFails),
        (1..80u8).prop_map(Fault::SourceDiesAt),
        (1..80u8).prop_map(Fault::TargetDiesAt),
        (1..80u8, 1..400u16).prop_map(|(at, for_s)| Fault::AgentDownFrom(at, for_s)),
        (1..80u8).prop_map(Fault::CancelAt),
        Just(Fault::DumpUntrue),
        (1..40u8).prop_map(Fault::NonsenseAtFrame),
    ]
}

#[test]
fn without_faults_the_container_moves() {
    for way in WAYS {
        for seed in 0..100 {
            let world = World::new(seed, way, vec![]).run();
            // `auto` without post-copy gives up on a program that writes too fast.
            assert!(has_migrated(&world) || way == Way::Auto, "{world:?}");
        }
    }
}

#[test]
fn a_lost_link_is_survived_at_every_frame() {
    for way in WAYS {
        for frame in 1..40 {
            for seed in 0..50 {
                let world = World::new(seed * 2_654_435_761, way, vec![Fault::LinkAtFrame(frame)]).run();
                assert!(world.end.is_some());
            }
        }
    }
}

#[test]
fn a_link_lost_while_pages_are_left_behind_ends_no_migration() {
    let pages_left = |world: &World| world.first_page_frame.is_some();
    for seed in 0..100 {
        let quiet = World::new(seed, Way::Postcopy, vec![]).run();
        assert!(pages_left(&quiet) && has_migrated(&quiet));
        for frame in quiet.first_page_frame.unwrap()..=quiet.frames {
            let fault = Fault::LinkAtFrame(u8::try_from(frame).unwrap());
            let world = World::new(seed, Way::Postcopy, vec![fault]).run();
            assert!(has_migrated(&world), "{world:?}");
        }
    }
}

#[test]
fn what_was_sent_before_the_link_was_lost_decides_where_no_link_is_opened_again() {
    let mut lost = 0;
    for way in WAYS {
        for (frame, seed) in (10..40).flat_map(|frame| (0..50).map(move |seed| (frame, seed))) {
            let world = World::new(seed, way, vec![Fault::LinkAtFrame(frame)]).without_reopening().run();
            let is_lost = fate(&world) == Some(Fate::Lost);
            assert!(!is_lost || world.lacking > 0, "{world:?}");
            assert!(!is_lost || Duration::from_nanos(world.now) < 2 * STRANDED_MAX, "{world:?}");
            lost += u32::from(is_lost);
        }
    }
    assert!(lost > 100, "{lost}");
}

#[test]
fn a_container_that_dies_with_the_targets_worker_is_lost_to_both() {
    let mut lost = 0;
    for way in WAYS {
        for (at, seed) in (20..70).flat_map(|at| (0..50).map(move |seed| (at, seed))) {
            let world = World::new(seed, way, vec![Fault::TargetDiesAt(at)]).run();
            assert_ne!(fate(&world), Some(Fate::Unknown), "{world:?}");
            lost += u32::from(fate(&world) == Some(Fate::Lost));
        }
    }
    assert!(lost > 100, "{lost}");
}

#[test]
fn a_source_that_dies_while_pages_are_left_behind_is_replaced() {
    let mut replaced = 0;
    for at in 20..60 {
        for seed in 0..50 {
            let world = World::new(seed, Way::Postcopy, vec![Fault::SourceDiesAt(at)]).run();
            if world.died_serving {
                replaced += 1;
                assert!(has_migrated(&world), "{world:?}");
            }
        }
    }
    assert!(replaced > 100, "{replaced}");
}

#[test]
fn when_the_answer_is_lost_the_record_is_asked_and_says_here() {
    // The last frame of such a move is the answer to COMMIT.
    let last = World::new(7, Way::InImages, vec![]).run().frames;
    let fault = Fault::LinkAtFrame(u8::try_from(last).unwrap());
    let world = World::new(7, Way::InImages, vec![fault]).run();
    assert!(has_migrated(&world), "{world:?}");
    assert_eq!(world.record.asked(false).answer, FateAnswer::Here);
}

#[test]
fn when_the_word_that_all_pages_have_come_is_lost_the_source_learns_it_by_asking() {
    for seed in 0..100 {
        let last = World::new(seed, Way::Postcopy, vec![]).run().frames;
        let fault = Fault::LinkAtFrame(u8::try_from(last).unwrap());
        let world = World::new(seed, Way::Postcopy, vec![fault]).run();
        assert!(has_migrated(&world), "{world:?}");
        assert!(world.now < 60 * 1_000_000_000, "{world:?}");
    }
}

#[test]
fn while_the_agent_is_away_the_fate_is_unknown_and_later_it_is_known() {
    let last = u8::try_from(World::new(7, Way::InImages, vec![]).run().frames).unwrap();
    let faults = vec![Fault::LinkAtFrame(last), Fault::AgentDownFrom(1, 300)];
    let mut world = World::new(7, Way::InImages, faults).run();
    let Some(source::End::Failed(failure)) = &world.end else { panic!("{world:?}") };
    assert_eq!(failure.fate, Fate::Unknown);
    assert!(world.agent_up, "the agent came back after the worker had given up");
    world.source_life += 1;
    let step = Source::resolve(Tick(world.now));
    world.take_source(step);
    let world = world.run();
    assert!(has_migrated(&world), "{world:?}");
}

/// As many cases as take a second or two; with `GODWIT_FULL` as many as take a minute.
fn cases() -> ProptestConfig {
    let cases = if std::env::var_os("GODWIT_FULL").is_some() { 400_000 } else { 8192 };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn whatever_breaks_exactly_one_side_has_the_container(
        seed in any::<u64>(),
        way in a_way(),
        reopens in any::<bool>(),
        faults in proptest::collection::vec(a_fault(), 0..4),
    ) {
        let world = World::new(seed, way, faults);
        if reopens { world.run() } else { world.without_reopening().run() };
    }
}
