//! The mailbox and the task behind it.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::{Container, Ended};
use crate::{
    error::{Result, ShimError},
    options::CheckpointOptions,
};

/// Where the answer to a request goes; nobody may be waiting for it any more.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// What only the actor may do.
#[derive(Debug)]
pub(crate) enum Request {
    /// Start the init (empty name) or an exec; answers with its pid.
    Start(String, Reply<i32>),
    /// Delete the container (empty name) or an exec; answers with its pid and end.
    Delete(String, Reply<(i32, Option<Ended>)>),
    /// Freeze the container.
    Pause(Reply<()>),
    /// Thaw it.
    Resume(Reply<()>),
    /// Change its limits to these OCI resources in JSON.
    Update(Vec<u8>, Reply<()>),
    /// Checkpoint it into the directory, or migrate it.
    Checkpoint(String, CheckpointOptions, Reply<()>),
}

impl Container {
    /// Serves the mailbox until the container is deleted.
    pub(super) async fn serve(self: Arc<Self>, mut mailbox: mpsc::UnboundedReceiver<Request>) {
        while let Some(request) = mailbox.recv().await {
            match request {
                Request::Start(exec_id, reply) => answer(reply, self.start(&exec_id).await),
                Request::Delete(exec_id, reply) => {
                    let deleted = self.delete(&exec_id).await;
                    let gone = exec_id.is_empty() && deleted.is_ok();
                    answer(reply, deleted);
                    if gone {
                        // Requests that are still queued find their reply dropped.
                        return;
                    }
                }
                Request::Pause(reply) => answer(reply, self.pause().await),
                Request::Resume(reply) => answer(reply, self.resume().await),
                Request::Update(resources, reply) => answer(reply, self.update(resources).await),
                Request::Checkpoint(path, options, reply) => self.checkpoint(path, options, reply).await,
            }
        }
    }

    /// Makes the actor do what `request` makes of a reply, and waits for the answer.
    ///
    /// # Errors
    /// The verb's own, and [`ShimError::Deleted`] when the container went away before its turn came.
    pub(crate) async fn call<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.ask(request(reply))?;
        answer.await.unwrap_or_else(|_| Err(ShimError::Deleted { id: self.id.clone() }))
    }
}

pub(super) fn answer<T>(reply: Reply<T>, result: Result<T>) {
    // The client may have gone; the verb was done all the same.
    reply.send(result).ok();
}
