//! exec: what a further process is, and what the verb answers.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use serde_json::json;

use crate::bed::{Bed, reap};

mod tests {
    crate::against_both!(
        the_exit_code_is_the_programs,
        failures_are_said_as_callers_expect,
        a_detached_process_is_left_to_the_caller,
        a_process_is_as_its_file_says,
        a_process_is_confined_like_the_first,
        another_user_is_confined_without_new_privileges_too,
        a_process_joins_the_user_namespace,
        terminals_arrive_at_the_console_socket,
    );
}

fn the_exit_code_is_the_programs(bed: &Bed) {
    let _container = bed.start("web");
    for (script, code) in [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)] {
        assert_eq!(bed.run(&["exec", "web", "sh", "-c", script]).status.code(), Some(code), "{script}");
    }
    let script = "echo $A-$B; pwd; id -u; id -g";
    let options = ["exec", "-e", "A=1", "-e", "B=2", "--cwd", "/tmp", "--user", "7:8"];
    let output = bed.ok(&[&options[..], &["web", "sh", "-c", script]].concat());
    assert_eq!(output, "1-2\n/tmp\n7\n8\n");
}

fn failures_are_said_as_callers_expect(bed: &Bed) {
    let _container = bed.start("web");
    let failed = "exec failed: unable to start container process: ";
    for (program, reason) in [
        ("absent", "exec: \"absent\": executable file not found in $PATH"),
        ("/absent", "exec: \"/absent\": stat /absent: no such file or directory"),
        ("/tmp", "exec: \"/tmp\": permission denied"),
    ] {
        assert_eq!(bed.fails_with(255, &["exec", "web", program]), format!("{failed}{reason}"));
    }
    let text = bed.fails_with(255, &["exec", "--cwd", "/absent", "web", "true"]);
    assert!(text.starts_with(failed), "{text}");
    assert!(text.contains("chdir"), "{text}");
    assert_eq!(bed.state("web")["status"], "running");
}

fn a_detached_process_is_left_to_the_caller(bed: &Bed) {
    let _container = bed.start("web");
    let pid = bed.exec_detached(&["web", "sh", "-c", "exit 5"]);
    assert_eq!(reap(pid), 5);
}

fn a_process_is_as_its_file_says(bed: &Bed) {
    let _container = bed.start("web");
    let file = bed.path().join("process.json");
    let process = json!({
        "user": {"uid": 7, "gid": 8, "additionalGids": [9]},
        "args": ["sh", "-c", "id -u; id -G; echo $X; pwd"],
        "env": ["PATH=/bin", "X=y"],
        "cwd": "/tmp",
    });
    fs::write(&file, process.to_string()).unwrap();
    let output = bed.ok(&["exec", "--process", file.to_str().unwrap(), "web"]);
    assert_eq!(output, "7\n8 9\ny\n/tmp\n");
}

/// Fields of `/proc/self/status` that say what a process may do.
const CONFINEMENT: &str = "grep -E '^(Uid|Cap|NoNewPrivs|Seccomp:|SigBlk)' /proc/self/status";

fn confine(bed: &Bed, no_new_privileges: bool) {
    bed.configure(|spec| {
        let process = &mut spec["process"];
        process["args"] = json!(["sh", "-c", format!("{CONFINEMENT} > /tmp/init; exec sleep 1000")]);
        process["noNewPrivileges"] = json!(true);
        if !no_new_privileges {
            process.as_object_mut().unwrap().remove("noNewPrivileges");
        }
        spec["root"]["readonly"] = json!(false);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
        });
    });
}

fn of_init(bed: &Bed) -> String {
    let file = bed.bundle().join("rootfs/tmp/init");
    crate::bed::eventually("init writes nothing", || {
        fs::read_to_string(&file).is_ok_and(|text| text.contains("Seccomp"))
    });
    fs::read_to_string(file).unwrap()
}

/// The process must have the filter (libcontainer's tenants lose it), the capabilities and the flag of init.
fn a_process_is_confined_like_the_first(bed: &Bed) {
    for no_new_privileges in [true, false] {
        confine(bed, no_new_privileges);
        let container = bed.start("web");
        let init = of_init(bed);
        assert!(init.contains("Seccomp:\t2"), "{init}");
        assert!(init.contains(&format!("NoNewPrivs:\t{}", u8::from(no_new_privileges))), "{init}");
        assert_eq!(bed.ok(&["exec", "web", "sh", "-c", CONFINEMENT]), init);
        assert_eq!(bed.run(&["exec", "web", "mkdir", "/tmp/x"]).status.code(), Some(1));
        drop(container);
        fs::remove_file(bed.bundle().join("rootfs/tmp/init")).unwrap();
    }
}

/// Without `no_new_privs` a filter can only be loaded with a capability that the user must not keep.
fn another_user_is_confined_without_new_privileges_too(bed: &Bed) {
    confine(bed, false);
    let _container = bed.start("web");
    let output = bed.ok(&["exec", "--user", "1000:1000", "web", "sh", "-c", CONFINEMENT]);
    for line in ["Uid:\t1000\t1000\t1000\t1000", "NoNewPrivs:\t0", "Seccomp:\t2", "CapEff:\t0000000000000000"]
    {
        assert!(output.contains(line), "{line}: {output}");
    }
    let bounding = |text: &str| text.lines().find(|line| line.starts_with("CapBnd")).unwrap().to_owned();
    assert_eq!(bounding(&output), bounding(&of_init(bed)));
}

fn a_process_joins_the_user_namespace(bed: &Bed) {
    bed.configure(|spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
    });
    let path = bed.bundle().join("rootfs");
    assert!(
        std::process::Command::new("chown")
            .args(["-R", "100000:100000"])
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bed.path(), mode).unwrap();
    let container = bed.start("web");
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    let pid = bed.exec_detached(&["--user", "5:6", "web", "sleep", "1000"]);
    assert_eq!(namespace(pid), namespace(container.pid));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t100005\t100005\t100005\t100005"), "{status}");
    assert!(status.contains("Gid:\t100006\t100006\t100006\t100006"), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    assert_eq!(bed.ok(&["exec", "web", "id", "-u"]), "0\n");
    // Init only ends completely once what died with its PID namespace is reaped.
    bed.ok(&["kill", "web", "KILL"]);
    assert_eq!(reap(pid), 137);
    assert_eq!(container.wait(), 137);
}

fn terminals_arrive_at_the_console_socket(bed: &Bed) {
    let socket = bed.path().join("tty.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let read_master = || {
        let (stream, _) = listener.accept().unwrap();
        let mut name = [0; 256];
        let received = godwit_sys::fdpass::receive(&stream, &mut name).unwrap();
        let mut master = fs::File::from(received.fds.into_iter().next().unwrap());
        let mut text = Vec::new();
        let mut buffer = [0; 256];
        // EIO once the last process has closed its side.
        while let Ok(length @ 1..) = master.read(&mut buffer) {
            text.extend_from_slice(&buffer[..length]);
        }
        String::from_utf8(text).unwrap()
    };
    let socket = socket.to_str().unwrap();
    bed.configure(|spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["args"] = json!(["sh", "-c", "tty; test -c /dev/console && echo console; sleep 1"]);
    });
    let container = bed.create_with("web", &["--console-socket", socket], Stdio::null());
    bed.ok(&["start", "web"]);
    let pid = bed.exec_detached(&["--tty", "--console-socket", socket, "web", "tty"]);
    let (first, second) = (read_master(), read_master());
    assert_eq!(first, "/dev/pts/0\r\nconsole\r\n");
    assert_eq!(second, "/dev/pts/1\r\n");
    assert_eq!(reap(pid), 0);
    assert_eq!(container.wait(), 0);
}
