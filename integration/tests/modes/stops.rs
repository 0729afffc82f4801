//! Between the start of a migration and the freeze, no task is stopped but for the moment of an injection.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, Trouble};
use godwit_protocol::Mode;

use super::claim::move_by;
use super::storm::Storm;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(rounds_stop_a_thread_only_for_an_injection).alone(),
        case!(rounds_stop_many_processes_only_for_an_injection).alone(),
        case!(postcopy_stops_nothing_before_the_freeze).alone(),
    ]
}

fn rounds_stop_a_thread_only_for_an_injection(stage: &Stage) -> Outcome {
    assert_runs_on(stage, Storm::of("beat"), Mode::Precopy, 1)
}

fn rounds_stop_many_processes_only_for_an_injection(stage: &Stage) -> Outcome {
    let storm = Storm { count: 4, reports: 4, ..Storm::of("processes") };
    assert_runs_on(stage, storm, Mode::Hybrid, 1)
}

fn postcopy_stops_nothing_before_the_freeze(stage: &Stage) -> Outcome {
    assert_runs_on(stage, Storm::of("beat"), Mode::Postcopy, 0)
}

/// Looks at every task more than a thousand times a second while the container moves, and claims that each was stopped
/// at most `stops` times and for a few milliseconds before its cgroup froze. CRIU thaws the cgroup as soon as it holds
/// the tasks, which tells as well that the freeze has begun; where both were too fast to be seen, it tries again.
fn assert_runs_on(stage: &Stage, storm: Storm, mode: Mode, stops: u64) -> Outcome {
    let mut place = storm.run_on(&stage.a)?;
    let mut counts = storm.counts(&place)?;
    for turn in 0..ATTEMPTS {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let freezer = place.cgroup_file("freezer/freezer.state", "cgroup.freeze")?;
        let tasks = tasks_of(&place)?;
        let over = AtomicBool::new(false);
        let (moved, watched) = thread::scope(|scope| {
            let watch = scope.spawn(|| watch(&tasks, &freezer.to_string_lossy(), &over));
            let moved = move_by(&place, target, mode);
            over.store(true, Ordering::Relaxed);
            (moved, watch.join().unwrap_or_default())
        });
        place = moved?.0;
        counts = storm.await_passes(&place, &counts, 2)?;
        if watched.saw_the_freeze {
            watched.assert_ran_on(stops);
            return Ok(());
        }
    }
    Err(Trouble::Garbled { what: "the moment of the freeze", text: format!("missed {ATTEMPTS} times") })
}

/// What was seen until the cgroup began to freeze.
#[derive(Debug, Default)]
struct Watched {
    looks: u64,
    saw_the_freeze: bool,
    /// The longest time between two looks: a stop cannot be known to be shorter.
    longest_gap: Duration,
    /// By task, if it was seen stopped.
    stops: BTreeMap<String, Stopped>,
}

impl Watched {
    fn assert_ran_on(&self, stops: u64) {
        assert!(self.looks > 20, "{self:?}");
        for (task, stopped) in &self.stops {
            assert!(stopped.times <= stops, "{task} was stopped more than {stops} times: {self:?}");
            assert!(stopped.longest <= STOP_MAX + self.longest_gap, "{task} was stopped for long: {self:?}");
        }
    }
}

/// How often and for how long a task was stopped. An injection stops it twice, and between that it makes a system call:
/// stops that are no further apart than one may be long count as one.
#[derive(Clone, Copy, Debug)]
struct Stopped {
    times: u64,
    longest: Duration,
    began: Instant,
    seen: Instant,
}

impl Stopped {
    fn once(now: Instant) -> Self {
        Self { times: 1, longest: Duration::ZERO, began: now, seen: now }
    }

    /// Takes in that it is seen stopped, where looks are so far apart at most.
    fn again(&mut self, now: Instant, gap: Duration) {
        if now - self.seen > STOP_MAX + gap {
            self.times += 1;
            self.began = now;
        }
        self.seen = now;
        self.longest = self.longest.max(now - self.began);
    }
}

fn watch(tasks: &[String], freezer: &str, over: &AtomicBool) -> Watched {
    let mut watched = Watched::default();
    let mut last = Instant::now();
    while !over.load(Ordering::Relaxed) {
        let states: Vec<_> = tasks.iter().map(|task| State::of(task)).collect();
        // After the states: what is stopped while nothing freezes yet is stopped by somebody else.
        let freezing = fs::read_to_string(freezer).is_ok_and(|text| !["THAWED", "0"].contains(&text.trim()));
        if freezing || states.contains(&State::HeldByCriu) {
            watched.saw_the_freeze = true;
            break;
        }
        let now = Instant::now();
        watched.looks += 1;
        watched.longest_gap = watched.longest_gap.max(now - last);
        last = now;
        let gap = watched.longest_gap;
        let stopped = tasks.iter().zip(states).filter(|(_, state)| *state == State::Stopped);
        for (task, _) in stopped {
            let known = watched.stops.entry(task.clone());
            known.and_modify(|known| known.again(now, gap)).or_insert_with(|| Stopped::once(now));
        }
        thread::sleep(LOOK_EVERY);
    }
    watched
}

/// The directories of all tasks of a container.
fn tasks_of(container: &Container<'_>) -> Result<Vec<String>, Trouble> {
    let mut tasks = Vec::new();
    for pid in container.site().rpc.pids(container.id())? {
        let dir = format!("/proc/{pid}/task");
        let entries = fs::read_dir(&dir).map_err(Trouble::io("read", &dir))?;
        tasks.extend(entries.flatten().map(|entry| entry.path().display().to_string()));
    }
    Ok(tasks)
}

/// Tells whether CRIU holds a process. It thaws the cgroup then, which is frozen for some milliseconds only.
pub(super) fn is_held_by_criu(pid: u32) -> bool {
    State::of(&format!("/proc/{pid}")) == State::HeldByCriu
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Or ended, or asleep.
    Running,
    Stopped,
    HeldByCriu,
}

impl State {
    /// Reads proc_pid_status(5) of a task.
    fn of(task: &str) -> Self {
        loop {
            let status = fs::read_to_string(format!("{task}/status")).unwrap_or_default();
            let field =
                |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
            if !field("State:").starts_with(['t', 'T']) {
                return Self::Running;
            }
            // The kernel looks for a tracer first and at the state later: it may have come in between.
            if field("State:").starts_with('t') && field("TracerPid:") == "0" {
                continue;
            }
            let tracer = fs::read_to_string(format!("/proc/{}/comm", field("TracerPid:")));
            let is_criu = tracer.is_ok_and(|name| name.trim() == "criu");
            return if is_criu { Self::HeldByCriu } else { Self::Stopped };
        }
    }
}

const LOOK_EVERY: Duration = Duration::from_micros(300);
const ATTEMPTS: u32 = 6;
/// An injection takes less than a millisecond on a machine that does nothing else.
const STOP_MAX: Duration = Duration::from_millis(10);
