//! Migrations, with workers that are scripts.

use std::{path::Path, time::Duration};

use godwit_sys::pidfd::PidFd;

use super::*;

#[tokio::test(flavor = "current_thread")]
async fn what_cannot_be_understood_as_a_migration_is_refused_by_name() {
    let bench = Bench::started(Arc::default()).await;
    let error = bench.checkpoint("godwit://b?mode=teleport").await.unwrap_err();
    assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
    assert!(error.to_string().contains("`teleport`"), "{error}");
    assert!(matches!(bench.container.migration_status(), Err(ShimError::NeverMigrated { .. })));
}

const REPORT: &str = r#"{"id":"web","migration":"m","mode":"native","outcome":"migrated",
    "fate":"running_on_target","total_ms":2.0,"downtime_ms":1.0,
    "downtime":{"freeze_ms":1.0,"state_dump_ms":0.0,"transfer_ms":0.0,"restore_ms":0.0,"resume_ms":0.0},
    "pages":{"total":0,"normal":0,"zero":0},"bytes":{"state":0,"memory":0,"rootfs":0,"wire":0},
    "disk_bytes_written":0,"cpu_s":{"source":0.0,"target":0.0}}"#;

const PROGRESS: &str = r#"{"event":"progress","snapshot":{"migration":"m","id":"web","mode":"native",
    "phase":"frozen","elapsed_ms":5,"sent_bytes":1,"expected_bytes":2,"rate_bytes_per_s":3}}"#;

impl Bench {
    /// Gives the shim a worker that says `lines` and then runs `rest`, which finds what it was told on stdin
    /// and whether it is to resolve in `$resolve`.
    fn worker(&self, lines: &[&str], rest: &str) {
        use std::os::unix::fs::PermissionsExt;
        let lines: Vec<String> = lines
            .iter()
            .map(|line| format!("echo '{}' >/proc/self/fd/$fd", line.replace('\n', "")))
            .collect();
        let script = format!(
            "#!/bin/sh\nresolve=\nwhile [ $# -gt 0 ]; do case $1 in --events-fd) fd=$2;; --pid-file) pids=$2;; \
             --resolve) resolve=1;; esac; shift; done\n{}\n{rest}\n",
            lines.join("\n")
        );
        let path = self.bundle.path().join("worker");
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn snapshot(&self) -> serde_json::Value {
        serde_json::from_str(&self.container.migration_status().unwrap()).unwrap()
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_migration_answers_at_commit_and_its_worker_waits_for_the_release() {
    let bench = Bench::started(Arc::default()).await;
    bench.container.call(Request::Pause).await.unwrap();
    let committed = format!(r#"{{"event":"committed","report":{REPORT}}}"#);
    let told = bench.bundle.path().join("told");
    let rest = format!("read line; echo $line >{}.new; mv {0}.new {0}", told.display());
    bench.worker(&[PROGRESS, r#"{"event":"committing"}"#, &committed], &rest);
    bench.checkpoint("godwit://b?migration=m").await.unwrap();
    // The client's pause was lifted, and its resume finds nothing to do but is welcome.
    assert_eq!(bench.fake.verbs(), ["create", "start", "pause", "resume"]);
    assert!(!told.exists());
    assert!(
        crate::bundle::is_committing(bench.bundle.path()),
        "else `delete` kills the worker in its clean-up"
    );
    assert_eq!(bench.snapshot()["ended"]["end"], "well");
    while !told.exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(std::fs::read_to_string(&told).unwrap().trim(), r#"{"command":"release"}"#);
    bench.container.call(Request::Resume).await.unwrap();
    assert!(matches!(bench.container.cancel_migration(), Err(ShimError::NotMigrating { .. })));
}

#[tokio::test(flavor = "current_thread")]
async fn a_worker_that_dies_before_it_commits_leaves_the_container_running() {
    let bench = Bench::started(Arc::default()).await;
    bench.worker(&[PROGRESS], "exit 3");
    let error = bench.checkpoint("godwit://b?migration=m").await.unwrap_err();
    assert_eq!(error.code(), ttrpc::Code::ABORTED);
    assert!(error.to_string().contains("ended with status 3"), "{error}");
    assert!(error.to_string().contains("the container runs on the source"), "{error}");
    assert_eq!(bench.fake.verbs(), ["create", "start", "resume"]);
    let snapshot = bench.snapshot();
    assert_eq!(
        (&snapshot["phase"], &snapshot["ended"]["failure"]["fate"]),
        (&"frozen".into(), &"running_on_source".into())
    );
    bench.container.call(Request::Pause).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn after_committing_only_the_target_decides() {
    let bench = Bench::started(Arc::default()).await;
    let committed = format!(r#"{{"event":"committed","report":{}}}"#, REPORT.replace('\n', ""));
    // It dies after it has said that it commits; so does the first that asks; the second gets an answer.
    let asked = bench.bundle.path().join("asked");
    let rest = format!(
        "[ $resolve ] || {{ echo '{{\"event\":\"committing\"}}' >/proc/self/fd/$fd; exit 1; }}\n\
         [ -e {0} ] || {{ touch {0}; exit 1; }}\necho '{committed}' >/proc/self/fd/$fd; read line",
        asked.display()
    );
    bench.worker(&[], &rest);
    let error = bench.checkpoint("godwit://b?migration=m").await.unwrap_err();
    assert!(error.to_string().contains("it is not known which side"), "{error}");
    // Nobody thaws, and nothing else is done to it, until the answer is there.
    assert_eq!(bench.fake.verbs(), ["create", "start"]);
    for request in [Request::Pause, Request::Resume] {
        let refused = bench.container.call(request).await.unwrap_err();
        assert!(matches!(refused, ShimError::Migrating { .. }), "{refused}");
        assert_eq!(refused.code(), ttrpc::Code::FAILED_PRECONDITION);
    }
    while bench.snapshot()["ended"]["end"] != "well" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(bench.fake.verbs(), ["create", "start"]);
}

#[tokio::test(flavor = "current_thread")]
async fn a_resume_while_it_commits_is_refused_at_once() {
    let bench = Arc::new(Bench::started(Arc::default()).await);
    let failed = r#"{"event":"failed","failure":{"side":"source","phase":"committing","fate":"running_on_source","cause":"refused"}}"#;
    let go_on = bench.bundle.path().join("go-on");
    let rest =
        format!("until [ -e {} ]; do sleep 0.01; done; echo '{failed}' >/proc/self/fd/$fd", go_on.display());
    bench.worker(&[r#"{"event":"committing"}"#], &rest);
    let asking = Arc::clone(&bench);
    let migration = tokio::spawn(async move { asking.checkpoint("godwit://b?migration=m").await });
    while bench.container.migration_status().is_err() || bench.snapshot()["phase"] != "committing" {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let refused = bench.container.refuse_while_migrating("resume").unwrap_err();
    assert_eq!(refused.code(), ttrpc::Code::FAILED_PRECONDITION);
    std::fs::write(&go_on, []).unwrap();
    migration.await.unwrap().unwrap_err();
    bench.container.refuse_while_migrating("resume").unwrap();
    assert_eq!(bench.fake.verbs(), ["create", "start"]);
}

#[tokio::test(flavor = "current_thread")]
async fn what_a_dead_worker_has_started_is_waited_for_before_the_thaw() {
    let bench = Bench::started(Arc::default()).await;
    let let_go = bench.bundle.path().join("let-go");
    // As CRIU does, it holds none of the worker's descriptors but the one that nobody knows of.
    let rest = format!("bash -c \"exec $fd>&-; sleep 0.2; touch {}\" & exit 3", let_go.display());
    bench.worker(&[PROGRESS], &rest);
    bench.checkpoint("godwit://b?migration=m").await.unwrap_err();
    assert!(let_go.exists());
    assert_eq!(bench.fake.verbs(), ["create", "start", "resume"]);
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_stays_frozen_is_not_said_to_run() {
    let bench = Bench::started(Arc::default()).await;
    let group = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| std::fs::write(group.path().join(file), text).unwrap();
    write("cgroup.freeze", "1\n");
    write("cgroup.events", "populated 1\nfrozen 1\n");
    bench.container.lock().cgroup = Some(Cgroup::V2(group.path().to_owned()));
    bench.worker(&[PROGRESS], "exit 3");
    let error = bench.checkpoint("godwit://b?migration=m").await.unwrap_err().to_string();
    let by_hand = format!("echo 0 >{}", group.path().join("cgroup.freeze").display());
    assert!(error.contains("still frozen") && error.contains(&by_hand), "{error}");
    assert_eq!(bench.snapshot()["ended"]["failure"]["fate"], "unknown");
    assert_eq!(std::fs::read_to_string(group.path().join("cgroup.freeze")).unwrap().trim(), "0");
    assert!(matches!(bench.container.call(Request::Resume).await, Err(ShimError::Migrating { .. })));
    // What held it lets go.
    write("cgroup.events", "populated 1\nfrozen 0\n");
    while bench.snapshot()["ended"]["failure"]["fate"] != "running_on_source" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bench.container.call(Request::Pause).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn cancelling_reaches_the_worker_and_its_failure_the_client() {
    let bench = Arc::new(Bench::started(Arc::default()).await);
    let failed = r#"{"event":"failed","failure":{"side":"source","phase":"frozen","fate":"running_on_source","cause":"cancelled"}}"#;
    bench.worker(&[PROGRESS], &format!("read line; echo '{failed}' >/proc/self/fd/$fd"));
    let asking = Arc::clone(&bench);
    let migration = tokio::spawn(async move { asking.checkpoint("godwit://b").await });
    while bench.container.migration_status().is_err() || bench.snapshot()["phase"] != "frozen" {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let exec = bench.container.add_exec("e", Address::default(), Vec::new());
    assert_eq!(exec.unwrap_err().code(), ttrpc::Code::FAILED_PRECONDITION);
    bench.container.cancel_migration().unwrap();
    let error = migration.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("cancelled"), "{error}");
}

/// What a target's worker does: makes an init that runs `command`, and says so.
fn restoring(command: &str) -> String {
    format!("{command} & echo $! >$pids; echo '{{\"event\":\"restored\",\"pid\":'$!'}}' >/proc/self/fd/$fd\n")
}

impl Bench {
    async fn incoming(rest: &str) -> Self {
        // As the shim is: the init becomes its child when the worker has ended.
        godwit_sys::process::set_subreaper(true).unwrap();
        let ask = |request: &mut CreateRequest| request.checkpoint = "godwit-incoming:///s".to_owned();
        let bench = Self::with(Arc::default(), ask).await;
        bench.worker(&[], rest);
        bench
    }

    fn init_exists(&self) -> bool {
        Path::new(&format!("/proc/{}", self.container.pid())).exists()
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_incoming_container_runs_on_when_its_memory_is_filled() {
    let rest = restoring("sleep 60") + "echo '{\"event\":\"filled\"}' >/proc/self/fd/$fd; exit 1";
    let mut bench = Bench::incoming(&rest).await;
    let pid = bench.start("").await.unwrap();
    assert_eq!((bench.container.view("").unwrap().status, bench.container.pid()), ("running", pid));
    bench.container.be_whole("checkpoint").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(bench.init_exists() && bench.fake.verbs().is_empty(), "{:?}", bench.fake.verbs());
    bench.container.kill("", 15, false).await.unwrap();
    assert_eq!(bench.status("").await, 143);
    bench.delete("").await.unwrap();
    let expected = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    assert_eq!(bench.topics(4).await, expected);
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_whose_worker_dies_before_its_memory_is_here_is_killed() {
    let bench = Bench::incoming(&(restoring("sleep 60") + "sleep 0.2; kill -9 $$")).await;
    bench.start("").await.unwrap();
    assert!(bench.init_exists());
    assert_eq!(bench.status("").await, 137);
    bench.delete("").await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_worker_that_ends_well_has_filled_the_memory() {
    let bench = Bench::incoming(&(restoring("sleep 60") + "exit 0")).await;
    let pid = bench.start("").await.unwrap();
    bench.container.be_whole("checkpoint").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(bench.init_exists());
    PidFd::open(pid).unwrap().send_signal(9).unwrap();
    assert_eq!(bench.status("").await, 137);
}

#[tokio::test(flavor = "current_thread")]
async fn an_init_that_ends_while_its_memory_is_filled_ends_the_worker_and_keeps_its_status() {
    // The worker is its parent, and does not collect it.
    let rest = restoring("sh -c 'sleep 0.2; exit 7'") + "echo $$ >$pids.worker; exec sleep 60";
    let mut bench = Bench::incoming(&rest).await;
    bench.start("").await.unwrap();
    assert_eq!(bench.status("").await, 7);
    bench.delete("").await.unwrap();
    let worker = std::fs::read_to_string(bench.bundle.path().join("init.pid.worker")).unwrap();
    assert!(!Path::new("/proc").join(worker.trim()).exists());
    let expected = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    assert_eq!(bench.topics(4).await, expected);
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_was_restored_is_seen_to_run_before_its_worker_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let go_on = directory.path().join("go-on");
    let rest = format!(
        "sleep 60 & echo $! >$pids; until [ -e {} ]; do sleep 0.01; done; kill -9 $!; exit 1",
        go_on.display()
    );
    let bench = Arc::new(Bench::incoming(&rest).await);
    assert_eq!(bench.container.view("").unwrap().status, "created");
    let starting = Arc::clone(&bench);
    let start = tokio::spawn(async move { starting.start("").await });
    while bench.container.view("").unwrap().status != "running" {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_ne!(bench.container.view("").unwrap().pid, 0);
    std::fs::write(&go_on, []).unwrap();
    let error = start.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("ended with status 1"), "{error}");
    assert_eq!(bench.container.view("").unwrap().status, "created");
}

#[tokio::test(flavor = "current_thread")]
async fn what_a_worker_reports_is_passed_on_as_it_is() {
    let bench = Bench::started(Arc::default()).await;
    let progress = PROGRESS.replace("\"phase\"", "\"unheard_of\":[{\"dirty\":7}],\"phase\"");
    let report = REPORT.replace("\"cpu_s\"", "\"news\":{\"count\":9},\"cpu_s\"");
    bench.worker(&[&progress, &format!(r#"{{"event":"committed","report":{report}}}"#)], "read line");
    bench.checkpoint("godwit://b?migration=m").await.unwrap();
    let snapshot = bench.snapshot();
    assert_eq!(snapshot["unheard_of"][0]["dirty"], 7);
    assert_eq!(snapshot["ended"]["report"]["news"]["count"], 9);
    // And as the protocol has it.
    serde_json::from_value::<godwit_protocol::worker::Snapshot>(snapshot).unwrap();
}
