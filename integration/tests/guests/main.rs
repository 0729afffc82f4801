//! On two virtual machines with stock kernels: what the kernel of the machine that tests run on may not have, which
//! is cgroup version 2 alone, soft-dirty bits, and another kernel at the other end.
//!
//! Guests are emulated and slow, so their lanes belong to full runs, and nothing here says how long something took.

mod host;
mod lifecycle;
mod moves;

use std::process::ExitCode;

use godwit_integration::suite::pairs::{self, Lane, PairCase, PairSuite};

fn main() -> ExitCode {
    pairs::run(&PairSuite {
        name: "guests",
        lanes: &[SAME, NEWER, OLD],
        prepare: host::prepare,
        cases: cases(),
    })
}

fn cases() -> Vec<PairCase> {
    let mut cases = Vec::new();
    cases.extend(lifecycle::cases());
    cases.extend(moves::cases());
    cases
}

/// Writes are followed by userfaultfd, and by soft-dirty bits where that is denied.
const SAME: Lane = Lane { name: "6.12", kernels: ["6.12", "6.12"] };
/// Before kernel 6.7, writes are followed by soft-dirty bits, and CRIU dumps lazily.
const NEWER: Lane = Lane { name: "6.1-to-6.12", kernels: ["6.1", "6.12"] };
/// As before, and what the target restores with is as old.
const OLD: Lane = Lane { name: "6.1", kernels: ["6.1", "6.1"] };
