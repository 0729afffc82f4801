//! containerd's Task service and godwit's Migrate service: requests in, answers out.
//!
//! Nothing is decided here. A request that names a container goes to it; the handlers wait, and may be dropped
//! when their client goes away, while the container's actor finishes what it was asked.
//!
//! # A Create that nobody waits for
//! When the client of a Create goes away, containerd takes back what is still being made: it sends Delete and Shutdown
//! while the Create is under way, and then runs the `delete` action. Both wait for the Create to end. A shim that
//! answered them at once would live on with a container that containerd does not know, in a bundle that is gone, and
//! the next shim of that name would find it listening.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
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
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Names of containers that are being created.
    creating: watch::Sender<HashSet<String>>,
    /// Whether a container was ever asked for.
    was_used: AtomicBool,
    shutdown: watch::Sender<bool>,
}

/// The name of a container that is being created, until it is dropped.
#[derive(Debug)]
struct Creating {
    service: Arc<Service>,
    id: String,
}

impl Service {
    /// Returns a service without containers; `shutdown` becomes true when containerd wants it to end.
    pub(crate) fn new(shared: Shared, shutdown: watch::Sender<bool>) -> Arc<Self> {
        Arc::new(Self {
            shared,
            containers: Mutex::default(),
            creating: watch::Sender::default(),
            was_used: AtomicBool::new(false),
            shutdown,
        })
    }

    /// Tells whether a container was ever asked for.
    pub(crate) fn was_used(&self) -> bool {
        self.was_used.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.lock().get(id).cloned().ok_or(ShimError::NoContainer)
    }

    /// Waits until the container `id` is there, if it is being created, and returns it.
    async fn created(&self, id: &str) -> Result<Arc<Container>> {
        // Fails only when the sender is gone, which this service owns.
        self.creating.subscribe().wait_for(|creating| !creating.contains(id)).await.ok();
        self.container(id)
    }

    /// Ends the shim, unless it has containers, or has them once all that are being created are there.
    async fn shut_down(&self) {
        if !self.lock().is_empty() {
            return;
        }
        self.creating.subscribe().wait_for(HashSet::is_empty).await.ok();
        // A pod's shim lives until its last container is gone.
        if self.lock().is_empty() {
            self.shutdown.send_replace(true);
        }
    }
}

impl Creating {
    /// Takes the name of a container that is to be created.
    fn begin(service: &Arc<Service>, id: String) -> Result<Self> {
        service.was_used.store(true, Ordering::Relaxed);
        let is_free = !service.lock().contains_key(&id)
            && service.creating.send_if_modified(|creating| creating.insert(id.clone()));
        if !is_free {
            return Err(ShimError::ContainerExists { id });
        }
        Ok(Self { service: Arc::clone(service), id })
    }

    async fn run(self, request: CreateRequest) -> Result<Arc<Container>> {
        let container = Container::create(request, self.service.shared.clone()).await?;
        self.service.lock().insert(self.id.clone(), Arc::clone(&container));
        Ok(container)
    }
}

impl Drop for Creating {
    fn drop(&mut self) {
        self.service.creating.send_modify(|creating| {
            creating.remove(&self.id);
        });
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
        // Taken before anything is waited for, so that a Delete that follows finds it.
        let creating = Creating::begin(&self.0, request.id.clone())?;
        let created = tokio::spawn(creating.run(request)).await;
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
        let container = self.0.created(&request.id).await?;
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
        let service = Arc::clone(&self.0);
        // containerd does not wait for long, but its wish stands.
        let down = tokio::spawn(async move { service.shut_down().await }).await;
        down.map_err(|error| ttrpc::Error::Others(format!("shutdown ended early: {error}")))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        events::Publisher,
        reaper::{Reaper, Scope},
    };

    fn service(bundle: &std::path::Path) -> (Arc<Service>, watch::Receiver<bool>) {
        std::fs::write(bundle.join("config.json"), "{}").unwrap();
        let reaper = Arc::new(Reaper::default());
        reaper.run(Scope::Claimed).unwrap();
        let shared = Shared {
            namespace: "shim-service-test".to_owned(),
            containerd: String::new(),
            socket: String::new(),
            addresses: bundle.join("addresses"),
            worker: bundle.join("worker"),
            reaper,
            events: Publisher::recording().0,
        };
        let (shutdown, down) = watch::channel(false);
        (Service::new(shared, shutdown), down)
    }

    fn context() -> TtrpcContext {
        TtrpcContext::default()
    }

    /// A container that waits for its migration needs no runtime to be created, and this one to be deleted.
    fn incoming(bundle: &std::path::Path) -> CreateRequest {
        CreateRequest {
            id: "web".to_owned(),
            bundle: bundle.to_owned(),
            checkpoint: "godwit-incoming:///run/s".to_owned(),
            options: CreateOptions { binary_name: "/bin/true".to_owned(), ..CreateOptions::default() },
            ..CreateRequest::default()
        }
    }

    #[tokio::test]
    async fn a_create_that_is_given_up_leaves_neither_container_nor_shim() {
        let bundle = tempfile::tempdir().unwrap();
        let (service, down) = service(bundle.path());
        let creating = Creating::begin(&service, "web".to_owned()).unwrap();
        let task = Arc::new(TaskService(Arc::clone(&service)));
        // What containerd sends when the client of a Create has gone.
        let gives_up = tokio::spawn(async move {
            let request = DeleteRequest { id: "web".to_owned(), ..DeleteRequest::default() };
            task.delete(&context(), request).await.expect("what is being created is deleted");
            task.shutdown(&context(), ShutdownRequest::default()).await.unwrap();
        });
        tokio::task::yield_now().await;
        assert!(!gives_up.is_finished(), "it waits until there is something to delete");
        creating.run(incoming(bundle.path())).await.unwrap();
        gives_up.await.unwrap();
        assert!(service.lock().is_empty() && *down.borrow());
    }

    #[tokio::test]
    async fn a_shutdown_waits_for_a_create_and_ends_no_shim_that_has_a_container() {
        let bundle = tempfile::tempdir().unwrap();
        let (service, down) = service(bundle.path());
        let creating = Creating::begin(&service, "web".to_owned()).unwrap();
        let asked = tokio::spawn({
            let service = Arc::clone(&service);
            async move { service.shut_down().await }
        });
        tokio::task::yield_now().await;
        assert!(!asked.is_finished());
        creating.run(incoming(bundle.path())).await.unwrap();
        asked.await.unwrap();
        assert!(!*down.borrow());
    }

    #[tokio::test]
    async fn a_name_is_taken_from_the_beginning_of_its_create_until_that_fails() {
        let bundle = tempfile::tempdir().unwrap();
        let (service, _down) = service(bundle.path());
        let first = Creating::begin(&service, "web".to_owned()).unwrap();
        let second = Creating::begin(&service, "web".to_owned()).unwrap_err();
        assert!(matches!(second, ShimError::ContainerExists { .. }), "{second}");
        let nowhere = CreateRequest { bundle: "/nowhere".into(), ..incoming(bundle.path()) };
        first.run(nowhere).await.unwrap_err();
        Creating::begin(&service, "web".to_owned()).unwrap();
    }
}
