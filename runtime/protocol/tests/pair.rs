//! Both machines, an agent and a record in one small world with a clock of its own, and everything that can break.
//!
//! Goal: whatever breaks, at most one side can run the container at any moment; before COMMIT every failure ends
//! with the container running on the source; after it the two sides agree as soon as the agent can be asked.
//! Method: actions take a random time and then answer with an event; frames take a random time and keep their
//! order; faults strike at the n-th frame, action or happening. A seed replays exactly.

use std::collections::BTreeMap;

use godwit_protocol::failure::Fate;
use godwit_protocol::fate::{Decision, FateAnswer};
use godwit_protocol::report::Tick;
use godwit_protocol::rootfs::Pass;
use godwit_protocol::source::{self, PeerEvent, Source};
use godwit_protocol::target::{self, Target};
use godwit_protocol::wire::message::Resumed;
use proptest::prelude::*;

/// What breaks, and when.
#[derive(Debug, Clone, Copy)]
enum Fault {
    LinkAtFrame(u8),
    SourceActionFails(u8),
    TargetActionFails(u8),
    SourceDiesAt(u8),
    TargetDiesAt(u8),
    AgentDownFrom(u8, u16),
    CancelAt(u8),
    NonsenseAtFrame(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tasks {
    Absent,
    Frozen,
    Running,
}

#[derive(Debug)]
enum Happening {
    ToSource(PeerEvent, u32),
    ToTarget(target::Event, u32),
    AtSource(source::Event, u32),
    /// The source learns what it has sent before the last frame of it leaves: so does the engine.
    AtSourceThenTell(source::Event, Vec<target::Event>, u32),
    AtTarget(target::Event),
    SourceLosesLink(u32),
    TargetLosesLink,
    Ask(u32),
    Resolve,
    AgentBack,
}

#[derive(Debug)]
struct World {
    now: u64,
    random: u64,
    agenda: BTreeMap<(u64, u64), Happening>,
    scheduled: u64,
    faults: Vec<Fault>,

    source: Option<Source>,
    /// Counts source workers: what an earlier one left on the agenda does not concern a later one.
    source_life: u32,
    source_tasks: Tasks,
    commit_announced: bool,

    target: Option<Target>,
    target_tasks: Tasks,
    record: Decision,
    agent_up: bool,

    link_up: bool,
    /// When the last frame of each direction arrives: frames keep their order.
    last_arrival: [u64; 2],
    frames: u32,
    source_actions: u32,
    target_actions: u32,
    happenings: u32,
    end: Option<source::End>,
}

impl World {
    fn new(seed: u64, faults: Vec<Fault>) -> Self {
        let step = Source::begin(false, Tick(0));
        let mut world = Self {
            now: 0,
            random: seed | 1,
            agenda: BTreeMap::new(),
            scheduled: 0,
            faults,
            source: None,
            source_life: 0,
            source_tasks: Tasks::Running,
            commit_announced: false,
            target: None,
            target_tasks: Tasks::Absent,
            record: Decision::Undecided,
            agent_up: true,
            link_up: true,
            last_arrival: [0; 2],
            frames: 0,
            source_actions: 0,
            target_actions: 0,
            happenings: 0,
            end: None,
        };
        world.take_source(step);
        world
    }

    /// A duration of 1 to 100 ms in ns.
    fn a_while(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % 100 + 1) * 1_000_000
    }

    fn after(&mut self, delay: u64, happening: Happening) {
        self.scheduled += 1;
        self.agenda.insert((self.now + delay, self.scheduled), happening);
    }

    fn soon(&mut self, happening: Happening) {
        let delay = self.a_while();
        self.after(delay, happening);
    }

    fn send(&mut self, direction: usize, happening: Happening) {
        if !self.link_up {
            return;
        }
        self.frames += 1;
        let frame = self.frames;
        if self.faults.iter().any(|fault| matches!(fault, Fault::LinkAtFrame(n) if u32::from(*n) == frame)) {
            self.lose_link();
            return;
        }
        let happening = match happening {
            Happening::ToSource(_, life) if self.nonsense_at(frame) => {
                Happening::ToSource(PeerEvent::Nonsense { what: "noise".to_owned() }, life)
            }
            Happening::ToTarget(_, life) if self.nonsense_at(frame) => {
                Happening::ToTarget(target::Event::Nonsense { what: "noise".to_owned() }, life)
            }
            happening => happening,
        };
        let arrival = (self.now + self.a_while()).max(self.last_arrival[direction] + 1);
        self.last_arrival[direction] = arrival;
        self.after(arrival - self.now, happening);
    }

    fn nonsense_at(&self, frame: u32) -> bool {
        self.faults.iter().any(|fault| matches!(fault, Fault::NonsenseAtFrame(n) if u32::from(*n) == frame))
    }

    /// What is under way is lost with the link; both sides notice some time later.
    fn lose_link(&mut self) {
        if !std::mem::replace(&mut self.link_up, false) {
            return;
        }
        self.agenda
            .retain(|_, happening| !matches!(happening, Happening::ToSource(..) | Happening::ToTarget(..)));
        let life = self.source_life;
        self.soon(Happening::SourceLosesLink(life));
        self.soon(Happening::TargetLosesLink);
    }

    fn tell_source(&mut self, event: PeerEvent) {
        let life = self.source_life;
        self.send(0, Happening::ToSource(event, life));
    }

    fn tell_target(&mut self, event: target::Event) {
        let life = self.source_life;
        self.send(1, Happening::ToTarget(event, life));
    }

    fn at_source(&mut self, event: source::Event) {
        let life = self.source_life;
        self.soon(Happening::AtSource(event, life));
    }

    fn soon_and_then_tell(&mut self, event: source::Event, frames: Vec<target::Event>) {
        let life = self.source_life;
        self.soon(Happening::AtSourceThenTell(event, frames, life));
    }

    fn take_source(&mut self, step: source::Step) {
        self.source = Some(step.state);
        for action in step.actions {
            self.source_actions += 1;
            let count = self.source_actions;
            let fails =
                |fault: &Fault| matches!(fault, Fault::SourceActionFails(n) if u32::from(*n) == count);
            if self.faults.iter().any(fails) && may_fail(&action) {
                if action == source::Action::Commit {
                    // The line to the shim comes first, and the frame may have left in spite of the error.
                    self.commit_announced = true;
                    if self.a_while().is_multiple_of(2_000_000) {
                        self.tell_target(target::Event::Commit);
                    }
                }
                self.at_source(source::Event::Failed { cause: "an action failed".to_owned() });
            } else {
                self.act_source(action);
            }
        }
        if let Some(end) = self.source.as_ref().and_then(Source::end).cloned() {
            self.end = Some(end);
            self.source = None;
            self.lose_link();
        }
    }

    fn act_source(&mut self, action: source::Action) {
        use source::Action;
        match action {
            Action::Connect => self.at_source(source::Event::LinkUp),
            Action::SendOffer => self.tell_source(PeerEvent::Accepted),
            Action::SendBlobs => {
                let step = Target::begin(Tick(self.now));
                self.take_target(step);
            }
            Action::SendRootfs => {
                let sent = source::Event::RootfsSent;
                self.soon_and_then_tell(sent, vec![target::Event::Applied(Pass::Live)]);
            }
            Action::Freeze => {
                self.source_tasks = Tasks::Frozen;
                self.at_source(source::Event::Froze);
            }
            Action::Dump => {
                self.soon_and_then_tell(source::Event::Dumped, vec![target::Event::Applied(Pass::Final)]);
            }
            Action::Commit => {
                self.commit_announced = true;
                self.tell_target(target::Event::Commit);
            }
            Action::AskFate { pause } => {
                let pause = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX) + self.a_while();
                let life = self.source_life;
                self.after(pause, Happening::Ask(life));
            }
            Action::Kill => {
                self.source_tasks = Tasks::Absent;
                self.at_source(source::Event::Killed);
            }
            Action::CleanUp => self.at_source(source::Event::CleanedUp),
            Action::RollBack { tell } => {
                if tell.is_some() {
                    self.tell_target(target::Event::Abort { detail: "rolled back".to_owned() });
                }
                self.source_tasks = Tasks::Running;
                self.at_source(source::Event::RolledBack);
            }
            Action::ReportMoved => self.at_source(source::Event::Release),
            Action::LeaveFrozen | Action::ReportChecked | Action::ReportFailed { .. } => {}
        }
    }

    fn take_target(&mut self, step: target::Step) {
        self.target = Some(step.state);
        for action in step.actions {
            self.target_actions += 1;
            let count = self.target_actions;
            let fails =
                |fault: &Fault| matches!(fault, Fault::TargetActionFails(n) if u32::from(*n) == count);
            let may_fail = !matches!(action, target::Action::Undo { .. });
            if self.faults.iter().any(fails) && may_fail {
                self.soon(Happening::AtTarget(target::Event::Failed {
                    cause: "an action failed".to_owned(),
                }));
            } else {
                self.act_target(action);
            }
        }
        if self.target.as_ref().is_some_and(|target| target.end().is_some()) {
            self.target = None;
        }
    }

    fn act_target(&mut self, action: target::Action) {
        use target::Action;
        match action {
            Action::SendReady => self.tell_source(PeerEvent::Ready),
            Action::SendApplied(pass) => self.tell_source(PeerEvent::RootfsApplied(pass)),
            Action::SendReceived => self.tell_source(PeerEvent::Received),
            Action::Restore => {
                self.target_tasks = Tasks::Frozen;
                self.soon(Happening::AtTarget(target::Event::Held));
            }
            Action::SendRestored => self.tell_source(PeerEvent::Restored),
            Action::Record(next) => {
                if self.record.may_become(next) {
                    self.record = next;
                }
                self.soon(Happening::AtTarget(target::Event::Recorded(self.record)));
            }
            Action::Resume => {
                self.target_tasks = Tasks::Running;
                self.soon(Happening::AtTarget(target::Event::Running { pid: 1 }));
            }
            Action::ReportResumed { .. } => self.tell_source(PeerEvent::Resumed(Resumed::default())),
            Action::Undo { tell } => {
                self.target_tasks = Tasks::Absent;
                assert!(self.record == Decision::Aborted || self.record.may_become(Decision::Aborted));
                self.record = Decision::Aborted;
                if tell.is_some() {
                    self.tell_source(PeerEvent::Aborted { detail: "aborted".to_owned() });
                }
                self.soon(Happening::AtTarget(target::Event::Undone));
            }
            Action::ReportFailed { .. } => {}
        }
    }

    fn feed_source(&mut self, event: source::Event) {
        if let Some(source) = self.source.take() {
            let step = source.step(event, Tick(self.now));
            self.take_source(step);
        }
    }

    fn feed_target(&mut self, event: target::Event) {
        if let Some(target) = self.target.take() {
            let step = target.step(event, Tick(self.now));
            self.take_target(step);
        }
    }

    fn ask(&mut self) {
        if !self.agent_up {
            self.at_source(source::Event::AskFailed { cause: "nobody answers".to_owned() });
            return;
        }
        let asked = self.record.asked(self.target.is_some());
        if asked.kill_first {
            self.target_tasks = Tasks::Absent;
        }
        self.record = asked.decision;
        self.at_source(source::Event::Answered(asked.answer));
    }

    /// What the shim does when its worker dies: thaw, or ask in its place.
    fn source_dies(&mut self) {
        // After the move nothing can be decided any more; before it the worker's part is taken over.
        if self.source.as_ref().is_none_or(|source| source.moved().is_some()) {
            return;
        }
        self.source = None;
        self.source_life += 1;
        self.lose_link();
        if self.commit_announced {
            self.soon(Happening::Resolve);
        } else {
            self.source_tasks = Tasks::Running;
        }
    }

    /// Tasks that CRIU holds die with the worker; tasks that run do not.
    fn target_dies(&mut self) {
        if self.target.take().is_some() {
            if self.target_tasks == Tasks::Frozen {
                self.target_tasks = Tasks::Absent;
            }
            self.lose_link();
        }
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
    fn turn(&mut self) -> bool {
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
                let dumped = event == source::Event::Dumped;
                self.feed_source(event);
                frames.into_iter().for_each(|frame| self.tell_target(frame));
                if dumped {
                    self.soon_and_then_tell(source::Event::StateSent, vec![target::Event::Complete]);
                }
            }
            Happening::SourceLosesLink(life) if life == self.source_life => {
                self.feed_source(source::Event::LinkLost { cause: lost() });
            }
            Happening::Ask(life) if life == self.source_life => self.ask(),
            Happening::ToTarget(event, _) | Happening::AtTarget(event) => self.feed_target(event),
            Happening::TargetLosesLink => self.feed_target(target::Event::LinkLost { cause: lost() }),
            Happening::Resolve => {
                let step = Source::resolve(Tick(self.now));
                self.take_source(step);
            }
            Happening::AgentBack => self.agent_up = true,
            _ => {}
        }
    }

    fn check_moment(&self) {
        let both = (self.source_tasks, self.target_tasks);
        assert_ne!(both, (Tasks::Running, Tasks::Running), "both sides run: {self:?}");
        assert!(self.commit_announced || self.target_tasks != Tasks::Running, "resumed without COMMIT");
        // What can no longer change is never both absent: a container is not lost.
        assert_ne!(both, (Tasks::Absent, Tasks::Absent), "neither side has it: {self:?}");
    }

    fn check_end(&self) {
        let fate = match &self.end {
            Some(source::End::Migrated(_)) => Fate::RunningOnTarget,
            Some(source::End::Failed(failure)) => failure.fate,
            Some(source::End::Checked) => unreachable!("no dry run here"),
            // The worker died before COMMIT, and the shim thawed the container.
            None => Fate::RunningOnSource,
        };
        let both = (self.source_tasks, self.target_tasks);
        match fate {
            Fate::RunningOnTarget => assert_eq!(both, (Tasks::Absent, Tasks::Running), "{self:?}"),
            Fate::RunningOnSource => {
                assert_eq!(self.source_tasks, Tasks::Running, "{self:?}");
                assert_eq!(self.target_tasks, Tasks::Absent, "{self:?}");
            }
            Fate::Unknown => {
                assert!(self.commit_announced, "{self:?}");
                // A worker that died while it rolled back may have thawed already: then the record bars the target.
                let barred = self.record == Decision::Aborted && self.target_tasks == Tasks::Absent;
                assert!(self.source_tasks == Tasks::Frozen || barred, "{self:?}");
                let agent_was_away =
                    |fault: &Fault| matches!(fault, Fault::AgentDownFrom(_, for_s) if *for_s > 60);
                assert!(self.faults.iter().any(agent_was_away), "{self:?}");
            }
            Fate::Lost => panic!("lost: {self:?}"),
        }
    }

    fn run(mut self) -> Self {
        for _ in 0..5_000 {
            self.check_moment();
            if !self.turn() {
                self.check_end();
                return self;
            }
        }
        panic!("it does not end: {self:?}");
    }
}

/// Undoing, killing and what only speaks to the shim have no way to fail here.
fn may_fail(action: &source::Action) -> bool {
    use source::Action;
    !matches!(
        action,
        Action::Kill
            | Action::RollBack { .. }
            | Action::CleanUp
            | Action::LeaveFrozen
            | Action::AskFate { .. }
            | Action::ReportMoved
            | Action::ReportChecked
            | Action::ReportFailed { .. }
    )
}

fn a_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (1..14u8).prop_map(Fault::LinkAtFrame),
        (1..12u8).prop_map(Fault::SourceActionFails),
        (1..12u8).prop_map(Fault::TargetActionFails),
        (1..40u8).prop_map(Fault::SourceDiesAt),
        (1..40u8).prop_map(Fault::TargetDiesAt),
        (1..40u8, 1..400u16).prop_map(|(at, for_s)| Fault::AgentDownFrom(at, for_s)),
        (1..40u8).prop_map(Fault::CancelAt),
        (1..14u8).prop_map(Fault::NonsenseAtFrame),
    ]
}

#[test]
fn without_faults_the_container_moves() {
    let world = World::new(1, vec![]).run();
    assert!(matches!(world.end, Some(source::End::Migrated(_))), "{world:?}");
}

#[test]
fn a_lost_link_is_survived_at_every_frame() {
    for frame in 1..14 {
        for seed in 0..200 {
            let world = World::new(seed * 2_654_435_761, vec![Fault::LinkAtFrame(frame)]).run();
            assert!(world.end.is_some());
        }
    }
}

#[test]
fn when_the_answer_is_lost_the_record_is_asked_and_says_here() {
    // The last frame of a move is the answer to COMMIT.
    let last = World::new(7, vec![]).run().frames;
    let world = World::new(7, vec![Fault::LinkAtFrame(u8::try_from(last).unwrap())]).run();
    assert!(matches!(world.end, Some(source::End::Migrated(_))), "{world:?}");
    assert_eq!(world.record.asked(false).answer, FateAnswer::Here);
}

#[test]
fn while_the_agent_is_away_the_fate_is_unknown_and_later_it_is_known() {
    let last = u8::try_from(World::new(7, vec![]).run().frames).unwrap();
    let mut world = World::new(7, vec![Fault::LinkAtFrame(last), Fault::AgentDownFrom(1, 300)]).run();
    let Some(source::End::Failed(failure)) = &world.end else { panic!("{world:?}") };
    assert_eq!(failure.fate, Fate::Unknown);
    assert!(world.agent_up, "the agent came back after the worker had given up");
    world.source_life += 1;
    let step = Source::resolve(Tick(world.now));
    world.take_source(step);
    let world = world.run();
    assert!(matches!(world.end, Some(source::End::Migrated(_))), "{world:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn whatever_breaks_exactly_one_side_has_the_container(
        seed in any::<u64>(),
        faults in proptest::collection::vec(a_fault(), 0..4),
    ) {
        World::new(seed, faults).run();
    }
}
