//! What remains on the source after the container has moved.
//!
//! Every step tolerates that its thing is gone already: a client of the container (`ctr run --rm`) sees the task
//! end and cleans up as well, and a clean-up that was interrupted is run again.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::{
        DeleteContainerRequest, DeleteTaskRequest,
        containers_client::ContainersClient,
        snapshots::{RemoveSnapshotRequest, snapshots_client::SnapshotsClient},
        tasks_client::TasksClient,
    },
    types::v1::{Process, Status},
};

use crate::{
    client::Containerd,
    error::{NodeError, Optional},
    source::Source,
};

impl Source {
    /// Removes the task, and unless `keep` is set also the container's record and snapshot.
    ///
    /// The task must have ended, or be about to: it is waited for and never killed.
    ///
    /// # Errors
    /// [`NodeError`] of the first step that failed; running it again goes on from there.
    pub fn clean_up(&self, keep: bool) -> Result<(), NodeError> {
        if let Some(process) = self.ended_task()? {
            self.containerd().delete_task(self.id())?;
            remove_fifos(&process);
        }
        if keep {
            return Ok(());
        }
        // The snapshot is named by the record, so the record goes last.
        let container = match self.container() {
            Ok(container) => container,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        };
        if !container.snapshot_key.is_empty() {
            self.containerd().remove_snapshot(&container.snapshotter, &container.snapshot_key)?;
        }
        self.containerd().delete_container(self.id())
    }

    fn ended_task(&self) -> Result<Option<Process>, NodeError> {
        let deadline = Instant::now() + END_LIMIT;
        loop {
            let Some(process) = self.task()? else { return Ok(None) };
            if process.status() == Status::Stopped {
                return Ok(Some(process));
            }
            if Instant::now() > deadline {
                return Err(NodeError::Unfit {
                    id: self.id().to_owned(),
                    cause:
                        "has moved, but containerd here still believes that its task lives: remove it with \
                            `ctr tasks delete --force`"
                            .to_owned(),
                });
            }
            thread::sleep(END_POLL);
        }
    }
}

impl Containerd {
    /// Deletes a task that has ended; one that is gone is no error.
    pub(crate) fn delete_task(&self, id: &str) -> Result<(), NodeError> {
        let request = self.request(DeleteTaskRequest { container_id: id.to_owned() });
        self.call("delete the task", TasksClient::new(self.channel()).delete(request)).optional()?;
        Ok(())
    }

    /// Deletes a container's record; one that is gone is no error.
    pub(crate) fn delete_container(&self, id: &str) -> Result<(), NodeError> {
        let request = self.request(DeleteContainerRequest { id: id.to_owned() });
        self.call("delete the container", ContainersClient::new(self.channel()).delete(request))
            .optional()?;
        Ok(())
    }

    /// Removes a snapshot; one that is gone is no error.
    pub(crate) fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), NodeError> {
        let request =
            self.request(RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() });
        self.call("remove the snapshot", SnapshotsClient::new(self.channel()).remove(request)).optional()?;
        Ok(())
    }
}

/// Removes a deleted task's FIFOs and the directory made for them, as the client that deletes a task does.
fn remove_fifos(process: &Process) {
    for path in [&process.stdin, &process.stdout, &process.stderr] {
        remove_fifo(Path::new(path));
    }
}

/// Removes `path` if it is a FIFO, and its directory if that is empty then.
pub(crate) fn remove_fifo(path: &Path) {
    use std::os::unix::fs::FileTypeExt;

    let is_fifo = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    if !is_fifo {
        return;
    }
    if let Err(error) = fs::remove_file(path) {
        log::debug!(path:% = path.display(); "cannot remove a fifo: {error}");
    }
    if let Some(directory) = path.parent().map(PathBuf::from) {
        // It holds the task's other FIFOs until the last of them is removed, and may be anyone's.
        if fs::remove_dir(&directory).is_err() {
            log::trace!(path:% = directory.display(); "directory is still in use");
        }
    }
}

/// How long the task's end may take to reach containerd.
const END_LIMIT: Duration = Duration::from_secs(20);

const END_POLL: Duration = Duration::from_millis(20);
