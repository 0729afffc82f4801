//! Moving in a mode, and what the report must say of it.

use std::fmt::Debug;
use std::time::Duration;

use containerd_client::types::v1::Status;
use godwit_integration::suite::{Answer, Container, Job, Outcome, Site, Trouble};
use godwit_protocol::Mode;
use godwit_protocol::report::{Faults, Report, Waits};
use godwit_sys::page_range::PageRange;
use godwit_sys::pagemap_scan::{Pagemap, Region, Scan};

/// Starts the migration of a container to the other node in a mode, with flags of `godwit migrate`.
pub(super) fn start(site: &Site, id: &str, to: &str, mode: Mode, flags: &[&str]) -> Result<Job, Trouble> {
    let mode = mode.to_string();
    let mut argv = vec!["godwit", "migrate", id, "--to", to, "--mode", &mode, "--json", "--quiet"];
    argv.extend(flags);
    Job::start(site.node().command(argv))
}

/// Waits for the end of a migration and returns what it printed.
pub(super) fn answer(job: Job) -> Result<Answer, Trouble> {
    Answer::read(job.wait_for(PATIENCE)?)
}

/// Flags that have a busy machine do what the mode is about: `auto` is not to give up.
pub(super) fn flags_of(mode: Mode) -> &'static [&'static str] {
    if mode == Mode::Auto { &["--downtime-limit", "60000"] } else { &[] }
}

/// Moves a container in a mode, with the flags that fit a test machine, and claims as [`move_with`] does.
pub(super) fn move_by<'a>(
    container: &Container<'a>,
    target: &'a Site,
    mode: Mode,
) -> Result<(Container<'a>, Report), Trouble> {
    move_with(container, target, mode, flags_of(mode))
}

/// Moves a container in a mode, and claims that it runs there, that nothing of it is left here, and that the report
/// agrees with the mode and with itself.
pub(super) fn move_with<'a>(
    container: &Container<'a>,
    target: &'a Site,
    mode: Mode,
    flags: &[&str],
) -> Result<(Container<'a>, Report), Trouble> {
    let moved = Container::adopt(target, container.id());
    let done = start(container.site(), container.id(), &target.host(), mode, flags)?.wait_for(PATIENCE)?;
    let text = done.stdout.clone();
    Answer::read(done)?.moved()?;
    let report: Report =
        serde_json::from_str(&text).map_err(|_| Trouble::Garbled { what: "a report", text })?;
    moved.await_state(Status::Running)?;
    container.await_gone()?;
    assert_sound(&report, mode);
    Ok((moved, report))
}

/// Claims that a report agrees with its mode and with itself.
fn assert_sound(report: &Report, mode: Mode) {
    let json = serde_json::to_string(report).unwrap_or_default();
    assert_eq!(report.mode, mode, "{json}");
    let sum = report.downtime.total_ms();
    assert!((sum - report.downtime_ms).abs() <= 1.0, "the parts sum up to {sum} ms: {json}");
    assert!(report.downtime_ms > 0.0 && report.downtime_ms <= report.total_ms, "{json}");
    assert_eq!(report.pages.duplicate, 0, "{json}");
    assert_eq!(report.disk_bytes_written, 0, "{json}");
    assert!(report.pages.normal + report.pages.zero <= report.pages.total, "{json}");
    assert!(report.bytes.memory >= report.pages.normal * PAGE_BYTES, "{json}");
    let content = report.bytes.state + report.bytes.memory + report.bytes.rootfs;
    assert!(report.bytes.wire >= content, "{json}");
    if report.streams == 0 {
        // The old way, which has to be explained.
        assert!(report.rounds.is_empty() && !report.notes.is_empty(), "{json}");
        return;
    }
    if can_scan() {
        assert_eq!(report.notes, [] as [&str; 0], "{json}");
    } else {
        assert!(report.notes.iter().any(|note| note.contains("lazily")), "{json}");
    }
    assert_eq!(!report.rounds.is_empty(), mode.has_rounds(), "{json}");
    assert_eq!(report.expected_downtime_ms.is_some(), mode.has_rounds(), "{json}");
    assert_rounds(report, &json);
    for waits in [report.faults.network, report.faults.local] {
        assert_waits(waits, &json);
    }
    assert_threads(&report.faults, &json);
    if !matches!(mode, Mode::Postcopy | Mode::Hybrid | Mode::Auto) {
        assert_eq!(report.faults.network.count, 0, "nothing was left at the source: {json}");
    }
    let peak = report.peak_memory_bytes;
    assert!(peak.source > 0 && peak.target > 0, "{json}");
}

/// Tells whether the kernel has PAGEMAP_SCAN, by which pages are followed and hidden from CRIU.
fn can_scan() -> bool {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let any = PageRange::page_at(0x1_0000);
    let scanned = Pagemap::open(own).map(|map| map.scan(any, Scan::default(), &mut [Region::default()]));
    matches!(scanned, Ok(Ok(_)))
}

fn assert_rounds(report: &Report, json: &str) {
    for (number, round) in (0..).zip(&report.rounds) {
        assert_eq!(round.round, number, "{json}");
        // Zeros that the kernel knows of have no contents to be sent, and are no dirty pages here.
        assert!(round.sent_pages <= round.dirty_pages, "{json}");
        assert_eq!(round.bytes, round.sent_pages * PAGE_BYTES, "{json}");
        assert!(round.duration_ms > 0.0 && round.expected_downtime_ms > 0.0, "{json}");
        assert!(round.dirty_pages_per_s.is_finite() && round.bytes_per_s.is_finite(), "{json}");
    }
    let sent: u64 = report.rounds.iter().map(|round| round.sent_pages).sum();
    assert!(sent <= report.pages.normal, "{sent} pages in rounds: {json}");
}

fn assert_waits(waits: Waits, context: impl Debug) {
    let Waits { count, p50_us, p99_us, max_us, blocked_us } = waits;
    assert!(p50_us <= p99_us && p99_us <= max_us, "{context:?}");
    assert!(blocked_us >= max_us && (count > 0 || blocked_us == 0), "{context:?}");
}

/// Who waits for a page for long is seen waiting. Short waits add up, and none of them may have been looked at.
pub(super) fn assert_threads(faults: &Faults, context: impl Debug) {
    let longest_us = faults.network.max_us.max(faults.local.max_us);
    assert!(longest_us < LONG_WAIT_US || !faults.threads.is_empty(), "{context:?}");
    assert!(faults.threads.iter().all(|thread| thread.pid > 0 && thread.tid > 0), "{context:?}");
    assert!(faults.threads.is_sorted_by(|one, next| one.blocked_us >= next.blocked_us), "{context:?}");
}

/// Claims that a container that was to move still runs here, untouched, and that nothing of it is there.
pub(super) fn assert_stayed(container: &Container<'_>, pid: u32, there: &Container<'_>) -> Outcome {
    container.assert_runs()?;
    assert_eq!(container.pid()?, pid, "it runs as another process than before");
    there.await_gone()
}

const PAGE_BYTES: u64 = 4096;
/// So long do threads wait for pages, all together, that some have to be seen waiting, in microseconds.
const LONG_WAIT_US: u64 = 2_000_000;
/// How long a migration may take, or a program to check all of its memory, on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
