//! Stopping, freezing, waiting for and deleting tasks.

use std::fs;
use std::thread;

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::rpc::Streams;
use godwit_integration::suite::{Case, Outcome, Stage, await_that};

use super::exec::process;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(paused_container_stands_still_until_resumed),
        case!(exec_in_a_paused_container_is_refused),
        case!(signal_reaches_the_handler),
        case!(killing_all_ends_every_process_of_a_container_without_its_own_pids),
        case!(everyone_who_waits_learns_the_status),
        case!(task_that_ended_keeps_its_status_until_deleted),
        case!(running_task_is_deleted_only_by_force),
        case!(unknown_ids_are_not_found),
        case!(what_exists_is_not_made_twice),
        case!(what_ended_takes_no_signal_and_no_second_start),
        case!(same_id_runs_again_after_deletion),
    ]
}

/// The container counts into a file in its own `/tmp`; while it is paused, the count must not change, and that
/// is seen from outside, through its root.
fn paused_container_stands_still_until_resumed(stage: &Stage) -> Outcome {
    let script = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; usleep 1000; done";
    let container = stage.a.plan("pause").run(&["sh", "-c", script])?;
    let file = format!("/proc/{}/root/tmp/count", container.pid()?);
    let count = || fs::read_to_string(&file).unwrap_or_default();
    await_that("it counts", || !count().is_empty())?;
    container.task("pause")?;
    assert_eq!(container.state()?, Some(Status::Paused));
    assert_eq!(stage.a.rpc.state(container.id(), "")?.status(), Status::Paused);
    let before = count();
    // Other calls give a container that is not frozen time enough to go on.
    for _ in 0..5 {
        stage.a.ctr(&["tasks", "list"])?;
    }
    assert_eq!(count(), before);
    container.task("resume")?;
    assert_eq!(container.state()?, Some(Status::Running));
    await_that("it goes on counting", || count() != before)
}

fn exec_in_a_paused_container_is_refused(stage: &Stage) -> Outcome {
    let container = stage.a.plan("pause-exec").run(&["sleep", "1000"])?;
    container.task("pause")?;
    let text = container.exec(&["true"])?.refused()?;
    assert!(text.contains("paused"), "{text}");
    container.task("resume")?;
    container.exec(&["true"])?.ok()?;
    Ok(())
}

fn signal_reaches_the_handler(stage: &Stage) -> Outcome {
    let script = "trap 'echo usr1' USR1; trap 'exit 12' TERM; echo ready; while :; do sleep 0.01; done";
    let (container, job) = stage.a.plan("signal").foreground(&["sh", "-c", script])?;
    job.await_stdout("ready\n")?;
    container.kill("SIGUSR1")?;
    job.await_stdout("usr1\n")?;
    container.kill("15")?;
    job.wait()?.with_code(12)?;
    Ok(())
}

/// In the machine's pid namespace, the end of init does not end the rest of the container.
fn killing_all_ends_every_process_of_a_container_without_its_own_pids(stage: &Stage) -> Outcome {
    let own_pids = "/proc/self/ns/pid";
    let container = stage.a.plan("kill-all").flags(&["--with-ns", &format!("pid:{own_pids}")]).run(&[
        "sh",
        "-c",
        "sleep 1000 & sleep 1001 & wait",
    ])?;
    await_that("all three processes run", || {
        stage.a.rpc.pids(container.id()).is_ok_and(|pids| pids.len() == 3)
    })?;
    let pids = stage.a.rpc.pids(container.id())?;
    stage.a.ctr(&["tasks", "kill", "--all", "--signal", "SIGKILL", container.id()])?;
    container.await_state(Status::Stopped)?;
    let gone = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_err() || status.is_ok_and(|status| status.contains("State:\tZ"))
    };
    await_that("every process has ended", || pids.iter().all(gone))
}

fn everyone_who_waits_learns_the_status(stage: &Stage) -> Outcome {
    let container =
        stage.a.plan("wait").run(&["sh", "-c", "trap 'exit 21' TERM; while :; do sleep 0.01; done"])?;
    let (id, rpc) = (container.id(), &stage.a.rpc);
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..20).map(|_| scope.spawn(|| rpc.wait(id, ""))).collect();
        container.kill("SIGTERM")?;
        for waiter in waiters {
            let status = waiter.join().expect("a call does not panic");
            assert_eq!(status?, 21);
        }
        Ok(())
    })
}

fn task_that_ended_keeps_its_status_until_deleted(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let container = stage.a.plan("ended").run(&["sh", "-c", "exit 33"])?;
    container.await_state(Status::Stopped)?;
    let info = rpc.state(container.id(), "")?;
    assert_eq!((info.status(), info.exit_status), (Status::Stopped, 33));
    assert!(info.exited_at.is_some_and(|time| time.seconds > 0));
    assert_eq!(rpc.wait(container.id(), "")?, 33);
    assert_eq!(rpc.delete(container.id())?, 33);
    assert_eq!(rpc.state(container.id(), "").expect_err("it is deleted").code, Code::NotFound);
    Ok(())
}

fn running_task_is_deleted_only_by_force(stage: &Stage) -> Outcome {
    let container = stage.a.plan("delete").run(&["sleep", "1000"])?;
    let refusal = stage.a.rpc.delete(container.id()).expect_err("it runs");
    // containerd's own shim gives no better code.
    assert!(matches!(refusal.code, Code::FailedPrecondition | Code::Unknown), "{refusal}");
    assert_eq!(container.state()?, Some(Status::Running));
    stage.a.try_ctr(&["tasks", "delete", "--force", container.id()])?;
    assert_eq!(container.state()?, None);
    Ok(())
}

fn unknown_ids_are_not_found(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let unknown = stage.a.id("unknown");
    let container = stage.a.plan("known").run(&["sleep", "1000"])?;
    let id = container.id();
    let codes = [
        rpc.state(&unknown, "").map(drop),
        rpc.start(&unknown, "").map(drop),
        rpc.kill(&unknown, "", 9, false),
        rpc.delete(&unknown).map(drop),
        rpc.pause(&unknown),
        rpc.state(id, "no-such").map(drop),
        rpc.start(id, "no-such").map(drop),
        rpc.kill(id, "no-such", 9, false),
        rpc.delete_process(id, "no-such").map(drop),
        rpc.resize(id, "no-such", 1, 1),
    ];
    for (index, answer) in codes.into_iter().enumerate() {
        let refusal = answer.expect_err("there is no such thing");
        assert_eq!(refusal.code, Code::NotFound, "call {index}: {refusal}");
    }
    Ok(())
}

fn what_exists_is_not_made_twice(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let container = stage.a.plan("twice").run(&["sleep", "1000"])?;
    let id = container.id();
    let refusal = rpc.create(id, Vec::new(), None).expect_err("the task exists");
    assert_eq!(refusal.code, Code::AlreadyExists, "{refusal}");
    rpc.exec(id, "extra", &process(&["sleep", "1001"]), &Streams::default())?;
    let refusal = rpc.exec(id, "extra", &process(&["true"]), &Streams::default()).expect_err("it is added");
    assert_eq!(refusal.code, Code::AlreadyExists, "{refusal}");
    assert_eq!(container.state()?, Some(Status::Running));
    Ok(())
}

fn what_ended_takes_no_signal_and_no_second_start(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let container = stage.a.plan("over").run(&["true"])?;
    container.await_state(Status::Stopped)?;
    let refusal = rpc.kill(container.id(), "", 15, false).expect_err("it has ended");
    assert_eq!(refusal.code, Code::NotFound, "{refusal}");
    rpc.start(container.id(), "").expect_err("it has ended");
    rpc.pause(container.id()).expect_err("it has ended");
    rpc.exec(container.id(), "late", &process(&["true"]), &Streams::default()).expect_err("it has ended");
    assert_eq!(rpc.delete(container.id())?, 0);
    Ok(())
}

fn same_id_runs_again_after_deletion(stage: &Stage) -> Outcome {
    let container = stage.a.plan("again").create(&["false"])?;
    for _ in 0..3 {
        stage.a.ctr(&["tasks", "start", "--detach", container.id()])?;
        container.await_state(Status::Stopped)?;
        assert_eq!(stage.a.rpc.delete(container.id())?, 1);
    }
    Ok(())
}
