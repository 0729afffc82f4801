//! Targets that cannot take the container.

use std::path::Path;

use godwit_integration::case;
use godwit_integration::suite::{Answer, Case, Container, Outcome, Stage, Trouble};

use super::claim::{assert_counts_on, assert_says, counter};
use super::crash::ATTEMPTS;
use super::guard::{AgentAway, SmallStorage};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(name_that_a_record_has_on_the_target_is_refused),
        case!(name_that_a_running_container_has_on_the_target_is_refused),
        case!(snapshot_of_the_name_on_the_target_is_refused),
        case!(target_without_criu_is_told_to_install_it).alone(),
        case!(files_that_do_not_fit_on_the_target_are_refused).alone(),
        case!(storage_that_fills_during_the_transfer_leaves_the_source_running).alone(),
        case!(second_attempt_after_a_failed_one_succeeds).alone(),
    ]
}

fn name_that_a_record_has_on_the_target_is_refused(stage: &Stage) -> Outcome {
    let (container, pid) = counter(stage, "name")?;
    stage.b.rpc.reserve_name(container.id(), stage.lane.runtime.name())?;
    let answer = stage.a.migrate(container.id(), "node-b", &[]);
    // It must still be there, so it can be removed.
    stage.b.ctr(&["containers", "delete", container.id()])?;
    assert_says(answer?, &[container.id(), "already"])?;
    assert_counts_on(stage, &container, pid)
}

fn name_that_a_running_container_has_on_the_target_is_refused(stage: &Stage) -> Outcome {
    let (container, pid) = counter(stage, "namesake")?;
    let other = Container::adopt(&stage.b, container.id());
    let runtime = stage.lane.runtime.name();
    let image = "localhost/busybox:latest";
    stage.b.ctr(&["run", "--detach", "--runtime", runtime, image, other.id(), "sleep", "100000"])?;
    let other_pid = other.pid()?;
    assert_says(stage.a.migrate(container.id(), "node-b", &[])?, &[container.id()])?;
    other.assert_runs()?;
    assert_eq!(other.pid()?, other_pid);
    drop(other);
    assert_counts_on(stage, &container, pid)
}

fn snapshot_of_the_name_on_the_target_is_refused(stage: &Stage) -> Outcome {
    let (container, pid) = counter(stage, "snapshot")?;
    stage.b.ctr(&["snapshots", "prepare", container.id()])?;
    let answer = stage.a.migrate(container.id(), "node-b", &[]);
    stage.b.ctr(&["snapshots", "remove", container.id()])?;
    assert_says(answer?, &[container.id(), "snapshot"])?;
    assert_counts_on(stage, &container, pid)
}

fn target_without_criu_is_told_to_install_it(stage: &Stage) -> Outcome {
    let path = stage.b.command(&["sh", "-c", "echo $PATH"])?.ok()?;
    let has_criu = |dir: &&str| Path::new(dir).join("criu").exists();
    let path: Vec<&str> = path.trim().split(':').filter(|dir| !has_criu(dir)).collect();
    let agent = AgentAway::on_b(stage);
    agent.replace_with_path(&path.join(":"))?;
    let (container, pid) = counter(stage, "no-criu")?;
    let answer = stage.a.migrate(container.id(), "node-b", &[])?;
    assert_eq!(answer.code, 4, "it is known before anything moves: {}", answer.text("error.cause"));
    assert_says(answer, &["criu", "agent", "install"])?;
    assert_counts_on(stage, &container, pid)
}

/// The container has written 48 MiB that cannot be compressed, and the target has room for 16.
fn files_that_do_not_fit_on_the_target_are_refused(stage: &Stage) -> Outcome {
    let (container, pid) = counter(stage, "files")?;
    container.exec(&["dd", "if=/dev/urandom", "of=/tmp/big", "bs=1048576", "count=48"])?.ok()?;
    let small = SmallStorage::with_free(stage, 16 << 20)?;
    let answer = stage.a.migrate(container.id(), "node-b", &[])?;
    drop(small);
    assert_says(answer, &["target", "MiB", "free"])?;
    assert_counts_on(stage, &container, pid)
}

/// There is room enough when the target is asked, and somebody else takes it while the container is on its way.
///
/// On a busy machine it may be taken too late to matter. Then the migration goes through, which is as good, and
/// another one is disturbed.
fn storage_that_fills_during_the_transfer_leaves_the_source_running(stage: &Stage) -> Outcome {
    for _ in 0..ATTEMPTS {
        let (container, pid) = counter(stage, "filling")?;
        container.exec(&["dd", "if=/dev/urandom", "of=/tmp/big", "bs=1048576", "count=48"])?.ok()?;
        let there = Container::adopt(&stage.b, container.id());
        let small = SmallStorage::with_free(stage, 96 << 20)?;
        let mut job = stage.a.start_migration(container.id(), "node-b", &[])?;
        while job.is_running() && stage.b.process(&["godwit", "migrate-target", container.id()]).is_none() {}
        small.fill()?;
        let answer = Answer::read(job.wait()?)?;
        drop(small);
        if answer.code == 0 {
            there.assert_runs()?;
            continue;
        }
        assert_says(answer, &["failed to write", "No space left"])?;
        assert_counts_on(stage, &container, pid)?;
        let (moved, _) = container.move_to(&stage.b)?;
        moved.exec(&["test", "-e", "/tmp/big"])?.ok()?;
        return Ok(());
    }
    let text = format!("{ATTEMPTS} migrations went through before it was full");
    Err(Trouble::Garbled { what: "a transfer to be disturbed", text })
}

/// The target has no room at first, and then it has.
fn second_attempt_after_a_failed_one_succeeds(stage: &Stage) -> Outcome {
    let (container, pid) = counter(stage, "again")?;
    container.exec(&["dd", "if=/dev/urandom", "of=/tmp/big", "bs=1048576", "count=32"])?.ok()?;
    let small = SmallStorage::with_free(stage, 8 << 20)?;
    let answer = stage.a.migrate(container.id(), "node-b", &[])?;
    drop(small);
    answer.failed()?;
    assert_counts_on(stage, &container, pid)?;
    let (moved, _) = container.move_to(&stage.b)?;
    moved.exec(&["test", "-e", "/tmp/big"])?.ok()?;
    Ok(())
}
