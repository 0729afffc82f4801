//! Limits and what is used: cgroups, updates, metrics, and running out of memory.

use std::fs;

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, Trouble, await_that};
use serde_json::json;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(memory_limit_is_set),
        case!(processor_quota_is_set),
        case!(update_changes_limits_of_a_running_container),
        case!(metrics_count_memory_processes_and_time),
        case!(running_out_of_memory_is_an_event),
        case!(every_process_is_in_the_containers_cgroup),
    ]
}

fn memory_limit_is_set(stage: &Stage) -> Outcome {
    let container = stage.a.plan("memory").flags(&["--memory-limit", "33554432"]).run(&["sleep", "1000"])?;
    assert_eq!(memory_limit(&container)?, "33554432");
    Ok(())
}

fn processor_quota_is_set(stage: &Stage) -> Outcome {
    let container = stage.a.plan("cpus").flags(&["--cpus", "0.5"]).run(&["sleep", "1000"])?;
    assert_eq!(quota(&container)?, "50000");
    Ok(())
}

fn update_changes_limits_of_a_running_container(stage: &Stage) -> Outcome {
    let container = stage.a.plan("update").flags(&["--memory-limit", "33554432"]).run(&["sleep", "1000"])?;
    let resources =
        json!({ "memory": { "limit": 67_108_864 }, "cpu": { "quota": 25_000, "period": 100_000 } });
    stage.a.rpc.update(container.id(), &resources)?;
    assert_eq!(memory_limit(&container)?, "67108864");
    assert_eq!(quota(&container)?, "25000");
    assert_eq!(container.state()?, Some(Status::Running));
    Ok(())
}

fn metrics_count_memory_processes_and_time(stage: &Stage) -> Outcome {
    let container = stage.a.plan("metrics").run(&["sh", "-c", "sleep 1000 & while :; do :; done"])?;
    await_that("the shell has started its child", || {
        stage.a.rpc.pids(container.id()).is_ok_and(|pids| pids.len() == 2)
    })?;
    let value = |table: &str, names: &[&str]| {
        let row =
            table.lines().find(|line| names.contains(&line.split_whitespace().next().unwrap_or_default()));
        row.and_then(|row| row.split_whitespace().nth(1)?.parse::<u64>().ok())
    };
    let table = container.task("metrics")?;
    assert!(
        value(&table, &["memory.usage_in_bytes", "memory.usage"]).is_some_and(|bytes| bytes > 0),
        "{table}"
    );
    assert_eq!(value(&table, &["pids.current"]), Some(2), "{table}");
    let time = |table: &str| value(table, &["cpuacct.usage", "cpu.usage_usec"]);
    let before = time(&table);
    assert!(before.is_some_and(|time| time > 0), "{table}");
    await_that("its processor time grows", || {
        container.task("metrics").is_ok_and(|table| time(&table) > before)
    })?;
    let kind = stage.a.rpc.metrics(container.id())?.type_url;
    assert!(kind.starts_with("io.containerd.cgroups.v") && kind.ends_with(".Metrics"), "{kind}");
    Ok(())
}

fn running_out_of_memory_is_an_event(stage: &Stage) -> Outcome {
    let script = "read start; x=0123456789abcdef; while :; do x=$x$x; done";
    let plan = stage.a.plan("oom").flags(&["--memory-limit", "16777216"]);
    let (container, mut job) = plan.foreground(&["sh", "-c", script])?;
    container.await_state(Status::Running)?;
    job.write("\n")?;
    job.wait()?.with_code(137)?;
    stage.a.events.await_one(container.id(), "oom").map(drop)
}

fn every_process_is_in_the_containers_cgroup(stage: &Stage) -> Outcome {
    let container = stage.a.plan("cgroup").run(&["sleep", "1000"])?;
    let exec = container.start_exec(&[], &["sh", "-c", "echo up; sleep 1001"])?;
    exec.await_stdout("up\n")?;
    let file = container.cgroup_file("pids/cgroup.procs", "cgroup.procs")?;
    let text = fs::read_to_string(&file).map_err(Trouble::io("read", &file))?;
    let mut inside: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    let mut listed = stage.a.rpc.pids(container.id())?;
    inside.sort_unstable();
    listed.sort_unstable();
    assert_eq!(inside, listed);
    // The shell may or may not have become the sleep.
    assert!(listed.len() >= 2, "{listed:?}");
    // Of every hierarchy, those without a controller among them.
    for pid in listed {
        let path = format!("/proc/{pid}/cgroup");
        let text = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
        let is_own = |line: &str| line.rsplit('/').next() == Some(container.id());
        assert!(!text.is_empty() && text.lines().all(is_own), "{text}");
    }
    Ok(())
}

fn memory_limit(container: &Container<'_>) -> Result<String, Trouble> {
    let file = container.cgroup_file("memory/memory.limit_in_bytes", "memory.max")?;
    Ok(fs::read_to_string(&file).map_err(Trouble::io("read", &file))?.trim().to_owned())
}

/// Returns the processor time a container may use in each period of 100 ms, in microseconds.
fn quota(container: &Container<'_>) -> Result<String, Trouble> {
    let file = container.cgroup_file("cpu/cpu.cfs_quota_us", "cpu.max")?;
    let text = fs::read_to_string(&file).map_err(Trouble::io("read", &file))?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}
