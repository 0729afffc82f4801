//! Checkpoints made under one shim and restored under another.

use std::fs;

use containerd_client::types::v1::Status;
use godwit_integration::Version;
use godwit_integration::case;
use godwit_integration::suite::options::{CheckpointOptions, TaskOptions};
use godwit_integration::suite::{Case, Lane, Outcome, Runtime, Stage, Trouble};

use super::workload::{COUNTER, assert_usable, await_count_past};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(checkpoint_of_runcs_shim_restores_under_godwit).on(has_both_and_takes_paths),
        case!(checkpoint_of_godwit_restores_under_runcs_shim).on(has_both_and_takes_paths),
        case!(checkpoint_restores_under_the_shim_that_made_it).on(takes_paths),
        case!(container_created_from_a_checkpoint_is_restored_by_its_start).on(has_both_and_takes_paths),
    ]
}

fn takes_paths(lane: Lane) -> bool {
    lane.containerd >= Version::V2_1 || lane.runtime.name().starts_with("io.containerd.runc")
}

fn has_both_and_takes_paths(lane: Lane) -> bool {
    takes_paths(lane) && matches!(lane.runtime, Runtime::Godwit | Runtime::RuncGodwit)
}

fn checkpoint_of_runcs_shim_restores_under_godwit(stage: &Stage) -> Outcome {
    restores_under(stage, Runtime::Runc, stage.lane.runtime)
}

fn checkpoint_of_godwit_restores_under_runcs_shim(stage: &Stage) -> Outcome {
    restores_under(stage, stage.lane.runtime, Runtime::Runc)
}

fn checkpoint_restores_under_the_shim_that_made_it(stage: &Stage) -> Outcome {
    restores_under(stage, stage.lane.runtime, stage.lane.runtime)
}

/// The container's record says where its checkpoint is, by the file that ctr takes for every runtime but runc. Its
/// first task is restored from there by `ctr tasks start`.
fn container_created_from_a_checkpoint_is_restored_by_its_start(stage: &Stage) -> Outcome {
    let (inside, outside) = stage.a.scratch("record")?;
    let reached = checkpointed_into(stage, stage.lane.runtime, &inside)?;
    let config = outside.join("config.toml");
    let text = format!("CriuImagePath = \"{inside}/image\"\nCriuWorkPath = \"{inside}/restore\"\n");
    fs::write(&config, text).map_err(Trouble::io("write", &config))?;
    let config = format!("{inside}/config.toml");
    let flags = [&TMPFS[..], &["--runtime-config-path", &config]].concat();
    let container = stage.a.plan("from-record").flags(&flags).create(&["sleep", "1000"])?;
    stage.a.ctr(&["tasks", "start", "--detach", container.id()])?;
    let now = await_count_past(&container, reached)?;
    await_count_past(&container, now)?;
    assert!(outside.join("restore/restore.log").exists());
    assert_usable(&container)
}

/// Takes a checkpoint of a container of one runtime into a directory, and starts a container of another from it.
/// Both write nothing but to a tmpfs, which is part of the checkpoint: the second has a root of its own.
fn restores_under(stage: &Stage, maker: Runtime, restorer: Runtime) -> Outcome {
    let (inside, _outside) = stage.a.scratch("exchange")?;
    let reached = checkpointed_into(stage, maker, &inside)?;
    let second = stage.a.plan("restored").runtime(restorer).flags(&TMPFS).create(&["sleep", "1000"])?;
    let rootfs = stage.a.rpc.rootfs(second.id())?;
    let options = TaskOptions {
        criu_image_path: format!("{inside}/image"),
        criu_work_path: format!("{inside}/restore"),
        ..Default::default()
    };
    stage.a.rpc.create(second.id(), rootfs, Some(options.to_any()))?;
    stage.a.rpc.start(second.id(), "")?;
    let now = await_count_past(&second, reached)?;
    await_count_past(&second, now)?;
    assert_usable(&second)
}

/// Runs a container that counts, and ends it by a checkpoint into `image` below a directory of the node. Returns a
/// count that the checkpoint is past.
fn checkpointed_into(stage: &Stage, maker: Runtime, directory: &str) -> Result<u64, Trouble> {
    let container = stage.a.plan("made").runtime(maker).flags(&TMPFS).run(&COUNTER)?;
    let reached = await_count_past(&container, 10)?;
    let [image_path, work_path] = ["image", "work"].map(|name| format!("{directory}/{name}"));
    let options = CheckpointOptions { exit: true, image_path, work_path, ..Default::default() };
    stage.a.rpc.checkpoint(container.id(), Some(options.to_any()))?;
    container.await_state(Status::Stopped)?;
    Ok(reached)
}

/// Where the counter writes, so that the checkpoint has it and no writable layer has to come along.
const TMPFS: [&str; 2] = ["--mount", "type=tmpfs,src=tmpfs,dst=/tmp"];
