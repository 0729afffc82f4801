//! One connection: its hello, its first message, and what that leads to.

use std::{net::TcpStream, path::Path, time::Duration};

use godwit_engine::{
    decision::Record,
    link::{Link, LinkError},
};
use godwit_protocol::{
    MigrationId,
    fate::FateAnswer,
    wire::{Message, Reject, RejectCode},
};

use super::{Seat, migration, streams};
use crate::{NodeError, target};

/// Why a connection did not end well; for the log, since the peer has been told.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// The link broke or the peer does not keep to the protocol.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The offer was declined.
    #[error("declined: {}", .0.detail)]
    Declined(Reject),
    /// The migration failed on this side.
    #[error("migration failed: {0}")]
    Failed(String),
}

/// Serves a connection to its end.
///
/// # Errors
/// [`ConnectionError`] to be logged, once.
pub(super) fn serve(seat: &Seat, socket: TcpStream) -> Result<(), ConnectionError> {
    let mut link = Link::accept(socket)?;
    seat.lend(link.breaker());
    link.set_silence_max(Some(FIRST_MESSAGE_MAX))?;
    let first = match link.receive() {
        Ok(Message::Offer(offer)) => Ok(Some(*offer)),
        Ok(Message::JoinStream { migration, stream }) => {
            return streams::join(seat, link, &migration, stream);
        }
        Ok(Message::Rejoin { migration }) => return streams::rejoin(seat, link, &migration),
        Ok(Message::FateQuery { migration }) => return answer(seat, &mut link, &migration),
        Ok(other) => {
            Err(LinkError::Unexpected { kind: other.kind(), expected: "an offer, a link or a question" })
        }
        Err(LinkError::Closed) => Ok(None),
        Err(error) => Err(error),
    };
    match first {
        Ok(Some(offer)) => migration::serve(seat, link, offer),
        // A connection that is opened and closed without a word is a probe.
        Ok(None) => Ok(()),
        Err(error) => {
            decline(&mut link, &Reject::new(RejectCode::Protocol, error.to_string()));
            Err(error.into())
        }
    }
}

/// Tells the peer why it is declined, if it still listens.
pub(super) fn decline(link: &mut Link, reject: &Reject) {
    if let Err(error) = link.send(&Message::Reject(reject.clone())) {
        log::debug!("the peer was not told why: {error}");
    }
}

fn answer(seat: &Seat, link: &mut Link, migration: &MigrationId) -> Result<(), ConnectionError> {
    let answer = ask(seat.containerd(), seat.directory(), migration).unwrap_or_else(|error| {
        // Nothing is known for sure, so the source has to ask again.
        log::error!(migration:%; "cannot say where the container is: {error}");
        FateAnswer::Pending
    });
    log::info!(migration:%, answer:?; "asked about a migration's fate");
    link.send(&Message::FateAnswer(answer))?;
    Ok(())
}

fn ask(containerd: &Path, directory: &Path, migration: &MigrationId) -> Result<FateAnswer, NodeError> {
    Record::of(directory, migration).ask(|| target::end_task_of(containerd, directory, migration))
}

/// A source makes up its offer after it has connected, of what its containerd tells: on a busy host that takes a while.
const FIRST_MESSAGE_MAX: Duration = Duration::from_secs(60);
