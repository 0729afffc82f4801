use std::collections::BTreeMap as Oracle;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Claim {
        page: u64,
        count: u64,
        installed: u64,
    },
    Next {
        cursor: u64,
        count: u64,
    },
    Request {
        page: u64,
        window: u64,
    },
    MarkRequested {
        page: u64,
        count: u64,
    },
    Arrive {
        page: u64,
        count: u64,
    },
    Bring {
        page: u64,
        count: u64,
        installed: u64,
    },
    Drop {
        page: u64,
        count: u64,
    },
    Unmap {
        page: u64,
        count: u64,
    },
    Remap {
        page: u64,
        count: u64,
        to: u64,
    },
    /// Away, and back.
    Return {
        page: u64,
        count: u64,
    },
    Fork,
}

fn step() -> impl Strategy<Value = Step> {
    let (page, count) = (0_u64..80, 1_u64..12);
    prop_oneof![
        3 => (page.clone(), count.clone(), 0_u64..12)
            .prop_map(|(page, count, installed)| Step::Claim { page, count, installed }),
        3 => (page.clone(), count.clone()).prop_map(|(cursor, count)| Step::Next { cursor, count }),
        2 => (page.clone(), 1_u64..9).prop_map(|(page, window)| Step::Request { page, window }),
        1 => (page.clone(), count.clone()).prop_map(|(page, count)| Step::MarkRequested { page, count }),
        3 => (page.clone(), count.clone()).prop_map(|(page, count)| Step::Arrive { page, count }),
        3 => (page.clone(), count.clone(), 0_u64..12)
            .prop_map(|(page, count, installed)| Step::Bring { page, count, installed }),
        1 => (page.clone(), count.clone()).prop_map(|(page, count)| Step::Drop { page, count }),
        1 => (page.clone(), count.clone()).prop_map(|(page, count)| Step::Unmap { page, count }),
        2 => (page.clone(), count.clone()).prop_map(|(page, count)| Step::Return { page, count }),
        2 => (page, count, 100_u64..140).prop_map(|(page, count, to)| Step::Remap { page, count, to }),
        1 => Just(Step::Fork),
    ]
}

fn pages(page: u64, count: u64) -> PageRange {
    PageRange::new(page * PAGE_BYTES, (page + count) * PAGE_BYTES).unwrap()
}

/// Per page: where it is at the source, and its state.
type Naive = Oracle<u64, (u64, State)>;

fn held(naive: &Naive) -> u64 {
    naive.values().filter(|(_, state)| *state == State::Held).count() as u64
}

fn remote(naive: &Naive) -> u64 {
    naive.values().filter(|(_, state)| is_remote(*state)).count() as u64
}

fn is_remote(state: State) -> bool {
    matches!(state, State::Remote | State::Requested)
}

fn lacking(naive: &Naive) -> Lacking {
    let such = |such: fn(State) -> bool| -> PageSet {
        let mut origins: Vec<u64> =
            naive.values().filter(|(_, state)| such(*state)).map(|(origin, _)| *origin).collect();
        origins.sort_unstable();
        origins.into_iter().map(|origin| pages(origin, 1)).collect()
    };
    Lacking { pages: such(is_remote), requested: such(|state| state == State::Requested) }
}

fn release(naive: &mut Naive, page: u64, count: u64) -> Vec<u64> {
    let gone = (page..page + count).filter_map(|page| naive.get(&page));
    gone.filter(|(_, state)| *state == State::Held).map(|(origin, _)| *origin).collect()
}

fn settle(ledger: &Ledger, naive: &mut Naive, claim: Option<Claim>, installed: u64, required: bool) {
    let Some(claim) = claim else {
        assert!(!required);
        return;
    };
    let first = claim.pages.start() / PAGE_BYTES;
    for index in 0..claim.pages.pages() {
        let (origin, state) = naive[&(first + index)];
        assert_eq!((origin, state), (claim.origin / PAGE_BYTES + index, State::Held));
        assert_eq!(ledger.state(claim.pages.start() + index * PAGE_BYTES), State::Busy);
        if index < installed {
            naive.insert(first + index, (origin, State::Installed));
        }
    }
    ledger.settle(claim, installed.min(claim.pages.pages()));
}

fn numbers(ranges: &[PageRange]) -> Vec<u64> {
    ranges.iter().flat_map(|range| range.chunks(1)).map(|page| page.start() / PAGE_BYTES).collect()
}

fn request(ledger: &Ledger, naive: &mut Naive, page: u64, window: u64) {
    let wanted = numbers(ledger.request(page * PAGE_BYTES, window).as_slice());
    let mut expected = Vec::new();
    if let Some((origin, state)) = naive.get(&page).copied() {
        // Pages of the block that are reached without a gap, here as at the source.
        let adjacent = |to: &u64| {
            let shift = |at: u64| (origin + at).checked_sub(page);
            let range = page.min(*to)..=page.max(*to);
            range.into_iter().all(|at| naive.get(&at).is_some_and(|entry| Some(entry.0) == shift(at)))
        };
        let first = (origin / window * window + page).saturating_sub(origin);
        let block = (first..first + window).filter(|at| (origin + at - page) / window == origin / window);
        let near = block.filter(adjacent).filter(|at| naive[at].1 == State::Remote);
        expected = near.map(|at| naive[&at].0).collect();
        assert!(state != State::Remote || wanted.contains(&origin));
    }
    // Segments may end where pages are adjacent all the same, so fewer may be asked for.
    assert!(wanted.iter().all(|origin| expected.contains(origin)), "{wanted:?} of {expected:?}");
    for entry in naive.values_mut().filter(|entry| wanted.contains(&entry.0)) {
        entry.1 = State::Requested;
    }
}

/// Pages arrive, and so many of each claim are installed at once.
fn bring(ledger: &Ledger, naive: &mut Naive, origin: PageRange, installed: u64) {
    let is_due = |entry: &(u64, State)| origin.contains(entry.0 * PAGE_BYTES) && is_remote(entry.1);
    let mut due: Vec<u64> = naive.values().filter(|entry| is_due(entry)).map(|entry| entry.0).collect();
    due.sort_unstable();
    let claims = ledger.claim_arriving(origin);
    assert_eq!(numbers(&claims.iter().map(Claim::origin_pages).collect::<Vec<_>>()), due);
    assert_eq!((ledger.held(), ledger.remote()), (held(naive), remote(naive)), "not there yet");
    for claim in claims {
        for (index, page) in (0..).zip(claim.pages.chunks(1)) {
            assert_eq!(ledger.state(page.start()), State::Busy);
            let state = if index < installed { State::Installed } else { State::Held };
            naive.insert(page.start() / PAGE_BYTES, (claim.origin / PAGE_BYTES + index, state));
        }
        ledger.settle_arriving(claim, installed.min(claim.pages.pages()));
    }
}

fn apply(ledger: &mut Ledger, naive: &mut Naive, step: &Step) {
    match *step {
        Step::Claim { page, count, installed } => {
            let required = naive.get(&page).is_some_and(|(_, state)| *state == State::Held);
            let claim = ledger.claim_at(page * PAGE_BYTES, count);
            settle(ledger, naive, claim, installed, required);
        }
        Step::Next { cursor, count } => {
            let required = held(naive) > 0;
            let claim = ledger.claim_next(cursor * PAGE_BYTES, count);
            settle(ledger, naive, claim, count, required);
        }
        Step::Request { page, window } => request(ledger, naive, page, window),
        Step::MarkRequested { page, count } => {
            ledger.mark_requested(pages(page, count));
            let named = naive.values_mut().filter(|entry| (page..page + count).contains(&entry.0));
            named.filter(|entry| entry.1 == State::Remote).for_each(|entry| entry.1 = State::Requested);
        }
        Step::Arrive { page, count } => {
            let arrived = ledger.arrive(pages(page, count));
            let (mut held, mut unneeded) = (Vec::new(), (page..page + count).collect::<Vec<_>>());
            for (at, entry) in naive.iter_mut().filter(|(_, entry)| (page..page + count).contains(&entry.0)) {
                if is_remote(entry.1) {
                    entry.1 = State::Held;
                    held.push(*at);
                }
                if entry.1 == State::Held {
                    unneeded.retain(|origin| *origin != entry.0);
                }
            }
            let mut found = numbers(&arrived.held);
            found.sort_unstable();
            assert_eq!((found, numbers(arrived.unneeded.ranges())), (held, unneeded));
        }
        Step::Bring { page, count, installed } => bring(ledger, naive, pages(page, count), installed),
        Step::Drop { page, count } => {
            assert_eq!(numbers(&ledger.drop_pages(pages(page, count))), release(naive, page, count));
            naive.range_mut(page..page + count).for_each(|(_, entry)| entry.1 = State::Dropped);
        }
        Step::Unmap { page, count } => {
            assert_eq!(numbers(&ledger.unmap(pages(page, count))), release(naive, page, count));
            naive.retain(|key, _| !(page..page + count).contains(key));
        }
        Step::Remap { page, count, to } => {
            let moved: Naive = naive.range(page..page + count).map(|(key, entry)| (*key, *entry)).collect();
            naive.retain(|key, _| !(page..page + count).contains(key));
            let released = numbers(&ledger.remap(pages(page, count), to * PAGE_BYTES));
            assert_eq!(released, release(naive, to, count));
            naive.retain(|key, _| !(to..to + count).contains(key));
            naive.extend(moved.into_iter().map(|(key, entry)| (key - page + to, entry)));
        }
        Step::Return { page, count } => {
            apply(ledger, naive, &Step::Remap { page, count, to: 150 });
            apply(ledger, naive, &Step::Remap { page: 150, count, to: page });
        }
        Step::Fork => *ledger = ledger.fork(),
    }
}

proptest! {
    #[test]
    fn a_ledger_agrees_with_a_list_of_single_pages(steps in prop::collection::vec(step(), 0..60)) {
        // The one page that is in both sets is remote.
        let plan = SpacePlan {
            held: [pages(2, 20), pages(30, 5), pages(40, 1)].into_iter().collect(),
            remote: [pages(22, 4), pages(40, 30)].into_iter().collect(),
        };
        let list = |set: &PageSet, state| -> Naive {
            let pages = set.ranges().iter().flat_map(|range| range.chunks(1));
            pages.map(|page| (page.start() / PAGE_BYTES, (page.start() / PAGE_BYTES, state))).collect()
        };
        let mut naive = list(&plan.held, State::Held);
        naive.extend(list(&plan.remote, State::Remote));
        let mut ledger = Ledger::new(&plan);
        for step in &steps {
            apply(&mut ledger, &mut naive, step);
            prop_assert_eq!((ledger.held(), ledger.remote()), (held(&naive), remote(&naive)));
            prop_assert_eq!(ledger.lacking(), lacking(&naive));
            for page in 0..170 {
                let expected = naive.get(&page).map_or(State::Absent, |(_, state)| *state);
                prop_assert_eq!(ledger.state(page * PAGE_BYTES), expected);
            }
        }
    }
}

/// Memory that moved in parts and came back lies together, in pieces.
#[test]
fn pages_that_arrive_for_two_neighbouring_pieces_are_settled_in_both() {
    let mut ledger =
        Ledger::new(&SpacePlan { remote: [pages(0, 8)].into_iter().collect(), ..SpacePlan::default() });
    drop(ledger.remap(pages(4, 4), 100 * PAGE_BYTES));
    drop(ledger.remap(pages(100, 4), 4 * PAGE_BYTES));
    for claim in ledger.claim_arriving(pages(0, 8)) {
        ledger.settle_arriving(claim, 6.min(claim.pages.pages()));
    }
    assert_eq!(ledger.remote(), 0);
    assert!((0..8).all(|page| ledger.state(page * PAGE_BYTES) != State::Busy));
}

#[test]
fn a_claim_ends_where_lending_must() {
    let start = LEND_BYTES - 2 * PAGE_BYTES;
    let held = PageRange::new(start, start + 8 * PAGE_BYTES).unwrap();
    let ledger = Ledger::new(&SpacePlan { held: [held].into_iter().collect(), ..SpacePlan::default() });
    assert_eq!(ledger.claim_next(0, 100).unwrap().pages.pages(), 2);
    assert_eq!(ledger.claim_next(0, 100).unwrap().pages.pages(), 6);
    assert_eq!(ledger.claim_next(0, 100), None);
}

/// Goal: a page that is asked for at the moment when it arrives has arrived. Method: two threads that meet at each page,
/// and then one asks for it and the other brings it, after pauses of every length in turn.
#[test]
fn a_request_overtakes_no_arrival() {
    const PAGES: u64 = 50_000;
    let pause = |turns: u64| (0..turns).for_each(|_| std::hint::spin_loop());
    // The other may need this processor.
    let await_that = |is_so: &dyn Fn() -> bool| {
        for turn in 0.. {
            if is_so() {
                return;
            }
            if turn % 1000 == 999 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    };
    for brings in [false, true] {
        let remote: PageSet = [pages(0, PAGES)].into_iter().collect();
        let ledger = Ledger::new(&SpacePlan { remote, ..SpacePlan::default() });
        let (there, asked) = (AtomicU64::new(0), AtomicU64::new(0));
        let lost = std::thread::scope(|scope| {
            scope.spawn(|| {
                for page in 0..PAGES {
                    await_that(&|| there.load(Ordering::Acquire) > page);
                    pause(page % 7);
                    ledger.request(page * PAGE_BYTES, 1);
                    asked.store(page + 1, Ordering::Release);
                }
            });
            let mut lost = 0;
            for page in 0..PAGES {
                there.store(page + 1, Ordering::Release);
                pause(page % 31);
                let came = if brings {
                    let claims = ledger.claim_arriving(pages(page, 1));
                    claims.iter().for_each(|claim| ledger.settle_arriving(*claim, 1));
                    claims.len()
                } else {
                    ledger.arrive(pages(page, 1)).held.len()
                };
                lost += usize::from(came != 1);
                await_that(&|| asked.load(Ordering::Acquire) > page);
            }
            lost
        });
        assert_eq!(lost, 0);
        assert_eq!((ledger.remote(), ledger.held()), (0, if brings { 0 } else { PAGES }));
    }
}
