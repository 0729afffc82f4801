//! What a container uses, as runc's `events --stats` prints it.
//!
//! Read from the cgroup's files rather than through libcgroups: a kernel without swap accounting or kernel
//! memory files is common, and what is missing there must read as zero, not fail. Times are in nanoseconds,
//! sizes in bytes, on both cgroup versions.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use libcgroups::v1::ControllerType;
use serde::Serialize;

use crate::cgroup;
use crate::error::{ContainerError, Result};
use crate::state::{Status, Stored};

/// One record of `events`.
#[derive(Debug, Serialize)]
pub struct Event<'a> {
    /// `stats` or `oom`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The container.
    pub id: &'a str,
    /// The usage, for `stats`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Stats>,
}

/// Usage of one container.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    cpu: Cpu,
    cpuset: Empty,
    memory: Memory,
    pids: Pids,
    blkio: Blkio,
    hugetlb: BTreeMap<String, Counted>,
    intel_rdt: Empty,
    network_interfaces: Option<()>,
}

/// A section that runc prints and godwit has nothing to say in.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Empty {}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Cpu {
    usage: CpuUsage,
    throttling: Throttling,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct CpuUsage {
    total: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu: Vec<u64>,
    kernel: u64,
    user: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Throttling {
    #[serde(skip_serializing_if = "is_zero")]
    periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_time: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Memory {
    #[serde(skip_serializing_if = "is_zero")]
    cache: u64,
    usage: Counted,
    swap: Counted,
    kernel: Counted,
    #[serde(rename = "kernelTCP")]
    kernel_tcp: Counted,
    raw: BTreeMap<String, u64>,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Counted {
    limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Pids {
    #[serde(skip_serializing_if = "is_zero")]
    current: u64,
    #[serde(skip_serializing_if = "is_zero")]
    limit: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Blkio {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_bytes_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_serviced_recursive: Vec<BlkioEntry>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct BlkioEntry {
    major: u64,
    minor: u64,
    op: String,
    value: u64,
}

impl Stats {
    /// Reads the usage of a live container.
    ///
    /// # Errors
    /// [`ContainerError::NotRunning`], or a cgroup that cannot be found.
    pub fn of(stored: &Stored) -> Result<Self> {
        let status = stored.status()?;
        if matches!(status, Status::Stopped | Status::Creating) {
            return Err(ContainerError::NotRunning { status });
        }
        if cgroup::is_unified()? {
            return Ok(unified(&cgroup::directory(stored, ControllerType::Cpu)?));
        }
        let directory = |controller| cgroup::directory(stored, controller);
        let mut stats = Self { blkio: blkio_v1(stored), ..Self::default() };
        if let Ok(path) = directory(ControllerType::CpuAcct) {
            stats.cpu.usage = cpu_usage_v1(&path);
        }
        if let Ok(path) = directory(ControllerType::Cpu) {
            let stat = table(&path, "cpu.stat");
            stats.cpu.throttling = throttling(&stat, "throttled_time", 1);
        }
        if let Ok(path) = directory(ControllerType::Memory) {
            stats.memory = memory_v1(&path);
        }
        if let Ok(path) = directory(ControllerType::Pids) {
            stats.pids = pids(&path);
        }
        if let Ok(path) = directory(ControllerType::HugeTlb) {
            stats.hugetlb = huge_pages(&path, ("usage_in_bytes", "max_usage_in_bytes", "failcnt"));
        }
        Ok(stats)
    }
}

/// How often the kernel has killed a process of the container for want of memory.
///
/// # Errors
/// When the container's cgroup cannot be found.
pub fn oom_kills(stored: &Stored) -> Result<u64> {
    let directory = cgroup::directory(stored, ControllerType::Memory)?;
    let file = if cgroup::is_unified()? { "memory.events" } else { "memory.oom_control" };
    Ok(field(&table(&directory, file), "oom_kill"))
}

fn unified(path: &Path) -> Stats {
    let cpu = table(path, "cpu.stat");
    let raw = table(path, "memory.stat");
    let events = table(path, "memory.events");
    let counted = |prefix: &str, failed: u64| Counted {
        limit: number(path, &format!("{prefix}.max")),
        usage: number(path, &format!("{prefix}.current")),
        max: number(path, &format!("{prefix}.peak")),
        failcnt: failed,
    };
    let mut swap = counted("memory.swap", field(&table(path, "memory.swap.events"), "fail"));
    let usage = counted("memory", field(&events, "max"));
    // Version 1 counts memory and swap together, and so does whoever reads this.
    swap.usage = swap.usage.saturating_add(usage.usage);
    swap.limit = swap.limit.saturating_add(usage.limit);
    swap.max = 0;
    let cpu_usage = CpuUsage {
        total: field(&cpu, "usage_usec").saturating_mul(NS_PER_US),
        percpu: Vec::new(),
        kernel: field(&cpu, "system_usec").saturating_mul(NS_PER_US),
        user: field(&cpu, "user_usec").saturating_mul(NS_PER_US),
    };
    Stats {
        cpu: Cpu { usage: cpu_usage, throttling: throttling(&cpu, "throttled_usec", NS_PER_US) },
        memory: Memory { cache: field(&raw, "file"), usage, swap, raw, ..Memory::default() },
        pids: pids(path),
        blkio: blkio_v2(&text(path, "io.stat")),
        hugetlb: huge_pages(path, ("current", "peak", "events.max")),
        ..Stats::default()
    }
}

fn cpu_usage_v1(path: &Path) -> CpuUsage {
    let stat = table(path, "cpuacct.stat");
    let per_cpu = text(path, "cpuacct.usage_percpu");
    CpuUsage {
        total: number(path, "cpuacct.usage"),
        percpu: per_cpu.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect(),
        kernel: field(&stat, "system").saturating_mul(NS_PER_TICK),
        user: field(&stat, "user").saturating_mul(NS_PER_TICK),
    }
}

fn throttling(stat: &BTreeMap<String, u64>, time: &str, unit_ns: u64) -> Throttling {
    Throttling {
        periods: field(stat, "nr_periods"),
        throttled_periods: field(stat, "nr_throttled"),
        throttled_time: field(stat, time).saturating_mul(unit_ns),
    }
}

fn memory_v1(path: &Path) -> Memory {
    let counted = |prefix: &str| Counted {
        limit: number(path, &format!("{prefix}.limit_in_bytes")),
        usage: number(path, &format!("{prefix}.usage_in_bytes")),
        max: number(path, &format!("{prefix}.max_usage_in_bytes")),
        failcnt: number(path, &format!("{prefix}.failcnt")),
    };
    let raw = table(path, "memory.stat");
    Memory {
        cache: field(&raw, "cache"),
        usage: counted("memory"),
        swap: counted("memory.memsw"),
        kernel: counted("memory.kmem"),
        kernel_tcp: counted("memory.kmem.tcp"),
        raw,
    }
}

fn pids(path: &Path) -> Pids {
    let limit = text(path, "pids.max");
    Pids { current: number(path, "pids.current"), limit: limit.trim().parse().unwrap_or(0) }
}

/// Usage of each size of huge pages that was used at all, as runc leaves out the others.
fn huge_pages(path: &Path, (usage, max, failed): (&str, &str, &str)) -> BTreeMap<String, Counted> {
    let Ok(entries) = fs::read_dir(path) else { return BTreeMap::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let suffix = format!(".{usage}");
    names
        .filter_map(|name| Some(name.strip_prefix("hugetlb.")?.strip_suffix(&suffix)?.to_owned()))
        .filter(|size| !size.contains('.'))
        .map(|size| {
            let file = |kind: &str| format!("hugetlb.{size}.{kind}");
            let failcnt = match failed.split_once('.') {
                Some((events, key)) => field(&table(path, &file(events)), key),
                None => number(path, &file(failed)),
            };
            let (usage, max) = (number(path, &file(usage)), number(path, &file(max)));
            (size, Counted { limit: 0, usage, max, failcnt })
        })
        .filter(|(_, counted)| *counted != Counted::default())
        .collect()
}

fn blkio_v1(stored: &Stored) -> Blkio {
    let Ok(path) = cgroup::directory(stored, ControllerType::Blkio) else { return Blkio::default() };
    let entries = |file: &str| text(&path, file).lines().filter_map(blkio_line_v1).collect();
    Blkio {
        io_service_bytes_recursive: entries("blkio.throttle.io_service_bytes_recursive"),
        io_serviced_recursive: entries("blkio.throttle.io_serviced_recursive"),
    }
}

/// `8:0 Read 4096`; the last line, `Total 4096`, has no device.
fn blkio_line_v1(line: &str) -> Option<BlkioEntry> {
    let mut words = line.split_ascii_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let op = words.next()?.to_owned();
    let value = words.next()?.parse().ok()?;
    Some(BlkioEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, op, value })
}

/// `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 ..`
fn blkio_v2(text: &str) -> Blkio {
    let mut blkio = Blkio::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut blkio.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut blkio.io_service_bytes_recursive, "Write"),
                "rios" => (&mut blkio.io_serviced_recursive, "Read"),
                "wios" => (&mut blkio.io_serviced_recursive, "Write"),
                _ => continue,
            };
            let value = value.parse().unwrap_or(0);
            list.push(BlkioEntry { major, minor, op: op.to_owned(), value });
        }
    }
    blkio
}

/// The text of a file, empty when there is none.
fn text(directory: &Path, file: &str) -> String {
    fs::read_to_string(directory.join(file)).unwrap_or_default()
}

/// The number in a file; `max` is the largest, a missing file zero.
fn number(directory: &Path, file: &str) -> u64 {
    match text(directory, file).trim() {
        "max" => u64::MAX,
        word => word.parse().unwrap_or(0),
    }
}

/// A file of lines `key value`.
fn table(directory: &Path, file: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    };
    text(directory, file).lines().filter_map(line).collect()
}

fn field(table: &BTreeMap<String, u64>, key: &str) -> u64 {
    table.get(key).copied().unwrap_or(0)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

const NS_PER_US: u64 = 1000;
/// `cpuacct.stat` counts in hundredths of a second on every architecture (USER_HZ).
const NS_PER_TICK: u64 = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn pretend(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn version_two_is_told_in_version_ones_units() {
        let directory = pretend(&[
            ("cpu.stat", "usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_throttled 1\nthrottled_usec 2\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2048\n"),
            ("memory.events", "low 0\nmax 5\noom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.events", "max 0\n"),
        ]);
        let stats = unified(directory.path());
        assert_eq!((stats.cpu.usage.total, stats.cpu.throttling.throttled_time), (7000, 2000));
        assert_eq!((stats.memory.usage.limit, stats.memory.usage.failcnt), (u64::MAX, 5));
        assert_eq!((stats.memory.cache, stats.memory.swap.usage), (2048, 4096));
        assert_eq!((stats.pids.current, stats.pids.limit), (3, 0));
        assert_eq!(stats.blkio.io_serviced_recursive.len(), 2);
        assert_eq!(stats.hugetlb["2MB"].usage, 2_097_152);
    }

    #[test]
    fn a_kernel_without_swap_accounting_reads_as_zero() {
        let directory = pretend(&[("memory.limit_in_bytes", "9"), ("memory.stat", "cache 1\n")]);
        let memory = memory_v1(directory.path());
        assert_eq!((memory.usage.limit, memory.swap, memory.cache), (9, Counted::default(), 1));
    }

    #[test]
    fn a_total_is_no_device() {
        let text = "8:0 Read 4096\n8:0 Total 4096\nTotal 4096\n";
        assert_eq!(text.lines().filter_map(blkio_line_v1).count(), 2);
    }
}
