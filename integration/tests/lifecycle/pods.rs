//! Containers that share a shim: those with the same sandbox in their annotations, as CRI marks the containers of a
//! pod.

use std::fs;

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::process::Daemon;
use godwit_integration::suite::{Case, Container, Outcome, Site, Stage, Trouble, await_that};
use nix::sys::signal::Signal;

use super::failure::{is_running, shim_of};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(containers_of_a_sandbox_share_a_shim_and_nothing_else),
        case!(killed_shim_of_a_sandbox_takes_all_of_it_along),
    ]
}

fn containers_of_a_sandbox_share_a_shim_and_nothing_else(stage: &Stage) -> Outcome {
    let [sandbox, member] = pod(&stage.a)?;
    let shim = only_shim_of(&stage.a, [&sandbox, &member])?;
    // The one ends and goes, and the other does not notice.
    member.stop()?;
    assert_eq!(stage.a.rpc.delete(member.id())?, 137);
    assert_eq!(sandbox.state()?, Some(Status::Running));
    assert_eq!(sandbox.exec(&["echo", "alone"])?.ok()?, "alone\n");
    // It comes back into the same shim.
    stage.a.ctr(&["tasks", "start", "--detach", member.id()])?;
    assert_eq!(only_shim_of(&stage.a, [&sandbox, &member])?.pid, shim.pid);
    for container in [&member, &sandbox] {
        container.stop()?;
        assert_eq!(stage.a.rpc.delete(container.id())?, 137);
    }
    await_that("the shim ends with its last container", || shims(&stage.a, [&sandbox, &member]).is_empty())
}

fn killed_shim_of_a_sandbox_takes_all_of_it_along(stage: &Stage) -> Outcome {
    let containers = pod(&stage.a)?;
    let [sandbox, member] = &containers;
    let inits = [sandbox.pid()?, member.pid()?];
    only_shim_of(&stage.a, [sandbox, member])?.signal(Signal::SIGKILL);
    await_that("both inits are gone", || !inits.iter().any(|init| is_running(*init)))?;
    for container in &containers {
        stage.a.events.await_one(container.id(), "exit")?;
        // The task may have gone already by itself.
        stage.a.try_ctr(&["tasks", "delete", "--force", container.id()])?;
        await_that("the task is gone", || container.state().is_ok_and(|state| state.is_none()))?;
    }
    Ok(())
}

/// Runs two containers of one sandbox. The first is the sandbox's own, and has its name.
fn pod(site: &Site) -> Result<[Container<'_>; 2], Trouble> {
    let first = site.plan("sandbox");
    let annotation = format!("io.kubernetes.cri.sandbox-id={}", first.id());
    let flags = ["--annotation", annotation.as_str()];
    let sandbox = first.flags(&flags).run(&["sleep", "1000"])?;
    let member = site.plan("member").flags(&flags).run(&["sleep", "1001"])?;
    Ok([sandbox, member])
}

/// Returns the shim of the first of `containers`, and claims that the others have none of their own.
fn only_shim_of<const N: usize>(site: &Site, containers: [&Container<'_>; N]) -> Result<Daemon, Trouble> {
    let all = shims(site, containers);
    assert_eq!(all.len(), 1, "{all:?}");
    shim_of(site, containers[0].id())
}

/// Returns the command lines of the shims that were started for one of `containers` and run.
fn shims<const N: usize>(site: &Site, containers: [&Container<'_>; N]) -> Vec<String> {
    let lines = site.node().cgroups().processes().into_iter().filter_map(|pid| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = line.split('\0');
        let is_shim = words.next().is_some_and(|program| program.contains("containerd-shim"))
            && words.any(|word| containers.iter().any(|container| container.id() == word));
        is_shim.then(|| line.replace('\0', " "))
    });
    lines.collect()
}
