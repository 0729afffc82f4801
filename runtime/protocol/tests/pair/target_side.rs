//! The target's worker and its shim, as far as the world pretends them.

use godwit_protocol::fate::Decision;
use godwit_protocol::report::{TargetMemory, Tick};
use godwit_protocol::source::PeerEvent;
use godwit_protocol::target::{self, Action};
use godwit_protocol::wire::message::Resumed;

use crate::world::{Fault, Happening, Lane, Tasks, World};

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
            self.target_actions += 1;
            let count = self.target_actions;
            let fails =
                self.strikes(|fault| matches!(fault, Fault::TargetActionFails(n) if u32::from(n) == count));
            // What is said to the source fails with the link. The last step of the record overwrites a word in place:
            // if it fails, only a source that lost the link as well is left without an answer.
            let last_step = action == Action::Record(Decision::Resumed) && self.record == Decision::Filling;
            let may_fail = !matches!(
                action,
                Action::Undo { .. } | Action::Destroy | Action::SendLacking | Action::ReportFilled(_)
            ) && !last_step;
            if fails && may_fail {
                let cause = "an action failed".to_owned();
                self.soon(Happening::AtTarget(target::Event::Failed { cause }));
            } else {
                self.act_target(action);
            }
        }
        if self.target.as_ref().is_some_and(|target| target.end().is_some()) {
            self.target = None;
            self.close_link();
        }
    }

    fn act_target(&mut self, action: Action) {
        match action {
            Action::SendReady => self.tell_source(PeerEvent::Ready),
            Action::SendApplied(pass) => self.tell_source(PeerEvent::RootfsApplied(pass)),
            Action::SendRoundReceived(round) => self.tell_source(PeerEvent::RoundReceived(round)),
            Action::SendReceived => self.tell_source(PeerEvent::Received),
            Action::Restore => {
                self.target_tasks = Tasks::Frozen;
                if self.lacking == 0 {
                    self.feed_target(target::Event::Arrived);
                }
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
            Action::ReportResumed { .. } => {
                self.tell_source(PeerEvent::Resumed(Resumed::default()));
                self.check_filled();
            }
            Action::ReportFilled(memory) => self.tell_source(PeerEvent::MemoryComplete(memory)),
            Action::SendLacking => {
                let life = self.source_life;
                self.send(Lane::ToSource, Happening::Lacking(life));
            }
            Action::DropLink => self.lose_link(),
            Action::Destroy => {
                self.target_tasks = Tasks::Absent;
                self.perished = true;
                if self.record.may_become(Decision::Lost) {
                    self.record = Decision::Lost;
                }
                self.soon(Happening::AtTarget(target::Event::Undone));
            }
            Action::Undo { tell } => {
                self.target_tasks = Tasks::Absent;
                if self.record == Decision::Aborted || self.record.may_become(Decision::Aborted) {
                    self.record = Decision::Aborted;
                    if tell.is_some() {
                        self.tell_source(PeerEvent::Aborted { detail: "aborted".to_owned() });
                    }
                    self.soon(Happening::AtTarget(target::Event::Undone));
                } else {
                    // It has run here, and the record's last step was answered with an error.
                    self.perished = true;
                    let cause = "the record says otherwise".to_owned();
                    self.soon(Happening::AtTarget(target::Event::UndoFailed { cause }));
                }
            }
            Action::ReportFailed { .. } => {}
        }
    }

    pub(crate) fn page_came(&mut self) {
        if self.target.is_some() {
            self.lacking -= 1;
            if self.lacking == 0 {
                self.feed_target(target::Event::Arrived);
            }
            self.check_filled();
        }
    }

    fn check_filled(&mut self) {
        if self.lacking == 0 {
            // A large container takes its time to be put in place.
            let pause = if self.below(4) == 0 { 20_000_000_000 } else { 0 } + self.a_while();
            self.after(pause, Happening::AtTarget(target::Event::Filled(TargetMemory::default())));
        }
    }

    /// Tasks that CRIU holds, or whose pages are to come, die with the worker; tasks that have everything do not.
    pub(crate) fn target_dies(&mut self) {
        let Some(target) = self.target.take() else { return };
        match self.target_tasks {
            Tasks::Frozen => self.target_tasks = Tasks::Absent,
            Tasks::Running
                if ["Filling", "Stranded"].contains(&target.label()) || self.record == Decision::Filling =>
            {
                self.target_tasks = Tasks::Absent;
                self.perished = true;
            }
            _ => {}
        }
        self.lose_link();
    }
}
