//! Ways to ask for a migration, and what is answered.

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::job::Job;
use godwit_integration::suite::options::CheckpointOptions;
use godwit_integration::suite::{Answer, Case, Container, Outcome, Stage};

use super::workload::{TICKER, assert_usable, await_ticks_past};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(report_has_every_figure_and_its_parts_sum_up),
        case!(report_for_people_names_downtime_and_pages),
        case!(dry_run_finds_nothing_in_the_way_and_moves_nothing),
        case!(keep_leaves_the_stopped_record_on_the_source),
        case!(ctr_moves_a_container_by_a_checkpoint_path).on(|lane| lane.ctr_sends_checkpoint_flags()),
        case!(checkpoint_call_of_containerd_moves_a_container),
        case!(state_wait_and_kill_are_answered_on_the_target_at_once),
        case!(events_tell_of_the_move_on_both_nodes),
    ]
}

fn report_has_every_figure_and_its_parts_sum_up(stage: &Stage) -> Outcome {
    let container = stage.a.plan("report").run(&TICKER)?;
    await_ticks_past(&container, 5)?;
    let (_moved, answer) = container.move_to(&stage.b)?;
    assert_eq!((answer.text("id"), answer.text("mode")), (container.id(), "native"));
    for path in FIGURES.iter().chain(&PARTS) {
        let value = answer.number(path);
        assert!(value.is_some_and(|value| value.is_finite() && value >= 0.0), "{path} is {value:?}");
    }
    let number = |path: &str| answer.number(path).unwrap_or(f64::NAN);
    let sum: f64 = PARTS.iter().map(|path| number(path)).sum();
    let downtime = number("downtime_ms");
    assert!((sum - downtime).abs() <= 1.0, "the parts sum up to {sum} ms of {downtime} ms");
    assert!(downtime > 0.0 && downtime <= number("total_ms"));
    assert!(number("pages.normal") + number("pages.zero") <= number("pages.total"));
    let parts = number("bytes.state") + number("bytes.memory") + number("bytes.rootfs");
    assert!(number("bytes.wire") >= parts, "{parts} bytes of content, {} on the wire", number("bytes.wire"));
    assert!(number("bytes.memory") >= number("pages.normal") * 4096.0);
    Ok(())
}

fn report_for_people_names_downtime_and_pages(stage: &Stage) -> Outcome {
    let container = stage.a.plan("prose").run(&TICKER)?;
    let moved = Container::adopt(&stage.b, container.id());
    let done = stage.a.command(&["godwit", "migrate", container.id(), "--to", "node-b"])?;
    let text = done.ok()?;
    for word in [container.id(), "down", "pages", "ms"] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    moved.await_state(Status::Running)
}

fn dry_run_finds_nothing_in_the_way_and_moves_nothing(stage: &Stage) -> Outcome {
    let container = stage.a.plan("dry").run(&TICKER)?;
    let (pid, before) = (container.pid()?, await_ticks_past(&container, 5)?);
    stage.a.migrate(container.id(), "node-b", &["--dry-run"])?.checked()?;
    assert_eq!(container.pid()?, pid);
    await_ticks_past(&container, before)?;
    Container::adopt(&stage.b, container.id()).await_gone()
}

fn keep_leaves_the_stopped_record_on_the_source(stage: &Stage) -> Outcome {
    let container = stage.a.plan("keep").run(&TICKER)?;
    let moved = Container::adopt(&stage.b, container.id());
    stage.a.migrate(container.id(), "node-b", &["--keep"])?.moved()?;
    moved.await_state(Status::Running)?;
    assert_eq!(container.state()?, None);
    assert!(container.is_recorded()?);
    let snapshots = stage.a.ctr(&["snapshots", "list"])?;
    assert!(snapshots.split_whitespace().any(|word| word == container.id()), "{snapshots}");
    // It can be run again here, from its program.
    stage.a.ctr(&["tasks", "start", "--detach", container.id()])?;
    assert_eq!(container.state()?, Some(Status::Running));
    Ok(())
}

/// ctr pauses the task before the call and resumes it afterwards, which must not disturb anything.
fn ctr_moves_a_container_by_a_checkpoint_path(stage: &Stage) -> Outcome {
    let container = stage.a.plan("by-ctr").run(&TICKER)?;
    let before = await_ticks_past(&container, 5)?;
    let moved = Container::adopt(&stage.b, container.id());
    let uri = "godwit://node-b:7450?mode=native";
    stage.a.ctr(&["tasks", "checkpoint", "--image-path", uri, container.id()])?;
    moved.await_state(Status::Running)?;
    await_ticks_past(&moved, before)?;
    container.await_gone()?;
    // ctr 2.1 makes an image of what it believes to be a checkpoint, unless the runtime is containerd's own.
    let checkpoint = format!("containerd.io/checkpoint/{}:", container.id());
    for name in stage.a.ctr(&["images", "list", "--quiet"])?.lines() {
        if name.starts_with(&checkpoint) {
            stage.a.ctr(&["images", "remove", "--sync", name])?;
        }
    }
    assert_usable(&moved)
}

/// Twice, since a containerd that stores what the call has left in its directory refuses the same content again.
fn checkpoint_call_of_containerd_moves_a_container(stage: &Stage) -> Outcome {
    for stem in ["by-call", "by-call-again"] {
        let container = stage.a.plan(stem).run(&TICKER)?;
        let before = await_ticks_past(&container, 5)?;
        let moved = Container::adopt(&stage.b, container.id());
        let options = CheckpointOptions { image_path: "godwit://node-b".to_owned(), ..Default::default() };
        stage.a.rpc.checkpoint(container.id(), Some(options.to_any()))?;
        moved.await_state(Status::Running)?;
        await_ticks_past(&moved, before)?;
        container.await_gone()?;
    }
    Ok(())
}

/// Calls about a container, and about its neighbour, are answered while it is being moved.
fn state_wait_and_kill_are_answered_on_the_target_at_once(stage: &Stage) -> Outcome {
    let container = stage.a.plan("busy").run(&TICKER)?;
    let neighbour = stage.a.plan("neighbour").run(&["sleep", "100000"])?;
    let moved = Container::adopt(&stage.b, container.id());
    let job: Job = stage.a.start_migration(container.id(), "node-b", &[])?;
    let mut asked = 0;
    // The source has the task until the migration is over.
    while let Ok(Some(state)) = container.state() {
        assert!(matches!(state, Status::Running | Status::Paused | Status::Stopped), "{state:?}");
        neighbour.assert_runs()?;
        asked += 1;
    }
    Answer::read(job.wait()?)?.moved()?;
    assert!(asked > 0);
    assert_usable(&moved)
}

fn events_tell_of_the_move_on_both_nodes(stage: &Stage) -> Outcome {
    let container = stage.a.plan("events").run(&TICKER)?;
    let (moved, _) = container.move_to(&stage.b)?;
    stage.b.events.await_topics(moved.id(), &["create", "start"])?;
    stage.a.events.await_one(container.id(), "exit")?;
    stage.a.events.await_one(container.id(), "delete")?;
    Ok(())
}

const FIGURES: [&str; 12] = [
    "total_ms",
    "downtime_ms",
    "pages.total",
    "pages.normal",
    "pages.zero",
    "bytes.state",
    "bytes.memory",
    "bytes.rootfs",
    "bytes.wire",
    "disk_bytes_written",
    "cpu_s.source",
    "cpu_s.target",
];
const PARTS: [&str; 5] = [
    "downtime.freeze_ms",
    "downtime.state_dump_ms",
    "downtime.transfer_ms",
    "downtime.restore_ms",
    "downtime.resume_ms",
];
