//! Memory on connections of its own: pages read from the source's processes, kept by the target's store.
//!
//! ```text
//! source   PageStreams ── bulk 0 ───► agent ──(handover)──► PageReceiver ──► MemoryStore
//!   reader per stream ─── bulk 1 ───►                         a thread each ─► Arrivals (marks, arrived pages)
//!   claims ───────────── fault ◄────────── PageRequest ────────────────────── request (a task waits)
//! ```
//! *Rounds* ([`PageStreams::send_round`]): each bulk stream has a thread that reads its share of the pages into a
//! buffer of its own and sends it; zeros are found by content and travel as names. A page's stream is a function of
//! its address ([`StreamId::of_page`]), so its newest version comes last without any barrier.
//!
//! *Serving* ([`PageStreams::serve`]): what stayed at the frozen source is pushed on the bulk streams, and the fault
//! stream answers requests. Whoever sends a page claims it first, so each is sent exactly once.
//!
//! Invariants:
//! - One broken stream ends all of them, and is one error for the migration.
//! - Content is copied twice by this end: into the buffer, and into the socket.
//! - The target takes a page only on its own stream, only whole and aligned, and as many as its store has room for.
//! - After [`ROUND_LAST`] on a stream nothing follows there, and only then is its end no error.
//!
//! Socket buffers are left to the kernel, which grows them with the connection's bandwidth and delay: setting a size
//! would stop that, and could only be smaller (`net.core.wmem_max`).
//!
//! Nothing here decides what to send or when a container runs.

mod claims;
mod receiver;
mod sender;
mod serve;
mod share;
mod streams;
#[cfg(test)]
mod tests;

use std::io;

use godwit_memory::{MemoryError, PageSet};
use godwit_protocol::wire::pages::StreamId;

pub use self::receiver::{Arrivals, PageReceiver};
pub use self::serve::Served;
pub(crate) use self::share::{frames, range, sorted};
pub use self::streams::{PageStreams, RoundSent, StreamsBreaker};
use crate::link::LinkError;

/// What is to be sent of one address space. The three sets have no page in common, except that `absent` may name
/// pages of the others: it is sent first.
#[derive(Debug, Clone, Default)]
pub struct SpaceWork {
    /// The name of the space on the wire: its process id inside the container.
    pub space: i32,
    /// The process on this host that has it.
    pub pid: i32,
    /// Pages to read and send.
    pub dirty: PageSet,
    /// Pages that are known to hold only zeros.
    pub zero: PageSet,
    /// Pages that the target must forget.
    pub absent: PageSet,
}

/// Pages that could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// A stream broke.
    #[error("{} broke", name(*.stream))]
    Link {
        /// Which.
        stream: StreamId,
        /// How.
        #[source]
        source: LinkError,
    },
    /// Memory could not be read, or kept.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The peer gave up.
    #[error("the peer gave up: {detail}")]
    Aborted {
        /// What it said.
        detail: String,
    },
    /// This end was told to stop.
    #[error("the page streams were stopped")]
    Stopped,
    /// A thread cannot be started.
    #[error("no thread can be started")]
    Thread(#[source] io::Error),
    /// The agent's connection cannot be used.
    #[error("no more streams can be taken from the agent")]
    Agent(#[from] crate::handover::HandoverError),
    /// A stream came that was not due.
    #[error("{} came twice, or there is none", name(*.stream))]
    NotDue {
        /// Which.
        stream: StreamId,
    },
    /// A page came on a stream that is not its own: an older version might come after it.
    #[error("page {address:x} of process {space} came on {}", name(*.stream))]
    WrongStream {
        /// Whose.
        space: i32,
        /// Which page.
        address: u64,
        /// Which stream.
        stream: StreamId,
    },
    /// Rounds were marked out of order, or something came after the last.
    #[error("round {round} was marked after round {before} on {}", name(*.stream))]
    Mark {
        /// Which stream.
        stream: StreamId,
        /// What was marked.
        round: u32,
        /// What had been.
        before: u32,
    },
}

fn name(stream: StreamId) -> String {
    match stream {
        StreamId::Bulk(index) => format!("page stream {index}"),
        StreamId::Fault => "the fault stream".to_owned(),
    }
}
