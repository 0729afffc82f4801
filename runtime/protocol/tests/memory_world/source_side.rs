//! The source's machine, and what it wants done.

use std::time::Duration;

use godwit_protocol::fate::FateAnswer;
use godwit_protocol::report::Tick;
use godwit_protocol::rootfs::Pass;
use godwit_protocol::source::{self, Action, PeerEvent, Source};
use godwit_protocol::target::{self, Target};
use godwit_protocol::wire::Message;

use crate::link::{Frame, Job, addresses, runs};
use crate::program;
use crate::sending::ROUND_FINAL;
use crate::world::{Happening, World};

impl World {
    pub(crate) fn feed_source(&mut self, event: source::Event) {
        let dumped = event == source::Event::Dumped;
        if let Some(source) = self.source.take() {
            let step = source.step(event, Tick(self.now));
            self.take_source(step);
        }
        if dumped {
            self.dumped = true;
            // The state may be there, or restored, before that.
            self.soon(Happening::AtSource(source::Event::Confirmed));
            self.plan_when_ready();
        }
    }

    pub(crate) fn take_source(&mut self, step: source::Step) {
        self.source = Some(step.state);
        for action in step.actions {
            self.act_source(action);
        }
        if let Some(end) = self.source.as_ref().and_then(Source::end).cloned() {
            self.end = Some(end);
            self.source = None;
            self.lose_link();
        }
    }

    fn act_source(&mut self, action: Action) {
        let soon = |event| Happening::AtSource(event);
        match action {
            Action::Connect => self.soon(soon(source::Event::LinkUp)),
            Action::SendOffer => self.soon(soon(source::Event::Peer(PeerEvent::Accepted(self.way)))),
            Action::SendBlobs => {
                let step = Target::begin(true, Tick(self.now));
                self.take_target(step);
            }
            Action::SendRootfs => {
                let sent = Job::Tell(source::Event::RootfsSent);
                self.tell_target([sent, say(&Message::RootfsEnd { pass: Pass::Live })]);
            }
            Action::OpenStreams => self.soon(soon(source::Event::StreamsOpen)),
            Action::Scan => {
                self.collect();
                self.soon(soon(source::Event::Scanned { pages: self.found.pages(), hot_pages: 0 }));
            }
            Action::SendRound { round, .. } => self.send_round(round),
            Action::Freeze => {
                self.source_runs = false;
                self.oracle = program::seen(&self.memory);
                self.soon(soon(source::Event::Froze));
            }
            Action::Dump { leave_pages } => self.dump(leave_pages),
            Action::Commit => self.tell_target([say(&Message::Commit)]),
            Action::AskFate { pause } => self.later(pause, Happening::Ask),
            Action::Serve => self.serve(),
            Action::Rejoin { pause, reopen } => self.later(pause, Happening::Rejoin(reopen)),
            Action::Kill => {
                self.check_needless();
                self.source_killed = true;
                // What the target dropped before it came need not be sent any more.
                self.lanes.iter_mut().for_each(|lane| lane.jobs.clear());
                self.unclaimed.clear();
                self.soon(soon(source::Event::Killed));
            }
            Action::ReportMoved => self.soon(soon(source::Event::Release)),
            Action::CleanUp => self.soon(soon(source::Event::CleanedUp)),
            Action::RollBack { tell } => {
                if let Some(detail) = tell {
                    self.tell_target([say(&Message::Abort { detail: &detail })]);
                }
                self.source_runs = true;
                self.soon(soon(source::Event::RolledBack));
            }
            Action::LeaveFrozen | Action::ReportChecked | Action::ReportFailed { .. } => {}
        }
    }

    fn later(&mut self, pause: Duration, happening: Happening) {
        let delay = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX) + self.random.below(1_000_000);
        self.after(delay, happening);
    }

    pub(crate) fn tell_target(&mut self, jobs: impl IntoIterator<Item = Job>) {
        self.give(usize::from(self.streams) + 2, jobs);
    }

    fn collect(&mut self) {
        let random = &mut self.random;
        let unsent = std::mem::take(&mut self.found);
        self.found = self.tracker.collect(&self.memory, || random.one_in(2));
        self.found.add_unsent(unsent, &self.memory);
    }

    /// The final scan, the last round, and CRIU meanwhile.
    fn dump(&mut self, leave_pages: bool) {
        self.collect();
        if leave_pages {
            for (space, pages) in std::mem::take(&mut self.found.dirty) {
                self.remote.extend(pages.iter().map(|address| (space, *address)));
                // An old copy must not be taken for the page that is still to come.
                self.found.absent.entry(space).or_default().extend(pages);
            }
        }
        self.send_round(ROUND_FINAL);
        self.later(Duration::from_millis(1), Happening::AtSource(source::Event::Dumped));
    }

    /// Tells the target what it must have, once CRIU has dumped and the last round is on its way.
    pub(crate) fn plan_when_ready(&mut self) {
        if !self.dumped || self.marking > 0 {
            return;
        }
        let mut jobs = vec![say(&Message::RootfsEnd { pass: Pass::Final })];
        for space in self.memory.keys() {
            let remote: Vec<u64> =
                self.remote.iter().filter(|page| page.0 == *space).map(|page| page.1).collect();
            let stored_pages = self.stored.get(space).map_or(0, |pages| pages.len() as u64);
            let remote = runs(&remote);
            jobs.push(say(&Message::MemoryPlan { space: *space, round: ROUND_FINAL, stored_pages, remote }));
        }
        self.unclaimed = self.remote.clone();
        jobs.extend([Job::Tell(source::Event::StateSent), say(&Message::StateEnd { manifest: vec![] })]);
        self.tell_target(jobs);
    }

    /// What the target's worker says on the main link.
    pub(crate) fn source_hears(&mut self, message: Message<'_>) {
        let event = match message {
            Message::Ready { .. } => PeerEvent::Ready,
            Message::RootfsApplied { pass } => PeerEvent::RootfsApplied(pass),
            Message::LackingEnd => return self.rejoins(),
            Message::Lacking { space, runs } => {
                return self.lacking.extend(addresses(&runs).map(|address| (space, address)));
            }
            Message::RoundReceived { round } => PeerEvent::RoundReceived(round),
            Message::Received => PeerEvent::Received,
            Message::Restored => PeerEvent::Restored,
            Message::Resumed(resumed) => PeerEvent::Resumed(resumed),
            Message::MemoryComplete(memory) => PeerEvent::MemoryComplete(memory),
            Message::Abort { detail } => PeerEvent::Aborted { detail: detail.to_owned() },
            other => panic!("{other:?}"),
        };
        self.feed_source(source::Event::Peer(event));
    }

    pub(crate) fn ask(&mut self) {
        let answer = self.record.asked(self.target.is_some()).answer;
        self.record = self.record.asked(self.target.is_some()).decision;
        self.soon(Happening::AtSource(source::Event::Answered(answer)));
    }

    /// Asks the agent first, and then comes back to a worker that still lacks pages.
    pub(crate) fn rejoin(&mut self, reopen: bool) {
        match self.record.asked(self.target.is_some()).answer {
            FateAnswer::Filling if reopen => {
                // Nothing is claimed from here on but what the target says it lacks.
                self.unclaimed.clear();
                self.open_link();
                self.feed_target(target::Event::Rejoined);
                // If the link broke under the answer, that has been said.
                if !self.answering && self.link_up {
                    self.rejoin_fails();
                }
            }
            answer => self.soon(Happening::AtSource(source::Event::Answered(answer))),
        }
    }

    pub(crate) fn rejoin_fails(&mut self) {
        let cause = "nobody answers".to_owned();
        self.soon(Happening::AtSource(source::Event::AskFailed { cause }));
    }

    fn rejoins(&mut self) {
        self.answering = false;
        self.rejoined += 1;
        self.unclaimed = std::mem::take(&mut self.lacking);
        assert!(self.unclaimed.is_subset(&self.remote));
        self.feed_source(source::Event::Rejoined);
    }
}

pub(crate) fn say(message: &Message<'_>) -> Job {
    Job::Frame(Frame::of(message))
}
