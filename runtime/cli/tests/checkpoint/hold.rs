//! The library's two questions: shall the dumped tasks end, shall the restored ones begin?

use std::time::Duration;

use godwit_container::checkpoint::{CheckpointError, CheckpointOptions, Decision, Dump, Outcome};
use godwit_container::restore::{Hold, RestoreOptions, restore};
use godwit_container::{Store, cgroup};
use godwit_criu::Program;

use crate::bed::{Bed, Container, Runtime::Godwit};

#[test]
fn a_dump_prepared_before_the_freeze_is_rolled_back_and_then_committed() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        let stored = Store::new(bed.path("root")).open("one").unwrap();
        let program = Program::find().unwrap();
        let dump = |images: &str, decision: Decision| {
            let options = CheckpointOptions::new(bed.path(images));
            let dump = Dump::prepare(&program, &stored, &options).unwrap();
            // CRIU waits, and the container still runs.
            one.assert_counting();
            let frozen = cgroup::freezer(&stored).unwrap().freeze(Duration::from_secs(5)).unwrap();
            let mut asked = 0;
            let outcome = dump.run(|_| {
                asked += 1;
                assert!(bed.path(images).join("inventory.img").exists());
                decision
            });
            assert_eq!(asked, 1);
            (outcome.unwrap(), frozen)
        };
        let (outcome, frozen) = dump("first", Decision::Rollback);
        assert_eq!(outcome, Outcome::RolledBack);
        assert_eq!(one.status(), "paused");
        drop(frozen);
        one.assert_counting();
        let (outcome, frozen) = dump("second", Decision::Commit);
        assert_eq!(outcome, Outcome::Committed);
        frozen.commit();
        one.reap();
        assert_eq!(one.status(), "stopped");
    });
}

#[test]
fn a_prepared_dump_that_is_dropped_leaves_no_trace() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        let stored = Store::new(bed.path("root")).open("one").unwrap();
        let options = CheckpointOptions::new(bed.path("images"));
        let dump = Dump::prepare(&Program::find().unwrap(), &stored, &options).unwrap();
        let criu = dump.criu_pid().unwrap();
        drop(dump);
        assert!(!std::path::Path::new(&format!("/proc/{criu}")).exists());
        one.assert_counting();
    });
}

#[test]
fn a_restore_is_held_stopped_and_abandoned_without_a_trace_or_let_go() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        one.checkpoint("images", &[]);
        one.reap();
        drop(one);
        let store = Store::new(bed.path("root"));
        for hold in [Hold::PostRestore, Hold::PreResume] {
            bed.bundle("two", |_| {});
            let mut options = RestoreOptions::new(bed.path("two"), bed.path("images"));
            options.pid_file = Some(bed.path("two.pid"));
            options.hold = hold;
            let mut held = 0;
            let refused = restore(&store, "two", &options, |pid| {
                held = pid;
                assert_stopped(pid);
                Decision::Rollback
            });
            assert!(matches!(refused, Err(CheckpointError::Abandoned)), "{hold:?}: {refused:?}");
            assert!(held > 0 && !std::path::Path::new(&format!("/proc/{held}")).exists());
            assert!(!bed.path("root/two").exists() && bed.cgroups("two").is_empty());

            let stored = restore(&store, "two", &options, |pid| {
                assert_stopped(pid);
                Decision::Commit
            })
            .unwrap();
            assert_eq!(stored.pid(), Some(bed.pid("two")));
            let two = Container::new(bed, Godwit, "two", None);
            assert_eq!(two.status(), "running");
            drop(two);
        }
    });
}

/// No instruction of the process's own runs while it is held: it waits in CRIU's restorer or under ptrace.
fn assert_stopped(pid: i32) {
    let times = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<String> = stat.split(' ').map(str::to_owned).collect();
        (fields[13].clone(), fields[14].clone())
    };
    let before = times();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(times(), before);
}
