//! Standard streams: pipes, terminals, files and logging programs.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::rpc::Streams;
use godwit_integration::suite::{Case, Outcome, Stage, Trouble, await_that};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::exec::process;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(run_keeps_output_and_errors_apart),
        case!(run_reads_its_input_to_the_end),
        case!(ten_megabytes_of_output_arrive_whole),
        case!(run_on_a_terminal_talks_and_is_resized),
        case!(attach_talks_to_a_detached_container),
        case!(log_file_has_output_and_errors),
        case!(logging_program_gets_output_and_arguments),
        case!(input_is_closed_when_containerd_says_so),
        case!(container_without_streams_runs),
    ]
}

fn run_keeps_output_and_errors_apart(stage: &Stage) -> Outcome {
    let done = stage.a.plan("apart").run_to_end(&["sh", "-c", "echo out; echo err >&2"])?;
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
    Ok(())
}

fn run_reads_its_input_to_the_end(stage: &Stage) -> Outcome {
    let (_container, mut job) = stage.a.plan("input").foreground(&["sh", "-c", "cat; echo end"])?;
    job.write("line\n")?;
    // ctr loses an end of input that comes before the task has started.
    job.await_stdout("line\n")?;
    assert_eq!(job.wait()?.ok()?, "line\nend\n");
    Ok(())
}

/// Read by the case itself, for ctr may end before it has read everything.
fn ten_megabytes_of_output_arrive_whole(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let container = stage.a.plan("output").run(&["sleep", "1000"])?;
    let (inside, outside) = stage.a.scratch("output")?;
    let stdout = format!("{inside}/out");
    stage.a.command(&["mkfifo", &stdout])?.ok()?;
    let fifo = outside.join("out");
    let failed = Trouble::io("read", &fifo);
    // Nobody writes to it yet, and opening it would wait for that.
    let reader = fs::OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&fifo);
    let mut reader = reader.map_err(Trouble::io("open", &fifo))?;
    let script = "yes 0123456789abcde | head -c 10485760";
    rpc.exec(
        container.id(),
        "yes",
        &process(&["sh", "-c", script]),
        &Streams { stdout: &stdout, stderr: &stdout, ..Streams::default() },
    )?;
    rpc.start(container.id(), "yes")?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::empty()))
        .map_err(|errno| Trouble::io("open", &fifo)(errno.into()))?;
    let mut text = Vec::new();
    reader.read_to_end(&mut text).map_err(failed)?;
    assert_eq!(text.len(), 10 << 20);
    assert!(text.chunks(16).all(|line| line == b"0123456789abcde\n"));
    assert_eq!(rpc.wait(container.id(), "yes")?, 0);
    assert_eq!(rpc.delete_process(container.id(), "yes")?, 0);
    container.stop()
}

fn run_on_a_terminal_talks_and_is_resized(stage: &Stage) -> Outcome {
    let script = "until stty size | grep -q '^20 70'; do usleep 10000; done; echo sized; \
                  read word; echo got $word; until stty size | grep -q '^21 71'; do usleep 10000; done; exit 4";
    let (container, mut job) = stage.a.plan("tty").on_terminal(20, 70, &["sh", "-c", script])?;
    job.await_stdout("sized")?;
    job.write("hello\n")?;
    job.await_stdout("got hello")?;
    stage.a.rpc.resize(container.id(), "", 21, 71)?;
    job.wait()?.with_code(4)?;
    Ok(())
}

fn attach_talks_to_a_detached_container(stage: &Stage) -> Outcome {
    let container =
        stage.a.plan("attach").run(&["sh", "-c", "while read word; do echo got $word; done; echo over"])?;
    let mut job = stage.a.start_ctr(&["tasks", "attach", container.id()])?;
    job.write("one\n")?;
    job.await_stdout("got one\n")?;
    job.write("two\n")?;
    job.await_stdout("got two\n")?;
    container.kill("SIGKILL")?;
    job.wait()?.with_code(137)?;
    Ok(())
}

fn log_file_has_output_and_errors(stage: &Stage) -> Outcome {
    let (inside, outside) = stage.a.scratch("log")?;
    let uri = format!("file://{inside}/log");
    let container = stage.a.plan("log").flags(&["--log-uri", &uri]).run(&[
        "sh",
        "-c",
        "echo out; echo err >&2; sleep 1000",
    ])?;
    await_that("both lines are in the log", || {
        let text = fs::read_to_string(outside.join("log")).unwrap_or_default();
        text.contains("out\n") && text.contains("err\n")
    })?;
    container.stop()
}

/// A logging program has output on descriptor 3, errors on 4, and says by closing 5 that it is ready; the
/// query of its URI comes as arguments, a key and a value each.
fn logging_program_gets_output_and_arguments(stage: &Stage) -> Outcome {
    let (inside, outside) = stage.a.scratch("logger")?;
    let program = outside.join("logger");
    let text = format!(
        "#!/bin/sh\ncat <&3 5>&- >{inside}/out &\ncat <&4 5>&- >{inside}/err &\n\
         echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $1 $2\" >{inside}/args\nexec 5>&-\nwait\n"
    );
    fs::write(&program, text).expect("the directory has just been made");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("the file has just been made");
    let uri = format!("binary://{inside}/logger?colour=green");
    let plan = stage.a.plan("logger").flags(&["--log-uri", &uri]);
    let container = plan.run(&["sh", "-c", "echo out; echo err >&2; sleep 1000"])?;
    let holds = |name: &str, expected: &str| {
        let path = outside.join(name);
        let text = expected.to_owned();
        await_that(&format!("{name} has {text:?} in it"), || {
            fs::read_to_string(&path).is_ok_and(|found| found == text)
        })
    };
    holds("args", &format!("{} default colour green\n", container.id()))?;
    holds("out", "out\n")?;
    holds("err", "err\n")?;
    container.stop()
}

fn input_is_closed_when_containerd_says_so(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let container = stage.a.plan("close").run(&["sleep", "1000"])?;
    let (inside, outside) = stage.a.scratch("close")?;
    let [stdin, stdout, stderr] = ["in", "out", "err"].map(|name| format!("{inside}/{name}"));
    stage.a.command(&["mkfifo", &stdin, &stdout, &stderr])?.ok()?;
    // Opened for both reading and writing, a FIFO makes nobody wait for its other end.
    let open = |name| fs::OpenOptions::new().read(true).write(true).open(outside.join(name));
    let writer = open("in").map_err(Trouble::io("open", &stdin))?;
    let _readers = (
        open("out").map_err(Trouble::io("open", &stdout))?,
        open("err").map_err(Trouble::io("open", &stderr))?,
    );
    let streams = Streams { stdin: &stdin, stdout: &stdout, stderr: &stderr, terminal: false };
    rpc.exec(container.id(), "cat", &process(&["cat"]), &streams)?;
    rpc.start(container.id(), "cat")?;
    drop(writer);
    // The shim holds the input open until it is told to close it.
    assert_eq!(rpc.state(container.id(), "cat")?.status(), Status::Running);
    rpc.close_stdin(container.id(), "cat")?;
    assert_eq!(rpc.wait(container.id(), "cat")?, 0);
    assert_eq!(rpc.delete_process(container.id(), "cat")?, 0);
    Ok(())
}

fn container_without_streams_runs(stage: &Stage) -> Outcome {
    let done =
        stage.a.plan("null-io").flags(&["--null-io"]).run_to_end(&["sh", "-c", "echo lost; exit 6"])?;
    assert_eq!(done.with_code(6)?.stdout, "");
    Ok(())
}
