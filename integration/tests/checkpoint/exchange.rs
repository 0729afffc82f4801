//! Checkpoints made under one shim and restored under another.

use containerd_client::types::v1::Status;
use godwit_integration::Version;
use godwit_integration::case;
use godwit_integration::suite::options::{CheckpointOptions, TaskOptions};
use godwit_integration::suite::{Case, Lane, Outcome, Runtime, Stage};

use super::workload::{COUNTER, assert_usable, await_count_past};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(checkpoint_of_runcs_shim_restores_under_godwit).on(has_both_and_takes_paths),
        case!(checkpoint_of_godwit_restores_under_runcs_shim).on(has_both_and_takes_paths),
        case!(checkpoint_restores_under_the_shim_that_made_it).on(takes_paths),
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

/// Takes a checkpoint of a container of one runtime into a directory, and starts a container of another from it.
/// Both write nothing but to a tmpfs, which is part of the checkpoint: the second has a root of its own.
fn restores_under(stage: &Stage, maker: Runtime, restorer: Runtime) -> Outcome {
    let flags = ["--mount", "type=tmpfs,src=tmpfs,dst=/tmp"];
    let first = stage.a.plan("made").runtime(maker).flags(&flags).run(&COUNTER)?;
    let reached = await_count_past(&first, 10)?;
    let (inside, _outside) = stage.a.scratch("exchange")?;
    let [image_path, work_path] = ["image", "work"].map(|name| format!("{inside}/{name}"));
    let options =
        CheckpointOptions { exit: true, image_path: image_path.clone(), work_path, ..Default::default() };
    stage.a.rpc.checkpoint(first.id(), Some(options.to_any()))?;
    first.await_state(Status::Stopped)?;
    drop(first);
    let second = stage.a.plan("restored").runtime(restorer).flags(&flags).create(&["sleep", "1000"])?;
    let rootfs = stage.a.rpc.rootfs(second.id())?;
    let options = TaskOptions { criu_image_path: image_path, criu_work_path: format!("{inside}/restore") };
    stage.a.rpc.create(second.id(), rootfs, Some(options.to_any()))?;
    stage.a.rpc.start(second.id(), "")?;
    let now = await_count_past(&second, reached)?;
    await_count_past(&second, now)?;
    assert_usable(&second)
}
