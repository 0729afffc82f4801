//! What stands in the way of a checkpoint is named before it is tried.

use std::process::Stdio;

use godwit_container::Store;
use godwit_container::checkpoint::machine;
use godwit_container::checkpoint::preflight::{Blocker, blockers};
use godwit_criu::Version;
use serde_json::json;

use crate::bed::{Bed, Runtime::Godwit, eventually};
use crate::failure::start_with_host_file;

fn look(bed: &Bed, id: &str) -> Vec<Blocker> {
    let stored = Store::new(bed.path("root")).open(id).unwrap();
    blockers(&stored, Version { major: 4, minor: 2, sublevel: 0 }).unwrap()
}

#[test]
fn a_plain_container_has_no_blocker_and_a_visitor_is_only_mentioned() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        assert_eq!(look(bed, "one"), []);
        let mut exec = bed.command(Godwit);
        let mut exec = exec.args(["exec", "one", "sleep", "1000"]).stdout(Stdio::null()).spawn().unwrap();
        eventually("the visitor is seen", || {
            let found = look(bed, "one");
            found.iter().any(|blocker| matches!(blocker, Blocker::Visitor { name, .. } if name == "sleep"))
                && !found.iter().any(Blocker::is_fatal)
        });
        bed.ok(Godwit, &["kill", "--all", "one", "KILL"]);
        exec.wait().unwrap();
        one.reap();
    });
}

#[test]
fn a_stopped_process_is_named_where_the_freezer_would_hold_it_for_ever() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        bed.ok(Godwit, &["kill", "one", "STOP"]);
        let expected = usize::from(!godwit_container::cgroup::is_unified().unwrap());
        eventually("the stopped process is seen", || {
            let found = look(bed, "one");
            found.iter().filter(|blocker| matches!(blocker, Blocker::Stopped { .. })).count() == expected
        });
        bed.ok(Godwit, &["kill", "one", "CONT"]);
        eventually("it goes on", || look(bed, "one").is_empty());
        bed.ok(Godwit, &["kill", "--all", "one", "KILL"]);
        one.reap();
    });
}

#[test]
fn a_host_file_as_output_is_named_with_its_path() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = start_with_host_file(bed, "one");
        let found = look(bed, "one");
        let (pid, path) = (one.pid, bed.path("output"));
        assert!(found.contains(&Blocker::HostFile { pid, fd: 1, path }), "{found:?}");
    });
}

#[test]
fn another_user_is_named_where_its_limits_are_hidden() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            spec["process"]["args"] = json!(["sleep", "1000"]);
        });
        let one = bed.start(Godwit, "one");
        let expected = Blocker::OtherUser { pid: one.pid, uid: 1000 };
        assert_eq!(look(bed, "one").contains(&expected), !machine::look().cap_sys_resource);
    });
}
