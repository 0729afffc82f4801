//! Migrations that cannot be: every one ends with an error that says what to do, the container running on the
//! source as before, and nothing left over on either node.
//!
//! Each case ends by claiming just that ([`claim::assert_untouched`]); that nothing is left over on the nodes is
//! claimed once for all cases, when they have ended.

mod claim;
mod container;
mod crash;
mod guard;
mod peer;
mod target;

use std::process::ExitCode;

use godwit_integration::suite::{self, Case, Lane, Runtime, Suite};
use godwit_integration::{BedOptions, Storage, Version};

fn main() -> ExitCode {
    suite::run(&Suite {
        name: "bad_input",
        lanes: vec![Lane::new(Version::V1_6, Runtime::Godwit), Lane::new(Version::V2_1, Runtime::InPlace)],
        more_lanes: vec![Lane::new(Version::V1_7, Runtime::RuncGodwit)],
        images: &["busybox", "python3"],
        // In memory, where a node's storage can be made small.
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
    cases.extend(container::cases());
    cases.extend(peer::cases());
    cases.extend(target::cases());
    cases.extend(crash::cases());
    cases
}
