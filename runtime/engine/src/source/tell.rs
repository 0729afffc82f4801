//! What the worker says: progress, logs, the report and the failure.

use std::sync::atomic::Ordering;
use std::time::Duration;

use godwit_protocol::failure::Fate;
use godwit_protocol::report::{Bytes, CpuSeconds, DowntimeParts, Outcome, Pages, PeakBytes, Report, Tick};
use godwit_protocol::source::Source;
use godwit_protocol::wire::pages::PAGE_BYTES;
use godwit_protocol::worker::{self, Snapshot};
use godwit_protocol::{Failure, Phase};

use super::container::Checkpointer;
use super::worker::Worker;
use crate::usage::Usage;

impl<C: Checkpointer, T: FnMut(&worker::Event)> Worker<C, T> {
    pub(super) fn report_moved(&mut self, source: &Source) {
        let report = self.report_of(Outcome::Migrated, source);
        log::info!(
            migration = self.order.migration.as_str(), side = "source", mode = self.order.request.mode.name();
            "moved: down {:.1} ms, {:.1} ms in all, {} bytes", report.downtime_ms, report.total_ms, report.bytes.wire
        );
        (self.tell)(&worker::Event::Committed { report: Box::new(report) });
    }

    pub(super) fn report_failed(&mut self, failure: Failure) {
        log::error!(
            migration = self.order.migration.as_str(), side = "source", mode = self.order.request.mode.name(),
            phase = failure.phase.label();
            "{failure}"
        );
        (self.tell)(&worker::Event::Failed { failure });
    }

    pub(super) fn report_of(&self, outcome: Outcome, source: &Source) -> Report {
        let usage = Usage::so_far();
        let moved = source.moved();
        let resumed = moved.map(|moved| moved.resumed).unwrap_or_default();
        let memory_there = moved.and_then(|moved| moved.memory.clone()).unwrap_or_default();
        let downtime = moved.map_or_else(DowntimeParts::default, |moved| moved.downtime);
        let memory = self.sent.pages.load(Ordering::Relaxed);
        let (normal, zero) = (memory / PAGE_BYTES, self.sent.zero_pages.load(Ordering::Relaxed));
        let ended_at = if moved.is_some() { self.moved_at } else { self.clock.now() };
        Report {
            id: self.order.id.clone(),
            migration: self.order.migration.clone(),
            mode: self.order.request.mode,
            outcome,
            fate: if moved.is_some() { Fate::RunningOnTarget } else { Fate::RunningOnSource },
            total_ms: ended_at.ms_since(Tick::default()),
            downtime_ms: downtime.total_ms(),
            downtime,
            // CRIU leaves out pages that were never touched and keeps no account of zero ones it finds.
            pages: Pages { total: normal + zero, normal, zero, duplicate: memory_there.duplicate_pages },
            bytes: Bytes {
                state: self.sent.state.load(Ordering::Relaxed),
                memory,
                rootfs: self.sent.rootfs.load(Ordering::Relaxed),
                wire: self.sent_bytes(),
            },
            // The later word holds what the earlier did.
            disk_bytes_written: usage.disk_bytes_written
                + resumed.disk_bytes_written.max(memory_there.disk_bytes_written),
            cpu_s: CpuSeconds {
                source: seconds(usage.cpu_us),
                target: seconds(resumed.cpu_us.max(memory_there.cpu_us)),
            },
            fill_ms: moved.map_or(0.0, |moved| ended_at.ms_since(moved.at)),
            rounds: source.rounds().to_vec(),
            expected_downtime_ms: source.expected_downtime().map(|expected| expected.as_secs_f64() * 1e3),
            faults: memory_there.faults,
            peak_memory_bytes: PeakBytes { source: usage.peak_bytes, target: memory_there.peak_bytes },
            streams: self.streams.as_ref().map_or(0, |streams| streams.bulk_count()),
            notes: self.plan.as_ref().map(|plan| plan.notes.clone()).unwrap_or_default(),
        }
    }

    fn sent_bytes(&self) -> u64 {
        let link = self.link.as_ref().map_or(0, |link| link.bulk.sent_bytes());
        link + self.streams.as_ref().map_or(0, |streams| streams.sent_bytes())
    }

    pub(super) fn tell_progress(&mut self, phase: Phase) {
        let now = self.clock.now();
        let sent_bytes = self.sent_bytes();
        let snapshot = Snapshot {
            migration: self.order.migration.clone(),
            id: self.order.id.clone(),
            mode: self.order.request.mode,
            phase,
            elapsed_ms: now.0 / 1_000_000,
            sent_bytes,
            expected_bytes: self.expected_bytes.max(sent_bytes),
            rate_bytes_per_s: self.rate.sample(now, sent_bytes),
            round: self.round,
            ended: None,
        };
        self.told_at = now;
        (self.tell)(&worker::Event::Progress { snapshot });
    }

    /// Logs the end of the phase that was and the begin of the one that is, each once.
    pub(super) fn log_phase(&mut self, next: Option<Phase>) {
        let now = self.clock.now();
        let (migration, mode) = (self.order.migration.as_str(), self.order.request.mode.name());
        if let Some((phase, since)) = self.phase {
            let ms = now.ms_since(since);
            log::info!(migration, side = "source", mode, phase = phase.label(); "{phase} ends after {ms:.1} ms");
        }
        if let Some(phase) = next {
            log::info!(migration, side = "source", mode, phase = phase.label(); "{phase} begins");
        }
        self.phase = next.map(|phase| (phase, now));
    }
}

fn seconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64()
}
