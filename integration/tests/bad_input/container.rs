//! Containers that cannot be moved, and requests that make no sense.

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::options::{CheckpointOptions, TaskOptions};
use godwit_integration::suite::trouble::skip;
use godwit_integration::suite::{Answer, Case, Container, Outcome, Runtime, Stage, await_that};

use super::claim::{COUNTER, assert_counts_on, assert_says, assert_untouched, counter};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(unknown_container_is_named),
        case!(stopped_task_is_not_moved),
        case!(container_without_a_task_is_not_moved),
        case!(paused_container_is_to_be_resumed_first),
        case!(container_of_another_runtime_is_told_what_to_use).on(|lane| lane.runtime == Runtime::Godwit),
        case!(container_that_runc_made_under_our_shim_is_told_what_to_use),
        case!(command_line_that_makes_no_sense_is_refused_by_name),
        case!(request_that_makes_no_sense_is_refused_by_name),
        case!(second_migration_of_the_same_container_is_refused),
        case!(process_of_another_user_is_named_where_it_cannot_be_dumped),
        case!(io_uring_is_named_before_anything_moves),
        case!(open_userfaultfd_is_named_before_anything_moves),
        case!(sctp_socket_is_named_before_anything_moves),
    ]
}

fn unknown_container_is_named(stage: &Stage) -> Outcome {
    let answer = stage.a.migrate("no-such-container", "node-b", &[])?;
    assert_eq!((answer.code, answer.text("outcome")), (4, "failed"));
    assert!(answer.text("error.cause").contains("no-such-container"), "{}", answer.text("error.cause"));
    Ok(())
}

fn stopped_task_is_not_moved(stage: &Stage) -> Outcome {
    let container = stage.a.plan("stopped").run(&["true"])?;
    container.await_state(Status::Stopped)?;
    assert_not_running(stage, container.id())
}

fn container_without_a_task_is_not_moved(stage: &Stage) -> Outcome {
    let container = stage.a.plan("no-task").create(&["true"])?;
    assert_not_running(stage, container.id())?;
    assert!(container.is_recorded()?);
    Ok(())
}

fn assert_not_running(stage: &Stage, id: &str) -> Outcome {
    let answer = stage.a.migrate(id, "node-b", &[])?;
    assert_eq!((answer.code, answer.text("outcome")), (4, "failed"));
    let cause = answer.text("error.cause");
    assert!(cause.contains(id) && cause.contains("run"), "{cause}");
    Ok(())
}

fn paused_container_is_to_be_resumed_first(stage: &Stage) -> Outcome {
    let (container, pid) = counter(stage, "paused")?;
    container.task("pause")?;
    assert_says(stage.a.migrate(container.id(), "node-b", &[])?, &["paused", "resume"])?;
    container.task("resume")?;
    assert_counts_on(stage, &container, pid)
}

fn container_of_another_runtime_is_told_what_to_use(stage: &Stage) -> Outcome {
    let container = stage.a.plan("foreign").runtime(Runtime::Runc).run(&["sleep", "1000"])?;
    let pid = container.pid()?;
    let answer = stage.a.migrate(container.id(), "node-b", &[])?;
    assert_says(answer, &["io.containerd.runc.v2", "io.containerd.godwit.v1"])?;
    assert_untouched(stage, &container, pid)
}

/// dockerd asks for runc by name even where this build's shim stands in the place of containerd's.
fn container_that_runc_made_under_our_shim_is_told_what_to_use(stage: &Stage) -> Outcome {
    let container = stage.a.plan("by-runc").create(&["sleep", "1000"])?;
    let rootfs = stage.a.rpc.rootfs(container.id())?;
    let options = TaskOptions { binary_name: "runc".to_owned(), ..Default::default() };
    stage.a.rpc.create(container.id(), rootfs, Some(options.to_any()))?;
    stage.a.rpc.start(container.id(), "")?;
    let pid = container.pid()?;
    assert_says(stage.a.migrate(container.id(), "node-b", &[])?, &["another OCI runtime", "BinaryName"])?;
    assert_untouched(stage, &container, pid)
}

fn command_line_that_makes_no_sense_is_refused_by_name(stage: &Stage) -> Outcome {
    for (words, named) in [
        (&["x", "--to", "node-b", "--mode", "teleport"][..], "teleport"),
        (&["x", "--to", "node-b:0"], "node-b:0"),
        (&["x", "--to", "node-b", "--fast"], "--fast"),
        (&["x"], "--to"),
    ] {
        let done = stage.a.command(&[&["godwit", "migrate"], words].concat())?.with_code(2)?;
        assert!(done.stderr.contains(named), "{named} is not in: {}", done.stderr);
    }
    Ok(())
}

/// Through containerd's own call, where no command line was checked before.
fn request_that_makes_no_sense_is_refused_by_name(stage: &Stage) -> Outcome {
    let (container, pid) = counter(stage, "nonsense")?;
    for (request, named) in [
        ("godwit://node-b?mode=teleport", "teleport"),
        ("godwit://node-b?speed=11", "speed"),
        ("godwit://node-b:70000", "70000"),
        ("godwit://", "HOST"),
    ] {
        let options = CheckpointOptions { image_path: request.to_owned(), ..Default::default() };
        let refusal = stage.a.rpc.checkpoint(container.id(), Some(options.to_any()));
        let refusal = refusal.expect_err("the request makes no sense");
        assert!(refusal.message.contains(named), "{named} is not in: {refusal}");
    }
    assert_counts_on(stage, &container, pid)
}

/// The first is made slow by its size. Whichever of the two is refused, the other must go through.
fn second_migration_of_the_same_container_is_refused(stage: &Stage) -> Outcome {
    let container = stage.a.plan("twice").image("workload").run(&BIG)?;
    await_that("the program has its memory", || {
        container.exec(&["workload", "ask"]).is_ok_and(|done| done.code == Some(0))
    })?;
    let moved = Container::adopt(&stage.b, container.id());
    let jobs = [(); 2].map(|()| stage.a.start_migration(container.id(), "node-b", &[]));
    let mut codes = Vec::new();
    for job in jobs {
        codes.push(Answer::read(job?.wait()?)?.code);
    }
    codes.sort_unstable();
    assert!(codes[0] == 0 && codes[1] != 0, "{codes:?}");
    moved.await_state(Status::Running)?;
    container.await_gone()
}

/// Without CAP_SYS_RESOURCE, CRIU cannot read the limits of a process of another user.
fn process_of_another_user_is_named_where_it_cannot_be_dumped(stage: &Stage) -> Outcome {
    let script = format!("su -s /bin/sh www-data -c 'sleep 1000000' & {}", COUNTER[2]);
    let container = stage.a.plan("users").run(&["sh", "-c", &script])?;
    let pid = container.pid()?;
    await_that("a process of the other user runs", || {
        let is_theirs = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.contains("\nUid:\t33\t")
        };
        stage.a.rpc.pids(container.id()).is_ok_and(|pids| pids.iter().any(is_theirs))
    })?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    let answer = stage.a.migrate(container.id(), "node-b", &["--dry-run"])?;
    if mask >> CAP_SYS_RESOURCE & 1 == 1 {
        answer.checked()?;
    } else {
        assert_eq!(answer.code, 4);
        assert_says(answer, &["CAP_SYS_RESOURCE", "33"])?;
    }
    assert_counts_on(stage, &container, pid)
}

fn io_uring_is_named_before_anything_moves(stage: &Stage) -> Outcome {
    // io_uring_setup(2), with eight entries.
    let open = "ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256))";
    is_named_while_held(stage, "io-uring", open, &["[io_uring]", "cannot be saved"])
}

fn open_userfaultfd_is_named_before_anything_moves(stage: &Stage) -> Outcome {
    // userfaultfd(2) with UFFD_USER_MODE_ONLY, for which a container needs no privilege.
    let open = "ctypes.CDLL(None).syscall(323, 1)";
    is_named_while_held(stage, "userfaultfd", open, &["[userfaultfd]", "cannot be saved"])
}

fn sctp_socket_is_named_before_anything_moves(stage: &Stage) -> Outcome {
    is_named_while_held(stage, "sctp", "listen(socket.IPPROTO_SCTP)", &["SCTP", "TCP"])
}

/// Runs Python holding the descriptor that the expression `open` gives, and claims that a dry run and a migration
/// name it by `words`, and that neither touches the container.
fn is_named_while_held(stage: &Stage, stem: &str, open: &str, words: &[&str]) -> Outcome {
    let program = HOLD.replace("OPEN", open);
    let container = stage.a.plan(stem).image("python3").run(&["python3", "-c", &program])?;
    let pid = container.pid()?;
    let file = format!("/proc/{pid}/root/run/held");
    let mut held = String::new();
    await_that("the program has what it asked for", || {
        held = std::fs::read_to_string(&file).unwrap_or_default();
        held.ends_with('\n')
    })?;
    if held.starts_with('-') {
        return skip(format!("this kernel does not give a program {stem}: {}", held.trim()));
    }
    for flags in [&["--dry-run"][..], &[]] {
        let answer = stage.a.migrate(container.id(), "node-b", flags)?;
        assert_eq!(answer.code, 4, "it is known before anything moves: {}", answer.text("error.cause"));
        assert_says(answer, &[words, &[&pid.to_string()]].concat())?;
    }
    assert_untouched(stage, &container, pid)
}

const CAP_SYS_RESOURCE: u32 = 24;
/// Writes the descriptor into a file, or the negative number of the error for which there is none.
const HOLD: &str = "
import ctypes, os, socket, time
def listen(protocol):
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    listener.bind(('127.0.0.1', 0))
    listener.listen()
    return listener.detach()
try:
    held = OPEN
except OSError as error:
    held = -error.errno
with open('/run/held.next', 'w') as file:
    file.write(f'{held}\\n')
os.rename('/run/held.next', '/run/held')
time.sleep(1000000)
";
const BIG: [&str; 4] = ["workload", "pages", "--pages", "65536"];
