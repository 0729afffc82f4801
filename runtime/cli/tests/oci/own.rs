//! What godwit alone promises: clean-up after a killed runtime, answers to wrong arguments, features.

use std::fs;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::bed::{Bed, Runtime, eventually};

/// `create` is killed while a hook runs: init waits in its namespaces, nothing has recorded it.
#[test]
fn what_a_killed_create_started_is_deleted_by_force() {
    Bed::with(Runtime::Godwit, |bed| {
        let mark = bed.path().join("hook");
        bed.configure(|spec| {
            let script = format!("echo $$ > {}; exec sleep 1000", mark.display());
            spec["hooks"]["createRuntime"] = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
        });
        let mut command = bed.command();
        command.arg("create").arg("--bundle").arg(bed.bundle()).arg("web");
        let mut runtime = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        eventually("the hook does not run", || fs::read_to_string(&mark).is_ok_and(|text| !text.is_empty()));
        runtime.kill().unwrap();
        runtime.wait().unwrap();
        let hook: i32 = fs::read_to_string(&mark).unwrap().trim().parse().unwrap();
        godwit_sys::pidfd::PidFd::open(hook).unwrap().send_signal(9).unwrap();
        crate::bed::reap(hook);
        assert_eq!(bed.state("web")["status"], "creating");
        assert!(bed.fails(&["delete", "web"]).contains("not stopped: creating"));
        bed.ok(&["delete", "--force", "web"]);
        assert_eq!(bed.cgroups(), Vec::<std::path::PathBuf>::new());
        assert_eq!(bed.fails(&["state", "web"]), "container does not exist");
    });
}

#[test]
fn a_foreground_run_gives_the_exit_code_and_deletes_the_container() {
    Bed::with(Runtime::Godwit, |bed| {
        bed.configure(|spec| spec["process"]["args"] = json!(["sh", "-c", "echo here; exit 6"]));
        let bundle = bed.bundle();
        let output = bed.run(&["run", "--no-subreaper", "--bundle", bundle.to_str().unwrap(), "web"]);
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(6), &b"here\n"[..]));
        assert_eq!(bed.fails(&["state", "web"]), "container does not exist");
    });
}

#[test]
fn a_process_without_capabilities_in_its_spec_has_none() {
    Bed::with(Runtime::Godwit, |bed| {
        bed.configure(|spec| {
            let process = spec["process"].as_object_mut().unwrap();
            process.remove("capabilities");
            process.insert("args".to_owned(), json!(["grep", "Cap", "/proc/self/status"]));
        });
        let bundle = bed.bundle();
        let output = bed.ok(&["run", "--bundle", bundle.to_str().unwrap(), "web"]);
        assert!(output.lines().all(|line| line.ends_with("\t0000000000000000")), "{output}");
    });
}

#[test]
fn wrong_arguments_exit_with_1_and_say_what_is_right() {
    Bed::with(Runtime::Godwit, |bed| {
        for args in [&["bogus"][..], &["state"], &["create", "--bogus", "x"], &["list", "extra"]] {
            let output = bed.run(args);
            assert_eq!(output.status.code(), Some(1), "{args:?}");
            assert!(String::from_utf8_lossy(&output.stderr).contains("--help"), "{args:?}");
        }
    });
}

#[test]
fn features_name_what_checkpointing_callers_look_for() {
    Bed::with(Runtime::Godwit, |bed| {
        let features: Value = serde_json::from_str(&bed.ok(&["features"])).unwrap();
        assert_eq!(features["annotations"]["org.opencontainers.runc.checkpoint.enabled"], "true");
        assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    });
}
