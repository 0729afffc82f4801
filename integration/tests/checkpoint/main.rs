//! Checkpoint and restore as containerd's users know them: `ctr tasks checkpoint`, `ctr containers checkpoint`
//! and `restore`, the options of the API, checkpoints made by one shim and restored by another.
//!
//! Under containerd's own shim with runc the same cases pass, apart from what it is known to leave behind.

mod containers;
mod exchange;
mod options;
mod tasks;
mod workload;

use std::process::ExitCode;

use godwit_integration::Version;
use godwit_integration::suite::{self, Case, Lane, Runtime, Suite};

fn main() -> ExitCode {
    suite::run(&Suite {
        name: "checkpoint",
        lanes: vec![
            Lane::new(Version::V1_6, Runtime::Runc),
            Lane::new(Version::V1_6, Runtime::InPlace),
            Lane::new(Version::V1_7, Runtime::RuncGodwit),
            Lane::new(Version::V2_1, Runtime::Godwit),
        ],
        more_lanes: vec![
            Lane::new(Version::V1_7, Runtime::Runc),
            Lane::new(Version::V2_1, Runtime::Runc),
            Lane::new(Version::V1_6, Runtime::Godwit),
            Lane::new(Version::V1_6, Runtime::RuncGodwit),
            Lane::new(Version::V1_7, Runtime::Godwit),
            Lane::new(Version::V1_7, Runtime::InPlace),
            Lane::new(Version::V2_1, Runtime::RuncGodwit),
            Lane::new(Version::V2_1, Runtime::InPlace),
        ],
        images: &["busybox"],
        bed: |lane, name| lane.bed(name),
        prepare: |stage| stage.a.import_workload(),
        tolerated: left_by_runc,
        cases: cases(),
    })
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(tasks::cases());
    cases.extend(containers::cases());
    cases.extend(options::cases());
    cases.extend(exchange::cases());
    cases
}

/// With containerd's own shim, the directory into which containerd unpacks a checkpoint stays after the restore,
/// a whole memory image each time. Nothing may stay with this build's.
fn left_by_runc(lane: Lane, thing: &str) -> bool {
    let unpacked = ["file /run/tmp/ctd-checkpoint", "file /run/tmp/ctrd-checkpoint"];
    !lane.runtime.is_godwit() && unpacked.iter().any(|path| thing.starts_with(path))
}
