//! What has to hold at every moment, and at the end.

use godwit_protocol::failure::Fate;
use godwit_protocol::fate::Decision;
use godwit_protocol::source;

use crate::world::{Fault, Tasks, World};

impl World {
    pub(crate) fn check_moment(&self) {
        let both = (self.source_tasks, self.target_tasks);
        assert_ne!(both, (Tasks::Running, Tasks::Running), "both sides run: {self:?}");
        assert!(self.commit_announced || self.target_tasks != Tasks::Running, "resumed without COMMIT");
        // What can no longer change is never both absent: a container is lost only with the target it ran on.
        assert!(both != (Tasks::Absent, Tasks::Absent) || self.perished, "neither side has it: {self:?}");
        if self.target_tasks == Tasks::Running && self.lacking > 0 {
            assert_eq!(self.source_tasks, Tasks::Frozen, "the target lacks pages: {self:?}");
        }
    }

    pub(crate) fn check_end(&self) {
        let fate = match &self.end {
            Some(source::End::Migrated(_)) => Fate::RunningOnTarget,
            Some(source::End::Failed(failure)) => failure.fate,
            Some(source::End::Checked) => unreachable!("no dry run here"),
            // The worker died before COMMIT, and the shim thawed the container.
            None => Fate::RunningOnSource,
        };
        match fate {
            Fate::RunningOnTarget => {
                assert_eq!(self.source_tasks, Tasks::Absent, "{self:?}");
                assert!(self.target_tasks == Tasks::Running || self.perished, "{self:?}");
            }
            Fate::RunningOnSource => {
                assert_eq!(self.source_tasks, Tasks::Running, "{self:?}");
                assert_eq!(self.target_tasks, Tasks::Absent, "{self:?}");
            }
            Fate::Unknown => self.check_unknown(),
            Fate::Lost => {
                assert!(self.perished, "{self:?}");
                assert_eq!(
                    (self.source_tasks, self.target_tasks),
                    (Tasks::Absent, Tasks::Absent),
                    "{self:?}"
                );
            }
        }
    }

    fn check_unknown(&self) {
        assert!(self.commit_announced, "{self:?}");
        // A worker that died while it rolled back may have thawed already: then the record bars the target.
        let barred = self.record == Decision::Aborted && self.target_tasks == Tasks::Absent;
        assert!(self.source_tasks == Tasks::Frozen || barred, "{self:?}");
        let agent_was_away =
            self.strikes(|fault| matches!(fault, Fault::AgentDownFrom(_, for_s) if for_s > 60));
        assert!(agent_was_away, "{self:?}");
    }
}
