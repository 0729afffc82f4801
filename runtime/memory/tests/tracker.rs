//! One conformance suite for every tracker: a receiver that does what a tracker says holds what the processes
//! hold, whatever they did.
//!
//! The world under a tracker is either this kernel with children that do as they are told, or a simulated
//! kernel with soft-dirty bits. Actions are drawn at random from a seed, which a failure prints.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "tracker/real.rs"]
mod real;

#[path = "tracker/simulated.rs"]
mod simulated;

use std::collections::BTreeMap;
use std::time::Duration;

use godwit_memory::tracker::{Collection, Procfs, SoftDirtyTracker, WpAsyncTracker};
use godwit_memory::{MemoryError, PAGE_BYTES, PageRange, PageSet};

/// What a process can do to its memory. Maps are numbered in order of their making.
#[derive(Debug, Clone, Copy)]
enum Action {
    Map {
        pages: u64,
    },
    Write {
        map: usize,
        page: u64,
        value: u64,
    },
    Read {
        map: usize,
        page: u64,
    },
    Drop {
        map: usize,
        page: u64,
        count: u64,
    },
    Unmap {
        map: usize,
    },
    Move {
        map: usize,
    },
    Forbid {
        map: usize,
        page: u64,
        count: u64,
    },
    Huge {
        map: usize,
    },
    /// The child writes `value` to the first page of each map and does nothing more.
    Fork {
        value: u64,
    },
    /// The last child ends.
    Exit,
    /// The process begins anew with nothing.
    Exec,
}

/// Processes whose memory is followed.
trait World {
    /// Does something; what is impossible now is passed over.
    fn act(&mut self, action: Action);
    /// The processes that are alive.
    fn processes(&self) -> Vec<i32>;
    /// The contents of pages, in order; a page that is not there is `None`.
    fn read(&mut self, pid: i32, pages: &PageSet) -> Vec<(u64, Option<u64>)>;
    /// The pages that are there and not known to be zero.
    fn present(&mut self, pid: i32) -> PageSet;
    /// One collection; a `frozen` one is the last.
    fn collect(&mut self, frozen: bool) -> Collection;
}

/// What a receiver holds: a digest per page; 0 stands for zeros.
#[derive(Default)]
struct Receiver {
    pages: BTreeMap<(i32, u64), u64>,
}

impl Receiver {
    fn receive(&mut self, world: &mut impl World, frozen: bool) -> Collection {
        let collection = world.collect(frozen);
        for pid in &collection.gone {
            self.pages.retain(|(owner, _), _| owner != pid);
        }
        for delta in &collection.deltas {
            assert!(delta.dirty.intersection(&delta.zero).is_empty());
            assert!(delta.dirty.union(&delta.zero).intersection(&delta.absent).is_empty());
            for page in single(&delta.absent) {
                self.pages.remove(&(delta.pid, page));
            }
            for page in single(&delta.zero) {
                self.pages.insert((delta.pid, page), 0);
            }
            for (page, contents) in world.read(delta.pid, &delta.dirty) {
                match contents {
                    Some(digest) => self.pages.insert((delta.pid, page), digest),
                    None => self.pages.remove(&(delta.pid, page)),
                };
            }
        }
        collection
    }

    /// Compares with a world in which nothing ran since the last collection.
    fn assert_equals(&self, world: &mut impl World, context: &str) {
        for pid in world.processes() {
            let there = world.present(pid);
            let held: PageSet = self
                .pages
                .range((pid, 0)..=(pid, u64::MAX))
                .map(|((_, page), _)| PageRange::page_at(*page))
                .collect();
            for (page, contents) in world.read(pid, &there.union(&held)) {
                let contents = contents.unwrap_or(0);
                let held = self.pages.get(&(pid, page)).copied().unwrap_or(0);
                assert_eq!(held, contents, "{context}: process {pid}, page {page:x}");
            }
        }
    }
}

fn single(pages: &PageSet) -> impl Iterator<Item = u64> {
    pages.ranges().iter().flat_map(|range| range.chunks(1)).map(PageRange::start)
}

/// A sequence that depends on its seed only.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn action(&mut self) -> Action {
        let map = usize::try_from(self.below(6)).unwrap();
        let (page, count) = (self.below(24), self.below(6) + 1);
        match self.below(40) {
            0..=2 => Action::Map { pages: [1, 8, 24, 1100][usize::try_from(self.below(4)).unwrap()] },
            3..=18 => Action::Write { map, page, value: self.below(1 << 30) + 1 },
            19..=23 => Action::Read { map, page },
            24..=27 => Action::Drop { map, page, count },
            28 => Action::Unmap { map },
            29..=30 => Action::Move { map },
            31 => Action::Forbid { map, page, count },
            32 => Action::Huge { map },
            33..=34 => Action::Fork { value: self.below(1 << 30) + 1 },
            35 => Action::Exit,
            36 if self.below(3) == 0 => Action::Exec,
            _ => Action::Write { map, page, value: 0 },
        }
    }
}

/// The suite: what every tracker must keep.
fn conformance<W: World>(mut make: impl FnMut() -> W, seeds: std::ops::Range<u64>) {
    writes_are_reported_once(&mut make());
    for seed in seeds {
        let mut world = make();
        let (mut random, mut receiver) = (Random(seed), Receiver::default());
        world.act(Action::Map { pages: 24 });
        for round in 0..12 {
            for _ in 0..random.below(16) {
                world.act(random.action());
            }
            let is_last = round == 11;
            let collection = receiver.receive(&mut world, is_last);
            if is_last {
                // A process that is frozen cannot be armed, and nobody may wait for it.
                assert!(collection.armed.stopped.is_empty() && collection.armed.untracked.is_empty());
            } else if !collection.armed.stopped.is_empty() {
                // Who was stopped to be armed ran on afterwards, maybe while its pages were read, and wherever a
                // process enters user space the kernel may write to its memory (rseq).
                receiver.receive(&mut world, false);
            }
            receiver.assert_equals(&mut world, &format!("seed {seed}, round {round}"));
        }
    }
}

fn writes_are_reported_once(world: &mut impl World) {
    world.act(Action::Map { pages: 64 });
    for page in 0..64 {
        world.act(Action::Write { map: 0, page, value: page + 1 });
    }
    let mut receiver = Receiver::default();
    receiver.receive(world, false);
    // The process itself needs a few pages to do what it is told.
    let quiet = receiver.receive(world, false);
    let reported: u64 = quiet.deltas.iter().map(|delta| delta.dirty.pages() + delta.untracked_pages).sum();
    assert!(reported < 32, "{reported} pages in a quiet round");
    for page in [3, 4, 40] {
        world.act(Action::Write { map: 0, page, value: 1000 + page });
    }
    let busy = receiver.receive(world, false);
    let reported: u64 = busy.deltas.iter().map(|delta| delta.dirty.pages()).sum();
    assert!((3..35).contains(&reported), "{reported} pages after three writes");
    receiver.assert_equals(world, "three writes");
}

#[test]
fn soft_dirty_over_a_simulated_kernel_conforms() {
    conformance(simulated::Simulated::new, 0..300);
}

#[test]
fn wp_async_over_this_kernel_conforms() {
    if let Err(error) = WpAsyncTracker::new(STOP_LIMIT) {
        eprintln!("SKIP: {error}");
        return;
    }
    let make = || real::Children::new(Box::new(WpAsyncTracker::new(STOP_LIMIT).unwrap()));
    conformance(make, 0..40);
}

#[test]
fn soft_dirty_over_this_kernel_conforms() {
    // The children wait for orders, so there is nothing to halt.
    let halt = || Ok::<(), MemoryError>(());
    if let Err(error) = Procfs::new(halt) {
        eprintln!("SKIP: {error}");
        return;
    }
    let make = || real::Children::new(Box::new(SoftDirtyTracker::new(Procfs::new(halt).unwrap())));
    conformance(make, 0..40);
}

#[test]
fn a_process_stops_only_to_be_injected_and_a_scan_is_short() {
    if let Err(error) = WpAsyncTracker::new(STOP_LIMIT) {
        eprintln!("SKIP: {error}");
        return;
    }
    let mut world = real::Children::new(Box::new(WpAsyncTracker::new(STOP_LIMIT).unwrap()));
    let pages = 64 << 20 >> 12;
    world.act(Action::Map { pages });
    for page in 0..pages {
        world.act(Action::Write { map: 0, page, value: 1 });
    }
    let first = world.collect(false);
    assert_eq!(first.armed.stopped.len(), 1);
    let second = world.collect(false);
    assert!(second.armed.stopped.is_empty(), "stopped once");
    println!(
        "stop {:?}, first scan {:?}, second scan {:?} for 64 MiB",
        first.armed.stopped[0].1, first.scan, second.scan
    );
    assert!(second.scan < Duration::from_millis(50));
    assert_eq!(PAGE_BYTES * pages, 64 << 20);
}

const STOP_LIMIT: Duration = Duration::from_millis(500);
