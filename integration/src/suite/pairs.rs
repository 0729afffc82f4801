//! Runs cases on pairs of guests, one pair after the other.
//!
//! As [`super::harness`] for beds: to `cargo test` and cargo-nextest a test is a lane, here a pair of kernels. Every
//! lane belongs to full runs. A pair that does not come up fails its lane.

use std::process::ExitCode;
use std::time::Instant;

use super::arguments::{Arguments, Which};
use super::harness::{Tally, attempt, keep_panics};
use super::trouble::Outcome;
use crate::guests::Guests;

/// The kernels of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// The lane's name.
    pub name: &'static str,
    /// Release lines of guest a's and guest b's kernel.
    pub kernels: [&'static str; 2],
}

/// One claim about the system, on some lanes.
#[derive(Clone, Copy, Debug)]
pub struct PairCase {
    /// The claim, as a sentence with underscores.
    pub name: &'static str,
    /// The lanes that it concerns.
    pub lanes: &'static [Lane],
    /// Finds out whether it holds.
    pub run: fn(&Guests) -> Outcome,
}

/// Cases that share a purpose.
#[derive(Debug)]
pub struct PairSuite {
    /// Its name, that of the test binary.
    pub name: &'static str,
    /// Its lanes.
    pub lanes: &'static [Lane],
    /// Prepares guests beyond what `hack/guests` does.
    pub prepare: fn(&Guests) -> Outcome,
    /// The cases.
    pub cases: Vec<PairCase>,
}

/// Runs a suite as its command line and environment want it.
#[must_use]
pub fn run(suite: &PairSuite) -> ExitCode {
    let args = Arguments::parse(std::env::args().skip(1));
    let is_full =
        args.which != Which::Ordinary || std::env::var_os("GODWIT_FULL").is_some_and(|value| value == "1");
    let wanted = |lane: &Lane| -> Vec<PairCase> {
        let asked =
            |case: &&PairCase| args.wants(suite.name, lane.name, case.name) && case.lanes.contains(lane);
        suite.cases.iter().filter(asked).copied().collect()
    };
    let lanes = suite.lanes.iter().map(|lane| (*lane, wanted(lane))).filter(|(_, cases)| !cases.is_empty());
    // To cargo-nextest, which lists the ordinary tests and then the ignored ones, all are of the latter kind.
    let lanes: Vec<_> =
        lanes.filter(|_| if args.list { args.which != Which::Ordinary } else { is_full }).collect();
    if args.list {
        lanes.iter().for_each(|(lane, _)| println!("{}: test", lane.name));
        return ExitCode::SUCCESS;
    }
    keep_panics();
    let mut tally = Tally::default();
    for (lane, cases) in lanes {
        run_lane(suite, lane, &cases, &mut tally);
    }
    if !is_full {
        println!("\n{}: all lanes are left to full runs (GODWIT_FULL=1), being slow", suite.name);
    }
    tally.close(suite.name)
}

fn run_lane(suite: &PairSuite, lane: Lane, cases: &[PairCase], tally: &mut Tally) {
    println!("\n{} on kernels {}: {} cases", suite.name, lane.kernels.join(" and "), cases.len());
    let name = |case: &str| format!("{}::{}::{case}", suite.name, lane.name);
    let started = Instant::now();
    let guests = match Guests::up(lane.kernels) {
        Ok(guests) => guests,
        Err(trouble) => {
            tally.enter(name("the_guests_come_up"), started, Err(trouble));
            return;
        }
    };
    if let Err(trouble) = (suite.prepare)(&guests) {
        tally.enter(name("the_guests_are_prepared"), started, Err(trouble));
        return;
    }
    for case in cases {
        let started = Instant::now();
        if !tally.enter(name(case.name), started, attempt(|| (case.run)(&guests)))
            && let Err(trouble) = guests.clear()
        {
            println!("-- its containers stay: {trouble}");
        }
    }
    let started = Instant::now();
    tally.enter(name("the_guests_go_down"), started, guests.down());
}
