//! A program that does random things to its memory, and the plain map that is the oracle.

use std::collections::{BTreeMap, BTreeSet};

use godwit_protocol::wire::pages::{CHUNK_BYTES, PAGE_BYTES};

/// A page: its space and its address.
pub(crate) type Page = (i32, u64);

/// Pages by space.
pub(crate) type Pages = BTreeMap<i32, BTreeSet<u64>>;

/// Contents by space and address; 0 is a page of zeros that is there.
pub(crate) type Memory = BTreeMap<i32, BTreeMap<u64, u64>>;

/// What a program does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    Write(Page, u64),
    Read(Page),
    /// `MADV_DONTNEED`, or `munmap`: the pages read as zeros, or not at all.
    Drop(i32, Vec<u64>),
    /// `mremap`: pages from slots to other slots of the space.
    Move(i32, Vec<(u64, u64)>),
    Fork(i32, i32),
    Exit(i32),
}

/// Random numbers that a seed replays.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn of(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        // Splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    pub(crate) fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        let index = usize::try_from(self.below(all.len().max(1) as u64)).ok()?;
        all.get(index).copied()
    }
}

/// Address of a slot: some neighbours, then the next 2 MiB, so that all streams are used.
fn address(slot: u64) -> u64 {
    0x7f00_0000_0000 + slot / NEIGHBOURS * CHUNK_BYTES + slot % NEIGHBOURS * PAGE_BYTES
}

/// What a program does next to `memory`; `contents` counts what has been written.
pub(crate) fn next(memory: &Memory, random: &mut Random, contents: &mut u64) -> Option<Op> {
    let spaces: Vec<i32> = memory.keys().copied().collect();
    let space = random.one_of(&spaces)?;
    let slot = random.below(SLOTS);
    let some = random.below(5) + 1;
    Some(match random.below(100) {
        0..50 => {
            *contents += 1;
            Op::Write((space, address(slot)), *contents)
        }
        50..58 => Op::Write((space, address(slot)), 0),
        58..75 => Op::Read((space, address(slot))),
        75..85 => Op::Drop(space, (slot..(slot + some).min(SLOTS)).map(address).collect()),
        85..93 => {
            let to = random.below(SLOTS);
            if slot.abs_diff(to) < some || slot.max(to) + some > SLOTS {
                return None;
            }
            Op::Move(space, (0..some).map(|index| (address(slot + index), address(to + index))).collect())
        }
        93..97 if spaces.len() < SPACES_MAX => {
            // Process ids are taken again soon, also those of processes that the target has heard of.
            let child = i32::try_from(random.below(6)).unwrap_or(0) + 1;
            if memory.contains_key(&child) {
                return None;
            }
            Op::Fork(space, child)
        }
        97..99 if spaces.len() > 1 => Op::Exit(space),
        _ => return None,
    })
}

/// Does it to a plain map.
pub(crate) fn apply(memory: &mut Memory, op: &Op) {
    match op {
        Op::Write((space, address), content) => {
            if let Some(pages) = memory.get_mut(space) {
                pages.insert(*address, *content);
            }
        }
        Op::Read(_) => {}
        Op::Drop(space, addresses) => {
            if let Some(pages) = memory.get_mut(space) {
                pages.retain(|address, _| !addresses.contains(address));
            }
        }
        Op::Move(space, moves) => {
            let Some(pages) = memory.get_mut(space) else { return };
            let taken: Vec<_> = moves.iter().map(|(from, to)| (*to, pages.remove(from))).collect();
            for (to, content) in taken {
                pages.remove(&to);
                pages.extend(content.map(|content| (to, content)));
            }
        }
        Op::Fork(parent, child) => {
            if let Some(pages) = memory.get(parent).cloned() {
                memory.insert(*child, pages);
            }
        }
        Op::Exit(space) => drop(memory.remove(space)),
    }
}

/// What a task would read: pages that are not there and pages of zeros are the same to it.
pub(crate) fn read(memory: &Memory, (space, address): Page) -> u64 {
    memory.get(&space).and_then(|pages| pages.get(&address)).copied().unwrap_or(0)
}

/// The same memory, without pages of zeros.
pub(crate) fn seen(memory: &Memory) -> Memory {
    let mut memory = memory.clone();
    for pages in memory.values_mut() {
        pages.retain(|_, content| *content != 0);
    }
    memory
}

/// Slots that lie beside each other.
const NEIGHBOURS: u64 = 6;

/// Slots of a space.
const SLOTS: u64 = 36;

/// Most processes at a time.
const SPACES_MAX: usize = 4;
