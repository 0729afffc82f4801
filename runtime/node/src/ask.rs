//! Asking for a migration: containerd's own checkpoint call with a `godwit://` URI for an image path.

use containerd_client::services::v1::{CheckpointTaskRequest, tasks_client::TasksClient};
use godwit_protocol::MigrationRequest;
use prost::Message;
use prost_types::Any;

use crate::{error::NodeError, source::Source};

/// The field of `containerd.runc.v1.CheckpointOptions` that carries the request. It is the one place in which
/// every containerd passes something on to the shim.
#[derive(Clone, PartialEq, Eq, Message)]
struct ImagePath {
    #[prost(string, tag = "8")]
    image_path: String,
}

impl Source {
    /// Asks the container's shim for a migration, through containerd, and returns when that has ended.
    ///
    /// The answer alone does not tell how: containerd may fail after the shim has succeeded (1.6 and 1.7 store
    /// an empty checkpoint, and do not like to do that twice). Ask the shim.
    ///
    /// # Errors
    /// [`NodeError::Call`] with the shim's or containerd's words.
    pub fn request_migration(&self, request: &MigrationRequest) -> Result<(), NodeError> {
        let containerd = self.containerd();
        let options = ImagePath { image_path: request.to_string() };
        let request = containerd.request(CheckpointTaskRequest {
            container_id: self.id().to_owned(),
            options: Some(Any { type_url: CHECKPOINT_OPTIONS.to_owned(), value: options.encode_to_vec() }),
            ..CheckpointTaskRequest::default()
        });
        let mut tasks = TasksClient::new(containerd.channel());
        containerd.call_unbounded("migrate the container", tasks.checkpoint(request)).map(drop)
    }
}

/// containerd 2.x accepts no other type.
const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";
