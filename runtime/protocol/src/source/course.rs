//! What a migration remembers from one state to the next: how its pages travel, and what its rounds showed.

use std::time::Duration;

use crate::plan::Way;
use crate::policy::{self, Policy, RoundStats, Verdict};
use crate::report::{Round, Tick};
use crate::wire::pages::PAGE_BYTES;

use super::{ASK_PAUSE, SERVE_TRIES, Settings};

/// What was sent in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundSent {
    /// Pages sent with their contents.
    pub normal_pages: u64,
    /// Pages found to hold only zeros.
    pub zero_pages: u64,
    /// Bytes of contents.
    pub bytes: u64,
}

#[derive(Debug)]
pub(super) struct Course {
    pub(super) way: Way,
    pub(super) rounds: Vec<Round>,
    pub(super) expected: Option<Duration>,
    settings: Settings,
    policy: Option<Box<dyn Policy>>,
    leaves_pages: bool,
    /// Whether the target was reached again after its link was lost.
    has_rejoined: bool,
    /// How often pages could not be given for a reason on this side.
    serve_failures: u32,
    /// When the rounds began.
    begun: Tick,
    /// When the last two scans ended.
    scanned: [Tick; 2],
    /// Pages that the last scan found.
    pending_pages: u64,
    /// Whether a round leaves those of them that are hot.
    holds_back: bool,
}

impl Course {
    pub(super) fn begin(settings: Settings) -> Self {
        Self {
            way: Way::InImages,
            rounds: Vec::new(),
            expected: None,
            settings,
            policy: None,
            leaves_pages: false,
            has_rejoined: false,
            serve_failures: 0,
            begun: Tick(0),
            scanned: [Tick(0); 2],
            pending_pages: 0,
            holds_back: false,
        }
    }

    /// The course of a worker that died: pages may have been left.
    pub(super) fn unknown() -> Self {
        Self { leaves_pages: true, ..Self::begin(Settings::default()) }
    }

    /// The course of a migration in the middle of its rounds, whose policy says `verdict`.
    #[cfg(test)]
    pub(super) fn amid(way: Way, leaves_pages: bool, verdict: Verdict) -> Self {
        #[derive(Debug)]
        struct Says(Verdict);

        impl Policy for Says {
            fn on_round(&mut self, _: &RoundStats) -> Verdict {
                self.0.clone()
            }
        }

        Self {
            way,
            rounds: vec![Round::default()],
            leaves_pages,
            policy: Some(Box::new(Says(verdict))),
            ..Self::begin(Settings::default())
        }
    }

    /// Takes the way that both sides can go.
    pub(super) fn take(&mut self, way: Way) {
        self.way = way;
        self.leaves_pages = way == Way::Postcopy;
        self.policy = way.has_rounds().then(|| policy::of(way, self.settings.limits));
    }

    /// Whether pages are left at the source when the container runs on the target.
    pub(super) const fn leaves_pages(&self) -> bool {
        self.leaves_pages
    }

    pub(super) const fn rejoined(&mut self) {
        self.has_rejoined = true;
    }

    pub(super) const fn failed_to_serve(&mut self) {
        self.serve_failures += 1;
    }

    /// Whether link and streams are worth opening again.
    pub(super) const fn can_serve(&self) -> bool {
        self.leaves_pages && self.serve_failures < SERVE_TRIES
    }

    /// How long to wait before the target is looked for. The first time it may be there at once, and tasks wait. One
    /// that has every page puts them in their places without being watched; unless it has died, which its agent may
    /// learn a moment later than this side.
    pub(super) const fn rejoin_pause(&self) -> Duration {
        if self.leaves_pages && !self.has_rejoined { Duration::ZERO } else { ASK_PAUSE }
    }

    pub(super) const fn begin_rounds(&mut self, now: Tick) {
        self.begun = now;
        self.scanned = [now; 2];
    }

    /// Whether the next round leaves pages that are written in every round.
    pub(super) const fn holds_back(&self) -> bool {
        self.holds_back
    }

    /// Takes what a scan found and says what comes next. The first is always followed by a round.
    pub(super) fn scanned(&mut self, pages: u64, hot_pages: u64, now: Tick) -> Verdict {
        self.scanned = [self.scanned[1], now];
        self.pending_pages = pages;
        let Some(last) = self.rounds.last_mut() else { return Verdict::NextRound };
        let stats = RoundStats {
            round: last.round,
            elapsed: since(now, self.begun),
            bytes_per_s: bandwidth(&self.rounds),
            pending_bytes: pages * PAGE_BYTES,
            hot_bytes: hot_pages * PAGE_BYTES,
            fixed: self.settings.fixed,
        };
        self.holds_back = stats.holds_back();
        let expected = stats.expected_downtime();
        if let Some(last) = self.rounds.last_mut() {
            last.expected_downtime_ms = expected.as_secs_f64() * 1e3;
        }
        let verdict = self.policy.as_mut().map_or(Verdict::SwitchOver, |policy| policy.on_round(&stats));
        if verdict == Verdict::GoPostcopy {
            self.leaves_pages = true;
            self.expected = Some(self.settings.fixed);
        } else {
            self.expected = Some(expected);
        }
        verdict
    }

    /// Notes a round that the target has.
    pub(super) fn ended(&mut self, round: u32, sent: RoundSent, now: Tick) {
        let duration_ms = now.ms_since(self.scanned[1]);
        let written_ms = self.scanned[1].ms_since(self.scanned[0]);
        self.rounds.push(Round {
            round,
            dirty_pages: self.pending_pages,
            sent_pages: sent.normal_pages,
            zero_pages: sent.zero_pages,
            bytes: sent.bytes,
            duration_ms,
            // Before the first scan nothing was followed.
            dirty_pages_per_s: if round == 0 { 0.0 } else { per_s(self.pending_pages, written_ms) },
            bytes_per_s: per_s(sent.bytes, duration_ms),
            expected_downtime_ms: 0.0,
        });
    }
}

/// Bytes a second that reach the target, by the latest round that sent enough to tell: a short one measures latency,
/// and the first is slowed by the page faults that following costs. Without such a round, the largest.
fn bandwidth(rounds: &[Round]) -> f64 {
    let telling = rounds.iter().rev().find(|round| round.bytes >= TELLING_BYTES);
    let largest = rounds.iter().max_by_key(|round| round.bytes);
    telling.or(largest).map_or(0.0, |round| round.bytes_per_s)
}

const TELLING_BYTES: u64 = 8 << 20;

fn per_s(count: u64, ms: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let count = count as f64;
    if ms > 0.0 { count / ms * 1e3 } else { 0.0 }
}

fn since(now: Tick, earlier: Tick) -> Duration {
    Duration::from_nanos(now.0.saturating_sub(earlier.0))
}
