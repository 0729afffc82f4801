//! What came of a migration, built in the order in which it becomes known.
//!
//! ```text
//! Stopwatch::freeze(now) ──lap(part, now)…──► Downtime (its parts sum to it by construction)
//! ```
//! Times are taken on the source, so that one clock measures one interval; the last part therefore contains the
//! way back of the target's last acknowledgement, and the figure is an upper bound of the blackout.

use serde::{Deserialize, Serialize};

use crate::failure::Fate;
use crate::request::{MigrationId, Mode};

/// Nanoseconds since the worker started, by a monotonic clock. Time is an argument everywhere in this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Tick(pub u64);

impl Tick {
    /// Returns the milliseconds from `earlier` to this tick; 0 if `earlier` is later.
    #[must_use]
    pub fn ms_since(self, earlier: Self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "an interval of a migration stays far below 2^53 ns")]
        let ns = self.0.saturating_sub(earlier.0) as f64;
        ns / 1e6
    }
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The container moved.
    Migrated,
    /// Only the preflight was asked for, and it found nothing in the way.
    Checked,
}

/// The downtime's parts in milliseconds, in the order in which they happen.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// From the request to freeze to the last task frozen.
    pub freeze_ms: f64,
    /// From there until CRIU has written the container's state.
    pub state_dump_ms: f64,
    /// From there until the target has everything it needs to restore.
    pub transfer_ms: f64,
    /// From there until the target holds the container restored and stopped.
    pub restore_ms: f64,
    /// From there until the target reports that the container runs.
    pub resume_ms: f64,
}

impl DowntimeParts {
    /// Returns the sum of the parts.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.freeze_ms + self.state_dump_ms + self.transfer_ms + self.restore_ms + self.resume_ms
    }
}

/// Measures the downtime: one lap per part, so that the parts sum to the whole.
#[derive(Debug)]
#[must_use = "a stopwatch that is dropped has measured nothing"]
pub struct Stopwatch {
    last: Tick,
    parts: DowntimeParts,
}

impl Stopwatch {
    /// Starts at the request to freeze.
    pub fn freeze(now: Tick) -> Self {
        Self { last: now, parts: DowntimeParts::default() }
    }

    /// Ends the freeze: every task is frozen.
    pub fn frozen(&mut self, now: Tick) {
        self.parts.freeze_ms += self.lap(now);
    }

    /// Ends the state dump.
    pub fn dumped(&mut self, now: Tick) {
        self.parts.state_dump_ms += self.lap(now);
    }

    /// Ends the transfer: the target has acknowledged the last byte.
    pub fn transferred(&mut self, now: Tick) {
        self.parts.transfer_ms += self.lap(now);
    }

    /// Ends the restore: the target holds the container stopped.
    pub fn restored(&mut self, now: Tick) {
        self.parts.restore_ms += self.lap(now);
    }

    /// Ends the downtime: the target says that the container runs.
    #[must_use]
    pub fn resumed(mut self, now: Tick) -> DowntimeParts {
        self.parts.resume_ms += self.lap(now);
        self.parts
    }

    fn lap(&mut self, now: Tick) -> f64 {
        let ms = now.ms_since(self.last);
        self.last = self.last.max(now);
        ms
    }
}

/// Pages of the container's memory, by what travelled for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pages {
    /// All pages that were considered.
    pub total: u64,
    /// Pages whose content was sent.
    pub normal: u64,
    /// Pages known to be zero, for which no content was sent.
    pub zero: u64,
    /// Pages that were sent after the freeze and had come before, unwritten since. 0 unless something is wrong.
    #[serde(default)]
    pub duplicate: u64,
}

/// One round of pre-copy.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 0; the first sends everything.
    pub round: u32,
    /// Pages that had to be sent.
    pub dirty_pages: u64,
    /// Pages sent with their contents.
    pub sent_pages: u64,
    /// Pages found to hold only zeros.
    pub zero_pages: u64,
    /// Bytes of contents sent.
    pub bytes: u64,
    /// From the scan until the target had all of it, in milliseconds.
    pub duration_ms: f64,
    /// Pages written a second while the round before ran.
    pub dirty_pages_per_s: f64,
    /// Bytes of contents that the target had a second.
    pub bytes_per_s: f64,
    /// Downtime to be expected of a switchover after this round, in milliseconds.
    pub expected_downtime_ms: f64,
}

/// What the restored tasks waited for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Faults {
    /// Faults whose page had to be fetched from the source.
    pub network: Waits,
    /// Faults whose page was at the target already.
    pub local: Waits,
    /// The threads that waited longest for either, the longest first. A sample every few milliseconds, from the resume
    /// on: CRIU makes the descriptors that faults come from so that a fault does not say whose it is.
    #[serde(default)]
    pub threads: Vec<ThreadWait>,
}

/// How long a thread waited for pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadWait {
    /// Its process, by the id inside the container.
    pub pid: i32,
    /// The thread, by the id inside the container.
    pub tid: i32,
    /// How long, in microseconds.
    pub blocked_us: u64,
}

/// How long faults of one kind took, all threads together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Waits {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer, in microseconds.
    pub p50_us: u64,
    /// All but one in a hundred took no longer, in microseconds.
    pub p99_us: u64,
    /// The longest, in microseconds.
    pub max_us: u64,
    /// All together, in microseconds.
    pub blocked_us: u64,
}

/// What the target's worker says when every page is in its task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TargetMemory {
    /// What the tasks waited for.
    pub faults: Faults,
    /// Most memory that pages on their way took beside the container's own, in bytes.
    pub peak_bytes: u64,
    /// Pages that came although they had come before.
    pub duplicate_pages: u64,
    /// Processor time of the worker and its CRIU so far, in microseconds.
    pub cpu_us: u64,
    /// Bytes that they caused to be written to storage so far.
    pub disk_bytes_written: u64,
}

/// Most memory that a migration took beside the container's own, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PeakBytes {
    /// Source worker.
    pub source: u64,
    /// Target worker.
    pub target: u64,
}

/// Bytes sent by the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Bytes {
    /// CRIU's images without the pages.
    pub state: u64,
    /// Page contents.
    pub memory: u64,
    /// The writable layer.
    pub rootfs: u64,
    /// Everything that went over the link, with headers.
    pub wire: u64,
}

/// Processor time of the migration's own processes, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct CpuSeconds {
    /// Source worker with its CRIU.
    pub source: f64,
    /// Target worker with its CRIU.
    pub target: f64,
}

/// What came of a migration that did what was asked; printed by `godwit migrate --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The container.
    pub id: String,
    /// The migration's name.
    pub migration: MigrationId,
    /// When pages travelled.
    pub mode: Mode,
    /// How it ended.
    pub outcome: Outcome,
    /// Where the container is.
    pub fate: Fate,
    /// From the start of the worker to the end of the move, in milliseconds.
    pub total_ms: f64,
    /// From the request to freeze until the target reports that the container runs, in milliseconds.
    pub downtime_ms: f64,
    /// The same by parts, which sum to it.
    pub downtime: DowntimeParts,
    /// Pages by what travelled for them.
    pub pages: Pages,
    /// Bytes by what they were for.
    pub bytes: Bytes,
    /// Bytes that the workers and their CRIU on both sides caused to be written to storage.
    pub disk_bytes_written: u64,
    /// Processor time on both sides.
    pub cpu_s: CpuSeconds,
    /// From the target's report that the container runs until every page was in its task, in milliseconds.
    #[serde(default)]
    pub fill_ms: f64,
    /// The rounds of pre-copy, in order.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// Downtime that was expected when the switchover was decided, in milliseconds; none without rounds.
    #[serde(default)]
    pub expected_downtime_ms: Option<f64>,
    /// What the restored tasks waited for.
    #[serde(default)]
    pub faults: Faults,
    /// Memory that the migration took.
    #[serde(default)]
    pub peak_memory_bytes: PeakBytes,
    /// Connections that carried pages beside the main link; 0 when CRIU moved them in its images.
    #[serde(default)]
    pub streams: u8,
    /// What was done otherwise than asked or than it could be best, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_sum_to_the_whole_even_when_the_clock_stands_still_or_goes_back() {
        let mut watch = Stopwatch::freeze(Tick(5_000_000));
        watch.frozen(Tick(7_000_000));
        watch.dumped(Tick(7_000_000));
        watch.transferred(Tick(6_000_000));
        watch.restored(Tick(17_500_000));
        let parts = watch.resumed(Tick(20_000_000));
        assert!((parts.total_ms() - 15.0).abs() < 1e-9);
        assert!((parts.restore_ms - 10.5).abs() < 1e-9);
        assert!(parts.transfer_ms.abs() < 1e-9);
    }
}
