//! `io.containerd.cgroups.v2.Metrics`: what a container has used, by cgroup v2.

use std::{fs, path::Path};

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
    RdmaEntry, RdmaStat,
};

use super::read::{self, Rdma, Table, huge_page_sizes, number};

pub(super) fn collect(directory: &Path) -> Metrics {
    let pids = PidsStat {
        current: number(directory, "pids.current"),
        limit: number(directory, "pids.max"),
        ..PidsStat::default()
    };
    let rdma = RdmaStat {
        current: rdma_entries(directory, "rdma.current"),
        limit: rdma_entries(directory, "rdma.max"),
        ..RdmaStat::default()
    };
    Metrics {
        pids: Some(pids).into(),
        cpu: Some(cpu(directory)).into(),
        memory: Some(memory(directory)).into(),
        memory_events: Some(memory_events(directory)).into(),
        io: Some(io(directory)).into(),
        rdma: Some(rdma).into(),
        hugetlb: hugetlb(directory),
        ..Metrics::default()
    }
}

fn cpu(directory: &Path) -> CPUStat {
    let stat = Table::read(directory, "cpu.stat");
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: pressure(directory, "cpu.pressure").into(),
        ..CPUStat::default()
    }
}

fn memory(directory: &Path) -> MemoryStat {
    let stat = Table::read(directory, "memory.stat");
    MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        workingset_refault: stat.get("workingset_refault"),
        workingset_activate: stat.get("workingset_activate"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: number(directory, "memory.current"),
        usage_limit: number(directory, "memory.max"),
        max_usage: number(directory, "memory.peak"),
        swap_usage: number(directory, "memory.swap.current"),
        swap_limit: number(directory, "memory.swap.max"),
        swap_max_usage: number(directory, "memory.swap.peak"),
        psi: pressure(directory, "memory.pressure").into(),
        ..MemoryStat::default()
    }
}

fn memory_events(directory: &Path) -> MemoryEvents {
    let events = Table::read(directory, "memory.events");
    MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

/// Lines are `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N …`.
fn io(directory: &Path) -> IOStat {
    let text = fs::read_to_string(directory.join("io.stat")).unwrap_or_default();
    let entry = |line: &str| {
        let (device, counters) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let table = Table::parse(&counters.replace(' ', "\n"));
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: table.get("rbytes"),
            wbytes: table.get("wbytes"),
            rios: table.get("rios"),
            wios: table.get("wios"),
            ..IOEntry::default()
        })
    };
    let usage = text.lines().filter_map(entry).collect();
    IOStat { usage, psi: pressure(directory, "io.pressure").into(), ..IOStat::default() }
}

/// Lines are `some|full avg10=N avg60=N avg300=N total=N`.
fn pressure(directory: &Path, file: &str) -> Option<PSIStats> {
    let text = fs::read_to_string(directory.join(file)).ok()?;
    let line = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let value = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key));
        let average = |key: &str| value(key).and_then(|text| text.parse().ok()).unwrap_or(0.0);
        Some(PSIData {
            avg10: average("avg10="),
            avg60: average("avg60="),
            avg300: average("avg300="),
            total: value("total=").and_then(|text| text.parse().ok()).unwrap_or(0),
            ..PSIData::default()
        })
    };
    Some(PSIStats { some: line("some ").into(), full: line("full ").into(), ..PSIStats::default() })
}

fn rdma_entries(directory: &Path, file: &str) -> Vec<RdmaEntry> {
    let entry = |read: Rdma| RdmaEntry {
        device: read.device,
        hca_handles: read.handles,
        hca_objects: read.objects,
        ..RdmaEntry::default()
    };
    read::rdma(directory, file).map(entry).collect()
}

fn hugetlb(directory: &Path) -> Vec<HugeTlbStat> {
    let stat = |pagesize: String| {
        let name = |file: &str| format!("hugetlb.{pagesize}.{file}");
        HugeTlbStat {
            current: number(directory, &name("current")),
            max: number(directory, &name("max")),
            failcnt: Table::read(directory, &name("events")).get("max"),
            pagesize,
            ..HugeTlbStat::default()
        }
    };
    huge_page_sizes(directory).into_iter().map(stat).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_fill_the_message() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        write("cpu.stat", "usage_usec 12\nuser_usec 7\nsystem_usec 5\n");
        write("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.00 total=9\n");
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n");
        write("io.stat", "8:16 rbytes=512 wbytes=1 rios=2 wios=3 dbytes=0 dios=0\n");
        write("pids.max", "100\n");
        let metrics = collect(directory.path());
        assert_eq!(metrics.cpu.usage_usec, 12);
        assert_eq!(metrics.cpu.psi.some.total, 9);
        assert!((metrics.cpu.psi.some.avg10 - 1.5).abs() < f64::EPSILON);
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (4096, u64::MAX));
        assert_eq!((metrics.memory_events.oom, metrics.memory_events.oom_kill), (2, 1));
        assert_eq!((metrics.io.usage[0].minor, metrics.io.usage[0].wios), (16, 3));
        assert_eq!(metrics.pids.limit, 100);
    }
}
