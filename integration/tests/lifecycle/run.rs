//! Running containers: what they see, how they end, and that nothing of them stays.

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, await_that};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(run_returns_the_exit_status),
        case!(run_killed_by_a_signal_returns_128_and_its_number),
        case!(detached_run_is_listed_with_its_process),
        case!(environment_and_working_directory_reach_the_process),
        case!(bind_mount_is_seen_inside),
        case!(read_only_root_cannot_be_written),
        case!(default_seccomp_profile_holds_for_init_and_exec),
        case!(dropped_capability_is_missing_from_init_and_exec),
        case!(user_namespace_maps_root_to_another_user),
        case!(privileged_container_may_mount),
        case!(host_network_is_the_nodes),
        case!(loopback_of_a_new_network_namespace_is_up),
        case!(given_network_namespace_is_joined),
        case!(orphans_of_the_container_are_reaped),
        case!(created_container_starts_later),
        case!(fifty_containers_run_at_once),
    ]
}

fn run_returns_the_exit_status(stage: &Stage) -> Outcome {
    for code in [0, 7, 255] {
        let done = stage.a.plan("status").run_to_end(&["sh", "-c", &format!("exit {code}")])?;
        done.with_code(code)?;
    }
    Ok(())
}

fn run_killed_by_a_signal_returns_128_and_its_number(stage: &Stage) -> Outcome {
    let (container, job) = stage.a.plan("killed").foreground(&["sleep", "1000"])?;
    container.await_state(Status::Running)?;
    container.kill("SIGKILL")?;
    job.wait()?.with_code(137)?;
    Ok(())
}

fn detached_run_is_listed_with_its_process(stage: &Stage) -> Outcome {
    let container = stage.a.plan("listed").run(&["sleep", "1234"])?;
    assert_eq!(container.state()?, Some(Status::Running));
    let (pid, list) = (container.pid()?, stage.a.ctr(&["tasks", "list"])?);
    let row = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = row.into_iter().find(|row| row.first() == Some(&container.id()));
    assert_eq!(row, Some(vec![container.id(), &pid.to_string(), "RUNNING"]), "{list}");
    await_that("the process has become what was asked for", || {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == "sleep\x001234\x00")
    })?;
    let listed = container.task("ps")?;
    assert!(listed.contains(&pid.to_string()), "{listed}");
    container.stop()?;
    stage.a.try_ctr(&["tasks", "delete", container.id()])?;
    assert_eq!(container.state()?, None);
    Ok(())
}

fn environment_and_working_directory_reach_the_process(stage: &Stage) -> Outcome {
    let plan = stage.a.plan("env").flags(&["--env", "COLOUR=green", "--cwd", "/tmp"]);
    let text = plan.run_to_end(&["sh", "-c", "echo $COLOUR $PWD $0"])?.ok()?;
    assert_eq!(text, "green /tmp sh\n");
    Ok(())
}

fn bind_mount_is_seen_inside(stage: &Stage) -> Outcome {
    let (inside, outside) = stage.a.scratch("bind")?;
    std::fs::write(outside.join("note"), "hello\n").expect("the directory has just been made");
    let mount = format!("type=bind,src={inside},dst=/mnt,options=rbind:ro");
    let plan = stage.a.plan("bind").flags(&["--mount", &mount]);
    let done = plan.run_to_end(&["sh", "-c", "cat /mnt/note; ! touch /mnt/other 2>/dev/null"])?;
    assert_eq!(done.ok()?, "hello\n");
    Ok(())
}

fn read_only_root_cannot_be_written(stage: &Stage) -> Outcome {
    let done = stage.a.plan("ro").flags(&["--read-only"]).run_to_end(&["touch", "/file"])?;
    assert!(done.with_code(1)?.stderr.contains("Read-only file system"));
    Ok(())
}

fn default_seccomp_profile_holds_for_init_and_exec(stage: &Stage) -> Outcome {
    let container = stage.a.plan("seccomp").flags(&["--seccomp"]).run(&["sleep", "1000"])?;
    for process in ["1", "self"] {
        let status = container.exec(&["grep", "^Seccomp:", &format!("/proc/{process}/status")])?.ok()?;
        assert_eq!(status, "Seccomp:\t2\n", "of process {process}");
    }
    let plain = stage.a.plan("no-seccomp").run_to_end(&["grep", "^Seccomp:", "/proc/self/status"])?.ok()?;
    assert_eq!(plain, "Seccomp:\t0\n");
    Ok(())
}

fn dropped_capability_is_missing_from_init_and_exec(stage: &Stage) -> Outcome {
    let container = stage.a.plan("caps").flags(&["--cap-drop", "CAP_CHOWN"]).run(&["sleep", "1000"])?;
    for process in ["1", "self"] {
        let line = container.exec(&["grep", "^CapEff:", &format!("/proc/{process}/status")])?.ok()?;
        let mask = line.trim_start_matches("CapEff:").trim();
        let mask = u64::from_str_radix(mask, 16).expect("the kernel writes hexadecimal");
        assert_eq!(mask & 1, 0, "CAP_CHOWN is bit 0 of {mask:x} of process {process}");
        assert_ne!(mask, 0);
    }
    Ok(())
}

fn user_namespace_maps_root_to_another_user(stage: &Stage) -> Outcome {
    let maps = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
    let container = stage.a.plan("userns").flags(&maps).run(&["sleep", "1000"])?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", container.pid()?)).unwrap_or_default();
    assert!(status.contains("Uid:\t100000\t"), "{status}");
    assert_eq!(container.exec(&["id", "-u"])?.ok()?, "0\n");
    container.exec(&["touch", "/written-by-root-inside"])?.ok()?;
    Ok(())
}

fn privileged_container_may_mount(stage: &Stage) -> Outcome {
    // Told by the status: ctr may lose what a short run writes.
    let command = ["sh", "-c", "mkdir /m && mount -t tmpfs none /m && grep -q ' /m tmpfs ' /proc/mounts"];
    stage.a.plan("priv").flags(&["--privileged"]).run_to_end(&command)?.ok()?;
    stage.a.plan("unpriv").run_to_end(&command)?.refused()?;
    Ok(())
}

fn host_network_is_the_nodes(stage: &Stage) -> Outcome {
    let own = stage.a.plan("net").run_to_end(&["ip", "addr"])?.ok()?;
    assert!(!own.contains("10.77.0.1"), "{own}");
    let host = stage.a.plan("host-net").flags(&["--net-host"]).run_to_end(&["ip", "addr"])?.ok()?;
    assert!(host.contains("10.77.0.1"), "{host}");
    Ok(())
}

fn loopback_of_a_new_network_namespace_is_up(stage: &Stage) -> Outcome {
    let text = stage.a.plan("loopback").run_to_end(&["ip", "addr", "show", "lo"])?.ok()?;
    assert!(text.contains("LOOPBACK,UP") && text.contains("127.0.0.1"), "{text}");
    Ok(())
}

fn given_network_namespace_is_joined(stage: &Stage) -> Outcome {
    let first = stage.a.plan("netns-owner").run(&["sleep", "1000"])?;
    let path = format!("/proc/{}/ns/net", first.pid()?);
    let joined = stage.a.plan("netns").flags(&["--with-ns", &format!("network:{path}")]);
    let text = joined.run_to_end(&["readlink", "/proc/self/ns/net"])?.ok()?;
    let theirs = std::fs::read_link(&path).expect("the first container runs");
    assert_eq!(text.trim(), theirs.to_string_lossy());
    Ok(())
}

/// The shell becomes its last command, which waits for no child, so that the others are orphans of init.
fn orphans_of_the_container_are_reaped(stage: &Stage) -> Outcome {
    let container =
        stage.a.plan("orphans").run(&["sh", "-c", "(sleep 1000 &) ; (sleep 1001 &) ; sleep 1002"])?;
    await_that("all three sleeps run", || {
        stage.a.rpc.pids(container.id()).is_ok_and(|pids| pids.len() == 3)
    })?;
    let pids = stage.a.rpc.pids(container.id())?;
    container.stop()?;
    let gone = |pid: &u32| !std::path::Path::new(&format!("/proc/{pid}")).exists();
    // Init is gone too: the shim has reaped it.
    await_that("all of the container's processes are gone", || pids.iter().all(gone))
}

fn created_container_starts_later(stage: &Stage) -> Outcome {
    let container = stage.a.plan("created").create(&["sleep", "1000"])?;
    assert!(container.is_recorded()?);
    assert_eq!(container.state()?, None);
    stage.a.ctr(&["tasks", "start", "--detach", container.id()])?;
    assert_eq!(container.state()?, Some(Status::Running));
    Ok(())
}

fn fifty_containers_run_at_once(stage: &Stage) -> Outcome {
    let plans: Vec<_> = (0..50).map(|_| stage.a.plan("many")).collect();
    let ids: Vec<String> = plans.iter().map(|plan| plan.id().to_owned()).collect();
    let mut running = Vec::new();
    for plan in plans {
        // Foreground ctr processes, so that all fifty are being made at once.
        running.push(plan.foreground(&["sh", "-c", "echo $$; read line; exit 3"])?);
    }
    for (_, job) in &running {
        job.await_stdout("1\n")?;
    }
    let listed = stage.a.ctr(&["tasks", "list"])?;
    for id in &ids {
        let row = listed.lines().find(|line| line.split_whitespace().next() == Some(id));
        assert!(row.is_some_and(|row| row.ends_with("RUNNING")), "{id} in\n{listed}");
    }
    let (containers, jobs): (Vec<Container<'_>>, Vec<_>) = running.into_iter().unzip();
    for job in jobs {
        // The end of its input ends the shell.
        job.wait()?.with_code(3)?;
    }
    drop(containers);
    Ok(())
}
