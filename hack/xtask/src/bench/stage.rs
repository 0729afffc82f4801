//! What every figure about moving needs: two nodes, containers with memory of a known kind, and one measured move.
//!
//! Every container ticks once a millisecond, whatever else it does, to a file in memory that both nodes append to;
//! the longest time in which that file did not grow is its downtime as seen from outside ([`crate::observer`]).

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use godwit_integration::image::catalog::by_name;
use godwit_integration::process::{output, wait_until};
use godwit_integration::workload::hold::count_of;
use godwit_integration::{Bed, BedOptions, Node, Storage, Version};
use godwit_protocol::Report;
use serde_json::{Value, json};

use super::GODWIT;
use crate::Result;
use crate::observer::{Observer, Seen};

/// What a container has in its memory, and what it does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Nothing: the ticks alone.
    Empty,
    /// Debian's memhog, which has filled its memory once and does nothing more.
    Idle,
    /// Debian's memhog, which fills its memory again and again.
    Rewriting,
    /// Random numbers, left alone.
    Random,
    /// Zeros, one byte, text and random numbers by turns, left alone.
    Mixed,
    /// One byte all over; so many pages a second are written.
    Rate(u32),
    /// One byte all over; pages chosen at random are written without rest.
    Busy,
}

impl Load {
    /// The name in rows.
    pub(super) fn name(self) -> String {
        match self {
            Self::Empty => "nothing".to_owned(),
            Self::Idle => "memhog, idle".to_owned(),
            Self::Rewriting => "memhog, rewriting".to_owned(),
            Self::Random => "random".to_owned(),
            Self::Mixed => "mixed".to_owned(),
            Self::Rate(rate) => format!("one byte, {rate} pages/s written"),
            Self::Busy => "one byte, random pages written without rest".to_owned(),
        }
    }

    /// What the container runs.
    pub(super) fn command(self, memory_mb: u32) -> Vec<String> {
        let text = match self {
            Self::Empty => "workload beside sleep 1000000".to_owned(),
            // memhog writes a dot for every 10 MB, and a line's end when it is through.
            Self::Idle => {
                let room = memory_mb.div_ceil(10) + 1;
                format!("workload beside --room {room} memhog -r1000000 {memory_mb}m")
            }
            Self::Rewriting => format!("workload beside memhog -r1000000 {memory_mb}m"),
            Self::Random => format!("workload hold --megabytes {memory_mb} --content random"),
            Self::Mixed => format!("workload hold --megabytes {memory_mb} --content mixed"),
            Self::Rate(rate) => format!("workload hold --megabytes {memory_mb} --rate {rate}"),
            Self::Busy => format!("workload hold --megabytes {memory_mb} --busy 0"),
        };
        text.split(' ').map(str::to_owned).collect()
    }

    /// Lines counted by the program when its memory is filled.
    const fn is_counted(self) -> bool {
        matches!(self, Self::Idle | Self::Rewriting)
    }
}

/// A bed with the image that holds every load.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) bed: Bed,
    pub(super) reference: String,
    count: Cell<u32>,
}

/// A container that runs on node a and ticks.
#[derive(Debug)]
pub(super) struct Running<'a> {
    stage: &'a Stage,
    pub(super) id: String,
    pub(super) output: PathBuf,
}

/// What a move by godwit came to.
#[derive(Debug)]
pub(super) struct Moved {
    /// The longest time that it stood still, as seen from outside.
    pub(super) observed_ms: f64,
    /// From the command to its end.
    pub(super) command_ms: f64,
    /// What a busy program did on the target.
    pub(super) written: Option<Written>,
    /// godwit's own report, or what it said instead.
    pub(super) report: Result<Report, String>,
}

impl Stage {
    /// Brings up a bed whose containerds keep everything in memory, with agents.
    pub(super) fn up(name: &str, containerd: Version, rate: Option<&str>) -> Result<Self> {
        let options = BedOptions {
            storage: Storage::Memory,
            agent: true,
            rate: rate.map(str::to_owned),
            ..BedOptions::for_test(&format!("bench-{name}"))
        };
        let bed = Bed::up(options.containerd(containerd))?;
        let image = by_name("bench")?;
        bed.import(&image.build()?)?;
        Ok(Self { bed, reference: image.reference(), count: Cell::new(0) })
    }

    /// A name for a container, and the file that it ticks to.
    pub(super) fn name(&self) -> Running<'_> {
        self.count.set(self.count.get() + 1);
        let id = format!("bench{}", self.count.get());
        // Both nodes see this directory, and it is memory.
        let output = Path::new("/dev/shm").join(format!("{}-{id}.out", self.bed.options().name));
        Running { stage: self, id, output }
    }

    /// Starts a container on node a and waits until its memory is filled.
    pub(super) fn start(&self, runtime: &str, load: Load, memory_mb: u32) -> Result<Running<'_>> {
        let running = self.name();
        let log = format!("file://{}", running.output.display());
        let words = ["run", "--detach", "--runtime", runtime, "--log-uri", &log];
        let words = words.into_iter().chain([self.reference.as_str(), &running.id]).map(str::to_owned);
        self.bed.a().ctr(words.chain(load.command(memory_mb)))?;
        running.await_filled(load)?;
        Ok(running)
    }

    /// Starts a container, moves it from node a to node b with godwit, and removes it.
    pub(super) fn measure(&self, load: Load, memory_mb: u32, options: &[&str]) -> Result<Moved> {
        let running = self.start(GODWIT, load, memory_mb)?;
        running.migrate(load, options)
    }

    /// Takes everything down.
    pub(super) fn down(self) -> Result<()> {
        Ok(self.bed.down()?)
    }
}

impl Running<'_> {
    /// Waits until the memory is filled and the ticks come steadily.
    pub(super) fn await_filled(&self, load: Load) -> Result<()> {
        let filled = || {
            let text = fs::read_to_string(&self.output).unwrap_or_default();
            let count = text.lines().last().and_then(count_of).unwrap_or(0);
            !text.is_empty() && (!load.is_counted() || count > 0)
        };
        if !wait_until(Duration::from_secs(120), filled) {
            return Err(format!("container {} does not fill its memory", self.id).into());
        }
        // What its start left to do, in containerd and the kernel, is no part of the move.
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// Moves it to node b with godwit and waits until it ticks there.
    fn migrate(&self, load: Load, options: &[&str]) -> Result<Moved> {
        let (a, b) = (self.stage.bed.a(), self.stage.bed.b());
        let target = b.address().to_string();
        let words = ["godwit", "migrate", &self.id, "--to", &target, "--json", "--quiet"];
        let observer = Observer::watch(&self.output);
        let begin = Instant::now();
        let output = output(&mut a.command(words.iter().chain(options)))?;
        let command_ms = ms(begin.elapsed());
        let ticks = self.await_ticks();
        if load == Load::Busy {
            std::thread::sleep(Written::TIMES[1]);
        }
        let seen = observer.finish();
        let gap = seen.gaps.first();
        let report = if output.status.success() {
            let report: Report = serde_json::from_slice(&output.stdout)?;
            ticks?;
            Ok(report)
        } else {
            let error = String::from_utf8_lossy(&output.stderr);
            Err(error.lines().last().unwrap_or("no message").to_owned())
        };
        let observed_ms = gap.map_or(0.0, |gap| ms(gap.length));
        let written = (load == Load::Busy).then(|| Written::of(&seen));
        Ok(Moved { observed_ms, command_ms, written, report })
    }

    /// Waits until it has ticked some more.
    pub(super) fn await_ticks(&self) -> Result<()> {
        let size = || fs::metadata(&self.output).map_or(0, |data| data.len());
        let begin = size();
        if wait_until(Duration::from_secs(180), || size() > begin + 40) {
            return Ok(());
        }
        Err(format!("container {} does not tick any more", self.id).into())
    }
}

impl Drop for Running<'_> {
    /// Removes what is left of it on both nodes.
    fn drop(&mut self) {
        for node in [self.stage.bed.a(), self.stage.bed.b()] {
            remove(node, &self.id);
        }
        drop(fs::remove_file(&self.output));
    }
}

fn remove(node: &Node, id: &str) {
    let known = node.ctr(["container", "ls", "--quiet"]).unwrap_or_default();
    if known.lines().any(|line| line == id) {
        drop(node.ctr_output(["task", "rm", "--force", id]));
        drop(node.ctr_output(["container", "rm", id]));
    }
}

impl Moved {
    /// Its columns of a row.
    pub(super) fn columns(&self) -> Value {
        let common = json!({"observed_downtime_ms": self.observed_ms, "command_ms": self.command_ms});
        let common = merged(common, Written::columns(self.written));
        let Ok(report) = &self.report else {
            let outcome = self.report.as_ref().err().map(|error| format!("failed: {error}"));
            return merged(common, json!({"outcome": outcome}));
        };
        let parts = &report.downtime;
        merged(
            common,
            json!({
                "outcome": "migrated", "total_ms": report.total_ms, "downtime_ms": report.downtime_ms,
                "freeze_ms": parts.freeze_ms, "state_dump_ms": parts.state_dump_ms,
                "transfer_ms": parts.transfer_ms, "restore_ms": parts.restore_ms, "resume_ms": parts.resume_ms,
                "fill_ms": report.fill_ms, "rounds": report.rounds.len(),
                "expected_downtime_ms": report.expected_downtime_ms,
                "pages": report.pages.total, "normal_pages": report.pages.normal, "zero_pages": report.pages.zero,
                "duplicate_pages": report.pages.duplicate,
                "memory_bytes": report.bytes.memory, "wire_bytes": report.bytes.wire,
                "disk_bytes_written": report.disk_bytes_written,
                "network_faults": report.faults.network.count, "network_fault_p50_us": report.faults.network.p50_us,
                "network_fault_p99_us": report.faults.network.p99_us,
                "local_faults": report.faults.local.count,
                "cpu_source_s": report.cpu_s.source, "cpu_target_s": report.cpu_s.target,
                "peak_source_bytes": report.peak_memory_bytes.source,
                "peak_target_bytes": report.peak_memory_bytes.target,
                "streams": report.streams, "notes": report.notes.join("; "),
            }),
        )
    }
}

/// Pages that a busy program wrote in its first second on the target, and in its first five.
#[derive(Debug, Clone, Copy)]
pub(super) struct Written([Option<u64>; 2]);

impl Written {
    /// The names of the columns.
    pub(super) const COLUMNS: [&str; 2] = ["pages_written_in_1_s", "pages_written_in_5_s"];
    const TIMES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

    pub(super) fn of(seen: &Seen) -> Self {
        Self(Self::TIMES.map(|time| seen.count_after_longest_gap(time)))
    }

    pub(super) fn columns(written: Option<Self>) -> Value {
        let values = written.map_or([None; 2], |Self(counts)| counts);
        Self::COLUMNS.into_iter().zip(values).map(|(name, value)| (name.to_owned(), json!(value))).collect()
    }
}

/// Puts two objects together.
pub(super) fn merged(one: Value, other: Value) -> Value {
    match (one, other) {
        (Value::Object(mut one), Value::Object(other)) => {
            one.extend(other);
            Value::Object(one)
        }
        (one, _) => one,
    }
}

/// Milliseconds of a duration.
pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

const SETTLE: Duration = Duration::from_millis(300);
