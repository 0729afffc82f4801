//! The link to the source, which another may take the place of while pages are still to come.
//!
//! ```text
//! page receiver's take thread ── replace ──► the old link broken and read to its end, the new one kept ──► Rejoined
//! worker's loop ── on Rejoined ── take ──► the new one's halves; whoever reads it says when it has ended
//! ```
//! What is said of a link comes before what is said of its successor, since that waits for the end of the reading. So
//! the loop needs not tell one's end from the other's.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::link::{Breaker, Link, ReceiveHalf, SendHalf};

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct MainLink(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    breaker: Breaker,
    /// Ends when nobody reads the link any more.
    read: Receiver<()>,
    next: Option<Link>,
}

/// Held by whoever reads the link.
#[derive(Debug)]
pub(super) struct Reading {
    _sender: Sender<()>,
}

impl MainLink {
    pub(super) fn over(link: Link) -> (Self, SendHalf, ReceiveHalf, Reading) {
        let (reading, read) = reading();
        let (send, receive) = link.split();
        let state = State { breaker: send.breaker(), read, next: None };
        (Self(Arc::new(Mutex::new(state))), send, receive, reading)
    }

    /// Keeps `link` for [`MainLink::take`], and ends the one before: nothing is said of that any more.
    pub(super) fn replace(&self, link: Link) {
        let mut state = self.lock();
        state.breaker.break_link();
        // An error is what it waits for.
        state.read.recv().ok();
        state.next = Some(link);
    }

    /// Takes the link that came last, if it has not been taken yet.
    pub(super) fn take(&self) -> Option<(SendHalf, ReceiveHalf, Reading)> {
        let mut state = self.lock();
        let (send, receive) = state.next.take()?.split();
        let (reading, read) = reading();
        (state.breaker, state.read) = (send.breaker(), read);
        Some((send, receive, reading))
    }

    /// Ends a link whose last word has to arrive.
    ///
    /// A socket that is closed while the peer's data waits in it is reset, and a reset takes from the peer what it has
    /// not read yet. So this end only stops sending, and whoever reads goes on until the source has closed its own.
    pub(super) fn take_leave(&self) {
        let state = self.lock();
        state.breaker.stop_sending();
        state.read.recv_timeout(LEAVE_MAX).ok();
        state.breaker.break_link();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn reading() -> (Reading, Receiver<()>) {
    let (sender, read) = channel();
    (Reading { _sender: sender }, read)
}

/// Time for the source to read the last word and close its end.
const LEAVE_MAX: Duration = Duration::from_secs(2);
