//! That no byte of memory or state passes through secondary storage, seen from outside.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use godwit_integration::case;
use godwit_integration::suite::{Answer, Case, Outcome, Site, Stage, Trouble};
use godwit_integration::{Bed, BedOptions, Storage};

use super::workload::{Shape, findings};

pub(super) fn cases() -> Vec<Case> {
    vec![case!(migration_writes_nothing_to_disk).alone()]
}

/// Follows `write_bytes` of every process outside of containers on both nodes while 64 MiB of memory move. The
/// kernel counts there what a process causes to be sent to storage, writes to a tmpfs not among it.
///
/// The nodes are the case's own, and their containerds have all of their data in memory: neither records nor
/// writable layers, whose bytes are in order, hide others. What the two daemons log is all that goes to disk.
fn migration_writes_nothing_to_disk(stage: &Stage) -> Outcome {
    let lane = stage.lane;
    let name = format!("migration-disk-{}", lane.to_string().replace(['/', '.'], "-"));
    let bed = Bed::up(BedOptions { agent: true, storage: Storage::Memory, ..lane.bed(&name) })?;
    let stage = Stage::new(lane, bed)?;
    [&stage.a, &stage.b].into_iter().try_for_each(Site::import_workload)?;
    let moved = move_watched(&stage);
    stage.down()?;
    let (answer, written) = moved?;
    for worker in ["criu", "godwit migrate-source", "godwit migrate-target"] {
        assert!(written.contains_key(worker), "{worker} was not seen: {written:?}");
    }
    for (program, bytes) in &written {
        let is_daemon = ["containerd", "godwit agent"].contains(&program.as_str());
        let allowed = if is_daemon { LOG_BYTES_MAX } else { 0 };
        assert!(*bytes <= allowed, "{program} has written {bytes} bytes to disk; all: {written:?}");
    }
    assert_eq!(answer.number("disk_bytes_written"), Some(0.0));
    Ok(())
}

fn move_watched(stage: &Stage) -> Result<(Answer, BTreeMap<String, u64>), Trouble> {
    let shape = Shape { processes: 1, threads: 1, pages: 16_384 };
    let container = shape.run(stage.a.plan("disk"))?;
    // There and, watched, back: whoever runs a program that has not been read since it was built makes the file system
    // note the time, and the kernel charges a block to him.
    let (container, _) = container.move_to(&stage.b)?;
    let earlier = findings(&container)?;
    let over = AtomicBool::new(false);
    let (moved, written) = thread::scope(|scope| {
        let watch = scope.spawn(|| watch(&[&stage.a, &stage.b], &over));
        let moved = container.move_to(&stage.a);
        over.store(true, Ordering::Relaxed);
        (moved, watch.join().unwrap_or_default())
    });
    let (moved, answer) = moved?;
    shape.assert_whole(&moved, earlier)?;
    Ok((answer, written))
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
            // One that appears later begins with nothing written.
            let first = if is_first { bytes } else { 0 };
            let entry = processes.entry(pid).or_insert_with(|| (String::new(), first, first));
            if let Some(program) = program(pid) {
                entry.0 = program;
            }
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

/// Returns what a process runs: its name, and for godwit also which of its commands. A process that is ending
/// has none.
fn program(pid: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    let command = line.split('\0').find(|word| COMMANDS.contains(word));
    (!line.is_empty()).then(|| match command {
        Some(command) if name.trim() == "godwit" => format!("godwit {command}"),
        _ => name.trim().to_owned(),
    })
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

const COMMANDS: [&str; 3] = ["agent", "migrate-source", "migrate-target"];
/// What a daemon may log while one container moves, counted in whole pages.
const LOG_BYTES_MAX: u64 = 64 << 10;
