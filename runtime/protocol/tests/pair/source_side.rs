//! The source's worker and its shim, as far as the world pretends them.

use std::time::Duration;

use godwit_protocol::fate::{Decision, FateAnswer};
use godwit_protocol::plan::Way;
use godwit_protocol::report::Tick;
use godwit_protocol::rootfs::Pass;
use godwit_protocol::source::{self, Action, PeerEvent, RoundSent, Source};
use godwit_protocol::target::{self, Target};

use crate::world::{Fault, Happening, Lane, Tasks, World};

impl World {
    fn at_source(&mut self, event: source::Event) {
        let life = self.source_life;
        self.soon(Happening::AtSource(event, life));
    }

    fn soon_and_then_tell(&mut self, event: source::Event, frames: Vec<target::Event>) {
        let life = self.source_life;
        self.soon(Happening::AtSourceThenTell(event, frames, life));
    }

    pub(crate) fn feed_source(&mut self, event: source::Event) {
        if let Some(source) = self.source.take() {
            let step = source.step(event, Tick(self.now));
            self.take_source(step);
        }
    }

    pub(crate) fn take_source(&mut self, step: source::Step) {
        self.source = Some(step.state);
        for action in step.actions {
            self.source_actions += 1;
            let count = self.source_actions;
            let fails =
                self.strikes(|fault| matches!(fault, Fault::SourceActionFails(n) if u32::from(n) == count));
            if fails && may_fail(&action) {
                if action == Action::Commit {
                    // The line to the shim comes first, and the frame may have left in spite of the error.
                    self.commit_announced = true;
                    if self.below(2) == 0 {
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

    fn act_source(&mut self, action: Action) {
        let life = self.source_life;
        match action {
            Action::Connect => self.at_source(source::Event::LinkUp),
            Action::SendOffer => self.tell_source(PeerEvent::Accepted(self.way)),
            Action::SendBlobs => {
                let step = Target::begin(self.way != Way::InImages, Tick(self.now));
                self.take_target(step);
            }
            Action::SendRootfs => {
                let sent = source::Event::RootfsSent;
                self.soon_and_then_tell(sent, vec![target::Event::Applied(Pass::Live)]);
            }
            Action::OpenStreams => self.at_source(source::Event::StreamsOpen),
            Action::Scan => {
                let pages = self.below(1_000_000);
                let hot_pages = self.below(pages + 1);
                self.at_source(source::Event::Scanned { pages, hot_pages });
            }
            Action::SendRound { round, .. } => {
                // The streams run beside the main link: either may be first to speak of the round.
                self.send(Lane::Pages, Happening::ToTarget(target::Event::RoundComplete(round)));
                let bytes = self.below(1 << 32);
                self.at_source(source::Event::RoundSent(RoundSent { bytes, ..RoundSent::default() }));
            }
            Action::Freeze => self.freeze(),
            Action::Dump { leave_pages } => {
                if self.way != Way::InImages {
                    let last = target::Event::RoundComplete(99);
                    self.send(Lane::Pages, Happening::ToTarget(last));
                }
                if leave_pages {
                    self.lacking = self.below(6) + 1;
                }
                self.soon_and_then_tell(source::Event::Dumped, vec![target::Event::Applied(Pass::Final)]);
            }
            Action::Commit => {
                self.commit_announced = true;
                self.tell_target(target::Event::Commit);
            }
            Action::AskFate { pause } => {
                let pause = ns(pause) + self.a_while();
                self.after(pause, Happening::Ask(life));
            }
            Action::Serve => self.serve(),
            Action::Rejoin { pause, reopen } => {
                self.lose_link();
                let pause = ns(pause) + self.a_while();
                self.after(pause, Happening::Rejoin(life, reopen));
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

    /// Freezes the source's tasks; now and then something is under way that keeps them from being dumped.
    fn freeze(&mut self) {
        let event = if self.below(3) == 0 {
            source::Event::Unsettled { cause: "a connection waits".to_owned() }
        } else {
            self.source_tasks = Tasks::Frozen;
            source::Event::Froze
        };
        self.at_source(event);
    }

    /// What follows when something has been sent.
    pub(crate) fn sent(&mut self, event: source::Event, frames: Vec<target::Event>) {
        let dumped = event == source::Event::Dumped;
        self.feed_source(event);
        for frame in frames {
            // That everything is there is said by the engine, which waits for the streams.
            if frame == target::Event::Complete {
                self.await_pages();
            }
            self.tell_target(frame);
        }
        if dumped {
            self.soon_and_then_tell(source::Event::StateSent, vec![target::Event::Complete]);
            let confirmed = if self.strikes(|fault| matches!(fault, Fault::DumpUntrue)) {
                source::Event::Failed { cause: "it is not what was dumped".to_owned() }
            } else {
                source::Event::Confirmed
            };
            // Now and then the target has restored it all before.
            let (pause, life) = (self.a_while() * (1 + 5 * self.below(2)), self.source_life);
            self.after(pause, Happening::AtSource(confirmed, life));
        }
    }

    fn serve(&mut self) {
        self.first_page_frame.get_or_insert(self.frames + 1);
        for _ in 0..self.lacking {
            self.send(Lane::Pages, Happening::Page);
        }
    }

    pub(crate) fn ask(&mut self) {
        let event = self.answer().map_or_else(nobody_answers, source::Event::Answered);
        self.at_source(event);
    }

    fn answer(&mut self) -> Option<FateAnswer> {
        if !self.agent_up {
            return None;
        }
        let asked = self.record.asked(self.target.is_some());
        if asked.kill_first {
            self.target_tasks = Tasks::Absent;
            self.perished |= self.record == Decision::Filling;
        }
        self.record = asked.decision;
        Some(asked.answer)
    }

    /// The agent is asked first; a worker that still lacks pages gets new connections, where that is known how to do.
    pub(crate) fn rejoin(&mut self, reopen: bool) {
        match self.answer() {
            Some(FateAnswer::Filling) if reopen && self.reopens => {
                self.open_link();
                self.feed_target(target::Event::Rejoined);
                if !self.is_answering() {
                    // It was not there yet: what it lacks is awaited for a while.
                    self.rejoin_fails();
                }
            }
            Some(answer) => self.at_source(source::Event::Answered(answer)),
            None => self.rejoin_fails(),
        }
    }

    pub(crate) fn rejoin_fails(&mut self) {
        self.at_source(nobody_answers());
    }

    /// What the shim does when its worker dies: thaw, or ask in its place.
    pub(crate) fn source_dies(&mut self) {
        let Some(source) = &self.source else { return };
        // Once it kills nothing can be decided any more; before that the worker's part is taken over.
        if ["Killing", "AwaitingRelease", "CleaningUp"].contains(&source.label()) {
            return;
        }
        self.died_serving |= ["Serving", "Rejoining"].contains(&source.label());
        self.source = None;
        self.source_life += 1;
        self.lose_link();
        if self.commit_announced {
            self.soon(Happening::Resolve);
        } else {
            self.source_tasks = Tasks::Running;
        }
    }
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn nobody_answers() -> source::Event {
    source::Event::AskFailed { cause: "nobody answers".to_owned() }
}

/// Undoing, killing and what only speaks to the shim have no way to fail here.
fn may_fail(action: &Action) -> bool {
    !matches!(
        action,
        Action::Kill
            | Action::RollBack { .. }
            | Action::CleanUp
            | Action::LeaveFrozen
            | Action::AskFate { .. }
            | Action::Rejoin { .. }
            | Action::ReportMoved
            | Action::ReportChecked
            | Action::ReportFailed { .. }
    )
}
