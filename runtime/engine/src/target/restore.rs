//! The thread in which a container is restored: it prepares what can be, waits for the word that all images are there,
//! reports that the container is held, and waits for the word about it.

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
    word: Sender<Go>,
    thread: JoinHandle<bool>,
}

/// What the thread waits for, one after the other. Nothing at all means that the container is given up.
#[derive(Debug)]
enum Go {
    /// All images are there.
    Begin,
    /// The container may run.
    Resume,
}

impl Restoring {
    /// Starts to prepare, and tells `tell` when the container is held, when it runs, and what went wrong.
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

    /// Says that all images are there.
    pub(super) fn begin(&self) {
        self.say(Go::Begin);
    }

    /// Lets the held container run.
    pub(super) fn resume(&self) {
        self.say(Go::Resume);
    }

    fn say(&self, go: Go) {
        if self.word.send(go).is_err() {
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
    words: &Receiver<Go>,
    tell: impl Fn(Event),
) -> bool {
    let begin = || words.recv().is_ok();
    let held = || {
        tell(Event::Held);
        match words.recv() {
            Ok(_) => Word::Resume,
            Err(_) => Word::GiveUp,
        }
    };
    match restorer.restore(images, lazy_pages, begin, held) {
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
