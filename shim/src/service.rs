//! containerd's Task service and godwit's Migrate service: requests in, answers out.
//!
//! Nothing is decided here. A request that names a container goes to it; the handlers wait, and may be dropped
//! when their client goes away, while the container's actor finishes what it was asked.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PauseRequest,
        PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
        StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
        WaitRequest, WaitResponse,
    },
    shim_async::Task,
};
use godwit_api::{CancelRequest, CancelResponse, Migrate, StatusRequest, StatusResponse};
use protobuf::{
    MessageField,
    well_known_types::{empty::Empty, timestamp::Timestamp},
};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

use crate::{
    container::{Container, CreateRequest, Ended, Request, Shared},
    error::{Result, ShimError},
    options::{CheckpointOptions, CreateOptions},
    stdio::Address,
};

/// Everything a shim serves.
#[derive(Debug)]
pub(crate) struct Service {
    shared: Shared,
    /// Nothing stands for a container that is being created.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    shutdown: watch::Sender<bool>,
}

impl Service {
    /// Returns a service without containers; `shutdown` becomes true when containerd wants it to end.
    pub(crate) fn new(shared: Shared, shutdown: watch::Sender<bool>) -> Arc<Self> {
        Arc::new(Self { shared, containers: Mutex::default(), shutdown })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.lock().get(id).cloned().flatten().ok_or(ShimError::NoContainer)
    }

    async fn create_container(self: Arc<Self>, request: CreateRequest) -> Result<Arc<Container>> {
        let id = request.id.clone();
        if self.lock().contains_key(&id) {
            return Err(ShimError::ContainerExists { id });
        }
        self.lock().insert(id.clone(), None);
        let created = Container::create(request, self.shared.clone()).await;
        match &created {
            Ok(container) => self.lock().insert(id, Some(Arc::clone(container))),
            Err(_) => self.lock().remove(&id).flatten().map(Some),
        };
        created
    }
}

/// The Task service of a shared [`Service`]; a type of its own because the trait wants one that is not behind
/// a pointer, while a Create must outlive its handler.
#[derive(Debug)]
pub(crate) struct TaskService(pub(crate) Arc<Service>);

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.0.container(&request.id)?;
        let view = container.view(&request.exec_id)?;
        let id = if request.exec_id.is_empty() { request.id } else { request.exec_id.clone() };
        Ok(StateResponse {
            id,
            bundle: container.bundle.display().to_string(),
            pid: view.pid.unsigned_abs(),
            status: status(view.status).into(),
            stdin: view.address.stdin,
            stdout: view.address.stdout,
            stderr: view.address.stderr,
            terminal: view.address.terminal,
            exit_status: view.ended.map_or(0, |ended| ended.status),
            exited_at: timestamp(view.ended),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let options = CreateOptions::decode(request.options.as_ref())?;
        let request = CreateRequest {
            id: request.id,
            bundle: request.bundle.into(),
            mounts: request.rootfs,
            address: Address {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            checkpoint: request.checkpoint,
            parent_checkpoint: request.parent_checkpoint,
            options,
        };
        let created = tokio::spawn(Arc::clone(&self.0).create_container(request)).await;
        let container =
            created.map_err(|error| ttrpc::Error::Others(format!("create ended early: {error}")))??;
        Ok(CreateTaskResponse { pid: container.pid().unsigned_abs(), ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.0.container(&request.id)?;
        let pid = container.call(|reply| Request::Start(request.exec_id, reply)).await?;
        Ok(StartResponse { pid: pid.unsigned_abs(), ..StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let container = self.0.container(&request.id)?;
        let is_container = request.exec_id.is_empty();
        let (pid, ended) = container.call(|reply| Request::Delete(request.exec_id, reply)).await?;
        if is_container {
            self.0.lock().remove(&request.id);
        }
        Ok(DeleteResponse {
            pid: pid.unsigned_abs(),
            exit_status: ended.map_or(0, |ended| ended.status),
            exited_at: timestamp(ended),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self.0.container(&request.id)?.processes().await?;
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        container.refuse_while_migrating("pause")?;
        container.call(Request::Pause).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        container.refuse_while_migrating("resume")?;
        container.call(Request::Resume).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        let options = CheckpointOptions::decode(request.options.as_ref())?;
        container.call(|reply| Request::Checkpoint(request.path, options, reply)).await?;
        Ok(Empty::default())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        container.kill(&request.exec_id, request.signal, request.all).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        let address = Address {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let spec = request.spec.into_option().unwrap_or_default().value;
        container.add_exec(&request.exec_id, address, spec)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let side = |length| u16::try_from(length).unwrap_or(u16::MAX);
        let container = self.0.container(&request.id)?;
        container.resize(&request.exec_id, side(request.width), side(request.height))?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        // Input is the only thing a client can close, whatever the flag says.
        self.0.container(&request.id)?.close_input(&request.exec_id)?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        container.refuse_while_migrating("update")?;
        let resources = request.resources.into_option().unwrap_or_default().value;
        container.call(|reply| Request::Update(resources, reply)).await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.0.container(&request.id)?;
        let mut end = container.end_of(&request.exec_id)?;
        // Only the change is waited for: the container itself may go meanwhile.
        let id = container.id.clone();
        drop(container);
        let ended = match end.wait_for(Option::is_some).await {
            Ok(ended) => *ended,
            Err(_) => return Err(ShimError::Deleted { id }.into()),
        };
        Ok(WaitResponse {
            exit_status: ended.map_or(0, |ended| ended.status),
            exited_at: timestamp(ended),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.0.container(&request.id)?.stats()?;
        Ok(StatsResponse { stats: Some(stats).into(), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.0.container(&request.id).map_or(0, |container| container.pid().unsigned_abs());
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // A pod's shim lives until its last container is gone.
        if self.0.lock().is_empty() {
            self.0.shutdown.send_replace(true);
        }
        Ok(Empty::default())
    }
}

/// The Migrate service of a shared [`Service`].
#[derive(Debug)]
pub(crate) struct MigrateService(pub(crate) Arc<Service>);

impl MigrateService {
    fn container(&self, namespace: &str, id: &str) -> Result<Arc<Container>> {
        if namespace != self.0.shared.namespace {
            return Err(ShimError::NoContainer);
        }
        self.0.container(id)
    }
}

#[async_trait]
impl Migrate for MigrateService {
    async fn status(&self, _: &TtrpcContext, request: StatusRequest) -> ttrpc::Result<StatusResponse> {
        let snapshot_json = self.container(&request.namespace, &request.id)?.migration_status()?;
        Ok(StatusResponse { snapshot_json, ..StatusResponse::default() })
    }

    async fn cancel(&self, _: &TtrpcContext, request: CancelRequest) -> ttrpc::Result<CancelResponse> {
        self.container(&request.namespace, &request.id)?.cancel_migration()?;
        Ok(CancelResponse::default())
    }
}

fn status(name: &str) -> Status {
    match name {
        "created" => Status::CREATED,
        "running" => Status::RUNNING,
        "stopped" => Status::STOPPED,
        "paused" => Status::PAUSED,
        "pausing" => Status::PAUSING,
        _ => Status::UNKNOWN,
    }
}

fn timestamp(ended: Option<Ended>) -> MessageField<Timestamp> {
    ended.and_then(|ended| ended.at).map(SystemTime::into).into()
}
