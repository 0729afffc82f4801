//! How the pages of one migration travel: what was asked for, as far as both hosts can do it.
//!
//! ```text
//! mode + what the source can do + what the target can do ──choose──► Plan (a way, and notes for the report)
//! ```
//! What cannot be done is never replaced in silence: it is refused by name, or done otherwise with a note.

use serde::{Deserialize, Serialize};

use crate::request::{Images, Limits, Mode};

/// When pages travel, decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// In CRIU's images, all of them in the freeze: for hosts that cannot do better.
    InImages,
    /// In the freeze.
    Native,
    /// In rounds, and the rest in the freeze.
    Precopy,
    /// After the container runs on the target.
    Postcopy,
    /// In rounds, and the rest after the container runs on the target.
    Hybrid,
    /// In rounds as long as that leads to a short downtime; then by what the limits allow.
    Auto,
}

impl Way {
    /// Tells whether pages travel in rounds while the container runs.
    #[must_use]
    pub const fn has_rounds(self) -> bool {
        matches!(self, Self::Precopy | Self::Hybrid | Self::Auto)
    }

    /// Tells whether godwit carries the pages, not CRIU.
    #[must_use]
    pub const fn is_ours(self) -> bool {
        !matches!(self, Self::InImages)
    }
}

/// What a host can do with memory; each field says why not, if it cannot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Abilities {
    /// Follow which pages are written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cannot_track: Option<String>,
    /// Follow it without a halt of the container in each round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cannot_track_running: Option<String>,
    /// Keep the pages from CRIU. Without it CRIU dumps lazily: it finds all pages, and leaves them out of its images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cannot_hide: Option<String>,
    /// Restore with the pages still to come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cannot_serve: Option<String>,
}

/// A way, and what the report has to say about how it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// When pages travel.
    pub way: Way,
    /// What is done otherwise than asked, and why.
    pub notes: Vec<String>,
}

impl Plan {
    /// Tells whether godwit carries the pages between two such hosts, by what is asked for and what
    /// they can do. Both ends come to the same answer.
    #[must_use]
    pub const fn is_ours(mode: Mode, images: Images, target: &Abilities) -> bool {
        target.cannot_serve.is_none() && !matches!((mode, images), (Mode::Native, Images::Disk))
    }

    /// Chooses how pages travel.
    ///
    /// # Errors
    /// Why what was asked for cannot be done, and what can be.
    pub fn choose(
        mode: Mode,
        images: Images,
        limits: &Limits,
        source: &Abilities,
        target: &Abilities,
    ) -> Result<Self, String> {
        if let Some(why) = &target.cannot_serve {
            let note = format!(
                "all pages travel in criu's images, in the freeze: the target cannot restore without them ({why})"
            );
            return Ok(Self { way: Way::InImages, notes: vec![note] });
        }
        let way = match mode {
            // What checkpoint, copy and restore have always been: all of it in files on storage.
            Mode::Native if images == Images::Disk => Way::InImages,
            Mode::Auto => Way::Auto,
            Mode::Native => Way::Native,
            Mode::Precopy => Way::Precopy,
            Mode::Postcopy => Way::Postcopy,
            Mode::Hybrid => Way::Hybrid,
        };
        let mut notes = Vec::new();
        if let Some(why) = source.cannot_hide.as_ref().filter(|_| way.is_ours()) {
            notes.push(format!("criu dumps lazily, which makes the freeze longer: {why}"));
        }
        let way = match (&source.cannot_track, &source.cannot_track_running) {
            (Some(why), _) if way == Way::Auto => {
                notes.push(format!("no rounds of pre-copy: {why}"));
                if limits.allow_postcopy { Way::Postcopy } else { Way::Native }
            }
            (Some(why), _) if way.has_rounds() => {
                return Err(format!(
                    "{mode} needs to know which pages are written, and the source cannot tell: {why}; use native or postcopy"
                ));
            }
            (None, Some(why)) if way.has_rounds() => {
                notes.push(format!(
                    "each round halts the container, to read which pages are soft-dirty: {why}"
                ));
                way
            }
            _ => way,
        };
        Ok(Self { way, notes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(
        mode: Mode,
        allow_postcopy: bool,
        source: &Abilities,
        target: &Abilities,
    ) -> Result<Plan, String> {
        Plan::choose(mode, Images::Cache, &Limits { allow_postcopy, ..Limits::default() }, source, target)
    }

    #[test]
    fn hosts_that_can_do_everything_do_what_is_asked() {
        let able = Abilities::default();
        for mode in Mode::ALL {
            let plan = choose(mode, false, &able, &able).unwrap();
            assert!(plan.notes.is_empty() && plan.way.has_rounds() == mode.has_rounds());
        }
    }

    #[test]
    fn without_tracking_rounds_are_refused_and_auto_does_without() {
        let (able, blind) = (
            Abilities::default(),
            Abilities { cannot_track: Some("kernel 6.7 is needed".to_owned()), ..Abilities::default() },
        );
        for mode in [Mode::Precopy, Mode::Hybrid] {
            assert!(choose(mode, true, &blind, &able).unwrap_err().contains("kernel 6.7"));
        }
        let plan = choose(Mode::Auto, true, &blind, &able).unwrap();
        assert!(plan.way == Way::Postcopy && plan.notes[0].contains("kernel 6.7"));
        assert_eq!(choose(Mode::Auto, false, &blind, &able).unwrap().way, Way::Native);
        assert_eq!(choose(Mode::Native, false, &blind, &able).unwrap().notes, Vec::<String>::new());
    }

    #[test]
    fn rounds_that_halt_the_container_are_made_and_said_to() {
        let able = Abilities::default();
        let halting =
            Abilities { cannot_track_running: Some("no userfaultfd".to_owned()), ..Abilities::default() };
        for mode in Mode::ALL {
            let plan = choose(mode, false, &halting, &able).unwrap();
            assert_eq!(plan.way, choose(mode, false, &able, &able).unwrap().way);
            assert_eq!(plan.notes.iter().any(|note| note.contains("no userfaultfd")), mode.has_rounds());
        }
    }

    #[test]
    fn native_through_storage_is_a_checkpoint_and_a_restore() {
        let able = Abilities::default();
        let choose = |mode| Plan::choose(mode, Images::Disk, &Limits::default(), &able, &able).unwrap();
        for mode in Mode::ALL {
            let plan = choose(mode);
            assert_eq!(plan.way.is_ours(), Plan::is_ours(mode, Images::Disk, &able));
            assert_eq!(plan.way == Way::InImages, mode == Mode::Native);
        }
    }

    #[test]
    fn without_serving_pages_go_the_old_way_and_the_report_says_so() {
        let able = Abilities::default();
        let target = Abilities { cannot_serve: Some("no userfaultfd".to_owned()), ..Abilities::default() };
        for mode in Mode::ALL {
            let ours = |target| Plan::is_ours(mode, Images::Cache, target);
            assert!(!ours(&target) && ours(&able));
            let plan = choose(mode, false, &able, &target).unwrap();
            assert!(plan.way == Way::InImages && plan.notes[0].contains("no userfaultfd"));
        }
    }

    #[test]
    fn without_hiding_criu_dumps_lazily_where_pages_are_ours_and_the_report_says_so() {
        let able = Abilities::default();
        let source = Abilities { cannot_hide: Some("no seccomp".to_owned()), ..Abilities::default() };
        for (mode, images) in Mode::ALL.into_iter().flat_map(|mode| Images::ALL.map(|images| (mode, images)))
        {
            let choose = |source| Plan::choose(mode, images, &Limits::default(), source, &able).unwrap();
            let plan = choose(&source);
            assert_eq!(plan.way, choose(&able).way);
            assert_eq!(plan.notes.iter().any(|note| note.contains("no seccomp")), plan.way.is_ours());
        }
        let both = Abilities { cannot_track: Some("no userfaultfd".to_owned()), ..source };
        assert_eq!(choose(Mode::Auto, false, &both, &able).unwrap().notes.len(), 2);
    }
}
