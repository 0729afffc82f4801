//! The target's machine, and what it wants done.

use godwit_protocol::fate::Decision;
use godwit_protocol::report::{TargetMemory, Tick};
use godwit_protocol::target::{self, Action};
use godwit_protocol::wire::Message;
use godwit_protocol::wire::message::Resumed;

use crate::link::{Job, runs};
use crate::program::Pages;
use crate::source_side::say;
use crate::world::{Happening, World};

impl World {
    pub(crate) fn feed_target(&mut self, event: target::Event) {
        if let Some(target) = self.target.take() {
            let step = target.step(event, Tick(self.now));
            self.take_target(step);
        }
    }

    pub(crate) fn take_target(&mut self, step: target::Step) {
        self.target = Some(step.state);
        for action in step.actions {
            self.act_target(action);
        }
        if self.target.as_ref().is_some_and(|target| target.end().is_some()) {
            self.target = None;
        }
    }

    fn act_target(&mut self, action: Action) {
        match action {
            Action::SendReady => self.tell_source([say(&Message::Ready { room_bytes: 0 })]),
            Action::SendApplied(pass) => self.tell_source([say(&Message::RootfsApplied { pass })]),
            Action::SendRoundReceived(round) => self.tell_source([say(&Message::RoundReceived { round })]),
            Action::SendReceived => self.tell_source([say(&Message::Received)]),
            Action::Restore => {
                self.restore();
                self.soon(Happening::AtTarget(target::Event::Held));
            }
            Action::SendRestored => self.tell_source([say(&Message::Restored)]),
            Action::Record(next) => {
                if self.record.may_become(next) {
                    self.record = next;
                }
                self.soon(Happening::AtTarget(target::Event::Recorded(self.record)));
            }
            Action::Resume => {
                self.target_runs = true;
                self.soon(Happening::AtTarget(target::Event::Running { pid: 1 }));
            }
            Action::ReportResumed { pid } => {
                let resumed = Resumed { pid, ..Resumed::default() };
                self.tell_source([say(&Message::Resumed(resumed))]);
                self.begin_fill();
            }
            Action::ReportFilled(memory) => self.tell_source([say(&Message::MemoryComplete(memory))]),
            Action::DropLink => self.lose_link(),
            Action::SendLacking => self.send_lacking(),
            Action::Undo { tell } => {
                self.record = Decision::Aborted;
                self.ledgers.clear();
                if let Some(detail) = tell {
                    self.tell_source([say(&Message::Abort { detail: &detail })]);
                }
                self.soon(Happening::AtTarget(target::Event::Undone));
            }
            Action::Destroy => panic!("a container was destroyed"),
            Action::ReportFailed { .. } => {}
        }
    }

    pub(crate) fn tell_source(&mut self, jobs: impl IntoIterator<Item = Job>) {
        self.give(usize::from(self.streams) + 3, jobs);
    }

    /// What the source says on the main link.
    pub(crate) fn target_hears(&mut self, message: Message<'_>) {
        match message {
            Message::RootfsEnd { pass } => self.feed_target(target::Event::Applied(pass)),
            Message::MemoryPlan { space, stored_pages, remote, .. } => {
                self.take_plan(space, stored_pages, &remote);
            }
            Message::StateEnd { .. } => {
                self.state_ended = true;
                self.complete_when_ready();
            }
            Message::Commit => self.feed_target(target::Event::Commit),
            Message::Abort { detail } => {
                self.feed_target(target::Event::Abort { detail: detail.to_owned() });
            }
            other => panic!("{other:?}"),
        }
    }

    /// Tells a source that came back which pages are still to come, and then asks anew for those that tasks wait for.
    fn send_lacking(&mut self) {
        self.answering = true;
        let mut lacking = Pages::new();
        for (space, address) in self.lacking_pages() {
            lacking.entry(space).or_default().insert(address);
        }
        let jobs: Vec<Job> = lacking
            .iter()
            .map(|(space, pages)| {
                let runs = runs(&pages.iter().copied().collect::<Vec<_>>());
                say(&Message::Lacking { space: *space, runs })
            })
            .collect();
        self.tell_source(jobs);
        self.tell_source([say(&Message::LackingEnd)]);
        self.ask_again();
    }

    /// Says that every page is in its task, once that is so.
    pub(crate) fn check_filled(&mut self) {
        if !self.filled && self.target_runs && !self.is_outstanding() {
            self.filled = true;
            self.soon(Happening::AtTarget(target::Event::Filled(TargetMemory::default())));
        }
    }
}
