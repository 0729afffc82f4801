//! The target's record of one migration: what was decided, and how a question about it is answered.
//!
//! ```text
//!             worker: COMMIT came          worker: the container runs, and has all of its memory
//! Undecided ───────────────────► Committed ───────────────────────────────────────► Resumed
//!     │                              │ │   the container runs                          ▲
//!     │ worker or agent gives up,    │ └────────────────────────► Filling ─────────────┘
//!     │ or the source asks           │                               │  the last page is in its task
//!     │                              │                               │
//!     │                              │ the worker could not resume,  │ the worker gives up, or is dead:
//!     │                              │ or is dead: whoever finds     │ whoever finds that kills what is
//!     │                              │ that kills what was restored  │ left of the container first
//!     └──────────────► Aborted ◄─────┘                               └──────────────► Lost
//! ```
//! `Aborted`, `Resumed` and `Lost` are final. The record outlives worker and agent (`godwit_engine::decision` keeps it in
//! a file). The worker resumes the container only after it has won the step to `Committed`, so once `Aborted` is
//! recorded no COMMIT that is still under way can start the container: the source may go on. And the source kills
//! its own only when told of `Resumed`: a target that dies between the two steps has lost nothing, but what the
//! container did in the moment before its running was recorded. While the container runs and pages are still to come the
//! record says `Filling`, so that a source that lost the link, or a worker in the place of one that died, knows whether
//! the target may still need the pages that only the source has. A container that lacks pages when the worker that serves
//! them ends cannot go on, and not go back either, since it has run: it is lost.

use serde::{Deserialize, Serialize};

/// What the target has decided about a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Nothing yet.
    #[default]
    Undecided,
    /// The container will never run here by this migration.
    Aborted,
    /// The worker may let the container run and is about to.
    Committed,
    /// The container runs here, and not all of its memory has come.
    Filling,
    /// The container runs here, and needs nothing of the source.
    Resumed,
    /// The container has run here, and was ended because it lacked memory that will not come.
    Lost,
}

/// The answer to the source's question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FateAnswer {
    /// The container does not and will not run on the target: the source may let it go on.
    NotHere,
    /// The worker is at it: ask again.
    Pending,
    /// The container runs on the target, and lacks pages: the source may not go on, and may kill its own only if it
    /// knows that it has sent all of them.
    Filling,
    /// The container runs on the target: the source may kill its own.
    Here,
    /// The container has run on the target and was ended there, lacking memory: it can go on nowhere, and the source
    /// has to end its own.
    Lost,
}

impl FateAnswer {
    /// Tells whether the container has run on the target: what was made for it there stays.
    #[must_use]
    pub const fn has_run(self) -> bool {
        matches!(self, Self::Here | Self::Filling | Self::Lost)
    }
}

/// What a question does to the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// What the record holds from now on; it must be written before the answer is sent.
    pub decision: Decision,
    /// The answer.
    pub answer: FateAnswer,
    /// Whether whatever was restored must be killed before the record is written.
    pub kill_first: bool,
}

impl Decision {
    /// Answers the source's question about the fate.
    ///
    /// A question about an undecided migration decides it: the source asks only after it has given up on its
    /// link, so no answer but `NotHere` would ever become true without a race.
    #[must_use]
    pub const fn asked(self, worker_alive: bool) -> Asked {
        let (decision, answer, kill_first) = match (self, worker_alive) {
            (Self::Undecided | Self::Aborted, _) => (Self::Aborted, FateAnswer::NotHere, false),
            (Self::Committed, true) => (Self::Committed, FateAnswer::Pending, false),
            (Self::Committed, false) => (Self::Aborted, FateAnswer::NotHere, true),
            (Self::Filling, true) => (Self::Filling, FateAnswer::Filling, false),
            // Nobody is left to put its pages in place, but it has run: there is no way back.
            (Self::Filling, false) => (Self::Lost, FateAnswer::Lost, true),
            (Self::Resumed, _) => (Self::Resumed, FateAnswer::Here, false),
            (Self::Lost, _) => (Self::Lost, FateAnswer::Lost, false),
        };
        Asked { decision, answer, kill_first }
    }

    /// Tells whether the record may go from this decision to `next`.
    #[must_use]
    pub const fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Undecided, Self::Aborted | Self::Committed)
                | (Self::Committed, Self::Aborted | Self::Filling | Self::Resumed)
                | (Self::Filling, Self::Resumed | Self::Lost)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_been_answered_for_good_never_changes() {
        for decision in [
            Decision::Undecided,
            Decision::Aborted,
            Decision::Committed,
            Decision::Filling,
            Decision::Resumed,
            Decision::Lost,
        ] {
            for alive in [false, true] {
                let asked = decision.asked(alive);
                assert!(asked.decision == decision || decision.may_become(asked.decision));
                if !matches!(asked.answer, FateAnswer::Pending | FateAnswer::Filling) {
                    assert_eq!(asked.decision.asked(!alive).answer, asked.answer);
                }
            }
        }
    }

    #[test]
    fn once_the_container_has_run_here_the_source_is_never_told_to_go_on() {
        for decision in [Decision::Filling, Decision::Resumed, Decision::Lost] {
            assert!(!decision.may_become(Decision::Aborted));
            for alive in [false, true] {
                assert!(decision.asked(alive).answer.has_run());
            }
        }
    }

    #[test]
    fn a_container_that_lacks_pages_is_lost_with_its_worker() {
        assert_eq!(Decision::Filling.asked(true).answer, FateAnswer::Filling);
        let lost = Asked { decision: Decision::Lost, answer: FateAnswer::Lost, kill_first: true };
        assert_eq!(Decision::Filling.asked(false), lost);
        assert!(!Decision::Lost.may_become(Decision::Resumed));
        assert!(!Decision::Resumed.may_become(Decision::Lost));
    }
}
