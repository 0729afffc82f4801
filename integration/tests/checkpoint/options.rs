//! Options of a checkpoint that ctr has no flags for, through containerd's API.

use std::path::PathBuf;

use containerd_client::types::v1::Status;
use godwit_integration::Version;
use godwit_integration::case;
use godwit_integration::suite::options::CheckpointOptions;
use godwit_integration::suite::{Case, Container, Lane, Outcome, Stage, Trouble, await_that};

use super::workload::{COUNTER, Images, LOCK, await_count_past, await_lock, count};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(file_locks_are_taken_along_when_asked_for).on(daemon_passes_paths),
        case!(connected_tcp_is_taken_along_when_asked_for).on(daemon_passes_paths),
        case!(external_unix_socket_is_taken_along_when_asked_for).on(daemon_passes_paths),
        case!(terminal_is_taken_along_when_asked_for).on(daemon_passes_paths),
        case!(cgroups_mode_and_empty_namespace_are_accepted).on(daemon_passes_paths),
        case!(container_is_not_paused_by_the_client_and_ends_with_exit).on(daemon_passes_paths),
        case!(parent_images_are_built_upon_or_refused_by_name)
            .on(|lane| daemon_passes_paths(lane) && lane.runtime.is_godwit()),
        case!(parent_images_that_are_not_there_are_refused_by_name)
            .on(|lane| daemon_passes_paths(lane) && lane.runtime.is_godwit()),
    ]
}

/// containerd 1.6 and 1.7 obey a path in the options only for names that begin like runc's.
fn daemon_passes_paths(lane: Lane) -> bool {
    lane.containerd >= Version::V2_1 || lane.runtime.name().starts_with("io.containerd.runc")
}

fn file_locks_are_taken_along_when_asked_for(stage: &Stage) -> Outcome {
    let container = stage.a.plan("lock").image("workload").run(&LOCK)?;
    await_lock(&container)?;
    refused_without(stage, &container)?;
    taken_with(stage, &container, CheckpointOptions { file_locks: true, ..Default::default() })
}

fn connected_tcp_is_taken_along_when_asked_for(stage: &Stage) -> Outcome {
    let container = stage.a.plan("tcp").image("workload").run(&["workload", "connection"])?;
    await_that("the connection is there", || {
        let pid = container.pid().unwrap_or_default();
        // The fourth column is the state, 01 for a connected socket: both ends are in this namespace.
        let connected = |line: &&str| line.split_whitespace().nth(3) == Some("01");
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
        table.lines().filter(connected).count() == 2
    })?;
    refused_without(stage, &container)?;
    taken_with(stage, &container, CheckpointOptions { open_tcp: true, ..Default::default() })
}

/// The container holds one end of a socket whose other end is outside: that of its own standard streams would
/// do, but those are FIFOs here, so it connects to a listener of the node through a bind mount.
fn external_unix_socket_is_taken_along_when_asked_for(stage: &Stage) -> Outcome {
    let (inside, outside) = stage.a.scratch("socket")?;
    let listener = std::os::unix::net::UnixListener::bind(outside.join("listener"));
    let listener = listener.map_err(Trouble::io("listen on", &outside))?;
    let mount = format!("type=bind,src={inside},dst=/mnt,options=rbind");
    let script = format!("nc local:/mnt/listener & {}", COUNTER[2]);
    let container = stage.a.plan("unix").flags(&["--mount", &mount]).run(&["sh", "-c", &script])?;
    drop(listener);
    await_count_past(&container, 10)?;
    taken_with(stage, &container, CheckpointOptions { external_unix_sockets: true, ..Default::default() })
}

fn terminal_is_taken_along_when_asked_for(stage: &Stage) -> Outcome {
    let (container, job) = stage.a.plan("terminal").on_terminal(24, 80, &COUNTER)?;
    await_that("it runs", || container.state().is_ok_and(|state| state == Some(Status::Running)))?;
    await_count_past(&container, 10)?;
    taken_with(stage, &container, CheckpointOptions { terminal: true, ..Default::default() })?;
    container.kill("SIGKILL")?;
    job.wait()?.with_code(137)?;
    Ok(())
}

fn cgroups_mode_and_empty_namespace_are_accepted(stage: &Stage) -> Outcome {
    let container = stage.a.plan("modes").run(&COUNTER)?;
    await_count_past(&container, 10)?;
    let options = CheckpointOptions {
        cgroups_mode: "soft".to_owned(),
        empty_namespaces: vec!["network".to_owned()],
        ..Default::default()
    };
    taken_with(stage, &container, options)
}

fn container_is_not_paused_by_the_client_and_ends_with_exit(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exit").run(&COUNTER)?;
    await_count_past(&container, 10)?;
    let (options, outside) = with_paths(stage, CheckpointOptions { exit: true, ..Default::default() })?;
    stage.a.rpc.checkpoint(container.id(), Some(options.to_any()))?;
    container.await_state(Status::Stopped)?;
    assert!(outside.join("image/inventory.img").exists());
    assert!(!stage.a.events.topics(container.id()).iter().any(|topic| topic == "paused"));
    Ok(())
}

/// A checkpoint upon another one holds what was written since. CRIU can tell that on kernels with soft-dirty tracking
/// alone.
fn parent_images_are_built_upon_or_refused_by_name(stage: &Stage) -> Outcome {
    let container = stage.a.plan("upon").run(&COUNTER)?;
    await_count_past(&container, 10)?;
    let (first, outside) = with_paths(stage, CheckpointOptions::default())?;
    stage.a.rpc.checkpoint(container.id(), Some(first.to_any()))?;
    let scratch = outside.parent().unwrap_or(&outside);
    let above = outside.strip_prefix(scratch).unwrap_or(&outside).join("image");
    let parent_path = format!("../../{}", above.display());
    let (second, outside) = with_paths(stage, CheckpointOptions { parent_path, ..Default::default() })?;
    match stage.a.rpc.checkpoint(container.id(), Some(second.to_any())) {
        Ok(()) => assert!(outside.join("image/parent").is_symlink()),
        Err(refusal) => {
            assert!(refusal.message.contains("soft-dirty"), "{refusal}");
        }
    }
    assert_eq!(container.state()?, Some(Status::Running));
    let now = count(&container)?;
    await_count_past(&container, now).map(drop)
}

fn parent_images_that_are_not_there_are_refused_by_name(stage: &Stage) -> Outcome {
    let container = stage.a.plan("no-parent").run(&COUNTER)?;
    let options = CheckpointOptions { parent_path: "../no-such-parent".to_owned(), ..Default::default() };
    let (options, _outside) = with_paths(stage, options)?;
    let refused = stage.a.rpc.checkpoint(container.id(), Some(options.to_any()));
    let refusal = refused.expect_err("there are no such images");
    assert!(refusal.message.contains("../no-such-parent"), "{refusal}");
    assert_eq!(container.state()?, Some(Status::Running));
    await_count_past(&container, 0).map(drop)
}

/// Claims that a checkpoint without options fails, and that the container goes on.
fn refused_without(stage: &Stage, container: &Container<'_>) -> Outcome {
    let (options, _outside) = with_paths(stage, CheckpointOptions::default())?;
    let refused = stage.a.rpc.checkpoint(container.id(), Some(options.to_any()));
    let refusal = refused.expect_err("CRIU has not been told to do it");
    assert!(refusal.message.contains("criu"), "{refusal}");
    assert_eq!(container.state()?, Some(Status::Running));
    Ok(())
}

/// Claims that a checkpoint with `options` succeeds, and that the container goes on.
fn taken_with(stage: &Stage, container: &Container<'_>, options: CheckpointOptions) -> Outcome {
    let _images = Images::named_after(&stage.a, container.id());
    let (options, outside) = with_paths(stage, options)?;
    stage.a.rpc.checkpoint(container.id(), Some(options.to_any()))?;
    assert!(outside.join("image/inventory.img").exists());
    assert!(outside.join("work/dump.log").exists());
    assert_eq!(container.state()?, Some(Status::Running));
    if let Ok(now) = count(container) {
        await_count_past(container, now)?;
    }
    Ok(())
}

fn with_paths(stage: &Stage, options: CheckpointOptions) -> Result<(CheckpointOptions, PathBuf), Trouble> {
    let (inside, outside) = stage.a.scratch("checkpoint")?;
    let [image_path, work_path] = ["image", "work"].map(|name| format!("{inside}/{name}"));
    Ok((CheckpointOptions { image_path, work_path, ..options }, outside))
}
