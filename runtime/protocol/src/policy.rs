//! When to switch over: what a round of pre-copy showed decides what comes next.
//!
//! ```text
//! scan ──► on_round(stats) ──► NextRound | SwitchOver | GoPostcopy | Abort
//! ```
//! A decision is made after a scan, so that what would have to be sent in the freeze is counted and not guessed:
//! only what is written between that scan and the freeze comes on top. The downtime to be expected is that
//! amount at the bandwidth of the rounds, and the fixed cost of a freeze, dump and restore, which the caller knows
//! from earlier moves.
//!
//! Rounds *converge* while every few of them leave clearly less to send ([`SHRINK`], [`STALLED_MAX`]).
//!
//! Pages that are written in every round are *hot*: a round may hold them back, and the freeze has to send them.
//! So they count for the downtime and not for what a round can still save. When there is next to nothing but hot pages
//! left, rounds gain nothing any more, as if they had stalled; should one be made all the same, in the hope of a calmer
//! program, it holds nothing back ([`RoundStats::holds_back`]).
//!
//! | way | enough, or within the limit and no longer converging | stalled, all hot, or spent |
//! |---|---|---|
//! | pre-copy | switch over | switch over, at a calm moment if there is one |
//! | hybrid | switch over if enough, else post-copy | post-copy |
//! | auto | switch over | post-copy if allowed; else switch over near the best if tolerable; else go on, or give up when spent |

use std::fmt::Debug;
use std::time::Duration;

use crate::plan::Way;
use crate::request::Limits;

/// What is known after a round and the scan that followed it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundStats {
    /// The round that ended, from 0.
    pub round: u32,
    /// Time since the first round began.
    pub elapsed: Duration,
    /// Bytes of contents a second that the target had in this round.
    pub bytes_per_s: f64,
    /// Bytes that were written since the scan before: what the next round, or the freeze, has to send.
    pub pending_bytes: u64,
    /// Those of them that are hot: written in every one of the last rounds.
    pub hot_bytes: u64,
    /// What a switchover costs beside the pages.
    pub fixed: Duration,
}

impl RoundStats {
    /// Returns the downtime to be expected if the container were frozen now and all pages sent.
    #[must_use]
    pub fn expected_downtime(&self) -> Duration {
        self.fixed + self.transfer(self.pending_bytes)
    }

    /// Returns whether another round leaves the hot pages to the freeze: it does if it has others that are worth it.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        self.hot_bytes > 0 && !self.is_little(self.pending_bytes.saturating_sub(self.hot_bytes))
    }

    /// How long another round would take.
    fn next_round(&self) -> Duration {
        let held = if self.holds_back() { self.hot_bytes } else { 0 };
        self.transfer(self.pending_bytes.saturating_sub(held))
    }

    /// Whether there is something left, and next to nothing of it is not hot.
    fn is_all_hot(&self) -> bool {
        self.hot_bytes > 0 && !self.holds_back()
    }

    /// Whether sending so much is little beside what a freeze costs anyhow.
    fn is_little(&self, bytes: u64) -> bool {
        self.transfer(bytes) <= self.fixed.mul_f64(WORTH)
    }

    fn transfer(&self, bytes: u64) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let transfer_s = bytes as f64 / self.bytes_per_s.max(1.0);
        Duration::try_from_secs_f64(transfer_s).unwrap_or(Duration::MAX / 2)
    }
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Another round.
    NextRound,
    /// Freeze, and send the rest.
    SwitchOver,
    /// Freeze, and let the rest travel after the container runs on the target.
    GoPostcopy,
    /// Give up: the container goes on where it is.
    Abort {
        /// Why, with the numbers.
        cause: String,
    },
}

/// Decides after each round.
pub trait Policy: Debug + Send {
    /// Takes what a round showed and says what comes next.
    fn on_round(&mut self, stats: &RoundStats) -> Verdict;
}

/// Returns the policy of a way that has rounds.
#[must_use]
pub fn of(way: Way, limits: Limits) -> Box<dyn Policy> {
    Box::new(Converging { way, limits, best: None, anchor: None, stalled: 0 })
}

/// Goes on while rounds converge, and takes what `way` and limits allow when they do not.
#[derive(Debug)]
struct Converging {
    way: Way,
    limits: Limits,
    /// The shortest downtime that any round promised.
    best: Option<Duration>,
    /// What the last round left that made progress.
    anchor: Option<u64>,
    /// Rounds since then.
    stalled: u32,
}

impl Policy for Converging {
    fn on_round(&mut self, stats: &RoundStats) -> Verdict {
        self.note(stats.pending_bytes);
        let expected = stats.expected_downtime();
        let best = self.best.map_or(expected, |best| best.min(expected));
        self.best = Some(best);

        let limit = Duration::from_millis(self.limits.downtime_limit_ms.into());
        let near = expected <= best.mul_f64(NEAR);
        let stalled = self.stalled >= STALLED_MAX;
        let spent = self.is_spent(stats);
        // Another round would gain nothing.
        let enough = stats.is_little(stats.pending_bytes);
        let hot = stats.is_all_hot();
        let over = enough || hot || stalled || spent;
        let short = expected <= limit && (over || self.stalled > 0);
        match self.way {
            Way::Hybrid if enough => Verdict::SwitchOver,
            Way::Hybrid if over || expected <= limit => Verdict::GoPostcopy,
            Way::Hybrid => Verdict::NextRound,
            _ if short => Verdict::SwitchOver,
            Way::Auto if over && self.limits.allow_postcopy => Verdict::GoPostcopy,
            Way::Auto if over && near && expected <= limit * TOLERABLE => Verdict::SwitchOver,
            // The freeze itself costs that much here, whatever rounds do: there is nothing to be gained by giving up.
            Way::Auto if enough => Verdict::SwitchOver,
            Way::Auto if spent => Verdict::Abort { cause: self.numbers(stats, best) },
            Way::Auto => Verdict::NextRound,
            _ if enough || spent => Verdict::SwitchOver,
            // Not in the middle of a burst, if there are calmer moments.
            _ if (stalled || hot) && (near || self.stalled >= 2 * STALLED_MAX) => Verdict::SwitchOver,
            _ => Verdict::NextRound,
        }
    }
}

impl Converging {
    /// Counts the rounds that make no progress. Measured from the last that did, not from the one before: a writer at nine
    /// tenths of the bandwidth converges slowly but well, and one that comes in bursts must not look like progress when
    /// a burst ends where it began.
    fn note(&mut self, pending_bytes: u64) {
        let progress = self.anchor.is_none_or(|anchor| {
            #[expect(clippy::cast_precision_loss, reason = "a comparison of amounts")]
            let (now, anchor) = (pending_bytes as f64, anchor as f64);
            now < anchor * SHRINK
        });
        if progress {
            self.anchor = Some(pending_bytes);
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
    }

    /// Whether there is no room for another round.
    fn is_spent(&self, stats: &RoundStats) -> bool {
        let timeout = Duration::from_secs(self.limits.timeout_s.into());
        stats.round + 1 >= self.limits.max_rounds
            || stats.elapsed.saturating_add(stats.next_round()) >= timeout
    }

    fn numbers(&self, stats: &RoundStats, best: Duration) -> String {
        format!(
            "pre-copy does not converge: after {} rounds and {:.1} s, {:.1} MB are written again each round and {:.1} MB/s \
             reach the target, so the container would be down for {:.0} ms ({:.0} at best), and {} are allowed; raise \
             --downtime-limit or --timeout, or use --allow-postcopy",
            stats.round + 1,
            stats.elapsed.as_secs_f64(),
            mb(stats.pending_bytes),
            stats.bytes_per_s / 1e6,
            stats.expected_downtime().as_secs_f64() * 1e3,
            best.as_secs_f64() * 1e3,
            self.limits.downtime_limit_ms,
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "a number for people")]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Progress is to leave less than this part of what the last round that made progress left.
pub const SHRINK: f64 = 0.8;
/// After so many rounds running without progress, none will make any.
pub const STALLED_MAX: u32 = 3;
/// A round that saves less than this part of the fixed cost is not worth it.
const WORTH: f64 = 0.1;
/// An expected downtime this much above the best seen is as good as the best.
const NEAR: f64 = 1.25;
/// Without post-copy, `auto` takes a downtime of up to so many times the limit rather than give up.
pub const TOLERABLE: u32 = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MB: u64 = 1_000_000;

    /// Runs rounds of a program that writes `written(round)` bytes in each, at 1 GB/s; returns the last verdict, and
    /// after how many rounds.
    fn run(way: Way, limits: Limits, written: impl Fn(u32) -> u64) -> (Verdict, u32) {
        run_hot(way, limits, |round| (written(round), 0))
    }

    /// The same with what of it is hot.
    fn run_hot(way: Way, limits: Limits, written: impl Fn(u32) -> (u64, u64)) -> (Verdict, u32) {
        let mut policy = of(way, limits);
        for round in 0..10_000 {
            let (pending_bytes, hot_bytes) = written(round);
            let stats = RoundStats {
                round,
                elapsed: Duration::from_secs(u64::from(round)),
                bytes_per_s: 1e9,
                pending_bytes,
                hot_bytes,
                fixed: Duration::from_millis(100),
            };
            match policy.on_round(&stats) {
                Verdict::NextRound => {}
                verdict => return (verdict, round + 1),
            }
        }
        panic!("no end");
    }

    #[test]
    fn an_idle_program_takes_one_round() {
        for way in [Way::Precopy, Way::Hybrid, Way::Auto] {
            assert_eq!(run(way, Limits::default(), |_| 0), (Verdict::SwitchOver, 1));
        }
    }

    #[test]
    fn rounds_that_converge_go_on_until_another_gains_nothing() {
        let (verdict, rounds) = run(Way::Auto, Limits::default(), |round| (1000 * MB) >> round);
        assert_eq!(verdict, Verdict::SwitchOver);
        assert!((6..=9).contains(&rounds), "{rounds}");
    }

    #[test]
    fn a_small_working_set_is_taken_once_it_stops_shrinking() {
        let limits = Limits::default();
        for way in [Way::Precopy, Way::Auto] {
            let (verdict, rounds) = run(way, limits, |_| 100 * MB);
            assert_eq!(verdict, Verdict::SwitchOver);
            assert!(rounds <= 1 + STALLED_MAX);
        }
        assert_eq!(run(Way::Hybrid, limits, |_| 100 * MB), (Verdict::GoPostcopy, 1));
    }

    #[test]
    fn a_writer_faster_than_the_link_ends_as_the_way_and_the_limits_say() {
        let limits = Limits::default();
        let fast = |_| 5000 * MB;
        assert_eq!(run(Way::Precopy, limits, fast).0, Verdict::SwitchOver);
        assert_eq!(run(Way::Hybrid, limits, fast).0, Verdict::GoPostcopy);
        let allowed = Limits { allow_postcopy: true, ..limits };
        assert_eq!(run(Way::Auto, allowed, fast).0, Verdict::GoPostcopy);
        let (verdict, rounds) = run(Way::Auto, limits, fast);
        let Verdict::Abort { cause } = verdict else { panic!("{verdict:?}") };
        assert!(cause.contains("5000.0 MB") && cause.contains("300 are allowed"), "{cause}");
        assert_eq!(rounds, limits.max_rounds);
    }

    #[test]
    fn a_bit_more_than_the_limit_is_better_than_giving_up() {
        assert_eq!(run(Way::Auto, Limits::default(), |_| 400 * MB).0, Verdict::SwitchOver);
    }

    #[test]
    fn the_time_limit_ends_rounds_too_before_one_that_would_exceed_it() {
        let limits = Limits { timeout_s: 10, ..Limits::default() };
        let (verdict, rounds) = run(Way::Auto, limits, |_| 5000 * MB);
        assert!(matches!(verdict, Verdict::Abort { .. }) && rounds == 6, "{verdict:?} {rounds}");
    }

    #[test]
    fn a_writer_just_below_the_bandwidth_is_given_the_rounds_it_needs() {
        let nine_tenths = |round| {
            let mut left = 8000 * MB;
            (0..round).for_each(|_| left = left / 10 * 9);
            left
        };
        let limits = Limits { max_rounds: 100, ..Limits::default() };
        for way in [Way::Precopy, Way::Auto] {
            let (verdict, rounds) = run(way, limits, nine_tenths);
            assert_eq!(verdict, Verdict::SwitchOver);
            assert!((30..45).contains(&rounds), "{rounds}");
        }
    }

    #[test]
    fn a_burst_is_waited_out() {
        let bursts = |round: u32| if round % 4 == 3 { 2000 * MB } else { 500 * MB };
        let (verdict, rounds) = run(Way::Precopy, Limits::default(), bursts);
        assert_eq!((verdict, rounds % 4 == 0), (Verdict::SwitchOver, false));
        let calm_in_the_end = |round: u32| if round < 12 { 5000 * MB } else { MB };
        let (verdict, rounds) = run(Way::Auto, Limits::default(), calm_in_the_end);
        assert_eq!((verdict, rounds), (Verdict::SwitchOver, 13));
    }

    #[test]
    fn rounds_end_when_all_that_is_left_is_hot() {
        let limits = Limits::default();
        let allowed = Limits { allow_postcopy: true, ..limits };
        // From the third round on, so many MB are written in each, and at most 5 of them are not hot.
        let hot = |mb: u64| move |round| if round < 2 { (1000 * MB, 0) } else { (mb * MB, (mb - 5) * MB) };
        // Way, limits, MB, verdict. Not hot, it would take three rounds more to see that they stall.
        let rows = [
            (Way::Precopy, limits, 100, Verdict::SwitchOver),
            (Way::Precopy, limits, 700, Verdict::SwitchOver),
            (Way::Hybrid, limits, 500, Verdict::GoPostcopy),
            (Way::Auto, limits, 100, Verdict::SwitchOver),
            (Way::Auto, limits, 700, Verdict::SwitchOver),
            (Way::Auto, allowed, 700, Verdict::GoPostcopy),
        ];
        for (way, limits, mb, expected) in rows {
            let (verdict, rounds) = run_hot(way, limits, hot(mb));
            assert_eq!((&verdict, rounds), (&expected, 3), "{way:?} {mb}");
        }
    }

    #[test]
    fn what_is_held_back_counts_for_the_downtime_and_not_for_the_next_round() {
        let stats = |pending_mb: u64, hot_mb: u64| RoundStats {
            round: 0,
            elapsed: Duration::from_secs(1),
            bytes_per_s: 1e9,
            pending_bytes: pending_mb * MB,
            hot_bytes: hot_mb * MB,
            fixed: Duration::from_millis(100),
        };
        // Pending, hot, whether they are held back, expected downtime, time of the next round.
        let rows = [
            (500, 0, false, 600, 500),
            (500, 200, true, 600, 300),
            (500, 489, true, 600, 11),
            // Nothing is worth a round: one that is made all the same sends everything.
            (500, 491, false, 600, 500),
            (500, 500, false, 600, 500),
            (0, 0, false, 100, 0),
        ];
        for (pending, hot, held, expected_ms, next_ms) in rows {
            let stats = stats(pending, hot);
            let found = (stats.holds_back(), stats.expected_downtime(), stats.next_round());
            let expected = (held, Duration::from_millis(expected_ms), Duration::from_millis(next_ms));
            assert_eq!(found, expected, "{pending} {hot}");
        }
    }

    #[test]
    fn a_program_that_is_hot_beyond_what_is_tolerable_is_waited_for() {
        let hot = |round: u32| if round < 12 { (5000 * MB, 5000 * MB) } else { (MB, 0) };
        assert_eq!(run_hot(Way::Auto, Limits::default(), hot), (Verdict::SwitchOver, 13));
    }

    #[test]
    fn a_fixed_cost_above_the_limit_is_not_fought_with_rounds() {
        let stats = |fixed_ms| RoundStats {
            round: 0,
            elapsed: Duration::from_secs(1),
            bytes_per_s: 1e9,
            pending_bytes: 0,
            hot_bytes: 0,
            fixed: Duration::from_millis(fixed_ms),
        };
        let verdict = |way, fixed_ms| of(way, Limits::default()).on_round(&stats(fixed_ms));
        assert_eq!(verdict(Way::Precopy, 9000), Verdict::SwitchOver);
        assert_eq!(verdict(Way::Auto, 400), Verdict::SwitchOver);
        assert_eq!(verdict(Way::Auto, 9000), Verdict::SwitchOver);
    }

    fn a_history() -> impl Strategy<Value = Vec<(u64, u64, f64, u64)>> {
        proptest::collection::vec((0..20_000 * MB, 0..=100_u64, 1e6..1e10, 0..20_000_u64), 40)
    }

    proptest! {
        #[test]
        fn whatever_rounds_show_the_limits_hold(
            way in proptest::sample::select(vec![Way::Precopy, Way::Hybrid, Way::Auto]),
            max_rounds in 1..40_u32,
            downtime_limit_ms in 1..2000_u32,
            timeout_s in 1..300_u32,
            allow_postcopy in any::<bool>(),
            fixed_ms in 0..1000_u64,
            history in a_history(),
        ) {
            let limits = Limits { max_rounds, downtime_limit_ms, timeout_s, allow_postcopy, ..Limits::default() };
            let mut policy = of(way, limits);
            let mut elapsed = Duration::ZERO;
            let fixed = Duration::from_millis(fixed_ms);
            for (round, (pending_bytes, hot_percent, bytes_per_s, took_ms)) in (0_u32..).zip(history) {
                elapsed += Duration::from_millis(took_ms);
                let hot_bytes = pending_bytes / 100 * hot_percent;
                let stats = RoundStats { round, elapsed, bytes_per_s, pending_bytes, hot_bytes, fixed };
                let verdict = policy.on_round(&stats);
                let expected = stats.expected_downtime();
                let limit = Duration::from_millis(downtime_limit_ms.into());
                let is_last = round + 1 == max_rounds || elapsed >= Duration::from_secs(timeout_s.into());
                match &verdict {
                    Verdict::NextRound => prop_assert!(!is_last),
                    Verdict::GoPostcopy => {
                        prop_assert!(way == Way::Hybrid || (way == Way::Auto && allow_postcopy));
                    }
                    Verdict::SwitchOver => {
                        let within = match way {
                            Way::Auto => {
                                expected <= limit * TOLERABLE || expected <= fixed.mul_f64(1.0 + WORTH)
                            }
                            Way::Hybrid => expected <= fixed.mul_f64(1.0 + WORTH),
                            _ => true,
                        };
                        prop_assert!(within, "{expected:?}");
                    }
                    Verdict::Abort { .. } => prop_assert!(way == Way::Auto && !allow_postcopy),
                }
                if verdict != Verdict::NextRound {
                    return Ok(());
                }
            }
            prop_assert!(false, "no end");
        }
    }
}
