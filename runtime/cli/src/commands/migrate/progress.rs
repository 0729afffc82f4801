//! Progress on stderr: a bar on a terminal, a line per phase otherwise.

use std::io::{self, IsTerminal};

use godwit_protocol::Phase;
use godwit_protocol::report::Round;
use godwit_protocol::worker::Snapshot;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress goes.
pub(super) enum Progress {
    /// Nowhere.
    Silent,
    /// A line whenever the phase changes, or a round ends.
    Lines {
        /// The phase and the round that were shown last.
        shown: Option<(Phase, Option<u32>)>,
    },
    /// A bar that is drawn over itself.
    Bar(ProgressBar),
}

impl Progress {
    /// Chooses by what the user asked for and whether stderr is a terminal.
    pub(super) fn new(quiet: bool, json: bool) -> Self {
        match (quiet, io::stderr().is_terminal()) {
            (true, _) => Self::Silent,
            (false, true) => Self::Bar(bar()),
            // A machine that reads the object on stdout has no use for lines meant for people.
            (false, false) if json => Self::Silent,
            (false, false) => Self::Lines { shown: None },
        }
    }

    /// Shows how far the migration is.
    pub(super) fn show(&mut self, snapshot: &Snapshot) {
        match self {
            Self::Silent => {}
            Self::Lines { shown } => {
                let now = (snapshot.phase, snapshot.round.map(|round| round.round));
                // Its end is told by what is printed after it.
                if *shown != Some(now) && snapshot.ended.is_none() {
                    *shown = Some(now);
                    eprintln!("{}", line(snapshot));
                }
            }
            Self::Bar(bar) => {
                bar.set_length(snapshot.expected_bytes.max(snapshot.sent_bytes).max(1));
                bar.set_position(snapshot.sent_bytes);
                bar.set_prefix(words(snapshot.phase));
                bar.set_message(figures(snapshot));
                bar.tick();
            }
        }
    }

    /// Says something in between.
    pub(super) fn say(&self, text: &str) {
        match self {
            Self::Silent => {}
            Self::Lines { .. } => eprintln!("{text}"),
            Self::Bar(bar) => bar.println(text),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:<20} [{bar:30}] {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr()).with_style(style)
}

/// Returns what a phase is in plain words.
fn words(phase: Phase) -> &'static str {
    match phase {
        Phase::Connecting => "connecting",
        Phase::Negotiating => "checking both hosts",
        Phase::Preparing => "preparing the target",
        Phase::CopyingRootfs => "copying files",
        Phase::CopyingMemory => "copying memory",
        Phase::Frozen => "switching over",
        Phase::Restoring => "restoring",
        Phase::Committing => "committing",
        Phase::Filling => "runs there, bringing memory behind",
        Phase::Committed => "moved",
        Phase::CleaningUp => "cleaning up",
        Phase::Done => "done",
    }
}

/// Returns how far a migration is, in one line.
pub(in crate::commands) fn line(snapshot: &Snapshot) -> String {
    format!("{}: {}", words(snapshot.phase), figures(snapshot))
}

/// Returns what the rounds have shown.
fn round_in_words(round: &Round) -> String {
    format!(
        "round {}: {} sent, down for {:.0} ms if it stopped now",
        round.round,
        bytes(round.bytes),
        round.expected_downtime_ms
    )
}

/// Returns bytes, rate and time left, as far as they are known.
fn figures(snapshot: &Snapshot) -> String {
    let Snapshot { sent_bytes, expected_bytes, rate_bytes_per_s, .. } = *snapshot;
    let mut text = bytes(sent_bytes);
    if expected_bytes > sent_bytes {
        text = format!("{text} of {}", bytes(expected_bytes));
    }
    if rate_bytes_per_s > 0 {
        text = format!("{text}, {}/s", bytes(rate_bytes_per_s));
        // What the rate is at the beginning says nothing about the rest.
        if expected_bytes > sent_bytes && sent_bytes >= expected_bytes / 20 {
            let left_s = (expected_bytes - sent_bytes).div_ceil(rate_bytes_per_s);
            text = format!("{text}, {left_s} s left");
        }
    }
    // A round's downtime is known once the scan after it has been made.
    if let Some(ended) = snapshot.round.filter(|round| round.expected_downtime_ms > 0.0) {
        text = format!("{text}; {}", round_in_words(&ended));
    }
    text
}

/// Returns a size with one decimal place at most.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    // Tenths of the unit, in integers, so that no figure is off by a rounding of floats.
    let mut tenths = u128::from(bytes) * 10;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths = (tenths + 512) / 1024;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use godwit_protocol::Mode;

    use super::*;

    #[test]
    fn sizes_are_short() {
        for (size, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 20, "1.0 MiB"),
            (100 << 20, "100.0 MiB"),
            (3 << 30, "3.0 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn what_is_not_known_is_not_shown() {
        let mut snapshot = Snapshot {
            migration: "m".to_owned().try_into().unwrap(),
            id: "web".to_owned(),
            mode: Mode::Native,
            round: None,
            phase: Phase::Frozen,
            elapsed_ms: 0,
            sent_bytes: 1 << 20,
            expected_bytes: 0,
            rate_bytes_per_s: 0,
            ended: None,
        };
        assert_eq!(figures(&snapshot), "1.0 MiB");
        snapshot.expected_bytes = 10 << 20;
        assert_eq!(figures(&snapshot), "1.0 MiB of 10.0 MiB");
        snapshot.rate_bytes_per_s = 4 << 20;
        assert_eq!(figures(&snapshot), "1.0 MiB of 10.0 MiB, 4.0 MiB/s, 3 s left");
    }
}
