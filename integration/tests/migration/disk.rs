//! That no byte of memory or state passes through secondary storage, seen from outside.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use godwit_integration::case;
use godwit_integration::suite::{Case, Outcome, Site, Stage};

use super::workload::{Shape, findings};

pub(super) fn cases() -> Vec<Case> {
    vec![case!(migration_writes_nothing_to_disk).alone()]
}

/// Follows `write_bytes` of every process outside of containers on both nodes while 64 MiB of memory move. The kernel counts there what
/// a process causes to be sent to storage, writes to a tmpfs not among it. Both containerds have their data on
/// disk, and write their own records of the container there.
fn migration_writes_nothing_to_disk(stage: &Stage) -> Outcome {
    let shape = Shape { processes: 1, threads: 1, pages: 16_384 };
    let container = shape.run(stage.a.plan("disk"))?;
    let earlier = findings(&container)?;
    let over = AtomicBool::new(false);
    let (moved, written) = thread::scope(|scope| {
        let watch = scope.spawn(|| watch(&[&stage.a, &stage.b], &over));
        let moved = container.move_to(&stage.b);
        over.store(true, Ordering::Relaxed);
        (moved, watch.join().unwrap_or_default())
    });
    let (moved, answer) = moved?;
    shape.assert_whole(&moved, earlier)?;
    let names: Vec<&str> = written.keys().map(String::as_str).collect();
    assert!(names.iter().any(|name| name.contains("criu")), "criu was not seen among {names:?}");
    for (program, bytes) in &written {
        let allowed = match program.as_str() {
            "containerd" => RECORDS_BYTES_MAX,
            // It mounts the writable layer, for which the kernel makes directories in it.
            name if name.starts_with("containerd-shim") => LAYER_BYTES_MAX,
            _ => 0,
        };
        assert!(*bytes <= allowed, "{program} has written {bytes} bytes to disk; all: {written:?}");
    }
    assert_eq!(answer.number("disk_bytes_written"), Some(0.0));
    Ok(())
}

/// Samples the nodes' processes until `over`, and returns by program how much all of its processes have
/// written since they were first seen. A process that begins and ends between two samples is missed; those that
/// carry a migration live much longer.
fn watch(sites: &[&Site], over: &AtomicBool) -> BTreeMap<String, u64> {
    let mut processes: BTreeMap<i32, (String, u64, u64)> = BTreeMap::new();
    let mut is_first = true;
    while !over.load(Ordering::Relaxed) {
        for pid in sites.iter().flat_map(|site| own_processes(site)) {
            let Some(bytes) = write_bytes(pid) else { continue };
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // One that appears later begins with nothing written.
            let first = if is_first { bytes } else { 0 };
            let entry = processes.entry(pid).or_insert_with(|| (String::new(), first, first));
            entry.0 = name.trim().to_owned();
            entry.2 = bytes;
        }
        is_first = false;
    }
    let mut programs = BTreeMap::new();
    for (name, first, last) in processes.into_values() {
        *programs.entry(name).or_default() += last - first;
    }
    programs
}

/// Returns the node's processes outside of containers: its daemons, shims, and what those have started. They are
/// read from one hierarchy, for the sake of many samples.
fn own_processes(site: &Site) -> Vec<i32> {
    let list = site.node().cgroups().init_files().into_iter().next();
    let text = list.and_then(|list| fs::read_to_string(list).ok()).unwrap_or_default();
    text.lines().filter_map(|pid| pid.parse().ok()).collect()
}

fn write_bytes(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.parse().ok())
}

/// What containerd may write about a container to its database, which it does in whole pages and more than once.
const RECORDS_BYTES_MAX: u64 = 4 << 20;
/// What empty directories may take.
const LAYER_BYTES_MAX: u64 = 64 << 10;
