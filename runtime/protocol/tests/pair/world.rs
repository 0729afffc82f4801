//! The world: its clock, its agenda, the connections, and what breaks.

use std::collections::BTreeMap;

use godwit_protocol::fate::Decision;
use godwit_protocol::plan::Way;
use godwit_protocol::report::Tick;
use godwit_protocol::request::Limits;
use godwit_protocol::source::{self, PeerEvent, Settings, Source};
use godwit_protocol::target::{self, Target};

/// What breaks, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    LinkAtFrame(u8),
    SourceActionFails(u8),
    TargetActionFails(u8),
    SourceDiesAt(u8),
    TargetDiesAt(u8),
    AgentDownFrom(u8, u16),
    CancelAt(u8),
    /// What was dumped turns out not to be true of the tasks.
    DumpUntrue,
    NonsenseAtFrame(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tasks {
    Absent,
    Frozen,
    Running,
}

#[derive(Debug)]
pub(crate) enum Happening {
    ToSource(PeerEvent, u32),
    ToTarget(target::Event),
    /// A page that the target lacks comes.
    Page,
    AtSource(source::Event, u32),
    /// The source learns what it has sent before the last frame of it leaves: so does the engine.
    AtSourceThenTell(source::Event, Vec<target::Event>, u32),
    AtTarget(target::Event),
    /// The side notices that the connections of this number are gone.
    SourceLosesLink(u32),
    TargetLosesLink(u32),
    Ask(u32),
    Rejoin(u32, bool),
    /// What the target lacks comes over the new link.
    Lacking(u32),
    Resolve,
    AgentBack,
}

/// The connections, or directions of one: frames keep their order on each.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lane {
    ToSource = 0,
    ToTarget = 1,
    Pages = 2,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: u64,
    random: u64,
    pub(crate) agenda: BTreeMap<(u64, u64), Happening>,
    scheduled: u64,
    pub(crate) faults: Vec<Fault>,
    pub(crate) way: Way,

    pub(crate) source: Option<Source>,
    /// Counts source workers: what an earlier one left on the agenda does not concern a later one.
    pub(crate) source_life: u32,
    pub(crate) source_tasks: Tasks,
    pub(crate) commit_announced: bool,
    /// Whether a source worker died while pages were left behind.
    pub(crate) died_serving: bool,

    pub(crate) target: Option<Target>,
    pub(crate) target_tasks: Tasks,
    /// Whether the source knows how to come back over a new link.
    pub(crate) reopens: bool,
    /// Pages that only the source has.
    pub(crate) lacking: u64,
    /// Whether the target lost the container after it had run there.
    pub(crate) perished: bool,
    pub(crate) record: Decision,
    pub(crate) agent_up: bool,

    pub(crate) link_up: bool,
    /// Counts the connections.
    pub(crate) link: u32,
    /// When the last frame of each lane arrives.
    last_arrival: [u64; 3],
    pub(crate) frames: u32,
    pub(crate) first_page_frame: Option<u32>,
    pub(crate) source_actions: u32,
    pub(crate) target_actions: u32,
    happenings: u32,
    pub(crate) end: Option<source::End>,
}

impl World {
    pub(crate) fn new(seed: u64, way: Way, faults: Vec<Fault>) -> Self {
        let allow_postcopy = seed.is_multiple_of(3);
        let limits = Limits { max_rounds: 5, allow_postcopy, ..Limits::default() };
        let step = Source::begin(Settings { limits, ..Settings::default() }, Tick(0));
        let mut world = Self {
            now: 0,
            random: seed | 1,
            agenda: BTreeMap::new(),
            scheduled: 0,
            faults,
            way,
            source: None,
            source_life: 0,
            source_tasks: Tasks::Running,
            commit_announced: false,
            died_serving: false,
            target: None,
            target_tasks: Tasks::Absent,
            reopens: true,
            lacking: 0,
            perished: false,
            record: Decision::Undecided,
            agent_up: true,
            link_up: true,
            link: 0,
            last_arrival: [0; 3],
            frames: 0,
            first_page_frame: None,
            source_actions: 0,
            target_actions: 0,
            happenings: 0,
            end: None,
        };
        world.take_source(step);
        world
    }

    pub(crate) fn without_reopening(self) -> Self {
        Self { reopens: false, ..self }
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % end
    }

    /// A duration of 1 to 100 ms in ns.
    pub(crate) fn a_while(&mut self) -> u64 {
        (self.below(100) + 1) * 1_000_000
    }

    pub(crate) fn after(&mut self, delay: u64, happening: Happening) {
        self.scheduled += 1;
        self.agenda.insert((self.now + delay, self.scheduled), happening);
    }

    pub(crate) fn soon(&mut self, happening: Happening) {
        let delay = self.a_while();
        self.after(delay, happening);
    }

    pub(crate) fn send(&mut self, lane: Lane, happening: Happening) {
        if !self.link_up {
            return;
        }
        self.frames += 1;
        let frame = self.frames;
        if self.strikes(|fault| matches!(fault, Fault::LinkAtFrame(n) if u32::from(n) == frame)) {
            self.lose_link();
            return;
        }
        let noise = || "noise".to_owned();
        let damaged =
            self.strikes(|fault| matches!(fault, Fault::NonsenseAtFrame(n) if u32::from(n) == frame));
        let happening = match happening {
            // Whoever rejoins reads the answer, and what is no answer is none.
            Happening::Lacking(_) if damaged => return self.lose_link(),
            Happening::ToSource(_, life) if damaged => {
                Happening::ToSource(PeerEvent::Nonsense { what: noise() }, life)
            }
            _ if damaged => Happening::ToTarget(target::Event::Nonsense { what: noise() }),
            happening => happening,
        };
        let last = self.last_arrival[lane as usize];
        let arrival = (self.now + self.a_while()).max(last + 1);
        self.last_arrival[lane as usize] = arrival;
        self.after(arrival - self.now, happening);
    }

    /// What is sent to the target from here on comes after the pages that have been sent.
    pub(crate) fn await_pages(&mut self) {
        let pages = self.last_arrival[Lane::Pages as usize];
        let main = &mut self.last_arrival[Lane::ToTarget as usize];
        *main = pages.max(*main);
    }

    pub(crate) fn strikes(&self, is_it: impl Fn(Fault) -> bool) -> bool {
        self.faults.iter().any(|fault| is_it(*fault))
    }

    /// Whether the source is about to hear what the target lacks.
    pub(crate) fn is_answering(&self) -> bool {
        self.agenda.values().any(|happening| matches!(happening, Happening::Lacking(_)))
    }

    /// What is under way is lost with the link; both sides notice some time later.
    pub(crate) fn lose_link(&mut self) {
        if !std::mem::replace(&mut self.link_up, false) {
            return;
        }
        if self.is_answering() {
            self.rejoin_fails();
        }
        self.agenda.retain(|_, happening| {
            let under_way = matches!(
                happening,
                Happening::ToSource(..) | Happening::ToTarget(_) | Happening::Page | Happening::Lacking(_)
            );
            !under_way
        });
        let link = self.link;
        self.soon(Happening::SourceLosesLink(link));
        self.soon(Happening::TargetLosesLink(link));
    }

    /// The target's worker ends: what it has said still comes, and then the end of the link.
    pub(crate) fn close_link(&mut self) {
        if std::mem::replace(&mut self.link_up, false) {
            self.agenda.retain(|_, happening| !matches!(happening, Happening::ToTarget(_) | Happening::Page));
            let last = self.last_arrival[Lane::ToSource as usize];
            let arrival = (self.now + self.a_while()).max(last + 1);
            let link = self.link;
            self.after(arrival - self.now, Happening::SourceLosesLink(link));
        }
    }

    pub(crate) fn open_link(&mut self) {
        self.lose_link();
        self.link += 1;
        self.link_up = true;
        self.last_arrival = [self.now; 3];
    }

    pub(crate) fn tell_source(&mut self, event: PeerEvent) {
        let life = self.source_life;
        self.send(Lane::ToSource, Happening::ToSource(event, life));
    }

    pub(crate) fn tell_target(&mut self, event: target::Event) {
        self.send(Lane::ToTarget, Happening::ToTarget(event));
    }

    fn strike(&mut self) {
        self.happenings += 1;
        let count = self.happenings;
        for fault in self.faults.clone() {
            match fault {
                Fault::SourceDiesAt(n) if u32::from(n) == count => self.source_dies(),
                Fault::TargetDiesAt(n) if u32::from(n) == count => self.target_dies(),
                Fault::CancelAt(n) if u32::from(n) == count => self.feed_source(source::Event::Cancel),
                Fault::AgentDownFrom(n, for_s) if u32::from(n) == count => {
                    self.agent_up = false;
                    self.after(u64::from(for_s) * 1_000_000_000, Happening::AgentBack);
                }
                _ => {}
            }
        }
    }

    /// Lets the next thing happen: a deadline, or what is first on the agenda.
    pub(crate) fn turn(&mut self) -> bool {
        let due = self.agenda.keys().next().copied();
        let at = due.map_or(u64::MAX, |(at, _)| at);
        let source_due = self.source.as_ref().and_then(Source::deadline).map_or(u64::MAX, |tick| tick.0);
        let target_due = self.target.as_ref().and_then(Target::deadline).map_or(u64::MAX, |tick| tick.0);
        if at.min(source_due).min(target_due) == u64::MAX {
            return false;
        }
        self.strike();
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

    fn happen(&mut self, happening: Happening) {
        let lost = || "the link is lost".to_owned();
        match happening {
            Happening::ToSource(event, life) if life == self.source_life => {
                self.feed_source(source::Event::Peer(event));
            }
            Happening::AtSource(event, life) if life == self.source_life => self.feed_source(event),
            Happening::AtSourceThenTell(event, frames, life) if life == self.source_life => {
                self.sent(event, frames);
            }
            Happening::SourceLosesLink(link) if link == self.link => {
                self.feed_source(source::Event::LinkLost { cause: lost() });
            }
            Happening::TargetLosesLink(link) if link == self.link => {
                self.feed_target(target::Event::LinkLost { cause: lost() });
            }
            Happening::Ask(life) if life == self.source_life => self.ask(),
            Happening::Lacking(life) if life == self.source_life => {
                self.feed_source(source::Event::Rejoined);
            }
            Happening::Rejoin(life, reopen) if life == self.source_life => self.rejoin(reopen),
            Happening::ToTarget(event) | Happening::AtTarget(event) => self.feed_target(event),
            Happening::Page => self.page_came(),
            Happening::Resolve => {
                let step = Source::resolve(Tick(self.now));
                self.take_source(step);
            }
            Happening::AgentBack => self.agent_up = true,
            _ => {}
        }
    }

    pub(crate) fn run(mut self) -> Self {
        for _ in 0..30_000 {
            self.check_moment();
            if !self.turn() {
                self.check_end();
                return self;
            }
        }
        panic!("it does not end: {self:?}");
    }
}
