//! A container on its way in: what has been made for it so far, and how that is undone.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::{
        AddResourceRequest, CreateContainerRequest, CreateRequest, CreateTaskRequest, Resource, StartRequest,
        containers_client::ContainersClient, leases_client::LeasesClient, tasks_client::TasksClient,
    },
    types::Mount,
};
use godwit_engine::decision::Record;
use godwit_protocol::{
    fate::FateAnswer,
    offer::{Image, Offer, Snapshot},
};

use super::{
    image::{label_blobs, prepare, register, rfc3339, unpack},
    journal::{Journal, Made, settle},
};
use crate::{
    client::Containerd,
    content::Ingest,
    error::{NodeError, Optional},
    image::check_digest,
    options, record,
    stdio::Fifos,
};

/// A container that is being made on the target.
///
/// Dropped before [`Arrival::settle`] found it to have run here, it takes back everything it made, so that the target is as it was.
#[derive(Debug)]
pub struct Arrival {
    containerd: Containerd,
    offer: Offer,
    journal: Journal,
    mounts: Vec<Mount>,
    then: Then,
}

/// What becomes of what was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    TakeBack,
    Keep,
    /// Nobody knows yet: whoever is asked about the fate, or an agent that is started later, finds it in the journal.
    Leave,
}

/// A task that waits for its migration; [`IncomingTask::start`] returns when that has ended.
#[derive(Debug)]
pub struct IncomingTask {
    containerd: Containerd,
    id: String,
}

impl Arrival {
    /// Begins with a lease, which keeps containerd's garbage collector away from what is not yet referred to.
    ///
    /// What is made is noted in a journal in `directory`, so that an agent that is restarted can take it back.
    ///
    /// # Errors
    /// [`NodeError`] if containerd refuses, for one because a migration of that name is in progress.
    pub fn begin(containerd: Containerd, offer: Offer, directory: &Path) -> Result<Self, NodeError> {
        let journal =
            Journal::begin(directory, &offer.migration, containerd.namespace(), &offer.container.id)?;
        // From here on dropping it undoes what has been done.
        let mut arrival = Self { containerd, offer, journal, mounts: Vec::new(), then: Then::TakeBack };
        create_lease(&mut arrival.containerd, arrival.journal.lease())?;
        for blob in arrival.offer.container.image.iter().flat_map(|image| &image.blobs) {
            arrival.hold_blob(&blob.digest)?;
        }
        Ok(arrival)
    }

    /// Returns the offer that it answers.
    #[must_use]
    pub const fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Begins to take in a blob; `None` if it has arrived in the meantime by another way.
    ///
    /// # Errors
    /// [`NodeError`] if containerd refuses.
    pub(crate) fn blob(&self, digest: &str, size_bytes: u64) -> Result<Option<Ingest<'_>>, NodeError> {
        check_digest("the blob's announcement", digest)?;
        let reference = format!("godwit-{}-{digest}", self.offer.migration);
        self.containerd.ingest(&reference, digest, size_bytes)
    }

    /// Registers the image under its name.
    ///
    /// # Errors
    /// [`NodeError`] if containerd refuses.
    pub fn register_image(&mut self) -> Result<(), NodeError> {
        let Some(image) = self.image() else { return Ok(()) };
        label_blobs(&self.containerd, &image)?;
        if register(&self.containerd, &image)? {
            self.journal.note(Made::Image(image.name))?;
        }
        Ok(())
    }

    /// Unpacks the layers that are not unpacked yet and makes the container's snapshot on them.
    ///
    /// # Errors
    /// [`NodeError`] if containerd refuses, or a layer is not what the image says.
    pub fn make_snapshot(&mut self) -> Result<(), NodeError> {
        let Some(Snapshot { key, parent, labels }) = self.offer.container.snapshot.clone() else {
            return Err(NodeError::Unfit {
                id: self.offer.container.id.clone(),
                cause: "has no snapshot".to_owned(),
            });
        };
        if let Some(image) = self.image() {
            unpack(&self.containerd, &self.offer, &image, &parent)?;
        }
        let snapshotter = self.offer.container.snapshotter.clone();
        let labels =
            labels.into_iter().filter(|(label, _)| !label.starts_with("containerd.io/gc.")).collect();
        self.mounts = prepare(&self.containerd, &snapshotter, &key, &parent, labels)?;
        self.journal.note(Made::Snapshot { snapshotter, key })
    }

    /// Creates the container's record, the same as on the source.
    ///
    /// # Errors
    /// [`NodeError`] if containerd refuses.
    pub fn create_container(&mut self) -> Result<(), NodeError> {
        let container = record::container(&self.offer.container);
        let request = self.containerd.request(CreateContainerRequest { container: Some(container) });
        self.containerd
            .call("create the container", ContainersClient::new(self.containerd.channel()).create(request))?;
        self.journal.note(Made::Container(self.offer.container.id.clone()))
    }

    /// Creates the task that the migration comes into over `socket`.
    ///
    /// # Errors
    /// [`NodeError`] if the FIFOs cannot be made or containerd or the shim refuses.
    pub fn create_task(&mut self, socket: &Path) -> Result<IncomingTask, NodeError> {
        let id = self.offer.container.id.clone();
        let unique = self.offer.migration.as_str();
        let (stdio, fifos) = Fifos::make(Path::new(FIFO_ROOT), unique, &id, &self.offer.stdio)?;
        self.journal.note(Made::Fifos(fifos.into_paths()))?;
        let task = CreateTaskRequest {
            container_id: id.clone(),
            rootfs: self.mounts.clone(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            options: Some(options::incoming(self.offer.container.runtime.options.as_ref(), socket)),
            ..CreateTaskRequest::default()
        };
        let starter = Containerd::connect(self.containerd.address(), self.containerd.namespace())?;
        // Noted first: a create that fails half way may leave a task.
        self.journal.note(Made::Task(id.clone()))?;
        self.create_when_free(&task)?;
        Ok(IncomingTask { containerd: starter, id })
    }

    /// Creates a task. containerd may not have done yet with an earlier one of this name, which it takes back by itself
    /// when the agent that asked for it has died; nobody else's can be in the way, for the record is ours.
    fn create_when_free(&self, task: &CreateTaskRequest) -> Result<(), NodeError> {
        let deadline = Instant::now() + EARLIER_TASK_MAX;
        loop {
            let request = self.containerd.request(task.clone());
            let created = self
                .containerd
                .call("create the task", TasksClient::new(self.containerd.channel()).create(request));
            match created {
                Err(error) if error.is_in_use() && Instant::now() < deadline => {
                    log::debug!(container = self.offer.container.id; "{error}");
                    thread::sleep(EARLIER_TASK_POLL);
                }
                created => return created.map(drop),
            }
        }
    }

    /// Ends the arrival as the migration's record says: keeps everything if the container runs here, else takes
    /// it back. Of one that was lost for want of its memory the task alone is ended. Call it when the incoming task has
    /// started or failed to; it returns when the container has all of its memory.
    ///
    /// # Errors
    /// [`NodeError::Record`] if the record cannot be used; everything is kept then, for nobody knows.
    pub fn settle(mut self, record: &Record) -> Result<FateAnswer, NodeError> {
        // Until the record says otherwise nothing may be taken back.
        self.then = Then::Leave;
        let fate = settle(record, || self.journal.end_task(&self.containerd))?;
        self.then = if fate.has_run() { Then::Keep } else { Then::TakeBack };
        Ok(fate)
    }

    fn image(&self) -> Option<Image> {
        self.offer.container.image.clone()
    }

    /// Adds a blob that is here already to the lease; one that is not is no matter.
    fn hold_blob(&self, digest: &str) -> Result<(), NodeError> {
        check_digest("the offer", digest)?;
        let resource = Resource { id: digest.to_owned(), r#type: "content".to_owned() };
        let request = self
            .containerd
            .request(AddResourceRequest { id: self.journal.lease().to_owned(), resource: Some(resource) });
        self.containerd
            .call("hold a blob", LeasesClient::new(self.containerd.channel()).add_resource(request))
            .optional()?;
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        match self.then {
            Then::Keep => self.journal.close(&self.containerd),
            Then::TakeBack => self.journal.take_back(&self.containerd),
            Then::Leave => {}
        }
    }
}

fn create_lease(containerd: &mut Containerd, lease: &str) -> Result<(), NodeError> {
    let expiry = ("containerd.io/gc.expire".to_owned(), rfc3339(LEASE_LIFE));
    let request =
        containerd.request(CreateRequest { id: lease.to_owned(), labels: [expiry].into_iter().collect() });
    containerd.call("create a lease", LeasesClient::new(containerd.channel()).create(request))?;
    containerd.hold_lease(lease)
}

impl IncomingTask {
    /// Starts the task, which returns when the container runs here or has failed to.
    ///
    /// # Errors
    /// [`NodeError`] with the shim's words if the migration failed.
    pub fn start(&self) -> Result<u32, NodeError> {
        let request =
            self.containerd.request(StartRequest { container_id: self.id.clone(), exec_id: String::new() });
        let answer = self
            .containerd
            .call_unbounded("start the task", TasksClient::new(self.containerd.channel()).start(request))?;
        Ok(answer.pid)
    }
}

/// Where containerd's clients make their FIFOs, whatever its state directory is.
const FIFO_ROOT: &str = "/run/containerd/fifo";

/// containerd gives its clean-up twice five seconds.
const EARLIER_TASK_MAX: Duration = Duration::from_secs(20);

const EARLIER_TASK_POLL: Duration = Duration::from_millis(50);

/// Long enough for any transfer; what an agent that was killed left behind goes afterwards.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);
