//! The sending half of the link, shared by the threads that send.
//!
//! The lock is held for one frame, so a short message overtakes the bulk between two of its frames, and a sender
//! that is told to stop stops there.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use godwit_protocol::rootfs::{Entry, Layer, Pass};
use godwit_protocol::wire::Message;

use crate::Cause;
use crate::link::{LinkError, SendHalf};
use crate::rootfs::{RootfsError, Sink};

/// Bulk that could not be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum BulkError {
    /// The link failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The sender was told to stop.
    #[error("it was told to stop")]
    Stopped,
    /// The writable layer cannot be read.
    #[error(transparent)]
    Rootfs(RootfsError),
    /// The images cannot be read.
    #[error("failed to {what} criu's images")]
    Images {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A blob cannot be read, or is not as long as its record says.
    #[error("failed to read blob {digest}")]
    Blob {
        /// Which.
        digest: String,
        /// Why.
        #[source]
        source: Cause,
    },
}

impl BulkError {
    pub(super) fn images(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Images { what, source }
    }
}

impl From<RootfsError> for BulkError {
    fn from(error: RootfsError) -> Self {
        match error {
            RootfsError::Link(error) => Self::Link(error),
            other => Self::Rootfs(other),
        }
    }
}

/// The sending half, for any thread.
#[derive(Debug, Clone)]
pub(super) struct BulkLink {
    send: Arc<Mutex<SendHalf>>,
    stopped: Arc<AtomicBool>,
    sent_bytes: Arc<AtomicU64>,
}

impl BulkLink {
    pub(super) fn over(send: SendHalf) -> Self {
        let sent_bytes = send.sent_bytes();
        Self { send: Arc::new(Mutex::new(send)), stopped: Arc::default(), sent_bytes }
    }

    /// Sends one message of the bulk.
    pub(super) fn send(&self, message: &Message<'_>) -> Result<(), BulkError> {
        self.check()?;
        Ok(self.send_always(message)?)
    }

    /// Fails once the sender has been told to stop.
    pub(super) fn check(&self) -> Result<(), BulkError> {
        if self.stopped.load(Ordering::Relaxed) { Err(BulkError::Stopped) } else { Ok(()) }
    }

    /// Sends one message, also after [`BulkLink::stop`].
    pub(super) fn send_always(&self, message: &Message<'_>) -> Result<(), LinkError> {
        // A thread that panicked within a send has left a broken frame, which the peer finds.
        self.send.lock().unwrap_or_else(PoisonError::into_inner).send(message)
    }

    /// Ends the bulk after the frame that is under way.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Returns the bytes sent so far, with headers.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }
}

/// Sends the writable layer.
#[derive(Debug)]
pub(super) struct RootfsSender<'l> {
    link: &'l BulkLink,
    /// Bytes of content sent.
    pub(super) bytes: u64,
}

impl<'l> RootfsSender<'l> {
    pub(super) const fn over(link: &'l BulkLink) -> Self {
        Self { link, bytes: 0 }
    }

    fn send(&self, message: &Message<'_>) -> Result<(), RootfsError> {
        match self.link.send(message) {
            Ok(()) => Ok(()),
            Err(BulkError::Link(error)) => Err(RootfsError::Link(error)),
            Err(_) => Err(RootfsError::Link(LinkError::Closed)),
        }
    }
}

impl Sink for RootfsSender<'_> {
    fn begin(&mut self, pass: Pass, layer: Layer) -> Result<(), RootfsError> {
        self.send(&Message::RootfsBegin { pass, layer })
    }

    fn entry(&mut self, entry: Entry<'_>) -> Result<(), RootfsError> {
        self.send(&Message::RootfsEntry(entry))
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RootfsError> {
        self.bytes += bytes.len() as u64;
        self.send(&Message::RootfsData { offset, bytes })
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), RootfsError> {
        self.send(&Message::RootfsRemove { path })
    }
}
