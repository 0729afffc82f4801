//! The thread in which CRIU restores: it reports that the container is held, and waits for the word.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::{io, thread};

use godwit_container::Store;
use godwit_container::checkpoint::Decision;
use godwit_container::lifecycle;
use godwit_container::restore::{RestoreOptions, restore};
use godwit_protocol::target::Event;

use crate::text::causes;

/// A restore under way, held, or done.
#[derive(Debug)]
pub(super) struct Restorer {
    word: Sender<Decision>,
    thread: JoinHandle<bool>,
}

impl Restorer {
    /// Starts to restore, and tells `tell` when the container is held, when it runs, and what went wrong.
    pub(super) fn start(
        store: &Store,
        id: &str,
        options: RestoreOptions,
        tell: impl Fn(Event) + Send + 'static,
    ) -> io::Result<Self> {
        let (word, decision) = channel();
        let (store, id) = (store.clone(), id.to_owned());
        let body = move || run(&store, &id, &options, &decision, tell);
        let thread = thread::Builder::new().name("restore".to_owned()).spawn(body)?;
        Ok(Self { word, thread })
    }

    /// Lets the held container run.
    pub(super) fn resume(&self) {
        if self.word.send(Decision::Commit).is_err() {
            log::warn!("a restore that has failed is told to go on");
        }
    }

    /// Makes sure that nothing of the container is left, in whatever state it is.
    ///
    /// Waits for a CRIU that has not reached the hold: it gives up there.
    ///
    /// # Errors
    /// What hinders the removal of a container that runs already.
    pub(super) fn undo(self, store: &Store, id: &str) -> Result<(), String> {
        drop(self.word);
        let runs = self.thread.join().map_err(|_| "the restoring thread died".to_owned())?;
        if runs { lifecycle::delete(store, id, true).map_err(|error| causes(&error)) } else { Ok(()) }
    }
}

/// Returns whether the container runs. A failed or abandoned restore has left nothing.
fn run(
    store: &Store,
    id: &str,
    options: &RestoreOptions,
    word: &Receiver<Decision>,
    tell: impl Fn(Event),
) -> bool {
    let held = |_| {
        tell(Event::Held);
        // A closed channel means that the migration was given up.
        word.recv().unwrap_or(Decision::Rollback)
    };
    match restore(store, id, options, held) {
        Ok(stored) => {
            tell(Event::Running { pid: stored.pid().unwrap_or_default() });
            true
        }
        Err(error) => {
            tell(Event::Failed { cause: causes(&error) });
            false
        }
    }
}
