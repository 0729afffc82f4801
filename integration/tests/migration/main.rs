//! Moving running containers from node to node: what runs goes on without a loss, containerd on the target owns
//! it, and nothing of it is left on the source.

mod asking;
mod disk;
mod programs;
mod records;
mod servers;
mod view;
mod workload;

use std::process::ExitCode;

use godwit_integration::suite::{self, Case, Lane, Runtime, Suite};
use godwit_integration::{BedOptions, Version};

fn main() -> ExitCode {
    suite::run(&Suite {
        name: "migration",
        lanes: vec![
            Lane::new(Version::V1_6, Runtime::Godwit),
            Lane::new(Version::V1_7, Runtime::RuncGodwit),
            Lane::new(Version::V2_1, Runtime::InPlace),
        ],
        more_lanes: vec![
            Lane::new(Version::V1_6, Runtime::InPlace),
            Lane::new(Version::V2_1, Runtime::Godwit),
            Lane::new(Version::V2_1, Runtime::RuncGodwit),
        ],
        images: &["busybox", "memhog", "redis", "python3", "nginx"],
        bed: |lane, name| BedOptions { agent: true, ..lane.bed(name) },
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
    cases.extend(programs::cases());
    cases.extend(servers::cases());
    cases.extend(records::cases());
    cases.extend(view::cases());
    cases.extend(asking::cases());
    cases.extend(disk::cases());
    cases
}
