//! The `delete` action: what is left of a container whose shim is gone.
//!
//! containerd runs it after every container, and then nearly always nothing is left. After a shim was killed,
//! everything may be: the container, a verb in progress with the CRIU it started, mounts, sockets. A worker
//! that has sent COMMIT is the one thing left alone: it knows, and nobody else does, where the container is.
//!
//! The shim itself may live: containerd also runs the action when it gives up on one, as on a Create that nobody waits
//! for. Such a shim is told to forget the container, and ends if it has no other.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::{ffi::OsStrExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use containerd_shim::Flags;
use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse, ShutdownRequest},
    shim_async::{Client, TaskClient},
};
use godwit_sys::pidfd::PidFd;
use protobuf::Message;
use ttrpc::context;

use crate::{
    bootstrap::{ADDRESS, socket_path},
    bundle::{self, Record, init_pid_file, read_pid},
    error::{Result, ShimError},
    runtime, worker,
};

/// 128 + SIGKILL.
const KILLED: u32 = 137;
const KILL: i32 = 9;
const DIE_LIMIT: Duration = Duration::from_secs(5);
const DISMISS_PAUSE: Duration = Duration::from_millis(20);

/// Cleans up after the container `flags.id` and tells containerd how it ended.
///
/// # Errors
/// When containerd cannot be answered; whatever cannot be cleaned up is logged to the bundle's log only.
pub(crate) fn delete(flags: &Flags) -> Result<()> {
    let bundle = bundle_path(flags)?;
    end_helpers(&bundle);
    let pid = read_pid(&init_pid_file(&bundle)).unwrap_or(0);
    if let Ok(Some(record)) = Record::read(&bundle) {
        delete_container(&record, &bundle, &flags.id);
    }
    let rootfs = bundle.join("rootfs");
    containerd_shim::mount::umount_recursive(rootfs.to_str(), 0)
        .unwrap_or_else(|error| log::warn!("failed to unmount {}: {error}", rootfs.display()));
    fs::remove_file(godwit_api::address_file(&flags.namespace, &flags.id)).ok();
    dismiss_shim(&bundle, &flags.id);
    let response = DeleteResponse {
        pid: pid.unsigned_abs(),
        exit_status: KILLED,
        exited_at: Some(SystemTime::now().into()).into(),
        ..DeleteResponse::default()
    };
    let bytes = response
        .write_to_bytes()
        .map_err(|source| ShimError::Undecodable { what: "the answer to delete", source })?;
    let mut stdout = io::stdout();
    stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(ShimError::io("answer containerd"))
}

/// containerd says which bundle by a flag, or by the working directory, which in a pod may be another's.
fn bundle_path(flags: &Flags) -> Result<PathBuf> {
    if !flags.bundle.is_empty() {
        return Ok(flags.bundle.clone().into());
    }
    let here = env::current_dir().map_err(ShimError::io("find the bundle"))?;
    Ok(here.parent().map_or_else(|| here.clone(), |parent| parent.join(&flags.id)))
}

/// Kills every verb started for this bundle, with its children, and the migration's worker unless it has
/// sent COMMIT.
fn end_helpers(bundle: &Path) {
    // A bundle is gone when its task was deleted in an orderly way, by a migration's worker for example, which is
    // then busy with what else is to be removed.
    let Ok(identity) = bundle::identity(bundle) else { return };
    let mut marks = vec![runtime::MARK];
    if !bundle::is_committing(bundle) {
        marks.push(worker::MARK);
    }
    let marks: Vec<Vec<u8>> =
        marks.iter().map(|mark| [mark.as_bytes(), b"=", identity.as_bytes()].concat()).collect();
    let deadline = Instant::now() + DIE_LIMIT;
    loop {
        let marked = marked_processes(&marks);
        if marked.is_empty() || Instant::now() > deadline {
            return;
        }
        for process in marked {
            // One that ended meanwhile is as good as killed.
            process.send_signal(KILL).ok();
            process.wait_exit(Duration::from_secs(1)).ok();
        }
    }
}

/// Returns the processes that have one of `marks` in their environment and have not ended.
fn marked_processes(marks: &[Vec<u8>]) -> Vec<PidFd> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let marked = |pid: i32| {
        // Opened first: what is read afterwards is about this process, or fails.
        let process = PidFd::open(pid).ok()?;
        // Empty for one that has ended.
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let found = environment.split(|byte| *byte == 0).any(|entry| marks.iter().any(|mark| mark == entry));
        found.then_some(process)
    };
    entries.flatten().filter_map(|entry| marked(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn delete_container(record: &Record, bundle: &Path, id: &str) {
    let target = record.target(bundle, id);
    // After a Delete there is nothing, and starting the runtime costs more than everything else here.
    if !target.root.join(id).exists() {
        return;
    }
    let mut command: Command = target.command("log.json");
    command.args(["delete", "--force", id]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => log::warn!("deleting {id} ended with {status}"),
        Err(error) => log::warn!("failed to delete {id}: {error}"),
    }
}

/// Makes the shim forget the container, if it still listens; removes its socket if it does not.
fn dismiss_shim(bundle: &Path, id: &str) {
    let Ok(address) = fs::read_to_string(bundle.join(ADDRESS)) else { return };
    let (address, path) = (address.trim(), socket_path(address.trim()));
    // A shim that ends in an orderly way removes its socket first.
    if !path.exists() {
        return;
    }
    if UnixStream::connect(&path).is_err() {
        fs::remove_file(&path).ok();
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let dismissed = runtime.map(|runtime| runtime.block_on(dismiss(address, id)));
    // One that ends while it is spoken to is what is wanted.
    if let Ok(Err(ttrpc::Error::RpcStatus(status))) = dismissed {
        log::warn!("the shim of {id} may have been left: {}", status.message());
    }
}

async fn dismiss(address: &str, id: &str) -> ttrpc::Result<()> {
    let task = TaskClient::new(Client::connect(address).await?);
    let delete = DeleteRequest { id: id.to_owned(), ..DeleteRequest::default() };
    let deadline = Instant::now() + DIE_LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match task.delete(context::with_duration(left), &delete).await {
            Ok(_) => break,
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => break,
            // Its init was killed a moment ago, and the shim may not know yet.
            Err(ttrpc::Error::RpcStatus(_)) if !left.is_zero() => tokio::time::sleep(DISMISS_PAUSE).await,
            Err(error) => return Err(error),
        }
    }
    let shutdown = ShutdownRequest { id: id.to_owned(), ..ShutdownRequest::default() };
    task.shutdown(context::with_duration(DIE_LIMIT), &shutdown).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_mark_until_it_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let identity = bundle::identity(directory.path()).unwrap();
        let mut child = Command::new("sleep").arg("60").env(runtime::MARK, &identity).spawn().unwrap();
        let mark = [runtime::MARK.as_bytes(), b"=", identity.as_bytes()].concat();
        // The environment is the parent's until exec.
        while marked_processes(std::slice::from_ref(&mark)).is_empty() {
            std::thread::yield_now();
        }
        end_helpers(directory.path());
        assert!(marked_processes(&[mark]).is_empty());
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn a_dead_shims_socket_is_removed() {
        let bundle = tempfile::tempdir().unwrap();
        let path = bundle.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        fs::write(bundle.path().join(ADDRESS), format!("unix://{}", path.display())).unwrap();
        dismiss_shim(bundle.path(), "web");
        assert!(!path.exists());
    }
}
