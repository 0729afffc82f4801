//! Everything that containerd's users do with a container short of checkpoints, through ctr and containerd's
//! API, on every supported containerd.
//!
//! The expectations are those of containerd's own shim with runc, on which the same cases run: one that fails
//! there is wrong.

mod control;
mod events;
mod exec;
mod failure;
mod limits;
mod options;
mod pods;
mod run;
mod streams;

use std::process::ExitCode;

use godwit_integration::Version;
use godwit_integration::suite::{self, Lane, Runtime, Suite};

fn main() -> ExitCode {
    suite::run(&Suite {
        name: "lifecycle",
        lanes: vec![
            Lane::new(Version::V1_6, Runtime::Runc),
            Lane::new(Version::V1_6, Runtime::Godwit),
            Lane::new(Version::V1_7, Runtime::RuncGodwit),
            Lane::new(Version::V2_1, Runtime::InPlace),
        ],
        more_lanes: vec![
            Lane::new(Version::V1_7, Runtime::Runc),
            Lane::new(Version::V2_1, Runtime::Runc),
            Lane::new(Version::V1_6, Runtime::RuncGodwit),
            Lane::new(Version::V1_6, Runtime::InPlace),
            Lane::new(Version::V1_7, Runtime::Godwit),
            Lane::new(Version::V1_7, Runtime::InPlace),
            Lane::new(Version::V2_1, Runtime::Godwit),
            Lane::new(Version::V2_1, Runtime::RuncGodwit),
        ],
        images: &["busybox"],
        bed: |lane, name| lane.bed(name),
        prepare: |_| Ok(()),
        // The socket of a shim that was killed: runc's does not remove it.
        tolerated: |lane, thing| !lane.runtime.is_godwit() && thing.starts_with("file /run/containerd/s/"),
        cases: cases(),
    })
}

fn cases() -> Vec<suite::Case> {
    let mut cases = Vec::new();
    cases.extend(run::cases());
    cases.extend(exec::cases());
    cases.extend(streams::cases());
    cases.extend(control::cases());
    cases.extend(limits::cases());
    cases.extend(events::cases());
    cases.extend(options::cases());
    cases.extend(pods::cases());
    cases.extend(failure::cases());
    cases
}
