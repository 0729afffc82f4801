//! Checkpoints of runc and godwit are one format.

use crate::bed::{Bed, Runtime, Runtime::Godwit, Runtime::Runc};

#[test]
fn runc_restores_what_godwit_saved() {
    Bed::with(&[Godwit, Runc], |bed| interchange(bed, Godwit, Runc));
}

#[test]
fn godwit_restores_what_runc_saved() {
    Bed::with(&[Godwit, Runc], |bed| interchange(bed, Runc, Godwit));
}

fn interchange(bed: &Bed, from: Runtime, to: Runtime) {
    bed.bundle("one", |_| {});
    // runc restores into the cgroup of the images only when the path is the same.
    bed.bundle("two", |spec| {
        if to == Runc {
            let one: serde_json::Value =
                serde_json::from_slice(&std::fs::read(bed.path("one/config.json")).unwrap()).unwrap();
            spec["linux"]["cgroupsPath"] = one["linux"]["cgroupsPath"].clone();
        }
    });
    let one = bed.start(from, "one");
    one.assert_counting();
    one.checkpoint("images", &[]);
    one.reap();
    let last = one.last_tick();
    drop(one);
    let two = bed.restore(to, "two", "images");
    assert_eq!(two.tick(), last + 1);
    two.assert_counting();
    assert_eq!(two.status(), "running");
    assert_eq!(bed.ok(to, &["exec", "two", "echo", "inside"]), "inside\n");
}
