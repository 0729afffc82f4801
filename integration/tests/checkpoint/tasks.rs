//! `ctr tasks checkpoint`, with and without its flags.

use std::fs;

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::{Case, Outcome, Runtime, Stage, Trouble};

use super::workload::{COUNTER, Images, LOCK, await_count_past, await_lock, count};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(task_goes_on_after_its_checkpoint),
        case!(task_ends_after_a_checkpoint_with_exit).on(|lane| lane.ctr_sends_checkpoint_flags()),
        case!(images_go_where_the_flags_say).on(|lane| lane.ctr_sends_checkpoint_flags()),
        case!(images_go_where_the_flags_say_and_the_task_ends).on(|lane| lane.ctr_sends_checkpoint_flags()),
        case!(checkpoint_of_a_paused_task_is_refused_and_it_stays_paused),
        case!(failed_checkpoint_says_why_and_leaves_the_task_running),
        case!(events_of_a_checkpoint_come_in_order),
    ]
}

fn task_goes_on_after_its_checkpoint(stage: &Stage) -> Outcome {
    let container = stage.a.plan("goes-on").run(&COUNTER)?;
    let images = Images::named_after(&stage.a, container.id());
    let pid = container.pid()?;
    await_count_past(&container, 10)?;
    container.task("checkpoint")?;
    assert_eq!(images.list()?.len(), 1);
    assert_eq!((container.state()?, container.pid()?), (Some(Status::Running), pid));
    await_count_past(&container, count(&container)?)?;
    Ok(())
}

fn task_ends_after_a_checkpoint_with_exit(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exits").run(&COUNTER)?;
    let images = Images::named_after(&stage.a, container.id());
    await_count_past(&container, 10)?;
    stage.a.ctr(&["tasks", "checkpoint", "--exit", container.id()])?;
    container.await_state(Status::Stopped)?;
    assert_eq!(images.list()?.len(), 1);
    Ok(())
}

fn images_go_where_the_flags_say(stage: &Stage) -> Outcome {
    let container = stage.a.plan("paths").run(&COUNTER)?;
    let _images = Images::named_after(&stage.a, container.id());
    let (inside, outside) = stage.a.scratch("paths")?;
    let [image, work] = ["image", "work"].map(|name| format!("{inside}/{name}"));
    await_count_past(&container, 10)?;
    stage.a.ctr(&["tasks", "checkpoint", "--image-path", &image, "--work-path", &work, container.id()])?;
    assert!(outside.join("image/inventory.img").exists());
    assert!(outside.join("work/dump.log").exists());
    assert!(!outside.join("image/dump.log").exists());
    await_count_past(&container, count(&container)?)?;
    Ok(())
}

fn images_go_where_the_flags_say_and_the_task_ends(stage: &Stage) -> Outcome {
    let container = stage.a.plan("paths-exit").run(&COUNTER)?;
    let _images = Images::named_after(&stage.a, container.id());
    let (inside, outside) = stage.a.scratch("paths-exit")?;
    await_count_past(&container, 10)?;
    stage.a.ctr(&["tasks", "checkpoint", "--exit", "--image-path", &inside, container.id()])?;
    container.await_state(Status::Stopped)?;
    assert!(outside.join("inventory.img").exists());
    let names = fs::read_dir(&outside).map_err(Trouble::io("read", &outside))?.flatten();
    let has_pages = names.filter_map(|entry| entry.file_name().into_string().ok());
    assert!(has_pages.into_iter().any(|name| name.starts_with("pages-")));
    Ok(())
}

fn checkpoint_of_a_paused_task_is_refused_and_it_stays_paused(stage: &Stage) -> Outcome {
    let container = stage.a.plan("paused").run(&COUNTER)?;
    let _images = Images::named_after(&stage.a, container.id());
    container.task("pause")?;
    stage.a.try_ctr(&["tasks", "checkpoint", container.id()])?;
    let state = container.state()?;
    assert!(matches!(state, Some(Status::Paused | Status::Running)), "{state:?}");
    if state == Some(Status::Paused) {
        container.task("resume")?;
    }
    let now = await_count_past(&container, 0)?;
    await_count_past(&container, now)?;
    Ok(())
}

/// CRIU refuses to dump a task that holds a file lock unless told otherwise, and `ctr tasks checkpoint` has no
/// flag for it.
fn failed_checkpoint_says_why_and_leaves_the_task_running(stage: &Stage) -> Outcome {
    let container = stage.a.plan("locked").image("workload").run(&LOCK)?;
    let images = Images::named_after(&stage.a, container.id());
    await_lock(&container)?;
    let text = stage.a.try_ctr(&["tasks", "checkpoint", container.id()])?.refused()?;
    assert!(text.contains("criu"), "{text}");
    if stage.lane.runtime.is_godwit() {
        assert!(
            text.contains("lock") && text.contains("dump.log"),
            "the reason and the log are named: {text}"
        );
    }
    assert_eq!(images.list()?, Vec::<String>::new());
    assert_eq!(container.state()?, Some(Status::Running));
    container.exec(&["true"])?.ok()?;
    Ok(())
}

fn events_of_a_checkpoint_come_in_order(stage: &Stage) -> Outcome {
    let container = stage.a.plan("event").run(&COUNTER)?;
    let _images = Images::named_after(&stage.a, container.id());
    container.task("checkpoint")?;
    // The pause is ctr's. containerd asks shims to tell of the checkpoint itself, which its own does not.
    let expected: &[&str] = match stage.lane.runtime {
        Runtime::Runc => &["create", "start", "paused", "resumed"],
        _ => &["create", "start", "paused", "checkpointed", "resumed"],
    };
    stage.a.events.await_topics(container.id(), expected)
}
