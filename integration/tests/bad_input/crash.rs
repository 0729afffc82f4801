//! Processes that carry a migration, killed in the middle of it.
//!
//! The container has enough memory for its transfer to last a while; the process to be killed is looked for from
//! the moment the migration begins, and killed as soon as it is there. Wherever that leads, exactly one node must
//! run the container, it must be whole, and the other must be clean.

use std::fs;
use std::time::Instant;

use godwit_integration::case;
use godwit_integration::cgroup::Hierarchy;
use godwit_integration::node::AGENT;
use godwit_integration::process::Daemon;
use godwit_integration::suite::trouble::LIMIT;
use godwit_integration::suite::{Answer, Case, Container, Outcome, Stage, Trouble, await_that};
use godwit_integration::workload::memory::Findings;
use godwit_integration::workload::program;
use nix::sys::signal::Signal;

use super::claim::assert_untouched;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(killed_target_shim_leaves_the_source_running).alone(),
        case!(killed_target_worker_leaves_the_source_running).alone(),
        case!(killed_source_worker_leaves_the_source_running).alone(),
        case!(source_worker_killed_in_mid_dump_leaves_nothing_frozen).alone(),
        case!(killed_criu_of_the_source_leaves_the_source_running).alone(),
        case!(killed_criu_of_the_target_leaves_the_source_running).alone(),
        case!(killed_agent_leaves_the_source_running).alone(),
        case!(killed_client_leaves_exactly_one_whole_container).alone(),
        case!(interrupted_client_gives_up_and_leaves_the_source_running).alone(),
    ]
}

fn killed_target_shim_leaves_the_source_running(stage: &Stage) -> Outcome {
    survives_kill(stage, "shim", |stage, id| stage.b.process(&["containerd-shim", id]))
}

fn killed_target_worker_leaves_the_source_running(stage: &Stage) -> Outcome {
    survives_kill(stage, "target-worker", |stage, id| stage.b.process(&["godwit", "migrate-target", id]))
}

fn killed_source_worker_leaves_the_source_running(stage: &Stage) -> Outcome {
    survives_kill(stage, "source-worker", |stage, id| stage.a.process(&["godwit", "migrate-source", id]))
}

/// Its CRIU lives on for as long as it takes to let go of the container, frozen all the while.
fn source_worker_killed_in_mid_dump_leaves_nothing_frozen(stage: &Stage) -> Outcome {
    survives_kill(stage, "mid-dump", |stage, id| {
        // CRIU's title once it has its order.
        stage.a.process(&["criu: dump"]).and_then(|_| stage.a.process(&["godwit", "migrate-source", id]))
    })
}

fn killed_criu_of_the_source_leaves_the_source_running(stage: &Stage) -> Outcome {
    survives_kill(stage, "source-criu", |stage, id| {
        // Once the target has its worker: those before that only look at what this node can do.
        stage.b.process(&["godwit", "migrate-target", id]).and_then(|_| stage.a.process(&["criu", "swrk"]))
    })
}

fn killed_criu_of_the_target_leaves_the_source_running(stage: &Stage) -> Outcome {
    survives_kill(stage, "target-criu", |stage, _| stage.b.process(&["criu", "swrk"]))
}

/// A dead agent cleans nothing up; the next one does.
fn killed_agent_leaves_the_source_running(stage: &Stage) -> Outcome {
    survives_kill(stage, "agent", |stage, id| {
        // Once the container is on its way there.
        stage.b.process(&["containerd-shim", id]).and_then(|_| stage.b.node().daemon(AGENT))
    })
}

/// The migration is the shim's, not the client's: it may go through or be given up.
fn killed_client_leaves_exactly_one_whole_container(stage: &Stage) -> Outcome {
    let container = big(stage, "client")?;
    let moved = Container::adopt(&stage.b, container.id());
    let job = stage.a.start_migration(container.id(), "node-b", &[])?;
    await_that("the migration is under way", || {
        stage.a.process(&["godwit", "migrate-source", container.id()]).is_some()
    })?;
    job.kill();
    await_that("the migration is over", || {
        stage.a.process(&["godwit", "migrate-source", container.id()]).is_none()
    })?;
    await_that("exactly one node has the container", || {
        let here = container.state().ok().flatten().is_some();
        let there = moved.state().ok().flatten().is_some();
        here != there
    })?;
    assert_whole(if moved.state()?.is_some() { &moved } else { &container })
}

fn interrupted_client_gives_up_and_leaves_the_source_running(stage: &Stage) -> Outcome {
    let container = big(stage, "interrupt")?;
    let _there = Container::adopt(&stage.b, container.id());
    let pid = container.pid()?;
    let job = stage.a.start_migration(container.id(), "node-b", &[])?;
    await_that("the target prepares", || stage.b.process(&["containerd-shim", container.id()]).is_some())?;
    if let Some(client) = i32::try_from(job.pid()).ok().and_then(Daemon::of) {
        client.signal(Signal::SIGINT);
    }
    Answer::read(job.wait()?)?.failed()?;
    assert_whole(&container)?;
    assert_untouched(stage, &container, pid)
}

/// Moves a container, kills the process that `victim` finds as soon as it is there, and claims that the container
/// goes on whole on the source, and then moves when nothing is killed.
///
/// On a busy machine the process may be found too late to matter. Then the migration goes through, which is as good,
/// and another one is disturbed.
fn survives_kill(stage: &Stage, stem: &str, victim: impl Fn(&Stage, &str) -> Option<Daemon>) -> Outcome {
    for _ in 0..ATTEMPTS {
        let container = big(stage, stem)?;
        let there = Container::adopt(&stage.b, container.id());
        let pid = container.pid()?;
        let answer = move_and_kill(stage, &container, &victim)?;
        if answer.code != 0 {
            assert_not_frozen(pid)?;
        }
        if stage.b.node().daemon(AGENT).is_none() {
            stage.b.node().start_agent::<[&str; 0], _>([])?;
        }
        if answer.code == 0 {
            assert_whole(&there)?;
            continue;
        }
        answer.failed()?;
        assert_whole(&container)?;
        assert_writes_on(&container)?;
        assert_untouched(stage, &container, pid)?;
        let (moved, _) = container.move_to(&stage.b)?;
        return assert_whole(&moved);
    }
    let text = format!("{ATTEMPTS} migrations went through before it was there");
    Err(Trouble::Garbled { what: "a process to be killed", text })
}

/// Moves a container, kills what `victim` finds if it finds anything in time, and returns what became of the move.
fn move_and_kill(
    stage: &Stage,
    container: &Container<'_>,
    victim: &impl Fn(&Stage, &str) -> Option<Daemon>,
) -> Result<Answer, Trouble> {
    let mut job = stage.a.start_migration(container.id(), "node-b", &[])?;
    // Without a rest between two looks: it may be there for a tenth of a second.
    let deadline = Instant::now() + LIMIT;
    while job.is_running() && Instant::now() < deadline {
        if let Some(found) = victim(stage, container.id()) {
            found.signal(Signal::SIGKILL);
            break;
        }
    }
    Answer::read(job.wait()?)
}

/// Runs the self-checking program with a quarter of a gibibyte.
fn big<'a>(stage: &'a Stage, stem: &str) -> Result<Container<'a>, Trouble> {
    let container = stage.a.plan(stem).image("workload").run(&["workload", "pages", "--pages", "65536"])?;
    await_that("the program has its memory", || {
        container.exec(&["workload", "ask"]).is_ok_and(|done| done.code == Some(0))
    })?;
    Ok(container)
}

fn assert_whole(container: &Container<'_>) -> Outcome {
    let findings = ask(container)?;
    assert_eq!((findings.pages, findings.bad), (65536, 0));
    Ok(())
}

fn assert_writes_on(container: &Container<'_>) -> Outcome {
    let before = ask(container)?.rewrites;
    await_that("it writes on", || ask(container).is_ok_and(|now| now.rewrites > before))
}

fn ask(container: &Container<'_>) -> Result<Findings, Trouble> {
    let line = container.exec(&["workload", "ask"])?.ok()?;
    program::parse_line(&line).ok_or(Trouble::Garbled { what: "findings", text: line })
}

/// Claims that the kernel has let the cgroup of a process go at this very moment.
fn assert_not_frozen(pid: u32) -> Outcome {
    let path = format!("/proc/{pid}/cgroup");
    let groups = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
    for hierarchy in Hierarchy::all()? {
        let controllers = hierarchy.options.as_deref().unwrap_or_default();
        let group = groups
            .lines()
            .find_map(|line| line.split_once(':')?.1.strip_prefix(controllers)?.strip_prefix(':'));
        let Some(group) = group else { continue };
        let directory = hierarchy.point.join(group.trim_start_matches('/'));
        for (file, frozen) in [("freezer.state", "FR"), ("cgroup.events", "frozen 1")] {
            let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
            assert!(!text.contains(frozen), "{} says {text}", directory.join(file).display());
        }
    }
    Ok(())
}

/// How often a process to be killed is looked for.
pub(super) const ATTEMPTS: usize = 4;
