//! `io.containerd.cgroups.v1.Metrics`: what a container has used, by cgroup v1.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat,
    Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};

use super::read::{self, Rdma, Table, huge_page_sizes, number, numbers};

/// cpuacct.stat counts in ticks of 1/100 s on every architecture (`USER_HZ`).
const NS_PER_TICK: u64 = 10_000_000;

pub(super) fn collect(found: &HashMap<String, PathBuf>) -> Metrics {
    let directory = |controller: &str| found.get(controller).map(PathBuf::as_path);
    let memory = directory("memory");
    Metrics {
        pids: directory("pids").map(pids).into(),
        cpu: directory("cpuacct").map(|cpuacct| cpu(cpuacct, directory("cpu"))).into(),
        memory: memory.map(self::memory).into(),
        memory_oom_control: memory.map(oom_control).into(),
        blkio: directory("blkio").map(blkio).into(),
        rdma: directory("rdma").map(rdma).into(),
        hugetlb: directory("hugetlb").map(hugetlb).unwrap_or_default(),
        ..Metrics::default()
    }
}

fn pids(directory: &Path) -> PidsStat {
    let limit = number(directory, "pids.max");
    // No limit is 0 in this message.
    let limit = if limit == u64::MAX { 0 } else { limit };
    PidsStat { current: number(directory, "pids.current"), limit, ..PidsStat::default() }
}

fn cpu(cpuacct: &Path, cpu: Option<&Path>) -> CPUStat {
    let ticks = Table::read(cpuacct, "cpuacct.stat");
    let usage = CPUUsage {
        total: number(cpuacct, "cpuacct.usage"),
        kernel: ticks.get("system") * NS_PER_TICK,
        user: ticks.get("user") * NS_PER_TICK,
        per_cpu: numbers(cpuacct, "cpuacct.usage_percpu"),
        ..CPUUsage::default()
    };
    let stat = cpu.map(|cpu| Table::read(cpu, "cpu.stat")).unwrap_or_default();
    let throttling = Throttle {
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_time: stat.get("throttled_time"),
        ..Throttle::default()
    };
    CPUStat { usage: Some(usage).into(), throttling: Some(throttling).into(), ..CPUStat::default() }
}

fn memory(directory: &Path) -> MemoryStat {
    let stat = Table::read(directory, "memory.stat");
    let entry = |prefix: &str| {
        let number = |name: &str| number(directory, &format!("memory.{prefix}{name}"));
        let entry = MemoryEntry {
            limit: number("limit_in_bytes"),
            usage: number("usage_in_bytes"),
            max: number("max_usage_in_bytes"),
            failcnt: number("failcnt"),
            ..MemoryEntry::default()
        };
        Some(entry).into()
    };
    MemoryStat {
        cache: stat.get("cache"),
        rss: stat.get("rss"),
        rss_huge: stat.get("rss_huge"),
        mapped_file: stat.get("mapped_file"),
        dirty: stat.get("dirty"),
        writeback: stat.get("writeback"),
        pg_pg_in: stat.get("pgpgin"),
        pg_pg_out: stat.get("pgpgout"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.get("hierarchical_memsw_limit"),
        total_cache: stat.get("total_cache"),
        total_rss: stat.get("total_rss"),
        total_rss_huge: stat.get("total_rss_huge"),
        total_mapped_file: stat.get("total_mapped_file"),
        total_dirty: stat.get("total_dirty"),
        total_writeback: stat.get("total_writeback"),
        total_pg_pg_in: stat.get("total_pgpgin"),
        total_pg_pg_out: stat.get("total_pgpgout"),
        total_pg_fault: stat.get("total_pgfault"),
        total_pg_maj_fault: stat.get("total_pgmajfault"),
        total_inactive_anon: stat.get("total_inactive_anon"),
        total_active_anon: stat.get("total_active_anon"),
        total_inactive_file: stat.get("total_inactive_file"),
        total_active_file: stat.get("total_active_file"),
        total_unevictable: stat.get("total_unevictable"),
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
        ..MemoryStat::default()
    }
}

fn oom_control(directory: &Path) -> MemoryOomControl {
    let control = Table::read(directory, "memory.oom_control");
    MemoryOomControl {
        oom_kill_disable: control.get("oom_kill_disable"),
        under_oom: control.get("under_oom"),
        oom_kill: control.get("oom_kill"),
        ..MemoryOomControl::default()
    }
}

fn blkio(directory: &Path) -> BlkIOStat {
    let read = |names: &[&str]| {
        names
            .iter()
            .map(|name| blkio_entries(directory, name))
            .find(|found| !found.is_empty())
            .unwrap_or_default()
    };
    // The counters of the throttling layer are there whatever the disk's scheduler is.
    BlkIOStat {
        io_service_bytes_recursive: read(&[
            "blkio.bfq.io_service_bytes_recursive",
            "blkio.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes",
        ]),
        io_serviced_recursive: read(&[
            "blkio.bfq.io_serviced_recursive",
            "blkio.io_serviced_recursive",
            "blkio.throttle.io_serviced_recursive",
            "blkio.throttle.io_serviced",
        ]),
        io_queued_recursive: read(&["blkio.bfq.io_queued_recursive", "blkio.io_queued_recursive"]),
        io_service_time_recursive: read(&[
            "blkio.bfq.io_service_time_recursive",
            "blkio.io_service_time_recursive",
        ]),
        io_wait_time_recursive: read(&["blkio.bfq.io_wait_time_recursive", "blkio.io_wait_time_recursive"]),
        io_merged_recursive: read(&["blkio.bfq.io_merged_recursive", "blkio.io_merged_recursive"]),
        io_time_recursive: read(&["blkio.bfq.time_recursive", "blkio.time_recursive"]),
        sectors_recursive: read(&["blkio.bfq.sectors_recursive", "blkio.sectors_recursive"]),
        ..BlkIOStat::default()
    }
}

/// Lines are `MAJOR:MINOR [OPERATION] NUMBER`, the last one a total of all devices.
fn blkio_entries(directory: &Path, file: &str) -> Vec<BlkIOEntry> {
    let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let rest: Vec<_> = words.collect();
        let (op, value) = match rest.as_slice() {
            [op, value] => (*op, value),
            [value] => ("", value),
            _ => return None,
        };
        Some(BlkIOEntry {
            op: op.to_owned(),
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            value: value.parse().ok()?,
            ..BlkIOEntry::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

fn rdma(directory: &Path) -> RdmaStat {
    RdmaStat {
        current: rdma_entries(directory, "rdma.current"),
        limit: rdma_entries(directory, "rdma.max"),
        ..RdmaStat::default()
    }
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

fn hugetlb(directory: &Path) -> Vec<HugetlbStat> {
    let stat = |pagesize: String| {
        let number = |name: &str| number(directory, &format!("hugetlb.{pagesize}.{name}"));
        HugetlbStat {
            usage: number("usage_in_bytes"),
            max: number("max_usage_in_bytes"),
            failcnt: number("failcnt"),
            pagesize,
            ..HugetlbStat::default()
        }
    };
    huge_page_sizes(directory).into_iter().map(stat).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_each_controller_fill_the_message() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        write("cpuacct.usage", "14926053\n");
        write("cpuacct.usage_percpu", "14000000 926053 \n");
        write("cpuacct.stat", "user 1\nsystem 2\n");
        write("cpu.stat", "nr_periods 3\nnr_throttled 1\nthrottled_time 500\n");
        write("memory.usage_in_bytes", "4096\n");
        write("memory.limit_in_bytes", "9223372036854771712\n");
        write("memory.stat", "cache 1\ntotal_rss 2\nhierarchical_memsw_limit 7\n");
        write("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
        write("pids.current", "2\n");
        write("pids.max", "max\n");
        write("blkio.throttle.io_service_bytes", "8:0 Read 512\n8:0 Write 0\nTotal 512\n");
        write("rdma.current", "mlx4_0 hca_handle=2 hca_object=3\n");
        write("hugetlb.2MB.usage_in_bytes", "2097152\n");
        let controllers = ["cpuacct", "cpu", "memory", "pids", "blkio", "rdma", "hugetlb"];
        let found = controllers.map(|name| (name.to_owned(), directory.path().to_owned())).into();
        let metrics = collect(&found);
        assert_eq!(metrics.cpu.usage.total, 14_926_053);
        assert_eq!(metrics.cpu.usage.per_cpu, [14_000_000, 926_053]);
        assert_eq!((metrics.cpu.usage.user, metrics.cpu.usage.kernel), (10_000_000, 20_000_000));
        assert_eq!(metrics.cpu.throttling.throttled_time, 500);
        assert_eq!((metrics.memory.usage.usage, metrics.memory.total_rss), (4096, 2));
        assert_eq!(metrics.memory.hierarchical_swap_limit, 7);
        assert_eq!(metrics.memory_oom_control.oom_kill, 2);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (2, 0));
        let bytes = &metrics.blkio.io_service_bytes_recursive;
        assert_eq!((bytes.len(), bytes[0].op.as_str(), bytes[0].major, bytes[0].value), (2, "Read", 8, 512));
        assert_eq!(metrics.rdma.current[0].hca_objects, 3);
        assert_eq!((metrics.hugetlb[0].pagesize.as_str(), metrics.hugetlb[0].usage), ("2MB", 2_097_152));
    }
}
