//! containerd's calls that `ctr` has no command for, or whose refusals it shows only as text.

use std::time::Duration;

use containerd_client::services::v1::container::Runtime as RecordRuntime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::snapshots::MountsRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    CheckpointTaskRequest, CloseIoRequest, Container as Record, CreateContainerRequest, CreateTaskRequest,
    DeleteProcessRequest, DeleteTaskRequest, ExecProcessRequest, GetContainerRequest, GetRequest,
    KillRequest, ListPidsRequest, MetricsRequest, PauseTaskRequest, ResizePtyRequest, ResumeTaskRequest,
    StartRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Request, Response, Status};
use containerd_client::types::Mount;
use containerd_client::types::v1::Process;
use prost_types::Any;
use serde_json::Value;

use super::trouble::Trouble;
use crate::containerd::SOCKET;
use crate::node::Node;

/// containerd's answer to a call that it did not carry out.
#[derive(Debug, thiserror::Error)]
#[error("containerd refused {call}: {code:?}: {message}")]
pub struct Refusal {
    /// The call.
    pub call: &'static str,
    /// The kind of refusal, which clients act upon.
    pub code: Code,
    /// The reason as text.
    pub message: String,
}

/// A connection to a node's containerd. Its calls block, may be made from many threads, and end within
/// [`DEADLINE`].
#[derive(Debug)]
pub struct Rpc {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

/// The result of a call.
pub type Answer<T> = Result<T, Refusal>;

macro_rules! call {
    ($self:ident, $method:ident, $request:expr) => {{
        let mut client = TasksClient::new($self.channel.clone());
        let request = in_namespace($request);
        $self.answer(stringify!($method), async move { client.$method(request).await })
    }};
}

impl Rpc {
    /// Connects to a node's containerd.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn connect(node: &Node) -> Result<Self, Trouble> {
        let socket = node.path(SOCKET);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(Trouble::io("start threads for", &socket))?;
        let channel = runtime.block_on(containerd_client::connect(&socket)).map_err(|error| {
            Trouble::Garbled { what: "the connection to containerd", text: error.to_string() }
        })?;
        Ok(Self { runtime, channel })
    }

    /// Makes a task of a container whose record and snapshot exist. It has no standard streams.
    ///
    /// # Errors
    /// containerd's.
    pub fn create(&self, id: &str, rootfs: Vec<Mount>, options: Option<Any>) -> Answer<u32> {
        let request =
            CreateTaskRequest { container_id: id.to_owned(), rootfs, options, ..Default::default() };
        call!(self, create, request).map(|response| response.pid)
    }

    /// Starts a task, or with an `exec_id` a process that [`Rpc::exec`] added.
    ///
    /// # Errors
    /// containerd's.
    pub fn start(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = StartRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        call!(self, start, request).map(|response| response.pid)
    }

    /// Returns the state of a task's init, or of the process `exec_id`.
    ///
    /// # Errors
    /// containerd's.
    pub fn state(&self, id: &str, exec_id: &str) -> Answer<Process> {
        let request = GetRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        let response = call!(self, get, request)?;
        response.process.ok_or_else(|| Refusal {
            call: "get",
            code: Code::Unknown,
            message: "the answer has no process in it".to_owned(),
        })
    }

    /// Adds a process, with `process` as in a runtime specification and streams of the given names.
    ///
    /// # Errors
    /// containerd's.
    pub fn exec(&self, id: &str, exec_id: &str, process: &Value, streams: &Streams<'_>) -> Answer<()> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: streams.stdin.to_owned(),
            stdout: streams.stdout.to_owned(),
            stderr: streams.stderr.to_owned(),
            terminal: streams.terminal,
            spec: Some(json_any(PROCESS, process)),
        };
        call!(self, exec, request).map(drop)
    }

    /// Sends a signal to a task's init, to all of its processes, or to the process `exec_id`.
    ///
    /// # Errors
    /// containerd's.
    pub fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Answer<()> {
        let request = KillRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), signal, all };
        call!(self, kill, request).map(drop)
    }

    /// Waits for the end of a task's init, or of the process `exec_id`, and returns its exit status.
    ///
    /// # Errors
    /// containerd's.
    pub fn wait(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = WaitRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        call!(self, wait, request).map(|response| response.exit_status)
    }

    /// Deletes a task that has ended, and returns its exit status.
    ///
    /// # Errors
    /// containerd's.
    pub fn delete(&self, id: &str) -> Answer<u32> {
        let request = DeleteTaskRequest { container_id: id.to_owned() };
        call!(self, delete, request).map(|response| response.exit_status)
    }

    /// Deletes a process that has ended, and returns its exit status.
    ///
    /// # Errors
    /// containerd's.
    pub fn delete_process(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        call!(self, delete_process, request).map(|response| response.exit_status)
    }

    /// Freezes a task.
    ///
    /// # Errors
    /// containerd's.
    pub fn pause(&self, id: &str) -> Answer<()> {
        call!(self, pause, PauseTaskRequest { container_id: id.to_owned() }).map(drop)
    }

    /// Lets a frozen task go on.
    ///
    /// # Errors
    /// containerd's.
    pub fn resume(&self, id: &str) -> Answer<()> {
        call!(self, resume, ResumeTaskRequest { container_id: id.to_owned() }).map(drop)
    }

    /// Returns the ids of a task's processes.
    ///
    /// # Errors
    /// containerd's.
    pub fn pids(&self, id: &str) -> Answer<Vec<u32>> {
        let request = ListPidsRequest { container_id: id.to_owned() };
        let response = call!(self, list_pids, request)?;
        Ok(response.processes.into_iter().map(|process| process.pid).collect())
    }

    /// Tells a process how large its terminal is.
    ///
    /// # Errors
    /// containerd's.
    pub fn resize(&self, id: &str, exec_id: &str, rows: u32, columns: u32) -> Answer<()> {
        let request = ResizePtyRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width: columns,
            height: rows,
        };
        call!(self, resize_pty, request).map(drop)
    }

    /// Closes the shim's end of a process's standard input.
    ///
    /// # Errors
    /// containerd's.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Answer<()> {
        let request =
            CloseIoRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), stdin: true };
        call!(self, close_io, request).map(drop)
    }

    /// Changes a task's limits to `resources`, as in a runtime specification.
    ///
    /// # Errors
    /// containerd's.
    pub fn update(&self, id: &str, resources: &Value) -> Answer<()> {
        let request = UpdateTaskRequest {
            container_id: id.to_owned(),
            resources: Some(json_any(RESOURCES, resources)),
            ..Default::default()
        };
        call!(self, update, request).map(drop)
    }

    /// Returns what a task has used, as its shim encoded it.
    ///
    /// # Errors
    /// containerd's.
    pub fn metrics(&self, id: &str) -> Answer<Any> {
        let request = MetricsRequest { filters: vec![format!("id=={id}")] };
        let response = call!(self, metrics, request)?;
        let data = response.metrics.into_iter().find(|metric| metric.id == id).and_then(|metric| metric.data);
        data.ok_or_else(|| Refusal {
            call: "metrics",
            code: Code::NotFound,
            message: format!("there are none of {id}"),
        })
    }

    /// Takes a checkpoint of a task with encoded options, without the pause that ctr puts around it.
    ///
    /// # Errors
    /// containerd's.
    pub fn checkpoint(&self, id: &str, options: Option<Any>) -> Answer<()> {
        let request = CheckpointTaskRequest { container_id: id.to_owned(), options, ..Default::default() };
        call!(self, checkpoint, request).map(drop)
    }

    /// Returns a container's record.
    ///
    /// # Errors
    /// containerd's.
    pub fn record(&self, id: &str) -> Answer<Record> {
        let mut client = ContainersClient::new(self.channel.clone());
        let request = in_namespace(GetContainerRequest { id: id.to_owned() });
        let response = self.answer("get container", async move { client.get(request).await })?;
        Ok(response.container.unwrap_or_default())
    }

    /// Adds a record that says no more than a name and a runtime: no container can be run of it.
    ///
    /// # Errors
    /// containerd's.
    pub fn reserve_name(&self, id: &str, runtime: &str) -> Answer<()> {
        let runtime = RecordRuntime { name: runtime.to_owned(), options: None };
        let spec = Some(json_any(SPEC, &Value::Object(serde_json::Map::default())));
        let record = Record { id: id.to_owned(), runtime: Some(runtime), spec, ..Default::default() };
        let mut client = ContainersClient::new(self.channel.clone());
        let request = in_namespace(CreateContainerRequest { container: Some(record) });
        self.answer("create container", async move { client.create(request).await }).map(drop)
    }

    /// Returns how the root file system of a container is mounted, whose snapshot has the container's name.
    ///
    /// # Errors
    /// containerd's.
    pub fn rootfs(&self, id: &str) -> Answer<Vec<Mount>> {
        let mut client = SnapshotsClient::new(self.channel.clone());
        let request = in_namespace(MountsRequest { snapshotter: SNAPSHOTTER.to_owned(), key: id.to_owned() });
        let response = self.answer("mounts", async move { client.mounts(request).await })?;
        Ok(response.mounts)
    }

    fn answer<T>(
        &self,
        call: &'static str,
        future: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Answer<T> {
        let refusal =
            |status: Status| Refusal { call, code: status.code(), message: status.message().to_owned() };
        self.runtime.block_on(future).map(Response::into_inner).map_err(refusal)
    }
}

/// The names of a process's streams: paths of FIFOs or URIs, empty for none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Streams<'a> {
    /// Standard input.
    pub stdin: &'a str,
    /// Standard output, or the terminal's.
    pub stdout: &'a str,
    /// Standard error.
    pub stderr: &'a str,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

fn in_namespace<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(
        "containerd-namespace",
        containerd_client::tonic::metadata::MetadataValue::from_static(NAMESPACE),
    );
    request.set_timeout(DEADLINE);
    request
}

fn json_any(type_url: &str, value: &Value) -> Any {
    Any { type_url: type_url.to_owned(), value: value.to_string().into_bytes() }
}

/// The namespace of containerd in which all cases work; it is ctr's default.
pub const NAMESPACE: &str = "default";
/// How long a call may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

const SNAPSHOTTER: &str = "overlayfs";
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
