//! How long tasks waited for pages: a histogram of fixed size.
//!
//! Buckets grow by an eighth to a quarter each (four per power of two), from 1 µs to over an hour, so a percentile is
//! right to within a quarter of itself. Counting is one atomic addition; nothing is allocated.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counts of durations.
#[derive(Debug)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    total_us: AtomicU64,
    max_us: AtomicU64,
}

/// What a histogram comes to. All durations in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Half of them were no longer.
    pub p50_us: u64,
    /// 99 of 100 were no longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
    /// All together: the time threads slept.
    pub total_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            total_us: AtomicU64::new(0),
            max_us: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    pub(super) fn record(&self, duration: Duration) {
        let duration_us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(duration_us)].fetch_add(1, Ordering::Relaxed);
        self.total_us.fetch_add(duration_us, Ordering::Relaxed);
        self.max_us.fetch_max(duration_us, Ordering::Relaxed);
    }

    pub(super) fn summary(&self) -> Latency {
        let counts: Vec<u64> = self.buckets.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max_us = self.max_us.load(Ordering::Relaxed);
        let percentile = |percent: u64| {
            let wanted = (count * percent).div_ceil(100);
            let mut seen = 0;
            let found = counts.iter().position(|count| {
                seen += count;
                seen >= wanted
            });
            found.map_or(0, |index| top_us(index).min(max_us))
        };
        Latency {
            count,
            p50_us: percentile(50),
            p99_us: percentile(99),
            max_us,
            total_us: self.total_us.load(Ordering::Relaxed),
        }
    }
}

/// 0 to 3 have a bucket each, everything else is told apart by its highest three bits.
fn bucket(duration_us: u64) -> usize {
    let exponent = u64::from(duration_us.max(1).ilog2());
    let index = match exponent.checked_sub(2) {
        None => duration_us,
        Some(shift) => 4 * (shift + 1) + (duration_us >> shift) - 4,
    };
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The longest duration of a bucket.
fn top_us(index: usize) -> u64 {
    let index = index as u64;
    match (index / 4).checked_sub(1) {
        None => index,
        Some(shift) => ((index % 4 + 5) << shift) - 1,
    }
}

/// Up to 2^33 µs; what is longer counts as that long.
const BUCKETS: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_lies_in_the_bucket_that_ends_at_or_behind_it() {
        let mut previous = 0;
        for duration_us in
            (0..5000).chain((13..32).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1]))
        {
            let index = bucket(duration_us);
            assert!(index >= previous, "{duration_us}");
            assert!(duration_us <= top_us(index), "{duration_us}");
            assert!(index == 0 || duration_us > top_us(index - 1), "{duration_us}");
            assert!(top_us(index) <= duration_us + duration_us / 4, "{duration_us}");
            previous = index;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_near_and_the_longest_is_exact() {
        let histogram = Histogram::default();
        assert_eq!(histogram.summary(), Latency::default());
        for duration_us in 1..=1000 {
            histogram.record(Duration::from_micros(duration_us));
        }
        let Latency { count, p50_us, p99_us, max_us, total_us } = histogram.summary();
        assert_eq!((count, max_us, total_us), (1000, 1000, 500_500));
        assert!((500..625).contains(&p50_us) && (990..=1000).contains(&p99_us), "{p50_us} {p99_us}");
    }
}
