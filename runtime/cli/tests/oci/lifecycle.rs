//! create, start, state, kill, pause, resume, delete, list and ps.

use std::fs;
use std::io::Read;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::bed::{Bed, eventually};

mod tests {
    crate::against_both!(
        a_container_goes_from_created_to_deleted,
        a_created_container_can_be_looked_into_and_deleted,
        a_paused_container_is_refused_what_it_cannot_do,
        a_killed_paused_container_ends,
        a_missing_container_is_named_as_containerd_expects,
        a_failed_create_leaves_nothing,
        only_the_container_writes_to_its_stdout,
        every_process_is_signalled_by_all,
        hooks_are_run_with_the_state,
        containers_are_listed,
        answers_have_their_fields_and_no_others,
        the_version_has_the_word_and_the_specifications,
        a_spec_is_written_once,
    );
}

fn a_container_goes_from_created_to_deleted(bed: &Bed) {
    let container = bed.create("web");
    let state = bed.state("web");
    assert_eq!(state["status"], "created");
    assert_eq!(state["pid"], container.pid);
    assert_eq!(state["bundle"], bed.bundle().to_str().unwrap());
    assert_eq!(state["rootfs"], bed.bundle().join("rootfs").to_str().unwrap());
    assert_eq!(state["annotations"], json!({"io.godwit.test": "yes"}));
    bed.ok(&["start", "web"]);
    assert_eq!(container.status(), "running");
    assert_eq!(bed.fails(&["start", "web"]), "cannot start an already running container");
    assert!(
        bed.fails(&["delete", "web"]).starts_with("cannot delete container web that is not stopped: running")
    );
    bed.ok(&["kill", "web", "0"]);
    assert_eq!(bed.fails(&["kill", "web", "NOSIG"]), "unknown signal \"NOSIG\"");
    container.kill();
    let state = bed.state("web");
    assert_eq!((&state["status"], &state["pid"]), (&json!("stopped"), &json!(0)));
    assert_eq!(bed.fails(&["kill", "web", "KILL"]), "container not running");
    assert_eq!(bed.fails(&["pause", "web"]), "container not running");
    assert_eq!(bed.fails(&["start", "web"]), "cannot start a container that has stopped");
    assert!(bed.fails_with(255, &["exec", "web", "true"]).contains("cannot exec in a stopped container"));
    bed.ok(&["delete", "web"]);
    assert_eq!(bed.cgroups(), Vec::<std::path::PathBuf>::new());
    assert_eq!(fs::read_dir(bed.root()).unwrap().count(), 0);
}

fn a_created_container_can_be_looked_into_and_deleted(bed: &Bed) {
    let container = bed.create("web");
    assert_eq!(bed.ok(&["exec", "web", "echo", "inside"]), "inside\n");
    let pids: Vec<i32> = serde_json::from_str(&bed.ok(&["ps", "--format", "json", "web"])).unwrap();
    assert_eq!(pids, [container.pid]);
    let table = bed.ok(&["ps", "web"]);
    assert!(table.lines().nth(1).unwrap().contains(&container.pid.to_string()), "{table}");
    let pid = container.pid;
    let reaper = std::thread::spawn(move || crate::bed::reap(pid));
    bed.ok(&["delete", "web"]);
    assert_eq!(reaper.join().unwrap(), 137);
    assert_eq!(bed.fails(&["state", "web"]), "container does not exist");
}

fn a_paused_container_is_refused_what_it_cannot_do(bed: &Bed) {
    let container = bed.create("web");
    bed.ok(&["pause", "web"]);
    assert_eq!(container.status(), "paused");
    assert_eq!(bed.fails(&["start", "web"]), "cannot start a container in the paused state");
    bed.ok(&["resume", "web"]);
    assert_eq!(container.status(), "created");
    bed.ok(&["start", "web"]);
    bed.ok(&["pause", "web"]);
    assert_eq!(bed.fails(&["pause", "web"]), "container not running");
    let text = "exec failed: cannot exec in a paused container (use --ignore-paused to override)";
    assert_eq!(bed.fails_with(255, &["exec", "web", "true"]), text);
    bed.ok(&["resume", "web"]);
    assert_eq!(container.status(), "running");
    assert_eq!(bed.fails(&["resume", "web"]), "container not paused");
}

fn a_killed_paused_container_ends(bed: &Bed) {
    let container = bed.start("web");
    bed.ok(&["pause", "web"]);
    bed.ok(&["kill", "web", "USR1"]);
    assert_eq!(container.status(), "paused");
    container.kill();
    assert_eq!(container.status(), "stopped");
}

fn a_missing_container_is_named_as_containerd_expects(bed: &Bed) {
    for verb in ["state", "start", "kill", "pause", "resume", "delete", "ps"] {
        assert_eq!(bed.fails(&[verb, "web"]), "container does not exist", "{verb}");
    }
    assert_eq!(bed.fails_with(255, &["exec", "web", "true"]), "exec failed: container does not exist");
    bed.ok(&["delete", "--force", "web"]);
    assert_eq!(bed.fails(&["state", "a/b"]), "invalid container ID format");
}

fn a_failed_create_leaves_nothing(bed: &Bed) {
    let create = |bed: &Bed| {
        let bundle = bed.bundle();
        bed.fails(&["create", "--bundle", bundle.to_str().unwrap(), "web"])
    };
    let failed = "create failed: unable to start container process: ";
    bed.configure(|spec| spec["process"]["args"] = json!(["absent"]));
    let text = create(bed);
    assert!(
        text.ends_with(&format!("{failed}exec: \"absent\": executable file not found in $PATH")),
        "{text}"
    );
    bed.configure(|spec| spec["process"]["args"] = json!(["/absent"]));
    let text = create(bed);
    let reason = "exec: \"/absent\": stat /absent: no such file or directory";
    assert!(text.ends_with(&format!("{failed}{reason}")), "{text}");
    bed.configure(|spec| spec["process"]["terminal"] = json!(true));
    assert!(create(bed).contains("without setting console socket"));
    bed.configure(|spec| {
        let mount = json!({"destination": "/tmp", "type": "nofs", "source": "nofs"});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
    let text = create(bed);
    assert!(text.contains("no such device") || text.contains("ENODEV"), "{text}");
    assert_eq!(fs::read_dir(bed.root()).map_or(0, Iterator::count), 0);
    assert_eq!(bed.cgroups(), Vec::<std::path::PathBuf>::new());
    bed.configure(|_| {});
    let _container = bed.create("web");
    assert!(create(bed).ends_with("create failed: container with given ID already exists"));
    assert_eq!(bed.state("web")["status"], "created");
}

fn only_the_container_writes_to_its_stdout(bed: &Bed) {
    bed.configure(|spec| {
        spec["process"]["args"] =
            json!(["sh", "-c", "echo out; echo err >&2; grep SigIgn /proc/self/status"]);
        // A rule for what the kernel does not know makes libcontainer warn from inside the container.
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["no_such_call", "acct"], "action": "SCMP_ACT_ERRNO"}],
        });
    });
    let (mut reader, writer) = std::io::pipe().unwrap();
    let container = {
        let error = writer.try_clone().unwrap();
        let mut command = bed.command();
        let pid_file = bed.path().join("pid");
        command.args(["--debug", "create", "--bundle"]).arg(bed.bundle()).arg("--pid-file").arg(&pid_file);
        assert!(command.arg("web").stdout(writer).stderr(error).status().unwrap().success());
        fs::read_to_string(pid_file).unwrap().parse::<i32>().unwrap()
    };
    bed.ok(&["start", "web"]);
    assert_eq!(crate::bed::reap(container), 0);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let ignored =
        text.strip_prefix("out\nerr\nSigIgn:\t").map(|mask| u64::from_str_radix(mask.trim_end(), 16));
    // Rust ignores SIGPIPE, number 13, from the start of a program; a container must not inherit that.
    assert!(ignored.is_some_and(|mask| mask.unwrap() & (1 << 12) == 0), "{text}");
    bed.ok(&["delete", "web"]);
}

fn every_process_is_signalled_by_all(bed: &Bed) {
    let container = bed.start("web");
    let other = bed.exec_detached(&["web", "sleep", "1000"]);
    bed.ok(&["kill", "--all", "web", "KILL"]);
    assert_eq!(crate::bed::reap(other), 137);
    assert_eq!(container.wait(), 137);
    eventually("the container does not stop", || container.status() == "stopped");
}

fn hooks_are_run_with_the_state(bed: &Bed) {
    let file = |point: &str| bed.path().join(point);
    bed.configure(|spec| {
        for point in ["createRuntime", "poststart", "poststop"] {
            let script = format!("cat > {}", file(point).display());
            spec["hooks"][point] = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
        }
    });
    let container = bed.start("web");
    container.kill();
    bed.ok(&["delete", "web"]);
    // runc calls a container that has just been started "created" still; the specification says "running".
    let started = &["created", "running"][..];
    for (point, allowed) in
        [("createRuntime", &["creating"][..]), ("poststart", started), ("poststop", &["stopped"])]
    {
        let state: Value = serde_json::from_str(&fs::read_to_string(file(point)).unwrap()).unwrap();
        assert_eq!(state["id"], "web");
        assert_eq!(state["bundle"], bed.bundle().to_str().unwrap());
        assert!(allowed.contains(&state["status"].as_str().unwrap()), "{point}: {state}");
    }
}

fn containers_are_listed(bed: &Bed) {
    let heading = bed.ok(&["list"]);
    assert_eq!(heading, "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n");
    let container = bed.start("web");
    assert_eq!(bed.ok(&["list", "--quiet"]), "web\n");
    let list: Value = serde_json::from_str(&bed.ok(&["list", "--format", "json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(list[0]["status"], "running");
    assert_eq!(list[0]["pid"], container.pid);
    assert_eq!(list[0]["owner"], "root");
    let table = bed.ok(&["list"]);
    let line: Vec<&str> = table.lines().nth(1).unwrap().split_ascii_whitespace().collect();
    assert_eq!((line[0], line[2], line[5]), ("web", "running", "root"));
}

fn a_spec_is_written_once(bed: &Bed) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let spec =
        |bed: &Bed| bed.command().args(["spec", "--bundle", path]).stdout(Stdio::null()).status().unwrap();
    assert!(spec(bed).success());
    let config: Value =
        serde_json::from_slice(&fs::read(directory.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(config["process"]["args"], json!(["sh"]));
    assert!(!spec(bed).success());
}

fn answers_have_their_fields_and_no_others(bed: &Bed) {
    let _container = bed.start("web");
    let fields = |object: &Value| object.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let expected = "annotations bundle created id ociVersion owner pid rootfs status";
    assert_eq!(fields(&bed.state("web")), expected);
    let list: Value = serde_json::from_str(&bed.ok(&["list", "--format", "json"])).unwrap();
    assert_eq!(fields(&list[0]), expected);
    let event: Value = serde_json::from_str(&bed.ok(&["events", "--stats", "web"])).unwrap();
    assert_eq!(fields(&event), "data id type");
    let sections = "blkio cpu cpuset hugetlb intel_rdt memory network_interfaces pids";
    assert_eq!(fields(&event["data"]), sections);
    assert_eq!(fields(&event["data"]["cpu"]), "throttling usage");
}

/// dockerd takes a runtime whose answer lacks them for one that does not work.
fn the_version_has_the_word_and_the_specifications(bed: &Bed) {
    let text = bed.ok(&["--version"]);
    let mut lines = text.lines();
    assert!(lines.next().is_some_and(|line| line.split(' ').nth(1) == Some("version")), "{text}");
    assert!(lines.any(|line| line.starts_with("spec: 1.")), "{text}");
}
