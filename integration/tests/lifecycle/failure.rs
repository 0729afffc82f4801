//! What goes wrong: programs that do not exist, a shim that is killed, a containerd that goes and comes back.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;

use containerd_client::types::v1::Status;
use godwit_integration::NodeName;
use godwit_integration::case;
use godwit_integration::process::Daemon;
use godwit_integration::suite::{Case, Outcome, Site, Stage, Trouble, await_that};
use nix::sys::signal::Signal;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(missing_program_is_named_and_nothing_stays),
        case!(missing_network_namespace_is_an_error_and_nothing_stays),
        case!(killed_shim_leaves_nothing_after_deletion),
        // runc's own shim may stay.
        case!(create_whose_client_dies_leaves_no_shim).on(|lane| lane.runtime.is_godwit()).alone(),
        case!(shim_ends_when_its_bundle_goes_before_a_create).on(|lane| lane.runtime.is_godwit()),
        case!(containers_live_on_while_containerd_restarts).alone(),
    ]
}

fn missing_program_is_named_and_nothing_stays(stage: &Stage) -> Outcome {
    let plan = stage.a.plan("missing");
    let id = plan.id().to_owned();
    let text = plan.run_to_end(&["no-such-program"])?.refused()?;
    assert!(text.contains("no-such-program"), "{text}");
    assert!(!stage.a.ctr(&["tasks", "list", "--quiet"])?.lines().any(|line| line == id));
    Ok(())
}

fn missing_network_namespace_is_an_error_and_nothing_stays(stage: &Stage) -> Outcome {
    let plan = stage.a.plan("bad-netns").flags(&["--with-ns", "network:/run/no-such-namespace"]);
    let text = plan.run_to_end(&["true"])?.refused()?;
    assert!(text.contains("no-such-namespace") || text.contains("no such file"), "{text}");
    Ok(())
}

/// Kills the shim of a running container, and expects containerd to notice, to end the container, and to let
/// go of all that was its.
fn killed_shim_leaves_nothing_after_deletion(stage: &Stage) -> Outcome {
    let container = stage.a.plan("orphaned").run(&["sh", "-c", "sleep 1000 & sleep 1001"])?;
    let id = container.id().to_owned();
    let init = container.pid()?;
    let bundle = stage.a.node().path(format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}"));
    assert!(bundle.exists());
    shim_of(&stage.a, &id)?.signal(Signal::SIGKILL);
    await_that("the container's init is gone", || !is_running(init))?;
    stage.a.events.await_one(&id, "exit")?;
    // The task may have gone already by itself.
    stage.a.try_ctr(&["tasks", "delete", "--force", &id])?;
    await_that("the task is gone", || container.state().is_ok_and(|state| state.is_none()))?;
    await_that("the bundle is gone", || !bundle.exists())?;
    stage.a.ctr(&["containers", "delete", &id])?;
    Ok(())
}

/// Kills ctr as soon as there is a shim for the container that it asked for. containerd then takes back what is being
/// made, and a shim that stayed would take in the next container of that name, in a bundle that is gone.
fn create_whose_client_dies_leaves_no_shim(stage: &Stage) -> Outcome {
    for _ in 0..GIVEN_UP {
        let (container, client) = stage.a.plan("given-up").foreground(&["sleep", "1000"])?;
        let id = container.id().to_owned();
        await_that("there is a shim", || shim_of(&stage.a, &id).is_ok())?;
        client.kill();
        // What the client made before, and the task, should it have come so far.
        drop(container);
        await_that("no shim of it is left", || shim_of(&stage.a, &id).is_err())?;
    }
    remove_dead_sockets(&stage.a.node().path("/run/containerd/s"))
}

/// `start` may be killed when it has made the socket and not yet a shim for it. The next shim of that name replaces such
/// a file, which costs nothing else; here no shim of that name follows.
fn remove_dead_sockets(directory: &Path) -> Outcome {
    for entry in fs::read_dir(directory).map_err(Trouble::io("read", directory))?.flatten() {
        let path = entry.path();
        if UnixStream::connect(&path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            fs::remove_file(&path).map_err(Trouble::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Starts a shim as containerd does, and then does what containerd does when the client went away just as the shim had
/// answered: it removes the bundle, and tells nobody.
fn shim_ends_when_its_bundle_goes_before_a_create(stage: &Stage) -> Outcome {
    let id = stage.a.id("never-created");
    let (inside, outside) = stage.a.scratch("never-created")?;
    let spec = outside.join("config.json");
    fs::write(&spec, "{}").map_err(Trouble::io("write", &spec))?;
    // For what the shim logs; nobody reads it any more.
    stage.a.command(&["mkfifo", &format!("{inside}/log")])?.ok()?;
    let start = format!(
        "cd {inside} && exec containerd-shim-godwit-v1 -namespace default -id {id} \
         -address /run/containerd/containerd.sock start </dev/null"
    );
    let address = stage.a.command(&["sh", "-c", &start])?.ok()?;
    let shim = shim_of(&stage.a, &id)?;
    let socket = stage.a.node().path(address.trim().trim_start_matches("unix://"));
    assert!(socket.exists(), "{address}");
    fs::remove_dir_all(&outside).map_err(Trouble::io("remove", &outside))?;
    await_that("the shim has ended", || !shim.is_alive())?;
    assert!(!socket.exists(), "{address}");
    Ok(())
}

fn containers_live_on_while_containerd_restarts(stage: &Stage) -> Outcome {
    let container = stage.b.plan("survivor").run(&["sleep", "1000"])?;
    let ended = stage.b.plan("ended-meanwhile").run(&["sleep", "1001"])?;
    let (pid, other) = (container.pid()?, ended.pid()?);
    stage.b.node().stop_containerd();
    assert!(is_running(pid));
    kill(other);
    await_that("the other has ended", || !is_running(other))?;
    stage.bed().start_containerd(NodeName::B)?;
    assert_eq!((container.pid()?, container.state()?), (pid, Some(Status::Running)));
    assert_eq!(container.exec(&["echo", "still here"])?.ok()?, "still here\n");
    // A containerd that finds a container ended may delete its task at once, as 2.1 does.
    await_that("the other is seen to have ended", || {
        ended.state().is_ok_and(|state| matches!(state, None | Some(Status::Stopped)))
    })?;
    container.stop()
}

/// Returns the shim of a container: the process that was started with its id.
pub(super) fn shim_of(site: &Site, id: &str) -> Result<Daemon, Trouble> {
    let is_shim = |pid: &i32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split('\0');
        words.next().is_some_and(|program| program.contains("containerd-shim"))
            && words.any(|word| word == id)
    };
    let shim = site.node().cgroups().processes().into_iter().find(is_shim).and_then(Daemon::of);
    shim.ok_or_else(|| Trouble::Garbled { what: "the shim of", text: id.to_owned() })
}

fn kill(pid: u32) {
    if let Some(process) = i32::try_from(pid).ok().and_then(Daemon::of) {
        process.signal(Signal::SIGKILL);
    }
}

pub(super) fn is_running(pid: u32) -> bool {
    let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    status.is_ok_and(|status| !status.contains("State:\tZ"))
}

/// Each time the client dies at another moment.
const GIVEN_UP: usize = 4;
