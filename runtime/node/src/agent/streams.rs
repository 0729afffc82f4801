//! Connections that join a migration whose worker has the main link: page streams, and another main link when that one
//! broke.
//!
//! A worker is entered under its migration's name before it gets the main link, and is taken out when it needs nothing
//! any more, or is gone. What joins in between is given to it, each stream once for each main link, so no more than a
//! migration has.

use std::{
    collections::BTreeSet,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use godwit_engine::{
    handover,
    link::{Link, LinkError},
};
use godwit_protocol::{
    MigrationId,
    wire::{Message, pages::StreamId},
};

use super::{Seat, Shared, connection::ConnectionError};

/// A connection to a worker, on which one thread at a time may give.
#[derive(Debug)]
pub(super) struct Worker {
    socket: UnixStream,
    joined: BTreeSet<StreamId>,
}

/// A worker that streams may join; taken out on drop.
#[derive(Debug)]
pub(super) struct Entry {
    shared: Arc<Shared>,
    migration: MigrationId,
}

impl Entry {
    /// Enters the worker of a migration. What joins waits until `give` has returned.
    pub(super) fn enter<T>(
        seat: &Seat,
        migration: &MigrationId,
        socket: UnixStream,
        give: impl FnOnce(&UnixStream) -> T,
    ) -> (Self, T) {
        let worker = Arc::new(Mutex::new(Worker { socket, joined: BTreeSet::new() }));
        let locked = lock(&worker);
        let entry = Self::of(&seat.shared, migration, Arc::clone(&worker));
        let given = give(&locked.socket);
        drop(locked);
        (entry, given)
    }

    /// Enters the worker to which an earlier agent gave the main link; `None` when it takes nothing that joins, or not
    /// yet.
    pub(super) fn of_earlier(shared: &Arc<Shared>, migration: &MigrationId) -> Option<Self> {
        match handover::find_worker(&shared.directory, migration) {
            Ok(socket) => {
                let worker = Worker { socket: socket?, joined: BTreeSet::new() };
                log::info!(migration:%; "found the worker of a migration that an earlier agent began");
                Some(Self::of(shared, migration, Arc::new(Mutex::new(worker))))
            }
            Err(error) => {
                log::warn!(migration:%; "{error}");
                None
            }
        }
    }

    fn of(shared: &Arc<Shared>, migration: &MigrationId, worker: Arc<Mutex<Worker>>) -> Self {
        shared.state().workers.insert(migration.clone(), worker);
        Self { shared: Arc::clone(shared), migration: migration.clone() }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // A connection that joins at this moment still holds the worker: the socket is closed by whoever is last.
        self.shared.state().workers.remove(&self.migration);
    }
}

/// Gives a connection to the worker of its migration.
///
/// # Errors
/// [`ConnectionError`]; the peer has been told.
pub(super) fn join(
    seat: &Seat,
    mut link: Link,
    migration: &MigrationId,
    stream: StreamId,
) -> Result<(), ConnectionError> {
    let worker = seat.shared.state().workers.get(migration).cloned();
    let Some(worker) = worker else {
        return Err(refuse(&mut link, format!("no migration {migration} takes page streams here")));
    };
    let mut worker = lock(&worker);
    if !worker.joined.insert(stream) {
        return Err(refuse(
            &mut link,
            format!("stream {stream:?} of migration {migration} has joined already"),
        ));
    }
    link.set_silence_max(None)?;
    seat.reclaim();
    log::debug!(migration:%, stream:?; "a page stream joins");
    handover::give_stream(&worker.socket, stream, link)
        .map_err(|error| ConnectionError::Failed(format!("page stream {stream:?} was not given: {error}")))
}

/// Gives the worker of a migration another main link; what joins from then on are the streams that go with it.
///
/// # Errors
/// [`ConnectionError`]; the peer has been told.
pub(super) fn rejoin(seat: &Seat, mut link: Link, migration: &MigrationId) -> Result<(), ConnectionError> {
    let worker = seat.shared.state().workers.get(migration).cloned();
    let Some(worker) = worker else {
        return Err(refuse(&mut link, format!("no worker of migration {migration} lacks pages here")));
    };
    let mut worker = lock(&worker);
    worker.joined.clear();
    link.set_silence_max(None)?;
    seat.reclaim();
    log::info!(migration:%; "the source is back over another link");
    handover::give_again(&worker.socket, link)
        .map_err(|error| ConnectionError::Failed(format!("the main link was not given: {error}")))
}

fn refuse(link: &mut Link, detail: String) -> ConnectionError {
    if let Err(error) = link.send(&Message::Abort { detail: &detail }) {
        return LinkError::into(error);
    }
    ConnectionError::Failed(detail)
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    // A stream counts as joined before it is given: a panic in between loses it, and the source gives up.
    worker.lock().unwrap_or_else(PoisonError::into_inner)
}
