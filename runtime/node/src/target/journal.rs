//! What has been made for a container that is on its way in, in a file, so that an agent that dies can be followed
//! by one that takes it back.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::{
        DeleteImageRequest, DeleteRequest, KillRequest, images_client::ImagesClient,
        leases_client::LeasesClient, tasks_client::TasksClient,
    },
    tonic::Code,
};
use godwit_engine::{decision::Record, handover};
use godwit_protocol::{MigrationId, fate::FateAnswer};
use serde::{Deserialize, Serialize};

use crate::{
    cleanup::remove_fifo,
    client::Containerd,
    error::{NodeError, Optional},
};

/// Something that was made for a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Made {
    /// The image's name.
    Image(String),
    /// The writable snapshot.
    Snapshot {
        /// Its snapshotter.
        snapshotter: String,
        /// Its key.
        key: String,
    },
    /// The container's record.
    Container(String),
    /// FIFOs for the task's streams.
    Fifos(Vec<PathBuf>),
    /// The task.
    Task(String),
}

/// The journal of one arrival.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Journal {
    migration: MigrationId,
    namespace: String,
    /// The container's id; empty in the journal of an agent that did not write it.
    #[serde(default)]
    id: String,
    lease: String,
    made: Vec<Made>,
    #[serde(skip)]
    path: PathBuf,
}

impl Journal {
    /// Begins a journal in `directory`.
    ///
    /// # Errors
    /// [`NodeError::File`] if it cannot be written.
    pub(crate) fn begin(
        directory: &Path,
        migration: &MigrationId,
        namespace: &str,
        id: &str,
    ) -> Result<Self, NodeError> {
        let journal = Self {
            migration: migration.clone(),
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            lease: format!("godwit-{migration}"),
            made: Vec::new(),
            path: directory.join(format!("{migration}.{SUFFIX}")),
        };
        journal.write()?;
        Ok(journal)
    }

    fn read(path: &Path) -> Result<Self, NodeError> {
        let json = fs::read(path).map_err(NodeError::file("read", path))?;
        let journal: Self = serde_json::from_slice(&json)
            .map_err(|error| NodeError::malformed(format!("journal {}", path.display()), error))?;
        Ok(Self { path: path.to_owned(), ..journal })
    }

    /// Returns the name of the lease that holds what nothing else refers to yet.
    pub(crate) fn lease(&self) -> &str {
        &self.lease
    }

    /// Notes that something is there now.
    ///
    /// # Errors
    /// [`NodeError::File`] if it cannot be written; it is noted in memory even so.
    pub(crate) fn note(&mut self, made: Made) -> Result<(), NodeError> {
        self.made.push(made);
        self.write()
    }

    /// Undoes everything, last first, and removes the journal if that worked.
    pub(crate) fn take_back(&mut self, containerd: &Containerd) {
        let migration = self.migration.to_string();
        let mut failed = Vec::new();
        while let Some(made) = self.made.pop() {
            if let Err(error) = take_back(containerd, &made) {
                log::error!(migration; "cannot take back what was made for a container that did not come: {error}");
                failed.insert(0, made);
            }
        }
        self.made = failed;
        // With the lease go, at once, the blobs and layers that nothing refers to.
        if let Err(error) = self.drop_lease(containerd, true) {
            log::warn!(migration; "{error}; it expires by itself");
        }
        if self.made.is_empty() {
            self.remove();
        }
    }

    /// Leaves everything to containerd.
    pub(crate) fn close(&self, containerd: &Containerd) {
        if let Err(error) = self.drop_lease(containerd, false) {
            log::warn!(migration:% = self.migration; "{error}; it expires by itself");
        }
        self.remove();
    }

    /// Kills and deletes the task, if there is one.
    ///
    /// # Errors
    /// [`NodeError`] if containerd cannot be made to.
    pub(crate) fn end_task(&self, containerd: &Containerd) -> Result<(), NodeError> {
        self.made
            .iter()
            .filter(|made| matches!(made, Made::Task(_)))
            .try_for_each(|task| take_back(containerd, task))
    }

    fn write(&self) -> Result<(), NodeError> {
        let json = serde_json::to_vec(self).map_err(|error| NodeError::malformed("journal", error))?;
        let new = self.path.with_extension("new");
        fs::write(&new, json).map_err(NodeError::file("write", &new))?;
        fs::rename(&new, &self.path).map_err(NodeError::file("write", &self.path))
    }

    fn remove(&self) {
        if let Some(directory) = self.path.parent() {
            // Left by a worker that was killed.
            handover::forget_worker(directory, &self.migration);
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!(path:% = self.path.display(); "cannot remove a journal: {error}");
            }
            _ => {}
        }
    }

    fn drop_lease(&self, containerd: &Containerd, sync: bool) -> Result<(), NodeError> {
        let request = containerd.request(DeleteRequest { id: self.lease.clone(), sync });
        containerd
            .call_unbounded("drop the lease", LeasesClient::new(containerd.channel()).delete(request))
            .optional()?;
        Ok(())
    }
}

/// What an agent that is gone left unfinished.
#[derive(Debug)]
pub struct LeftOver {
    journal: Journal,
}

impl LeftOver {
    /// Finds the journals in `directory`, all of which are dead agents'. One that cannot be read is logged.
    ///
    /// # Errors
    /// [`NodeError::File`] if `directory` cannot be read.
    pub fn find(directory: &Path) -> Result<Vec<Self>, NodeError> {
        let entries = fs::read_dir(directory).map_err(NodeError::file("read directory", directory))?;
        let paths = entries.flatten().map(|entry| entry.path());
        let journals = paths.filter(|path| path.extension().is_some_and(|extension| extension == SUFFIX));
        let read = |path: PathBuf| match Journal::read(&path) {
            Ok(journal) => Some(Self { journal }),
            Err(error) => {
                log::error!(path:% = path.display(); "cannot settle an earlier migration: {error}");
                None
            }
        };
        Ok(journals.filter_map(read).collect())
    }

    /// Returns namespace and id of the container.
    #[must_use]
    pub fn name(&self) -> (&str, &str) {
        (&self.journal.namespace, &self.journal.id)
    }

    /// Returns the migration's name.
    #[must_use]
    pub fn migration(&self) -> &MigrationId {
        &self.journal.migration
    }

    /// Waits for its worker to end, and settles it as its record in `directory` says. `while_it_lives` is called now
    /// and then until the worker has ended.
    ///
    /// # Errors
    /// [`NodeError`] if the record cannot be used or containerd refuses; it is left as it is then.
    pub fn settle(
        mut self,
        address: &Path,
        directory: &Path,
        mut while_it_lives: impl FnMut(),
    ) -> Result<(), NodeError> {
        let record = Record::of(directory, &self.journal.migration);
        while record.worker_is_alive()? {
            while_it_lives();
            thread::sleep(SETTLE_POLL);
        }
        let journal = &mut self.journal;
        let containerd = Containerd::connect(address, &journal.namespace)?;
        let fate = settle(&record, || journal.end_task(&containerd))?;
        log::info!(migration:% = journal.migration, fate:? = fate; "settled a migration of an earlier agent");
        if fate.has_run() {
            journal.close(&containerd);
        } else {
            journal.take_back(&containerd);
        }
        Ok(())
    }
}

/// Kills and deletes the task of a migration that an agent of this host has begun, if there is one.
///
/// # Errors
/// [`NodeError`] if containerd cannot be made to.
pub fn end_task_of(address: &Path, directory: &Path, migration: &MigrationId) -> Result<(), NodeError> {
    let path = directory.join(format!("{migration}.{SUFFIX}"));
    if !path.exists() {
        return Ok(());
    }
    let journal = Journal::read(&path)?;
    journal.end_task(&Containerd::connect(address, &journal.namespace)?)
}

/// Asks the record until it has an answer for good: while the container lacks memory, its worker may still die.
///
/// # Errors
/// [`NodeError::Record`], or what `kill` returned.
pub(super) fn settle(
    record: &Record,
    kill: impl Fn() -> Result<(), NodeError>,
) -> Result<FateAnswer, NodeError> {
    loop {
        match record.ask(&kill)? {
            FateAnswer::Pending | FateAnswer::Filling => thread::sleep(SETTLE_POLL),
            fate => return Ok(fate),
        }
    }
}

fn take_back(containerd: &Containerd, made: &Made) -> Result<(), NodeError> {
    match made {
        Made::Task(id) => end_task(containerd, id),
        Made::Container(id) => containerd.delete_container(id),
        Made::Snapshot { snapshotter, key } => containerd.remove_snapshot(snapshotter, key),
        Made::Fifos(paths) => {
            paths.iter().for_each(|path| remove_fifo(path));
            Ok(())
        }
        Made::Image(name) => {
            let request =
                containerd.request(DeleteImageRequest { name: name.clone(), sync: false, target: None });
            containerd
                .call("remove the image", ImagesClient::new(containerd.channel()).delete(request))
                .optional()?;
            Ok(())
        }
    }
}

/// Kills and deletes a task. Its restore may still be on its way out, so it is tried for a while.
fn end_task(containerd: &Containerd, id: &str) -> Result<(), NodeError> {
    let deadline = Instant::now() + END_LIMIT;
    loop {
        let request = containerd.request(KillRequest {
            container_id: id.to_owned(),
            signal: SIGKILL,
            all: true,
            ..KillRequest::default()
        });
        // A task that never ran cannot be killed; what matters is whether it can be deleted.
        let killed = containerd.call("kill the task", TasksClient::new(containerd.channel()).kill(request));
        if let Err(error) = killed {
            log::debug!(container = id; "{error}");
        }
        match containerd.delete_task(id) {
            Err(NodeError::Call { code: Code::FailedPrecondition | Code::Unknown, .. })
                if Instant::now() < deadline =>
            {
                thread::sleep(END_POLL);
            }
            ended => return ended,
        }
    }
}

const SUFFIX: &str = "journal";

const SETTLE_POLL: Duration = Duration::from_millis(100);

const END_LIMIT: Duration = Duration::from_secs(15);

const END_POLL: Duration = Duration::from_millis(50);

const SIGKILL: u32 = 9;
