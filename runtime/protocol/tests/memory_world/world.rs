//! The world: its clock and its agenda, and what has to hold in it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use godwit_protocol::failure::Fate;
use godwit_protocol::fate::Decision;
use godwit_protocol::plan::Way;
use godwit_protocol::report::Tick;
use godwit_protocol::request::Limits;
use godwit_protocol::source::{self, RoundSent, Settings, Source};
use godwit_protocol::target::{self, Target};
use godwit_protocol::wire::FRAME_HEADER_LEN;

use crate::link::{Frame, Job, Lane};
use crate::program::{self, Memory, Op, Page, Pages, Random};
use crate::tasks::Cell;
use crate::tracker::{Found, Tracker};

/// The ways in which godwit carries the pages.
pub(crate) const WAYS: [Way; 5] = [Way::Native, Way::Precopy, Way::Postcopy, Way::Hybrid, Way::Auto];

#[derive(Debug)]
pub(crate) enum Happening {
    /// A lane's socket can take the next frame.
    Free(usize, u32),
    Arrive(usize, u32, [u8; FRAME_HEADER_LEN], Frame),
    AtSource(source::Event),
    AtTarget(target::Event),
    SourceLosesLink(u32),
    TargetLosesLink(u32),
    Ask,
    Rejoin(bool),
    /// The program goes on, wherever it runs.
    Program,
    Fill,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) random: Random,
    agenda: BTreeMap<(u64, u64), Happening>,
    scheduled: u64,
    pub(crate) way: Way,
    /// Number of the frames that break the link.
    faults: Vec<u64>,
    frames: u64,
    pace_ns: u64,
    contents: u64,

    pub(crate) streams: u8,
    /// Bulk streams, then the fault stream, its requests, and the main link there and back.
    pub(crate) lanes: Vec<Lane>,
    pub(crate) link: u32,
    pub(crate) link_up: bool,
    /// Whether the target's answer to a source that came back is under way.
    pub(crate) answering: bool,

    pub(crate) source: Option<Source>,
    pub(crate) source_runs: bool,
    pub(crate) source_killed: bool,
    pub(crate) memory: Memory,
    pub(crate) tracker: Tracker,
    pub(crate) found: Found,
    /// What the target holds with contents, by what was sent.
    pub(crate) stored: Pages,
    pub(crate) sent: RoundSent,
    /// Lanes that have not marked the round yet.
    pub(crate) marking: usize,
    pub(crate) dumped: bool,
    pub(crate) remote: BTreeSet<Page>,
    pub(crate) unclaimed: BTreeSet<Page>,
    pub(crate) lacking: BTreeSet<Page>,
    pub(crate) end: Option<source::End>,

    pub(crate) target: Option<Target>,
    pub(crate) target_runs: bool,
    pub(crate) record: Decision,
    pub(crate) store: Memory,
    pub(crate) marks: Vec<Option<u32>>,
    pub(crate) plan: BTreeMap<i32, (u64, BTreeSet<u64>)>,
    pub(crate) state_ended: bool,
    pub(crate) ledgers: BTreeMap<i32, BTreeMap<u64, Cell>>,
    pub(crate) arrived: BTreeSet<Page>,
    pub(crate) waiting: Vec<Op>,
    pub(crate) filling: bool,
    pub(crate) filled: bool,
    pub(crate) ops_left: u32,
    pub(crate) oracle: Memory,

    pub(crate) rejoined: u32,
    pub(crate) requests: u64,
    pub(crate) unneeded: u64,
    pub(crate) rounds: u64,
}

impl World {
    pub(crate) fn of_seed(seed: u64) -> Self {
        let mut random = Random::of(seed ^ 0x5eed);
        let way = random.one_of(&WAYS).unwrap_or(Way::Hybrid);
        let faults = if random.one_in(2) {
            Vec::new()
        } else {
            (0..random.below(3) + 1).map(|_| random.below(250) + 1).collect()
        };
        Self::new(seed, way, faults)
    }

    pub(crate) fn new(seed: u64, way: Way, faults: Vec<u64>) -> Self {
        let mut random = Random::of(seed);
        let limits = Limits {
            max_rounds: u32::try_from(random.below(6)).unwrap_or(0) + 1,
            downtime_limit_ms: 1 << random.below(5),
            allow_postcopy: random.one_in(2),
            ..Limits::default()
        };
        let streams = u8::try_from(random.below(4)).unwrap_or(0) + 1;
        let pace_ns = 20_000 << random.below(8);
        // The memory is small: a usual cost of a switchover would hide it from the policy.
        let fixed = Duration::from_micros(random.below(2_000));
        let step = Source::begin(Settings { limits, fixed, ..Settings::default() }, Tick(0));
        let mut world = Self {
            now: 0,
            agenda: BTreeMap::new(),
            scheduled: 0,
            way,
            faults,
            frames: 0,
            pace_ns,
            contents: 0,
            streams,
            lanes: Vec::new(),
            link: 0,
            link_up: false,
            answering: false,
            source: None,
            source_runs: true,
            source_killed: false,
            memory: Memory::from([(1, BTreeMap::new())]),
            tracker: Tracker::default(),
            found: Found::default(),
            stored: Pages::new(),
            sent: RoundSent::default(),
            marking: 0,
            dumped: false,
            remote: BTreeSet::new(),
            unclaimed: BTreeSet::new(),
            lacking: BTreeSet::new(),
            end: None,
            target: None,
            target_runs: false,
            record: Decision::Undecided,
            store: Memory::new(),
            marks: vec![None; usize::from(streams)],
            plan: BTreeMap::new(),
            state_ended: false,
            ledgers: BTreeMap::new(),
            arrived: BTreeSet::new(),
            waiting: Vec::new(),
            filling: false,
            filled: false,
            ops_left: u32::try_from(random.below(80)).unwrap_or(0),
            oracle: Memory::new(),
            rejoined: 0,
            requests: 0,
            unneeded: 0,
            rounds: 0,
            random,
        };
        for _ in 0..100 {
            world.write();
        }
        world.open_link();
        world.after(1, Happening::Program);
        world.take_source(step);
        world
    }

    pub(crate) fn after(&mut self, delay: u64, happening: Happening) {
        self.scheduled += 1;
        self.agenda.insert((self.now + delay, self.scheduled), happening);
    }

    /// In up to 3 ms.
    pub(crate) fn soon(&mut self, happening: Happening) {
        let delay = self.random.below(3_000_000);
        self.after(delay, happening);
    }

    pub(crate) fn open_link(&mut self) {
        self.lose_link();
        self.link += 1;
        self.link_up = true;
        self.lanes = (0..self.streams + 4).map(|_| Lane::new(&mut self.random)).collect();
    }

    /// Everything under way is lost; both sides notice some time later.
    pub(crate) fn lose_link(&mut self) {
        if !std::mem::replace(&mut self.link_up, false) {
            return;
        }
        if std::mem::replace(&mut self.answering, false) {
            self.rejoin_fails();
        }
        self.lacking.clear();
        self.soon(Happening::SourceLosesLink(self.link));
        self.soon(Happening::TargetLosesLink(self.link));
    }

    /// Lets a lane do its next job, if it can.
    pub(crate) fn pump(&mut self, lane: usize) {
        while self.link_up && !self.lanes[lane].busy {
            let Some(job) = self.lanes[lane].jobs.pop_front() else { return };
            if let Some(frame) = self.do_job(lane, job) {
                self.send(lane, frame);
            }
        }
    }

    fn send(&mut self, lane: usize, frame: Frame) {
        self.frames += 1;
        if self.faults.contains(&self.frames) {
            return self.lose_link();
        }
        let (header, busy, travel) = self.lanes[lane].send(&frame);
        self.lanes[lane].busy = true;
        self.after(busy, Happening::Free(lane, self.link));
        self.after(travel, Happening::Arrive(lane, self.link, header, frame));
    }

    pub(crate) fn give(&mut self, lane: usize, jobs: impl IntoIterator<Item = Job>) {
        self.lanes[lane].jobs.extend(jobs);
        self.pump(lane);
    }

    fn happen(&mut self, happening: Happening) {
        let cause = || "the link is lost".to_owned();
        match happening {
            Happening::Free(lane, link) if link == self.link => {
                self.lanes[lane].busy = false;
                self.pump(lane);
            }
            Happening::Arrive(lane, link, header, frame) if link == self.link && self.link_up => {
                self.lanes[lane].receive(header, &frame);
                self.arrive(lane, &frame);
            }
            Happening::SourceLosesLink(link) if link == self.link => {
                self.feed_source(source::Event::LinkLost { cause: cause() });
            }
            Happening::TargetLosesLink(link) if link == self.link => {
                self.feed_target(target::Event::LinkLost { cause: cause() });
            }
            Happening::AtSource(event) => self.feed_source(event),
            Happening::AtTarget(event) => self.feed_target(event),
            Happening::Ask => self.ask(),
            Happening::Rejoin(reopen) => self.rejoin(reopen),
            Happening::Program => self.program(),
            Happening::Fill => self.fill(),
            _ => {}
        }
    }

    fn arrive(&mut self, lane: usize, frame: &Frame) {
        let streams = usize::from(self.streams);
        match lane.checked_sub(streams) {
            None | Some(0) => self.page_frame(lane, frame.message()),
            Some(1) => self.requested(&frame.message()),
            Some(2) => self.target_hears(frame.message()),
            Some(_) => self.source_hears(frame.message()),
        }
    }

    /// The program does one thing where it runs, and another soon.
    fn program(&mut self) {
        if self.source_runs && self.source.is_some() {
            self.write();
        } else if self.target_runs && self.ops_left > 0 {
            self.ops_left -= 1;
            if let Some(op) = program::next(&self.oracle, &mut self.random, &mut self.contents) {
                self.do_op(op);
            }
        } else if self.end.is_some() && self.target.is_none() {
            return;
        }
        let pace = self.random.below(self.pace_ns) + 1;
        self.after(pace, Happening::Program);
    }

    fn write(&mut self) {
        if let Some(op) = program::next(&self.memory, &mut self.random, &mut self.contents) {
            program::apply(&mut self.memory, &op);
            self.tracker.note(&self.memory, &op);
        }
    }

    /// Lets the next thing happen: a deadline, or what is first on the agenda.
    fn turn(&mut self) -> bool {
        let due = self.agenda.keys().next().copied();
        let at = due.map_or(u64::MAX, |(at, _)| at);
        let source_due = self.source.as_ref().and_then(Source::deadline).map_or(u64::MAX, |tick| tick.0);
        let target_due = self.target.as_ref().and_then(Target::deadline).map_or(u64::MAX, |tick| tick.0);
        if at.min(source_due).min(target_due) == u64::MAX {
            return false;
        }
        if source_due <= at.min(target_due) {
            self.now = source_due;
            self.feed_source(source::Event::Deadline);
        } else if target_due <= at {
            self.now = target_due;
            self.feed_target(target::Event::Deadline);
        } else if let Some(happening) = due.and_then(|key| self.agenda.remove(&key)) {
            self.now = at;
            self.happen(happening);
        }
        true
    }

    pub(crate) fn run(mut self) -> Self {
        for _ in 0..300_000 {
            assert!(!(self.source_runs && self.target_runs), "both sides run");
            if !self.turn() {
                self.check_end();
                return self;
            }
        }
        panic!("it does not end: {:?} and {:?}", self.source, self.target);
    }

    fn check_end(&self) {
        match self.end.as_ref().expect("it has ended") {
            source::End::Migrated(moved) => {
                assert!(self.source_killed && self.target_runs && !self.source_runs);
                assert!(self.filled, "the target never had every page");
                assert_eq!(program::seen(&self.tasks_memory()), program::seen(&self.oracle));
                let duplicates = moved.memory.as_ref().map_or(0, |memory| memory.duplicate_pages);
                assert_eq!(duplicates, 0);
            }
            source::End::Failed(failure) => {
                assert_eq!(failure.fate, Fate::RunningOnSource, "{failure:?}");
                assert!(self.source_runs && !self.source_killed && !self.target_runs);
            }
            source::End::Checked => unreachable!("no dry run here"),
        }
    }
}
