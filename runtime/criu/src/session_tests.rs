//! The conversation, against the simulator.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;
use crate::simulator;

fn options(directory: &Path) -> Options {
    Options::new(directory, directory, "dump.log").unwrap().pid(42).leave_running(true)
}

#[test]
fn a_dump_held_before_and_after_carries_its_options_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (mut session, criu) = simulator::start(|peer| {
        let request = peer.request().unwrap();
        assert_eq!(request.type_(), Criu_req_type::DUMP);
        assert!(peer.notify("pre-dump", None, None));
        assert!(peer.notify("post-dump", None, None));
        peer.respond(Criu_req_type::DUMP, true, 0, None);
        request
    });
    session
        .send(Request::Dump(options(directory.path()).external_mount("/etc/hosts", "/etc/hosts")))
        .unwrap();
    let mut seen = Vec::new();
    let response = session
        .run(|notification| {
            seen.push(notification.script);
            Ok(())
        })
        .unwrap();
    assert_eq!(response, Response { pid: None });
    assert_eq!(seen, [Script::PreDump, Script::PostDump]);
    session.finish().unwrap();
    let request = criu.join().unwrap();
    assert_eq!(request.opts.pid(), 42);
    assert!(request.opts.leave_running());
    assert_eq!(request.opts.ext_mnt[0].key(), "/etc/hosts");
}

#[test]
fn a_failing_hook_refuses_and_waits_for_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let (mut session, criu) = simulator::start(|peer| {
        peer.request().unwrap();
        let accepted = peer.notify("post-dump", None, None);
        peer.respond(Criu_req_type::DUMP, false, 5, None);
        accepted
    });
    session.send(Request::Dump(options(directory.path()))).unwrap();
    let error = session.run(|_| Err("link lost".into())).unwrap_err();
    assert_eq!(error.to_string(), "criu dump: post-dump: link lost");
    assert!(!criu.join().unwrap());
}

#[test]
fn a_failure_names_phase_point_errno_and_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("dump.log");
    fs::write(&log, "(00.1) Error (criu/tty.c:1): no tty\n(00.2) Error (criu/x.c:2): Dumping FAILED.\n")
        .unwrap();
    let (mut session, criu) = simulator::start(|peer| {
        peer.request().unwrap();
        peer.notify("network-lock", None, None);
        peer.respond(Criu_req_type::DUMP, false, 17, None);
    });
    session.send(Request::Dump(options(directory.path()))).unwrap();
    let error = session.run(|_| Ok(())).unwrap_err();
    criu.join().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "criu dump: failed, errno 17 (after network-lock): Error (criu/tty.c:1): no tty (log: {})",
            log.display()
        )
    );
    assert_eq!(error.log_path(), Some(log.as_path()));
}

#[test]
fn an_end_without_answer_and_a_message_that_is_none_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let (mut session, criu) = simulator::start(|peer| drop(peer.request()));
    session.send(Request::Dump(options(directory.path()))).unwrap();
    assert!(matches!(session.run(|_| Ok(())), Err(CriuError::Ended { phase: Phase::Dump, .. })));
    criu.join().unwrap();

    let (mut session, criu) = simulator::start(|peer| {
        peer.request();
        peer.send_bytes(b"\xff\xff\xff", None);
    });
    session.send(Request::Dump(options(directory.path()))).unwrap();
    assert!(matches!(session.next_message(), Err(CriuError::Protocol { .. })));
    criu.join().unwrap();
}

#[test]
fn a_terminal_and_the_restored_pid_arrive() {
    let directory = tempfile::tempdir().unwrap();
    let (mut session, criu) = simulator::start(|peer| {
        peer.request().unwrap();
        let file = File::open("/dev/null").unwrap();
        peer.notify("orphan-pts-master", None, Some(&file.into()));
        peer.notify("post-restore", Some(77), None);
        peer.respond(Criu_req_type::RESTORE, true, 0, Some(77));
    });
    session.send(Request::Restore(options(directory.path()))).unwrap();
    let mut terminals = 0;
    let response = session
        .run(|notification| {
            terminals += usize::from(notification.fd.is_some());
            assert_eq!(notification.pid.is_some(), notification.script == Script::PostRestore);
            Ok(())
        })
        .unwrap();
    criu.join().unwrap();
    assert_eq!((terminals, response.pid), (1, Some(77)));
}

#[test]
fn a_program_that_ends_at_once_is_reaped_and_reported() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("criu");
    fs::write(&path, "#!/bin/sh\nexit 3\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let error = Session::start(&Program::at(&path), Setup::new()).unwrap_err();
    assert!(matches!(error, CriuError::Ended { phase: Phase::Start, .. }), "{error}");
    let error = Session::start(&Program::at("/nonexistent/criu"), Setup::new()).unwrap_err();
    assert!(matches!(error, CriuError::Spawn { .. }), "{error}");
}

#[test]
fn a_real_criu_tells_version_and_features() {
    let Ok(program) = Program::find() else {
        println!("SKIP: no criu in PATH");
        return;
    };
    let mut session = match Session::start(&program, Setup::new()) {
        Ok(session) => session,
        Err(error @ CriuError::TooOld { .. }) => {
            println!("SKIP: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert!(session.version() >= Version::MINIMUM);
    let pid = session.pid().unwrap();
    match session.features() {
        Ok(features) => println!("{features:?}"),
        // Without privileges CRIU cannot probe the kernel; saying so is right.
        Err(error) => assert!(matches!(error, CriuError::Failed { .. }), "{error}"),
    }
    session.finish().unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

/// Goal: a CRIU that is killed is noticed although a helper of its own lives on with the socket.
#[test]
fn a_dead_criu_whose_helper_lives_on_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("criu");
    fs::write(&path, "#!/bin/sh\nsleep 1000 &\nexit 1\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let begun = std::time::Instant::now();
    let error = Session::start(&Program::at(&path), Setup::new()).unwrap_err();
    assert!(matches!(error, CriuError::Ended { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(60));
}
