//! Memory that moves while a program writes to it, over several streams, with the machines and messages of the wire.
//!
//! Goal: whatever the program does and whenever the link breaks, the target's memory is what the source's was when it
//! froze, and what the program wrote since; every page comes once after its last version was read, never as an old
//! copy; and no page that a task may still need is lost with the source.
//! Method: a world with a clock of its own (`world`). The source (`sending`, `tracker`) and the target (`receiving`,
//! `tasks`) are models of what the engine does; messages, streams of pages, machines and policy are the real ones.
//! A program does random things to its memory on both hosts in turn; the oracle is a plain map that the same things
//! are done to. A seed is a whole history: it is printed when it fails, and replays exactly with `GODWIT_SEED`.

mod link;
mod program;
mod receiving;
mod sending;
mod source_side;
mod target_side;
mod tasks;
mod tracker;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use godwit_protocol::plan::Way;
use godwit_protocol::source;

use world::World;

/// What came of some histories, to see that they were worth trying.
#[derive(Debug, Default)]
struct Seen {
    migrated: u64,
    failed: u64,
    rejoined: u64,
    requests: u64,
    unneeded: u64,
    rounds: u64,
}

fn try_seed(seed: u64, seen: &mut Seen) {
    let ran = catch_unwind(AssertUnwindSafe(|| World::of_seed(seed).run()));
    let world = ran.unwrap_or_else(|panic| {
        eprintln!("it was seed {seed}: GODWIT_SEED={seed} replays it");
        resume_unwind(panic)
    });
    match &world.end {
        Some(source::End::Migrated(_)) => seen.migrated += 1,
        _ => seen.failed += 1,
    }
    seen.rejoined += u64::from(world.rejoined);
    seen.requests += world.requests;
    seen.unneeded += world.unneeded;
    seen.rounds += world.rounds;
}

#[test]
fn the_targets_memory_is_the_sources_at_the_freeze() {
    let mut seen = Seen::default();
    if let Some(seed) = std::env::var("GODWIT_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return try_seed(seed, &mut seen);
    }
    let count = if std::env::var_os("GODWIT_FULL").is_some() { 100_000 } else { 4_000 };
    for seed in 0..count {
        try_seed(seed, &mut seen);
    }
    println!("{seen:?}");
    // Otherwise nothing was shown.
    assert!(seen.migrated > count / 3 && seen.failed > count / 20, "{seen:?}");
    assert!(seen.rejoined > count / 50 && seen.requests > count, "{seen:?}");
    assert!(seen.unneeded > count / 50 && seen.rounds > count, "{seen:?}");
}

#[test]
fn without_faults_every_way_moves_a_program_that_writes() {
    for way in world::WAYS {
        for seed in 0..100 {
            let world = World::new(seed, way, vec![]).run();
            assert!(
                matches!(world.end, Some(source::End::Migrated(_))) || way == Way::Auto,
                "{way:?} {seed}"
            );
            assert_eq!(world.rejoined, 0);
        }
    }
}
