//! The thread that reads the link: every message becomes an event.

use godwit_protocol::offer::Accept;
use godwit_protocol::source::{Event, PeerEvent};
use godwit_protocol::wire::Message;

use crate::link::{LinkError, ReceiveHalf};
use crate::text::causes;

/// What the target said.
#[derive(Debug)]
pub(super) enum Heard {
    /// Something that the machine decides on.
    Event(Event),
    /// It takes the container and lacks these blobs.
    Accepted(Box<Accept>),
}

/// Reads until the link with `peer` ends, and tells `tell` what comes. `tell` returns whether anybody still listens.
///
/// Whatever goes wrong is told with the peer's address and where to look further: the target can say nothing
/// more itself.
pub(super) fn listen(mut link: ReceiveHalf, peer: &str, tell: impl Fn(Heard) -> bool) {
    let mut speaker = "agent";
    loop {
        let heard = match link.receive() {
            Ok(Message::Accept(accept)) => Heard::Accepted(accept),
            Ok(message) => {
                if matches!(message, Message::Ready { .. }) {
                    speaker = "worker";
                }
                Heard::Event(Event::Peer(event_of(message)))
            }
            Err(LinkError::Wire(error)) => {
                let what = format!("{peer} sent what no `godwit agent` of this release sends: {error}");
                tell(Heard::Event(Event::Peer(PeerEvent::Nonsense { what })));
                return;
            }
            Err(error) => {
                let cause = format!(
                    "the target's {speaker} at {peer} is gone ({}): see the log of `godwit agent` there",
                    causes(&error)
                );
                tell(Heard::Event(Event::LinkLost { cause }));
                return;
            }
        };
        if !tell(heard) {
            return;
        }
    }
}

fn event_of(message: Message<'_>) -> PeerEvent {
    match message {
        Message::Reject(reject) => PeerEvent::Rejected { detail: reject.detail },
        Message::Preparing(step) => PeerEvent::Preparing(step),
        Message::Ready { .. } => PeerEvent::Ready,
        Message::RootfsApplied { pass } => PeerEvent::RootfsApplied(pass),
        Message::RoundReceived { round } => PeerEvent::RoundReceived(round),
        Message::MemoryComplete(memory) => PeerEvent::MemoryComplete(memory),
        Message::Received => PeerEvent::Received,
        Message::Restored => PeerEvent::Restored,
        Message::Resumed(resumed) => PeerEvent::Resumed(resumed),
        Message::Abort { detail } => PeerEvent::Aborted { detail: detail.to_owned() },
        other => PeerEvent::Nonsense { what: format!("the target sent {:?} out of place", other.kind()) },
    }
}
