//! Options of a task, which clients pass to the shim through containerd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::options::TaskOptions;
use godwit_integration::suite::rpc::Streams;
use godwit_integration::suite::{Case, Container, Outcome, Site, Stage, Trouble, await_that};

use super::exec::process;
use super::failure::shim_of;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(named_runtime_is_run_with_its_root_and_flags),
        case!(named_user_owns_the_streams),
        case!(shim_runs_in_the_named_cgroup),
        case!(address_of_another_shim_is_accepted),
        case!(path_to_criu_is_refused_by_name).on(|lane| lane.runtime.is_godwit()),
    ]
}

/// The runtime is a script that writes down what it is asked for, before the real one does it. There is no systemd
/// on a node, so the script keeps its flag to itself.
fn named_runtime_is_run_with_its_root_and_flags(stage: &Stage) -> Outcome {
    let (inside, outside) = stage.a.scratch("runtime")?;
    let program = if stage.lane.runtime.is_godwit() { "godwit" } else { "runc" };
    let text = format!(
        "#!/bin/sh\necho \"$@\" >>{inside}/calls\nfor word; do\n    shift\n    case $word in\n    \
         --systemd-cgroup*) ;;\n    *) set -- \"$@\" \"$word\" ;;\n    esac\ndone\nexec {program} \"$@\"\n"
    );
    let script = outside.join("runtime");
    fs::write(&script, text).map_err(Trouble::io("write", &script))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
        .map_err(Trouble::io("open up", &script))?;
    let options = TaskOptions {
        binary_name: format!("{inside}/runtime"),
        root: format!("{inside}/root"),
        no_pivot_root: true,
        no_new_keyring: true,
        systemd_cgroup: true,
        ..Default::default()
    };
    let container = run_with(&stage.a, "runtime", &options)?;
    assert_eq!(container.exec(&["echo", "well"])?.ok()?, "well\n");
    let calls = outside.join("calls");
    let calls = fs::read_to_string(&calls).map_err(Trouble::io("read", &calls))?;
    let create = calls.lines().find(|line| line.contains(" create ")).unwrap_or_default();
    let root = format!("--root {inside}/root/default");
    for words in [&*root, "--systemd-cgroup", "--no-pivot", "--no-new-keyring", container.id()] {
        assert!(create.contains(words), "{words} is not in {create:?}; all: {calls}");
    }
    assert!(outside.join("root/default").join(container.id()).is_dir());
    container.stop()?;
    assert_eq!(stage.a.rpc.delete(container.id())?, 137);
    Ok(())
}

/// Whoever runs as another user than root can open its standard streams again only if they are its own.
fn named_user_owns_the_streams(stage: &Stage) -> Outcome {
    let rpc = &stage.a.rpc;
    let options = TaskOptions { io_uid: 33, io_gid: 44, ..Default::default() };
    let container = run_with(&stage.a, "owner", &options)?;
    let (inside, outside) = stage.a.scratch("owner")?;
    let log = format!("file://{inside}/log");
    let streams = Streams { stdout: &log, stderr: &log, ..Default::default() };
    let mut spec = process(&["sh", "-c", "stat -L -c %u:%g /proc/self/fd/1 >/dev/stdout"]);
    spec["user"]["uid"] = 33.into();
    rpc.exec(container.id(), "who", &spec, &streams)?;
    rpc.start(container.id(), "who")?;
    assert_eq!(rpc.wait(container.id(), "who")?, 0);
    await_that("the owner is in the log", || {
        fs::read_to_string(outside.join("log")).is_ok_and(|text| text == "33:44\n")
    })?;
    rpc.delete_process(container.id(), "who")?;
    container.stop()
}

fn shim_runs_in_the_named_cgroup(stage: &Stage) -> Outcome {
    let name = stage.a.id("shims");
    let groups = Groups::make(&stage.a, &name)?;
    let options = TaskOptions { shim_cgroup: format!("/{name}"), ..Default::default() };
    let container = run_with(&stage.a, "shim-cgroup", &options)?;
    let shim = shim_of(&stage.a, container.id())?.pid.to_string();
    for group in &groups.paths {
        let file = group.join("cgroup.procs");
        let inside = fs::read_to_string(&file).map_err(Trouble::io("read", &file))?;
        assert!(inside.lines().any(|pid| pid == shim), "{shim} is not in {}", file.display());
    }
    // The container is not: it has its own.
    let init = container.pid()?.to_string();
    let file = container.cgroup_file("memory/cgroup.procs", "cgroup.procs")?;
    let inside = fs::read_to_string(&file).map_err(Trouble::io("read", &file))?;
    assert!(inside.lines().any(|pid| pid == init) && !file.ends_with(format!("{name}/cgroup.procs")));
    container.stop()?;
    assert_eq!(stage.a.rpc.delete(container.id())?, 137);
    Ok(())
}

/// It is there for containerd, to find a shim that it did not start.
fn address_of_another_shim_is_accepted(stage: &Stage) -> Outcome {
    let options = TaskOptions {
        task_api_address: "unix:///run/no-such-shim".to_owned(),
        task_api_version: 3,
        ..Default::default()
    };
    run_with(&stage.a, "task-api", &options)?.stop()
}

fn path_to_criu_is_refused_by_name(stage: &Stage) -> Outcome {
    let options = TaskOptions { criu_path: "/opt/criu".to_owned(), ..Default::default() };
    let Err(Trouble::Refused(refusal)) = run_with(&stage.a, "criu-path", &options) else {
        return Err(Trouble::Garbled { what: "a refusal", text: "the container runs".to_owned() });
    };
    assert!(refusal.message.contains("CriuPath"), "{refusal}");
    Ok(())
}

/// Runs a container that sleeps, with options for its shim that ctr has no flags for.
fn run_with<'a>(site: &'a Site, stem: &str, options: &TaskOptions) -> Result<Container<'a>, Trouble> {
    let container = site.plan(stem).create(&["sleep", "1000"])?;
    let rootfs = site.rpc.rootfs(container.id())?;
    site.rpc.create(container.id(), rootfs, Some(options.to_any()))?;
    site.rpc.start(container.id(), "")?;
    assert_eq!(container.state()?, Some(Status::Running));
    Ok(container)
}

/// A cgroup of one name in every hierarchy that shims are put into: those of version 1 if there are any, else the
/// unified one. Dropping it removes it.
#[derive(Debug)]
struct Groups {
    paths: Vec<PathBuf>,
}

impl Groups {
    fn make(site: &Site, name: &str) -> Result<Self, Trouble> {
        let mut groups = Self { paths: Vec::new() };
        let cgroups = site.node().cgroups();
        let is_v1 = cgroups.hierarchies().iter().any(|hierarchy| hierarchy.options.is_some());
        for (hierarchy, file) in cgroups.hierarchies().iter().zip(cgroups.root_files()) {
            if is_v1 && hierarchy.options.is_none() {
                continue;
            }
            let above = file.parent().unwrap_or_else(|| Path::new("/"));
            let path = above.join(name);
            fs::create_dir(&path).map_err(Trouble::io("make", &path))?;
            groups.paths.push(path.clone());
            // A version 1 cpuset takes no process before it has processors and memory nodes.
            for setting in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = fs::read_to_string(above.join(setting))
                    && path.join(setting).exists()
                {
                    fs::write(path.join(setting), value).map_err(Trouble::io("write", path.join(setting)))?;
                }
            }
        }
        Ok(groups)
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for path in &self.paths {
            // The shim may still be ending.
            let gone =
                await_that("the cgroup can be removed", || fs::remove_dir(path).is_ok() || !path.exists());
            drop(gone.inspect_err(|trouble| eprintln!("{}: {trouble}", path.display())));
        }
    }
}
