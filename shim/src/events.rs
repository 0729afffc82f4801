//! Publishes containerd's task events, in the order in which they were given.
//!
//! One queue, one sender, one connection: an event is sent again until containerd has taken it or
//! [`TRIES_MAX`] tries have failed, and only then the next one. Nobody waits for a delivery but
//! [`Publisher::flush`].

use std::{sync::Arc, time::Duration};

use containerd_shim::event::Event;
use containerd_shim_protos::{
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
};
use protobuf::well_known_types::{any::Any, timestamp::Timestamp};
use tokio::sync::{mpsc, oneshot};
use ttrpc::context::{self, Context};

/// Tries before an event is given up, with growing pauses between them.
const TRIES_MAX: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Where events go; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    namespace: Arc<str>,
    queue: mpsc::UnboundedSender<Item>,
}

#[derive(Debug)]
enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

impl Publisher {
    /// Returns a publisher for `namespace` that sends to the ttrpc socket of containerd at `address`.
    pub(crate) fn connect(address: String, namespace: &str) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        tokio::spawn(forward(address, namespace.to_owned(), items));
        Self { namespace: namespace.into(), queue }
    }

    /// Returns a publisher that hands its events to the receiver, as `topic`.
    #[cfg(test)]
    pub(crate) fn recording() -> (Self, mpsc::UnboundedReceiver<String>) {
        let (queue, mut items) = mpsc::unbounded_channel();
        let (topics, received) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(item) = items.recv().await {
                if let Item::Event(envelope) = item {
                    topics.send(envelope.topic).ok();
                }
            }
        });
        (Self { namespace: "test".into(), queue }, received)
    }

    /// Adds an event to the queue.
    pub(crate) fn publish<E: Event + protobuf::Message>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return log::error!("failed to encode event {}: {error}", event.topic()),
        };
        // The name is written out because asking the message for it makes protobuf parse the descriptors of
        // the whole file, which costs each shim some hundred kilobytes.
        let type_url = format!("containerd.events.{}", E::NAME);
        let envelope = Envelope {
            timestamp: Some(Timestamp::now()).into(),
            namespace: self.namespace.to_string(),
            topic: event.topic(),
            event: Some(Any { type_url, value, ..Any::default() }).into(),
            ..Envelope::default()
        };
        // The sender ends with the shim.
        self.queue.send(Item::Event(Box::new(envelope))).ok();
    }

    /// Waits until everything given so far was sent or given up.
    pub(crate) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            flushed.await.ok();
        }
    }
}

async fn forward(address: String, namespace: String, mut items: mpsc::UnboundedReceiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Flush(done) => {
                done.send(()).ok();
            }
            Item::Event(envelope) => {
                let topic = envelope.topic.clone();
                let request =
                    ForwardRequest { envelope: Some(*envelope).into(), ..ForwardRequest::default() };
                if let Err(error) = deliver(&mut client, &address, &namespace, &request).await {
                    log::error!("failed to publish {topic}: {error}");
                }
            }
        }
    }
}

async fn deliver(
    client: &mut Option<EventsClient>,
    address: &str,
    namespace: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let mut tries = 0;
    loop {
        let error = match try_deliver(client, address, namespace, request).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        *client = None;
        tries += 1;
        if tries == TRIES_MAX {
            return Err(error);
        }
        tokio::time::sleep(PAUSE * tries).await;
    }
}

async fn try_deliver(
    client: &mut Option<EventsClient>,
    address: &str,
    namespace: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    if client.is_none() {
        let address = address.strip_prefix("unix://").unwrap_or(address);
        *client = Some(EventsClient::new(Client::connect(&format!("unix://{address}")).await?));
    }
    let client = client.as_ref().expect("it was connected in the lines before");
    client.forward(metadata(namespace), request).await.map(|_| ())
}

fn metadata(namespace: &str) -> Context {
    let mut context = context::with_duration(ANSWER_LIMIT);
    context.add("containerd-namespace-ttrpc".to_owned(), namespace.to_owned());
    context
}
