//! The thread in which a container is restored: it reports that the container is held, and waits for the word.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::{io, thread};

use godwit_protocol::target::Event;

use super::{Restorer, Word};
use crate::text::causes;

/// A restore under way, held, or done.
#[derive(Debug)]
pub(super) struct Restoring {
    word: Sender<Word>,
    thread: JoinHandle<bool>,
}

impl Restoring {
    /// Starts to restore, and tells `tell` when the container is held, when it runs, and what went wrong.
    pub(super) fn start(
        restorer: impl Restorer,
        images: PathBuf,
        lazy_pages: bool,
        tell: impl Fn(Event) + Send + 'static,
    ) -> io::Result<Self> {
        let (word, words) = channel();
        let body = move || run(&restorer, &images, lazy_pages, &words, tell);
        let thread = thread::Builder::new().name("restore".to_owned()).spawn(body)?;
        Ok(Self { word, thread })
    }

    /// Lets the held container run.
    pub(super) fn resume(&self) {
        if self.word.send(Word::Resume).is_err() {
            log::warn!("a restore that has failed is told to go on");
        }
    }

    /// Makes sure that nothing of the container is left, in whatever state it is.
    ///
    /// Waits for a restore that has not reached the hold: it gives up there.
    ///
    /// # Errors
    /// What hinders the removal of a container that runs already.
    pub(super) fn undo(self, restorer: &impl Restorer) -> Result<(), String> {
        drop(self.word);
        let runs = self.thread.join().map_err(|_| "the restoring thread died".to_owned())?;
        if runs { restorer.remove().map_err(|cause| causes(cause.as_ref())) } else { Ok(()) }
    }
}

/// Returns whether the container runs. A failed or abandoned restore has left nothing.
fn run(
    restorer: &impl Restorer,
    images: &Path,
    lazy_pages: bool,
    words: &Receiver<Word>,
    tell: impl Fn(Event),
) -> bool {
    let held = || {
        tell(Event::Held);
        // A closed channel means that the migration was given up.
        words.recv().unwrap_or(Word::GiveUp)
    };
    match restorer.restore(images, lazy_pages, held) {
        Ok(pid) => {
            tell(Event::Running { pid });
            true
        }
        Err(cause) => {
            tell(Event::Failed { cause: causes(cause.as_ref()) });
            false
        }
    }
}
