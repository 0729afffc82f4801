//! `ctr containers checkpoint` and `ctr containers restore`.

use containerd_client::types::v1::Status;
use godwit_integration::Version;
use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Site, Stage, Trouble, await_that};

use super::workload::{COUNTER, Images, assert_usable, await_count_past, count};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(live_restore_goes_on_where_the_checkpoint_was_taken),
        case!(cold_restore_starts_anew_with_the_written_files),
        case!(checkpoint_travels_to_another_node),
        case!(restored_container_is_checkpointed_again).on(|lane| lane.containerd >= Version::V2_1),
        case!(restored_task_starts_again_from_its_program),
        case!(container_with_a_log_file_is_restored),
        case!(many_processes_are_restored),
        case!(read_only_container_with_limits_is_restored),
    ]
}

fn live_restore_goes_on_where_the_checkpoint_was_taken(stage: &Stage) -> Outcome {
    let (id, images, reached) = checkpointed(&stage.a, "live", &COUNTER, &[])?;
    let container = Container::adopt(&stage.a, &id);
    stage.a.ctr(&["containers", "restore", "--rw", "--live", &id, &reference(&id)])?;
    assert_eq!(container.state()?, Some(Status::Running));
    let now = await_count_past(&container, reached)?;
    await_count_past(&container, now)?;
    assert_usable(&container)?;
    drop((container, images));
    Ok(())
}

/// The count of a shell that was started again begins at 1, while the file that the first one wrote is there.
fn cold_restore_starts_anew_with_the_written_files(stage: &Stage) -> Outcome {
    let script =
        "test -e /tmp/first && echo again >/tmp/second; touch /tmp/first; while :; do usleep 1000; done";
    let container = stage.a.plan("cold").run(&["sh", "-c", script])?;
    let id = container.id().to_owned();
    let _images = Images::named_after(&stage.a, &id);
    await_that("the first shell has written", || {
        container.exec(&["test", "-e", "/tmp/first"]).is_ok_and(|done| done.code == Some(0))
    })?;
    stage.a.ctr(&["containers", "checkpoint", "--rw", "--image", "--task", &id, &reference(&id)])?;
    drop(container);
    let container = Container::adopt(&stage.a, &id);
    stage.a.ctr(&["containers", "restore", "--rw", &id, &reference(&id)])?;
    await_that("the second shell has seen what the first wrote", || {
        container.exec(&["test", "-e", "/tmp/second"]).is_ok_and(|done| done.code == Some(0))
    })
}

/// Checkpoint on node a, export, import on node b, restore there: the way containerd's users have had to move a
/// container so far.
fn checkpoint_travels_to_another_node(stage: &Stage) -> Outcome {
    let (id, images, reached) = checkpointed(&stage.a, "travels", &COUNTER, &[])?;
    let archive = stage.bed().dir().join(format!("{id}.tar"));
    let path = archive.to_string_lossy();
    let mut export = vec!["images", "export", "--skip-manifest-json"];
    if stage.lane.containerd >= Version::V2_1 {
        // What ctr 2.1 gets through the transfer service may lack its end.
        export.push("--local");
    }
    let named = reference(&id);
    stage.a.ctr(&[&export[..], &[&path, &named]].concat())?;
    let _images_there = Images::named_after(&stage.b, &id);
    let imported = stage.b.ctr(&["images", "import", "--no-unpack", &path]);
    std::fs::remove_file(&archive).map_err(Trouble::io("remove", &archive))?;
    imported?;
    let container = Container::adopt(&stage.b, &id);
    stage.b.ctr(&["containers", "restore", "--rw", "--live", &id, &reference(&id)])?;
    let now = await_count_past(&container, reached)?;
    await_count_past(&container, now)?;
    assert_usable(&container)?;
    drop(images);
    Ok(())
}

fn restored_container_is_checkpointed_again(stage: &Stage) -> Outcome {
    let (id, images, mut reached) = checkpointed(&stage.a, "repeat", &COUNTER, &[])?;
    for _ in 0..2 {
        let container = Container::adopt(&stage.a, &id);
        stage.a.ctr(&["containers", "restore", "--rw", "--live", &id, &reference(&id)])?;
        reached = await_count_past(&container, reached)?;
        for image in images.list()? {
            stage.a.ctr(&["images", "remove", "--sync", &image])?;
        }
        stage.a.ctr(&["containers", "checkpoint", "--rw", "--image", "--task", &id, &reference(&id)])?;
    }
    Ok(())
}

fn restored_task_starts_again_from_its_program(stage: &Stage) -> Outcome {
    let (id, _images, reached) = checkpointed(&stage.a, "start", &COUNTER, &[])?;
    let container = Container::adopt(&stage.a, &id);
    stage.a.ctr(&["containers", "restore", "--rw", "--live", &id, &reference(&id)])?;
    await_count_past(&container, reached)?;
    container.stop()?;
    stage.a.rpc.delete(&id)?;
    stage.a.ctr(&["tasks", "start", "--detach", &id])?;
    assert_eq!(container.state()?, Some(Status::Running));
    let now = count(&container)?;
    await_count_past(&container, now)?;
    Ok(())
}

fn container_with_a_log_file_is_restored(stage: &Stage) -> Outcome {
    let (inside, _outside) = stage.a.scratch("log")?;
    let uri = format!("file://{inside}/log");
    let (id, _images, reached) = checkpointed(&stage.a, "logged", &COUNTER, &["--log-uri", &uri])?;
    let container = Container::adopt(&stage.a, &id);
    stage.a.ctr(&["containers", "restore", "--rw", "--live", &id, &reference(&id)])?;
    await_count_past(&container, reached)?;
    assert_usable(&container)
}

fn many_processes_are_restored(stage: &Stage) -> Outcome {
    let script =
        format!("for i in 1 2 3 4 5 6 7 8; do (while :; do usleep 1000; done) & done; {}", COUNTER[2]);
    let (id, _images, reached) = checkpointed(&stage.a, "tree", &["sh", "-c", &script], &[])?;
    let container = Container::adopt(&stage.a, &id);
    stage.a.ctr(&["containers", "restore", "--rw", "--live", &id, &reference(&id)])?;
    await_count_past(&container, reached)?;
    // The shells' own children, usleep and mv, come and go.
    assert!(stage.a.rpc.pids(&id)?.len() >= 9);
    assert_usable(&container)
}

fn read_only_container_with_limits_is_restored(stage: &Stage) -> Outcome {
    let flags = ["--read-only", "--memory-limit", "67108864", "--mount", "type=tmpfs,src=tmpfs,dst=/tmp"];
    let (id, _images, reached) = checkpointed(&stage.a, "limited", &COUNTER, &flags)?;
    let container = Container::adopt(&stage.a, &id);
    stage.a.ctr(&["containers", "restore", "--rw", "--live", &id, &reference(&id)])?;
    await_count_past(&container, reached)?;
    let file = container.cgroup_file("memory/memory.limit_in_bytes", "memory.max")?;
    let limit = std::fs::read_to_string(&file).map_err(Trouble::io("read", &file))?;
    assert_eq!(limit.trim(), "67108864");
    assert_usable(&container)
}

/// Runs a container that counts, takes a checkpoint of all of it, and removes it. Returns its id, what removes
/// its images, and a count that the checkpoint is past.
fn checkpointed<'a>(
    site: &'a Site,
    stem: &str,
    command: &[&str],
    flags: &[&str],
) -> Result<(String, Images<'a>, u64), Trouble> {
    let container = site.plan(stem).flags(flags).run(command)?;
    let id = container.id().to_owned();
    let images = Images::named_after(site, &id);
    let reached = await_count_past(&container, 10)?;
    site.ctr(&["containers", "checkpoint", "--rw", "--image", "--task", &id, &reference(&id)])?;
    drop(container);
    Ok((id, images, reached))
}

fn reference(id: &str) -> String {
    format!("localhost/checkpoint-{id}:latest")
}
