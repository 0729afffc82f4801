//! The thread that reads the link: bulk goes where it belongs, everything that decides becomes an event.
//!
//! It ends with the link, and the link ends with it: whatever it cannot make sense of is reported once.

use std::path::PathBuf;
use std::sync::Arc;

use godwit_protocol::rootfs::Pass;
use godwit_protocol::target::Event;
use godwit_protocol::wire::Message;

use super::images::{Images, ImagesError};
use super::memory::Gate;
use crate::link::{LinkError, ReceiveHalf};
use crate::rootfs::{Applier, RootfsError, Sink};
use crate::text::causes;

/// Where the bulk goes.
#[derive(Debug)]
pub(super) struct Receiver {
    link: ReceiveHalf,
    rootfs: PathBuf,
    applier: Option<Applier>,
    pass: Option<Pass>,
    images: Option<Images>,
    memory: Option<Arc<Gate>>,
}

/// Why a message could not be taken.
enum Refusal {
    /// This side cannot store it.
    Failed(String),
    /// The source may not send it, or not here.
    Nonsense(String),
}

impl Receiver {
    /// Takes the writable layer through the root mounted at `rootfs`, images into `images`, and the plan of pages that
    /// come apart from them to `memory`.
    pub(super) fn new(link: ReceiveHalf, rootfs: PathBuf, images: Images, memory: Option<Arc<Gate>>) -> Self {
        Self { link, rootfs, applier: None, pass: None, images: Some(images), memory }
    }

    /// Reads until the link ends, and tells `tell` what happens. `tell` returns whether anybody still listens.
    pub(super) fn run(mut self, tell: impl Fn(Event) -> bool) {
        loop {
            let event = match self.step() {
                Ok(None) => continue,
                Ok(Some(event)) => event,
                Err(event) => {
                    tell(*event);
                    // To its end, so that what this side still says is not lost with a reset.
                    self.link.drain();
                    return;
                }
            };
            if !tell(event) {
                return;
            }
        }
    }

    /// The error is what nothing can follow.
    fn step(&mut self) -> Result<Option<Event>, Box<Event>> {
        let message = match self.link.receive() {
            Ok(message) => message,
            Err(error @ (LinkError::Wire(_) | LinkError::Unexpected { .. })) => {
                return Err(Box::new(Event::Nonsense { what: causes(&error) }));
            }
            Err(error) => return Err(Box::new(Event::LinkLost { cause: causes(&error) })),
        };
        let mut places = Places {
            rootfs: &self.rootfs,
            applier: &mut self.applier,
            pass: &mut self.pass,
            images: &mut self.images,
            memory: self.memory.as_deref(),
        };
        places.take(message).map_err(|refusal| {
            Box::new(match refusal {
                Refusal::Failed(cause) => Event::Failed { cause },
                Refusal::Nonsense(what) => Event::Nonsense { what },
            })
        })
    }
}

/// Reads a link that has taken the place of another, over which the source has nothing more to say, until it ends.
pub(super) fn until_the_end(mut link: ReceiveHalf, tell: impl Fn(Event)) {
    let event = match link.receive() {
        Ok(Message::Abort { detail }) => Event::Abort { detail: detail.to_owned() },
        Ok(other) => Event::Nonsense { what: format!("the source sent {:?} out of place", other.kind()) },
        Err(error @ (LinkError::Wire(_) | LinkError::Unexpected { .. })) => {
            Event::Nonsense { what: causes(&error) }
        }
        Err(error) => Event::LinkLost { cause: causes(&error) },
    };
    tell(event);
    link.drain();
}

/// The receiver without its link, from whose buffer the message borrows.
struct Places<'r> {
    rootfs: &'r PathBuf,
    applier: &'r mut Option<Applier>,
    pass: &'r mut Option<Pass>,
    images: &'r mut Option<Images>,
    memory: Option<&'r Gate>,
}

impl Places<'_> {
    fn take(&mut self, message: Message<'_>) -> Result<Option<Event>, Refusal> {
        match message {
            Message::RootfsBegin { pass, layer } => {
                if self.pass.replace(pass).is_some() {
                    return Err(Refusal::Nonsense("a pass began within another".to_owned()));
                }
                if self.applier.is_none() {
                    *self.applier = Some(Applier::open(self.rootfs)?);
                }
                self.applier()?.begin(pass, layer)?;
            }
            Message::RootfsEntry(entry) => self.applier()?.entry(entry)?,
            Message::RootfsData { offset, bytes } => self.applier()?.data(offset, bytes)?,
            Message::RootfsRemove { path } => self.applier()?.remove(path)?,
            Message::RootfsEnd { pass } => {
                let applier = self.applier()?;
                applier.end()?;
                if self.pass.take() != Some(pass) {
                    return Err(Refusal::Nonsense("another pass ended than began".to_owned()));
                }
                return Ok(Some(Event::Applied(pass)));
            }
            Message::ImageFile { index, name } => self.images()?.begin(index, name)?,
            Message::ImageData { index, offset, bytes } => self.images()?.append(index, offset, bytes)?,
            Message::StateEnd { manifest } => {
                let images = self.images.take();
                images.ok_or_else(|| out_of_place("StateEnd"))?.finish(&manifest)?;
                let Some(memory) = self.memory else { return Ok(Some(Event::Complete)) };
                memory.images_complete();
            }
            Message::MemoryPlan { space, round, stored_pages, remote } => {
                let memory = self.memory.ok_or_else(|| out_of_place("a plan of pages"))?;
                memory.promise(space, round, stored_pages, &remote).map_err(Refusal::Nonsense)?;
            }
            Message::Commit => return Ok(Some(Event::Commit)),
            Message::Abort { detail } => return Ok(Some(Event::Abort { detail: detail.to_owned() })),
            other => return Err(out_of_place(&format!("{:?}", other.kind()))),
        }
        Ok(None)
    }

    /// The writable layer, between the begin and the end of a pass.
    fn applier(&mut self) -> Result<&mut Applier, Refusal> {
        let applier = self.applier.as_mut().filter(|_| self.pass.is_some());
        applier.ok_or_else(|| out_of_place("content of the writable layer"))
    }

    /// The images, before the manifest.
    fn images(&mut self) -> Result<&mut Images, Refusal> {
        self.images.as_mut().ok_or_else(|| out_of_place("content of an image"))
    }
}

fn out_of_place(what: &str) -> Refusal {
    Refusal::Nonsense(format!("the source sent {what} out of place"))
}

impl From<RootfsError> for Refusal {
    fn from(error: RootfsError) -> Self {
        match error {
            RootfsError::Malformed { .. } => Self::Nonsense(causes(&error)),
            _ => Self::Failed(causes(&error)),
        }
    }
}

impl From<ImagesError> for Refusal {
    fn from(error: ImagesError) -> Self {
        match error {
            ImagesError::Write { .. } => Self::Failed(causes(&error)),
            ImagesError::Malformed { .. } | ImagesError::Mismatch { .. } => Self::Nonsense(causes(&error)),
        }
    }
}
