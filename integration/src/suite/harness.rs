//! Runs suites: every case on every lane, side by side where cases allow it.
//!
//! With `GODWIT_FULL=1`, or when asked for ignored tests, the slow cases and lanes run as well. The command
//! line is described in `arguments.rs`.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use super::arguments::{Arguments, Which};
use super::footprint::Footprint;
use super::lane::Lane;
use super::site::Stage;
use super::trouble::{Outcome, Trouble};
use crate::bed::{Bed, BedOptions};
use crate::node::CONTAINERD;
use crate::skip;

/// One claim about the system.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The claim, as a sentence with underscores.
    pub name: &'static str,
    run: fn(&Stage) -> Outcome,
    concerns: fn(Lane) -> bool,
    is_alone: bool,
    is_slow: bool,
}

impl Case {
    /// Returns a case. Use [`case!`](crate::case), which takes the name from the function.
    #[must_use]
    pub const fn new(name: &'static str, run: fn(&Stage) -> Outcome) -> Self {
        Self { name, run, concerns: |_| true, is_alone: false, is_slow: false }
    }

    /// Restricts it to the lanes on which what it claims is promised by anybody.
    #[must_use]
    pub const fn on(self, concerns: fn(Lane) -> bool) -> Self {
        Self { concerns, ..self }
    }

    /// Marks it as one that must not run beside others: it disturbs a daemon, or measures.
    #[must_use]
    pub const fn alone(self) -> Self {
        Self { is_alone: true, ..self }
    }

    /// Marks it as one that runs only when everything does.
    #[must_use]
    pub const fn slow(self) -> Self {
        Self { is_slow: true, ..self }
    }
}

/// Makes a [`Case`] of a function, under the function's name.
#[macro_export]
macro_rules! case {
    ($module:ident :: $name:ident) => {
        $crate::suite::Case::new(stringify!($name), $module::$name)
    };
    ($name:ident) => {
        $crate::suite::Case::new(stringify!($name), $name)
    };
}

/// Cases that share a purpose.
#[derive(Debug)]
pub struct Suite {
    /// Its name, that of the test binary.
    pub name: &'static str,
    /// The lanes of an ordinary run.
    pub lanes: Vec<Lane>,
    /// The lanes of a full run beyond those.
    pub more_lanes: Vec<Lane>,
    /// Images out of the catalogue that cases use on both nodes.
    pub images: &'static [&'static str],
    /// Makes a bed for a lane.
    pub bed: fn(Lane, &str) -> BedOptions,
    /// Prepares the nodes beyond that.
    pub prepare: fn(&Stage) -> Outcome,
    /// What may be left on a node that ran this lane, although it should not.
    pub tolerated: fn(Lane, &str) -> bool,
    /// The cases.
    pub cases: Vec<Case>,
}

/// Runs a suite as its command line and environment want it.
#[must_use]
pub fn run(suite: &Suite) -> ExitCode {
    let args = Arguments::parse(std::env::args().skip(1));
    let is_full =
        args.which != Which::Ordinary || std::env::var_os("GODWIT_FULL").is_some_and(|value| value == "1");
    let mut lanes = if args.which == Which::Ignored { Vec::new() } else { suite.lanes.clone() };
    if is_full && !(args.list && args.which == Which::Ordinary) {
        lanes.extend(&suite.more_lanes);
    }
    let wanted = |lane: &Lane| {
        let asked = |case: &&Case| args.wants(suite.name, &lane.to_string(), case.name);
        let now = |case: &&Case| (is_full || !case.is_slow) && (case.concerns)(*lane);
        suite.cases.iter().filter(now).filter(asked).copied().collect::<Vec<_>>()
    };
    let lanes: Vec<(Lane, Vec<Case>)> =
        lanes.into_iter().map(|lane| (lane, wanted(&lane))).filter(|(_, cases)| !cases.is_empty()).collect();
    if args.list {
        lanes.iter().for_each(|(lane, _)| println!("{lane}: test"));
        return ExitCode::SUCCESS;
    }
    keep_panics();
    let tally = Mutex::new(Tally::default());
    let queue = Mutex::new(lanes.into_iter().collect::<VecDeque<_>>());
    thread::scope(|scope| {
        for _ in 0..args.threads.max(1) {
            scope.spawn(|| {
                while let Some((lane, cases)) = pop(&queue) {
                    run_lane(suite, lane, &cases, &tally);
                }
            });
        }
    });
    if !is_full {
        let left = suite.cases.iter().filter(|case| case.is_slow).count();
        println!(
            "\nleft to full runs (GODWIT_FULL=1), being slow: {left} cases, {} lanes",
            suite.more_lanes.len()
        );
    }
    lock(&tally).close(suite.name)
}

/// How many cases ended how.
#[derive(Debug, Default)]
pub(super) struct Tally {
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
}

impl Tally {
    /// Counts and prints how a case ended, and tells whether that is well.
    pub(super) fn enter(&mut self, name: String, started: Instant, outcome: Outcome) -> bool {
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                println!("  ok     {name} ({seconds:.1} s)");
                self.passed += 1;
            }
            Err(Trouble::Skipped { reason }) => {
                skip::skip(&format!("{name}: {reason}"));
                self.skipped += 1;
            }
            Err(trouble) => {
                let text = trouble.to_string().replace('\n', "\n         ");
                println!("  FAILED {name} ({seconds:.1} s)\n         {text}");
                self.failed.push(name);
                return false;
            }
        }
        true
    }

    /// Prints how a suite went, and returns the status to end with.
    pub(super) fn close(&self, suite: &str) -> ExitCode {
        let Self { passed, failed, skipped } = self;
        println!("\n{suite}: {passed} passed, {} failed, {skipped} skipped", failed.len());
        failed.iter().for_each(|name| println!("  failed: {name}"));
        if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn run_lane(suite: &Suite, lane: Lane, cases: &[Case], tally: &Mutex<Tally>) {
    let enter = |case: &str, started, outcome| {
        lock(tally).enter(format!("{}::{lane}::{case}", suite.name), started, outcome)
    };
    println!("\n{} on containerd {lane}: {} cases", suite.name, cases.len());
    let started = Instant::now();
    let stage = match set_up(suite, lane) {
        Ok(stage) => stage,
        Err(trouble) => {
            enter("the_bed_comes_up", started, Err(trouble));
            return;
        }
    };
    let before = [&stage.a, &stage.b].map(Footprint::of);
    let mut all_passed = run_cases(&stage, cases, &enter);
    for (site, before) in [&stage.a, &stage.b].into_iter().zip(before) {
        let started = Instant::now();
        let tolerated = |thing: &str| (suite.tolerated)(lane, thing);
        let outcome = before.and_then(|before| before.await_again(site, tolerated));
        all_passed &= enter(&format!("nothing_is_left_on_node_{}", site.node().name()), started, outcome);
    }
    if !all_passed {
        for site in [&stage.a, &stage.b] {
            let node = site.node();
            let log = node.log_tail(CONTAINERD);
            let complaints: Vec<&str> = log.lines().filter(|line| !line.contains("level=info")).collect();
            if !complaints.is_empty() {
                println!("-- from the end of containerd's log on node {}:", node.name());
                println!("{}", complaints.join("\n"));
            }
        }
    }
    let started = Instant::now();
    if let Err(trouble) = stage.down() {
        enter("the_bed_goes_down", started, Err(trouble));
    }
}

fn set_up(suite: &Suite, lane: Lane) -> Result<Stage, Trouble> {
    let bed_name = format!("{}-{}", suite.name.replace('_', "-"), lane.to_string().replace(['/', '.'], "-"));
    let bed = Bed::up((suite.bed)(lane, &bed_name))?;
    let stage = Stage::new(lane, bed)?;
    for site in [&stage.a, &stage.b] {
        site.import(suite.images)?;
    }
    (suite.prepare)(&stage)?;
    Ok(stage)
}

/// Runs the cases that allow it side by side, and then the others one by one; tells whether all passed.
fn run_cases(stage: &Stage, cases: &[Case], enter: &(dyn Fn(&str, Instant, Outcome) -> bool + Sync)) -> bool {
    let (alone, together): (Vec<Case>, Vec<Case>) = cases.iter().partition(|case| case.is_alone);
    let queue = Mutex::new(together.into_iter().collect::<VecDeque<_>>());
    let all_passed = AtomicBool::new(true);
    let finish = |case: Case| {
        let started = Instant::now();
        if !enter(case.name, started, attempt(|| (case.run)(stage))) {
            all_passed.store(false, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(case) = pop(&queue) {
                    finish(case);
                }
            });
        }
    });
    alone.into_iter().for_each(finish);
    all_passed.into_inner()
}

/// Has panics of cases kept for [`attempt`] instead of printed.
pub(super) fn keep_panics() {
    panic::set_hook(Box::new(|info| PANIC.with_borrow_mut(|text| *text = info.to_string())));
}

/// Runs a case; a panic in it is its failure and nobody else's.
pub(super) fn attempt(case: impl FnOnce() -> Outcome) -> Outcome {
    panic::catch_unwind(AssertUnwindSafe(case)).unwrap_or_else(|_| {
        let text = PANIC.with_borrow_mut(std::mem::take);
        Err(Trouble::Garbled { what: "what the case claims", text })
    })
}

fn pop<T>(queue: &Mutex<VecDeque<T>>) -> Option<T> {
    lock(queue).pop_front()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// What the last panic of this thread said, and where.
    static PANIC: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
}

/// Cases mostly wait for processes to start and end, so more of them than processors keep those busy.
const WORKERS: usize = 4;
