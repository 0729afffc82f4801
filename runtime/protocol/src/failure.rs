//! What went wrong, and above all where the container is now.

use serde::{Deserialize, Serialize};

use crate::phase::Phase;

/// One of the two ends of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The host the container runs on when the migration begins.
    Source,
    /// The host it is to run on afterwards.
    Target,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// Where the container is after a migration ended. Callers act on it before they read the cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// The container runs on the source as before; the target is clean.
    RunningOnSource,
    /// The container runs on the target.
    RunningOnTarget,
    /// Neither side can run the container any more.
    Lost,
    /// COMMIT was sent and no answer came. The source stays frozen until the target can be asked.
    Unknown,
}

impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::RunningOnSource => "the container runs on the source",
            Self::RunningOnTarget => "the container runs on the target",
            Self::Lost => "the container is lost",
            Self::Unknown => "it is not known which side has the container; the source keeps it frozen",
        })
    }
}

/// A migration that did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("failed to migrate in phase {phase} on the {side}: {cause}; {fate}")]
pub struct Failure {
    /// The side on which the cause lies.
    pub side: Side,
    /// The phase in which it happened.
    pub phase: Phase,
    /// Where the container is now.
    pub fate: Fate,
    /// What happened and what to do about it: a lowercase fragment without a full stop.
    pub cause: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_side_phase_cause_and_fate() {
        let failure = Failure {
            side: Side::Target,
            phase: Phase::Restoring,
            fate: Fate::RunningOnSource,
            cause: "criu failed".to_owned(),
        };
        assert_eq!(
            failure.to_string(),
            "failed to migrate in phase restoring on the target: criu failed; the container runs on the source"
        );
    }
}
