//! The source's half: the container as its containerd records it, its image's blobs, and the cleaning up after
//! it has moved.
//!
//! ```text
//! Source::open ──► offer() ──► (blobs, by digest, that the target lacks) ──► … commit … ──► clean_up(keep)
//! ```
//! Nothing here changes the container before [`Source::clean_up`], which must not be called before the target
//! runs it.

use std::path::Path;

use containerd_client::{
    services::v1::{
        Container, GetContainerRequest, GetRequest, ListPidsRequest,
        containers_client::ContainersClient,
        snapshots::{Info as SnapshotInfo, StatSnapshotRequest, snapshots_client::SnapshotsClient},
        tasks_client::TasksClient,
    },
    types::v1::{Process, Status},
};
use godwit_protocol::{
    MigrationId, MigrationRequest,
    offer::{ContainerRecord, Needs, NodeFacts, Offer, Snapshot, Stdio},
    plan::Abilities,
};

use crate::{
    client::Containerd,
    error::{NodeError, Optional},
    facts, name, needs, record, source_image,
};

/// A container on the host it is to leave.
#[derive(Debug)]
pub struct Source {
    containerd: Containerd,
    id: String,
}

/// A task as containerd sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// It runs.
    Running,
    /// It has been paused by a client.
    Paused,
    /// It has been created and not started, or has ended, or there is none.
    NotRunning,
}

impl Source {
    /// Connects to the containerd that runs container `id`.
    ///
    /// # Errors
    /// [`NodeError`] if containerd cannot be reached or a name is malformed.
    pub fn open(address: &Path, namespace: &str, id: &str) -> Result<Self, NodeError> {
        name::check("container id", id)?;
        Ok(Self { containerd: Containerd::connect(address, namespace)?, id: id.to_owned() })
    }

    /// Returns the client, for reading blobs.
    #[must_use]
    pub const fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Returns the container's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Gathers everything the target has to know before it can take the container.
    ///
    /// # Errors
    /// [`NodeError::NoContainer`], [`NodeError::Unfit`] with what is in the way, or a failed call.
    pub fn offer(&self, request: &MigrationRequest, migration: MigrationId) -> Result<Offer, NodeError> {
        let container = self.container()?;
        let process = self.process()?;
        let facts = facts::gather(Some(&self.containerd));
        self.offer_of(container, &process, request, migration, facts)
    }

    /// Returns the runtime's name and how the task is.
    ///
    /// # Errors
    /// [`NodeError::NoContainer`], or a failed call.
    pub fn look(&self) -> Result<(String, TaskState), NodeError> {
        let container = self.container()?;
        let runtime = container.runtime.map(|runtime| runtime.name).unwrap_or_default();
        let state = match self.task()?.map(|process| process.status()) {
            Some(Status::Running) => TaskState::Running,
            Some(Status::Paused | Status::Pausing) => TaskState::Paused,
            _ => TaskState::NotRunning,
        };
        Ok((runtime, state))
    }

    /// Tells whether the source is cleaned up: no task, and unless `keep` is set no container.
    ///
    /// # Errors
    /// A failed call.
    pub fn is_gone(&self, keep: bool) -> Result<bool, NodeError> {
        if self.task()?.is_some() {
            return Ok(false);
        }
        match self.container() {
            Ok(_) => Ok(keep),
            Err(error) if error.is_not_found() => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn offer_of(
        &self,
        container: Container,
        process: &Process,
        request: &MigrationRequest,
        migration: MigrationId,
        source: NodeFacts,
    ) -> Result<Offer, NodeError> {
        let snapshot = self.snapshot(&container)?;
        let image = source_image::read(&self.containerd, &container.image, snapshot.parent.as_str())
            .map_err(|error| self.explain(error))?;
        let spec = container.spec.map(record::typed_bytes).ok_or_else(|| {
            NodeError::malformed(format!("record of container {}", self.id), "it has no spec")
        })?;
        let needs = self.needs()?;
        let container = ContainerRecord {
            id: self.id.clone(),
            namespace: self.containerd.namespace().to_owned(),
            labels: record::sorted(container.labels),
            image,
            runtime: record::runtime(&self.id, container.runtime)?,
            spec,
            snapshotter: container.snapshotter,
            snapshot: Some(snapshot),
            extensions: container
                .extensions
                .into_iter()
                .map(|(name, value)| (name, record::typed_bytes(value)))
                .collect(),
            sandbox_id: Some(container.sandbox).filter(|sandbox| !sandbox.is_empty()),
        };
        Ok(Offer {
            migration,
            mode: request.mode,
            dry_run: request.dry_run,
            keep: request.keep,
            source,
            container,
            stdio: stdio_of(process),
            needs,
            images: request.images,
            // The engine's to say.
            abilities: Abilities::default(),
            streams: 0,
        })
    }

    pub(crate) fn container(&self) -> Result<Container, NodeError> {
        let request = self.containerd.request(GetContainerRequest { id: self.id.clone() });
        self.containerd
            .call(
                "read the container's record",
                ContainersClient::new(self.containerd.channel()).get(request),
            )
            .optional()?
            .and_then(|answer| answer.container)
            .ok_or_else(|| NodeError::NoContainer {
                id: self.id.clone(),
                namespace: self.containerd.namespace().to_owned(),
            })
    }

    /// Returns the task, if there is one.
    pub(crate) fn task(&self) -> Result<Option<Process>, NodeError> {
        let request =
            self.containerd.request(GetRequest { container_id: self.id.clone(), exec_id: String::new() });
        let answer = self
            .containerd
            .call("read the container's task", TasksClient::new(self.containerd.channel()).get(request))
            .optional()?;
        Ok(answer.and_then(|answer| answer.process))
    }

    fn process(&self) -> Result<Process, NodeError> {
        let process = self.task()?;
        let state = process.as_ref().map_or(Status::Unknown, Process::status);
        process
            .filter(|_| matches!(state, Status::Running | Status::Paused | Status::Pausing))
            .ok_or_else(|| self.unfit("does not run: start it first (`ctr tasks start`)"))
    }

    fn snapshot(&self, container: &Container) -> Result<Snapshot, NodeError> {
        if container.snapshot_key.is_empty() {
            return Err(self.unfit(
                "has no snapshot (`ctr run --rootfs`): its root is a plain directory, which containerd cannot \
                 create on the target; run it from an image instead",
            ));
        }
        let request = self.containerd.request(StatSnapshotRequest {
            snapshotter: container.snapshotter.clone(),
            key: container.snapshot_key.clone(),
        });
        let info: SnapshotInfo = self
            .containerd
            .call(
                "read the container's snapshot",
                SnapshotsClient::new(self.containerd.channel()).stat(request),
            )?
            .info
            .unwrap_or_default();
        Ok(Snapshot {
            key: container.snapshot_key.clone(),
            parent: info.parent,
            labels: record::sorted(info.labels),
        })
    }

    fn needs(&self) -> Result<Needs, NodeError> {
        let request = self.containerd.request(ListPidsRequest { container_id: self.id.clone() });
        let pids = self
            .containerd
            .call(
                "list the container's processes",
                TasksClient::new(self.containerd.channel()).list_pids(request),
            )?
            .processes;
        Ok(Needs {
            memory_bytes: pids.iter().map(|process| needs::resident_bytes(process.pid)).sum(),
            // The engine's to say.
            rootfs_bytes: 0,
            tasks: u32::try_from(pids.len()).unwrap_or(u32::MAX),
        })
    }

    fn unfit(&self, cause: impl Into<String>) -> NodeError {
        NodeError::Unfit { id: self.id.clone(), cause: cause.into() }
    }

    fn explain(&self, error: source_image::ImageError) -> NodeError {
        match error {
            source_image::ImageError::Node(error) => error,
            source_image::ImageError::Unfit(cause) => self.unfit(cause),
        }
    }
}

fn stdio_of(process: &Process) -> Stdio {
    Stdio {
        terminal: process.terminal,
        stdin: process.stdin.clone(),
        stdout: process.stdout.clone(),
        stderr: process.stderr.clone(),
    }
}
