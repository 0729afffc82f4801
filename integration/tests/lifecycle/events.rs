//! What containerd tells those who listen, and in which order.

use godwit_integration::case;
use godwit_integration::suite::{Case, Outcome, Runtime, Stage, await_that};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(events_of_a_short_life_come_in_order),
        case!(events_of_exec_and_pause_come_in_order),
        case!(events_carry_pid_and_status),
    ]
}

fn events_of_a_short_life_come_in_order(stage: &Stage) -> Outcome {
    let plan = stage.a.plan("short");
    let id = plan.id().to_owned();
    plan.run_to_end(&["true"])?.ok()?;
    await_life(stage, &id, &["create", "start", "exit", "delete"])
}

fn events_of_exec_and_pause_come_in_order(stage: &Stage) -> Outcome {
    let container = stage.a.plan("busy").run(&["sleep", "1000"])?;
    container.exec(&["true"])?.ok()?;
    container.task("pause")?;
    container.task("resume")?;
    container.stop()?;
    assert_eq!(stage.a.rpc.delete(container.id())?, 137);
    let expected =
        ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"];
    await_life(stage, container.id(), &expected)
}

fn events_carry_pid_and_status(stage: &Stage) -> Outcome {
    let container = stage.a.plan("told").run(&["sh", "-c", "read none; sleep 1000"])?;
    let (id, events) = (container.id(), &stage.a.events);
    let pid = u64::from(container.pid()?);
    container.stop()?;
    assert_eq!(stage.a.rpc.delete(id)?, 137);
    for topic in delivered(stage, &["create", "start", "exit", "delete"]) {
        assert_eq!(events.await_one(id, topic)?.number("pid"), pid, "{topic}");
    }
    for topic in delivered(stage, &["exit", "delete"]) {
        assert_eq!(events.await_one(id, topic)?.number("exit_status"), 137, "{topic}");
    }
    assert!(
        events.await_one(id, "create")?.content["bundle"].as_str().is_some_and(|path| path.ends_with(id))
    );
    Ok(())
}

/// Waits until the events of a container whose task is deleted are `topics`.
fn await_life(stage: &Stage, id: &str, topics: &[&str]) -> Outcome {
    let topics = delivered(stage, topics);
    match stage.lane.runtime {
        // The last event may or may not come.
        Runtime::Runc => {
            let seen = || stage.a.events.topics(id).into_iter().take(topics.len()).collect::<Vec<_>>();
            await_that(&format!("the events of {id} begin with {topics:?}"), || seen() == topics)
        }
        _ => stage.a.events.await_topics(id, topics),
    }
}

/// Returns the part of `topics` that the lane's shim is sure to deliver: containerd's own may have ended before
/// its last event is on its way.
fn delivered<'a, 'b>(stage: &Stage, topics: &'a [&'b str]) -> &'a [&'b str] {
    if stage.lane.runtime.is_godwit() { topics } else { &topics[..topics.len() - 1] }
}
