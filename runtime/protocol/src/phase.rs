//! Where a migration stands, in the terms that logs, progress lines and failures use.

use serde::{Deserialize, Serialize};

/// A phase of a migration, seen from the source.
///
/// The order is the order in which a migration passes through them; [`Phase::Filling`] and everything after
/// it can no longer be rolled back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The link to the target's agent is being opened.
    Connecting,
    /// Versions, features and the preflight of both sides are compared; nothing has been moved.
    Negotiating,
    /// The target creates image, snapshot, container record and incoming task; the container runs.
    Preparing,
    /// The writable layer is copied while the container runs.
    CopyingRootfs,
    /// Pages are sent, round by round, while the container runs.
    CopyingMemory,
    /// The container is frozen: its state is dumped and sent.
    Frozen,
    /// The target restores the container and holds it stopped.
    Restoring,
    /// COMMIT has been sent and its acknowledgement is awaited; the fate is unknown until it comes.
    Committing,
    /// The container runs on the target; what it lacks of its pages is put in place.
    Filling,
    /// The target runs the container and has all of it.
    Committed,
    /// The source's record, task and snapshot are being removed.
    CleaningUp,
    /// The migration has ended, well or not.
    Done,
}

impl Phase {
    /// Returns the label used in logs, JSON and messages.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Negotiating => "negotiating",
            Self::Preparing => "preparing",
            Self::CopyingRootfs => "copying_rootfs",
            Self::CopyingMemory => "copying_memory",
            Self::Frozen => "frozen",
            Self::Restoring => "restoring",
            Self::Committing => "committing",
            Self::Filling => "filling",
            Self::Committed => "committed",
            Self::CleaningUp => "cleaning_up",
            Self::Done => "done",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_is_what_json_carries() {
        for phase in [
            Phase::Connecting,
            Phase::CopyingRootfs,
            Phase::CopyingMemory,
            Phase::Filling,
            Phase::Committing,
            Phase::Done,
        ] {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.label());
        }
    }
}
