//! How far the migration is, for the shim: at every change of phase, and twice a second or more in between.

use std::collections::VecDeque;
use std::time::Duration;

use godwit_protocol::report::Tick;

/// Longest time between two progress lines.
pub(super) const INTERVAL: Duration = Duration::from_millis(400);

/// Bytes sent over the last second.
#[derive(Debug, Default)]
pub(super) struct Rate {
    samples: VecDeque<(Tick, u64)>,
}

impl Rate {
    /// Notes that `sent_bytes` had been sent in all by `now`, and returns the bytes per second since the oldest
    /// sample within the window.
    pub(super) fn sample(&mut self, now: Tick, sent_bytes: u64) -> u64 {
        self.samples.push_back((now, sent_bytes));
        while self.samples.len() > 2
            && self.samples.get(1).is_some_and(|(at, _)| age_ns(*at, now) >= WINDOW_NS)
        {
            self.samples.pop_front();
        }
        let Some((at, before)) = self.samples.front() else { return 0 };
        let age_ns = u128::from(age_ns(*at, now).max(1));
        let bytes = u128::from(sent_bytes.saturating_sub(*before));
        if age_ns < u128::from(WINDOW_NS) / 10 {
            return 0;
        }
        u64::try_from(bytes * 1_000_000_000 / age_ns).unwrap_or(u64::MAX)
    }
}

fn age_ns(at: Tick, now: Tick) -> u64 {
    now.0.saturating_sub(at.0)
}

const WINDOW_NS: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let mut rate = Rate::default();
        let tick = |ms: u64| Tick(ms * 1_000_000);
        assert_eq!(rate.sample(tick(0), 0), 0);
        assert_eq!(rate.sample(tick(500), 1000), 2000);
        assert_eq!(rate.sample(tick(1000), 1000), 1000);
        assert_eq!(rate.sample(tick(1500), 1000), 0);
    }
}
