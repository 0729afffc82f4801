//! Further processes in a running container.

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::rpc::Streams;
use godwit_integration::suite::{Case, Outcome, Stage, await_that};
use serde_json::{Value, json};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(exec_returns_output_errors_and_status),
        case!(exec_reads_its_input_to_the_end),
        case!(exec_on_a_terminal_has_its_size),
        case!(exec_runs_as_another_user_elsewhere),
        case!(exec_of_a_missing_program_fails_and_leaves_the_container_running),
        case!(exec_killed_by_a_signal_has_128_and_its_number),
        case!(exec_is_killed_and_deleted_by_its_own_id),
        case!(exec_outlives_nothing_when_init_ends),
        case!(many_execs_run_side_by_side),
    ]
}

fn exec_returns_output_errors_and_status(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec").run(&["sleep", "1000"])?;
    let done = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 5"])?.with_code(5)?;
    assert_eq!(done.stdout, "out\n");
    assert!(done.stderr.starts_with("err\n"), "{}", done.stderr);
    Ok(())
}

fn exec_reads_its_input_to_the_end(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-cat").run(&["sleep", "1000"])?;
    let mut job = container.start_exec(&[], &["sh", "-c", "cat; echo end"])?;
    job.write("one\ntwo\n")?;
    assert_eq!(job.wait()?.ok()?, "one\ntwo\nend\n");
    Ok(())
}

fn exec_on_a_terminal_has_its_size(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-tty").run(&["sleep", "1000"])?;
    let command = ["tasks", "exec", "--tty", "--exec-id", "tty", container.id(), "sh", "-c"];
    // ctr tells the size only after the process has started.
    let script = "test -t 0 && until stty size | grep -q '^33 77'; do usleep 10000; done; stty size; exit 9";
    let job = stage.a.start_ctr_on_terminal(33, 77, &[&command[..], &[script]].concat())?;
    let done = job.wait()?.with_code(9)?;
    assert!(done.stdout.contains("33 77"), "{}", done.stdout);
    Ok(())
}

fn exec_runs_as_another_user_elsewhere(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-user").run(&["sleep", "1000"])?;
    let job = container.start_exec(&["--user", "33", "--cwd", "/tmp"], &["sh", "-c", "id -u; pwd"])?;
    assert_eq!(job.wait()?.ok()?, "33\n/tmp\n");
    Ok(())
}

fn exec_of_a_missing_program_fails_and_leaves_the_container_running(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-missing").run(&["sleep", "1000"])?;
    let text = container.exec(&["no-such-program"])?.refused()?;
    assert!(text.contains("no-such-program"), "{text}");
    assert_eq!(container.state()?, Some(Status::Running));
    assert_eq!(container.exec(&["echo", "well"])?.ok()?, "well\n");
    Ok(())
}

fn exec_killed_by_a_signal_has_128_and_its_number(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-signal").run(&["sleep", "1000"])?;
    container.exec(&["sh", "-c", "kill -TERM $$"])?.with_code(143)?;
    Ok(())
}

fn exec_is_killed_and_deleted_by_its_own_id(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let container = stage.a.plan("exec-id").run(&["sleep", "1000"])?;
    let id = container.id();
    rpc.exec(id, "extra", &process(&["sleep", "1001"]), &Streams::default())?;
    let pid = rpc.start(id, "extra")?;
    assert!(rpc.pids(id)?.contains(&pid));
    let info = rpc.state(id, "extra")?;
    assert_eq!((info.id.as_str(), info.pid), ("extra", pid));
    rpc.kill(id, "extra", 9, false)?;
    assert_eq!(rpc.wait(id, "extra")?, 137);
    assert_eq!(rpc.delete_process(id, "extra")?, 137);
    assert_eq!(container.state()?, Some(Status::Running));
    rpc.state(id, "extra").expect_err("it is deleted");
    Ok(())
}

fn exec_outlives_nothing_when_init_ends(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-last").run(&["sleep", "1000"])?;
    let job = container.start_exec(&[], &["sh", "-c", "echo up; sleep 1001"])?;
    job.await_stdout("up\n")?;
    container.stop()?;
    job.wait()?.with_code(137)?;
    Ok(())
}

/// They end when all have been heard, for ctr may miss the output of a process that ends at once.
fn many_execs_run_side_by_side(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-many").run(&["sleep", "1000"])?;
    let jobs: Vec<_> = (0..20)
        .map(|code| {
            let script = format!("echo {code}; until [ -e /tmp/heard ]; do usleep 10000; done; exit {code}");
            container.start_exec(&[], &["sh", "-c", &script])
        })
        .collect::<Result<_, _>>()?;
    for (code, job) in jobs.iter().enumerate() {
        job.await_stdout(&format!("{code}\n"))?;
    }
    container.exec(&["touch", "/tmp/heard"])?.ok()?;
    for (code, job) in (0..20).zip(jobs) {
        let done = job.wait()?.with_code(code)?;
        assert_eq!(done.stdout, format!("{code}\n"));
    }
    await_that("only init is left", || stage.a.rpc.pids(container.id()).is_ok_and(|pids| pids.len() == 1))
}

/// Returns a process as a runtime specification describes it.
pub(super) fn process(args: &[&str]) -> Value {
    json!({
        "user": { "uid": 0, "gid": 0 },
        "args": args,
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
    })
}
