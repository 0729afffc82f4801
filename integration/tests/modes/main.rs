//! Every mode of migration, with memory treated in every way: what is on the target is what was on the source, the
//! report says how it came there, and whatever fails leaves one whole container.

mod claim;
mod failures;
mod fallbacks;
mod memory;
mod servers;
mod setting;
mod stops;
mod storage;
mod storm;

use std::process::ExitCode;

use godwit_integration::suite::{self, Case, Lane, Runtime, Suite};
use godwit_integration::{BedOptions, Storage, Version};

fn main() -> ExitCode {
    suite::run(&Suite {
        name: "modes",
        lanes: vec![Lane::new(Version::V1_6, Runtime::Godwit)],
        more_lanes: vec![Lane::new(Version::V2_1, Runtime::InPlace)],
        images: &["busybox", "redis", "python3", "node", "visited", "postgres"],
        // Writable layers in memory: what is then written to disk is a migration's own.
        bed: |lane, name| BedOptions { agent: true, storage: Storage::Memory, ..lane.bed(name) },
        prepare: |stage| {
            stage.a.import_workload()?;
            stage.b.import_workload()
        },
        tolerated: suite::migration::is_record_of_a_decision,
        cases: cases(),
    })
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(memory::cases());
    cases.extend(servers::cases());
    cases.extend(stops::cases());
    cases.extend(storage::cases());
    cases.extend(failures::cases());
    cases.extend(fallbacks::cases());
    cases
}
