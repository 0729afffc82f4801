//! What the source's actions do: threads that send, and the container.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use godwit_protocol::plan::Way;
use godwit_protocol::rootfs::Pass;
use godwit_protocol::source::Event;
use godwit_protocol::wire::Message;
use godwit_protocol::worker::{self, Command};

use super::bulk::{BulkError, BulkLink, RootfsSender};
use super::container::{Checkpointer, Confirm, Dumping, Verdict};
use super::images::ImageStream;
use super::listen::listen;
use super::memory::{Cut, Memory, Route, Told};
use super::rejoin::{Answer, Reopened, rejoin};
use super::worker::{Connected, Dump, News, Sent, Worker};
use super::{ask, blobs};
use crate::Cause;
use crate::image_dir::{self, ImageDir};
use crate::link::{Link, LinkError};
use crate::rootfs::{Copier, LayerRoot};
use crate::text::causes;

impl<C: Checkpointer, T: FnMut(&worker::Event)> Worker<C, T> {
    pub(super) fn listen_for_commands(&self, commands: Receiver<Command>) {
        let news = self.teller.clone();
        thread::spawn(move || {
            for command in commands {
                if news.send(News::Command(Some(command))).is_err() {
                    return;
                }
            }
            news.send(News::Command(None)).ok();
        });
    }

    pub(super) fn connect(&self) {
        let news = self.teller.clone();
        let (host, port) = (self.order.request.host.clone(), self.order.request.port);
        thread::spawn(move || {
            let connected = match Link::connect(&host, port) {
                Ok(link) => News::Connected(Box::new(link)),
                Err(error) => News::Event(Event::Failed { cause: causes(&error) }),
            };
            news.send(connected).ok();
        });
    }

    pub(super) fn attach(&mut self, link: Link) {
        let breaker = link.breaker();
        let request = &self.order.request;
        let asked = || format!("{}:{}", request.host, request.port);
        let peer = link.peer().map_or_else(|_| asked(), |address| address.to_string());
        let (send, receive) = link.split();
        self.link_number += 1;
        let (news, number) = (self.teller.clone(), self.link_number);
        thread::spawn(move || {
            listen(receive, &peer, |heard| news.send(News::Heard(number, heard)).is_ok());
        });
        self.link = Some(Connected { bulk: BulkLink::over(send), breaker });
    }

    fn bulk(&self) -> Result<BulkLink, Cause> {
        let link = self.link.as_ref().ok_or(LinkError::Closed)?;
        Ok(link.bulk.clone())
    }

    pub(super) fn send_offer(&mut self) -> Result<(), Cause> {
        let mut offer = self.origin.offer()?;
        offer.abilities = self.abilities.clone();
        offer.streams = self.stream_count();
        offer.needs.rootfs_bytes = LayerRoot::of(&self.order.rootfs)?.size()?;
        self.expected_bytes = offer.needs.memory_bytes + offer.needs.rootfs_bytes;
        self.offered = offer.container.image.as_ref().map(|image| image.blobs.clone()).unwrap_or_default();
        Ok(self.bulk()?.send_always(&Message::Offer(Box::new(offer)))?)
    }

    /// Runs `work`, which sends bulk, in a thread of its own and reports how it failed, if it does.
    fn in_background(
        &self,
        work: impl FnOnce(&BulkLink, &Sender<News<C::Dump>>) -> Result<(), BulkError> + Send + 'static,
    ) where
        C::Dump: 'static,
    {
        let news = self.teller.clone();
        let bulk = self.bulk();
        thread::spawn(move || {
            let result = match bulk {
                Ok(bulk) => work(&bulk, &news),
                Err(_) => Err(BulkError::Link(LinkError::Closed)),
            };
            let event = match result {
                Ok(()) | Err(BulkError::Stopped) => return,
                Err(BulkError::Link(error)) => {
                    // The receiving thread knows better: the target may have said why before it closed the link.
                    thread::sleep(LAST_WORD_MAX);
                    Event::LinkLost { cause: causes(&error) }
                }
                Err(error) => Event::Failed { cause: causes(&error) },
            };
            news.send(News::Event(event)).ok();
        });
    }

    pub(super) fn send_blobs(&mut self) {
        let origin = Arc::clone(&self.origin);
        let (offered, missing) = (std::mem::take(&mut self.offered), std::mem::take(&mut self.missing));
        self.in_background(move |bulk, _| blobs::send(bulk, origin.as_ref(), &offered, &missing));
    }

    /// Prepares CRIU first: what is in the way of a dump is best known before anything is copied.
    pub(super) fn send_rootfs(&mut self) -> Result<(), Cause> {
        let images = ImageDir::make(self.order.request.images, image_dir::room_bytes())?;
        let way = self.plan.as_ref().map(|plan| plan.way).filter(|way| way.is_ours());
        self.memory = way.map(|way| self.start_memory(way)).transpose()?;
        let hidden = self.memory.as_ref().map(|memory| &memory.hidden);
        let dump = self.container.prepare(images.path(), hidden, &self.ahead)?;
        self.images = Some(images);
        let rootfs = self.order.rootfs.clone();
        let sent = Arc::clone(&self.sent);
        self.in_background(move |bulk, news| {
            let mut copier = Box::new(Copier::open(&LayerRoot::of(&rootfs)?)?);
            send_pass(&mut copier, Pass::Live, &BTreeSet::new(), bulk, &sent)?;
            news.send(News::Copied { copier, dump }).ok();
            news.send(News::Event(Event::RootfsSent)).ok();
            bulk.send(&Message::RootfsEnd { pass: Pass::Live })
        });
        Ok(())
    }

    /// Starts the thread that follows and sends the tasks' memory.
    fn start_memory(&self, way: Way) -> Result<Memory, Cause> {
        let request = &self.order.request;
        let route = Route {
            host: request.host.clone(),
            port: request.port,
            migration: self.order.migration.clone(),
            streams: self.stream_count(),
            way,
            hot_threshold: request.limits.hot_threshold,
        };
        let news = self.teller.clone();
        let tell = move |told| {
            let told = match told {
                Told::Open(streams) => News::Streams(streams),
                Told::Event(event) => News::Event(event),
            };
            news.send(told).ok();
        };
        let (tasks, sent) = (self.container.tasks()?, Arc::clone(&self.sent));
        Ok(Memory::start(route, tasks, self.ahead.clone(), sent, tell)?)
    }

    /// As many as the processors can keep busy, less one: each stream takes one to read and send, and one to receive,
    /// and a container that misses pages needs one to ask for them and to go on.
    fn stream_count(&self) -> u8 {
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let usual = u8::try_from((processors - 1).clamp(1, STREAMS_USUAL_MAX)).unwrap_or(1);
        self.order.request.limits.streams.unwrap_or(usual)
    }

    pub(super) fn open_streams(&mut self) -> Result<(), Cause> {
        self.memory.as_ref().ok_or("the memory is not followed")?.open();
        Ok(())
    }

    pub(super) fn with_memory(&self, order: impl FnOnce(&Memory)) {
        if let Some(memory) = &self.memory {
            order(memory);
        }
    }

    pub(super) fn freeze(&mut self) -> Result<(), Cause> {
        self.container.freeze()?;
        let event = match self.container.unsettled()? {
            Some(cause) => {
                self.container.thaw()?;
                log::info!("the tasks run on for a moment: {cause}");
                Event::Unsettled { cause }
            }
            None => Event::Froze,
        };
        self.report(News::Event(event));
        Ok(())
    }

    pub(super) fn start_dump(&mut self, leave_pages: bool) -> Result<(), Cause> {
        let prepared = self.prepared.take().zip(self.images.as_ref());
        let ((copier, dump), images) = prepared.ok_or("the dump was not prepared")?;
        let bulk = self.bulk()?;
        let (hidden, planned) = match &mut self.memory {
            Some(memory) => {
                let Cut { hidden, planned } = memory.cut(leave_pages, bulk);
                (Some(hidden), Some(planned))
            }
            None => (None, None),
        };
        let untraced = self.container.untraced_files();
        let dumped = Arc::new(AtomicBool::new(false));
        let (verdict, verdicts) = channel();
        let news = self.teller.clone();
        let thread = thread::spawn({
            let dumped = Arc::clone(&dumped);
            move || {
                let decide = |confirm: Confirm<'_>| {
                    news.send(News::Event(Event::Dumped)).ok();
                    // After the event: the state can be complete only behind it.
                    dumped.store(true, Ordering::Release);
                    news.send(News::Event(match confirm() {
                        Ok(()) => Event::Confirmed,
                        Err(cause) => Event::Failed { cause: causes(cause.as_ref()) },
                    }))
                    .ok();
                    // Without a verdict nobody is left to give one, and the container goes on.
                    verdicts.recv().unwrap_or(Verdict::Release)
                };
                if hidden.is_some_and(|hidden| hidden.recv().is_err()) {
                    // The memory thread has said why.
                    return Err("the memory could not be hidden from criu".to_owned());
                }
                dump.run(decide).map_err(|cause| {
                    let cause = causes(cause.as_ref());
                    news.send(News::Event(Event::Failed { cause: cause.clone() })).ok();
                    cause
                })
            }
        });
        self.dump = Some(Dump { verdict, thread });
        self.stream(copier, untraced, ImageStream::of(images.path()), dumped, planned);
        Ok(())
    }

    /// Sends the final pass, and the images while CRIU writes them.
    fn stream(
        &self,
        mut copier: Box<Copier>,
        untraced: BTreeSet<Vec<u8>>,
        mut images: ImageStream,
        dumped: Arc<AtomicBool>,
        planned: Option<Receiver<()>>,
    ) {
        let sent = Arc::clone(&self.sent);
        self.in_background(move |bulk, news| {
            send_pass(&mut copier, Pass::Final, &untraced, bulk, &sent)?;
            bulk.send(&Message::RootfsEnd { pass: Pass::Final })?;
            while !dumped.load(Ordering::Acquire) {
                if !images.send_grown(bulk)? {
                    bulk.check()?;
                    thread::sleep(GROWTH_POLL);
                }
            }
            images.send_rest(bulk)?;
            sent.pages.fetch_add(images.page_bytes(), Ordering::Relaxed);
            sent.state.store(images.state_bytes(), Ordering::Relaxed);
            if planned.is_some_and(|planned| planned.recv().is_err()) {
                return Err(BulkError::Stopped);
            }
            news.send(News::Event(Event::StateSent)).ok();
            images.send_manifest(bulk)
        });
    }

    pub(super) fn commit(&mut self) -> Result<(), Cause> {
        (self.tell)(&worker::Event::Committing);
        Ok(self.bulk()?.send_always(&Message::Commit)?)
    }

    /// Ends link and streams, and asks what the target has; if it lacks pages that can be given, opens others.
    pub(super) fn rejoin(&self, pause: Duration, reopen: bool) {
        if let Some(link) = &self.link {
            link.breaker.break_link();
        }
        self.with_memory(Memory::stop);
        log::warn!(
            migration = self.order.migration.as_str(), side = "source", reopen;
            "the target is looked for again: it runs the container, and has not said that it has all pages"
        );
        let (news, bulk_count) = (self.teller.clone(), self.stream_count());
        let (request, migration) = (self.order.request.clone(), self.order.migration.clone());
        thread::spawn(move || {
            thread::sleep(pause);
            let answer = match rejoin(&request, &migration, bulk_count, reopen) {
                Ok(Answer::Open(reopened)) => News::Reopened(reopened),
                Ok(Answer::Fate(answer)) => News::Event(Event::Answered(answer)),
                Err(error) => News::Event(Event::AskFailed { cause: causes(&error) }),
            };
            news.send(answer).ok();
        });
    }

    /// Takes the way to a target that lacks pages. A worker in the place of one that died gets at them here.
    pub(super) fn reopened(&mut self, Reopened { link, streams, lacking }: Reopened) -> Event {
        if self.memory.is_none() {
            match self.start_memory(Way::Postcopy) {
                Ok(memory) => self.memory = Some(memory),
                Err(cause) => return Event::AskFailed { cause: causes(cause.as_ref()) },
            }
        }
        if let Some(memory) = &mut self.memory {
            memory.reopen(&streams, lacking);
        }
        self.streams = Some(streams);
        self.attach(link);
        Event::Rejoined
    }

    pub(super) fn ask_fate(&self, pause: Duration) {
        let news = self.teller.clone();
        let (request, migration) = (self.order.request.clone(), self.order.migration.clone());
        thread::spawn(move || {
            thread::sleep(pause);
            let event = match ask::ask(&request, &migration) {
                Ok(answer) => Event::Answered(answer),
                Err(error) => Event::AskFailed { cause: causes(&error) },
            };
            news.send(News::Event(event)).ok();
        });
    }

    /// Lets CRIU kill the tasks, and kills what it leaves. The container runs or ran elsewhere: nothing here is an error
    /// that could change that.
    pub(super) fn kill(&mut self) {
        self.moved_at = self.clock.now();
        // No page is needed any more, and CRIU has to find the tasks as it left them.
        if let Some(memory) = self.memory.take() {
            memory.finish();
        }
        if let Err(cause) = self.end_dump(Verdict::Kill) {
            log::warn!("criu did not end the moved container's tasks: {cause}");
        }
        if let Err(cause) = self.container.kill() {
            log::error!("tasks of the moved container are left: {}", causes(cause.as_ref()));
        }
        self.report(News::Event(Event::Killed));
    }

    fn end_dump(&mut self, verdict: Verdict) -> Result<(), String> {
        let Some(dump) = self.dump.take() else { return Ok(()) };
        // A dump that has failed takes no verdict any more.
        dump.verdict.send(verdict).ok();
        dump.thread.join().unwrap_or_else(|_| Err("its thread panicked".to_owned()))
    }

    /// The container first, the target afterwards: one is down, the other only waits.
    pub(super) fn roll_back(&mut self, tell: Option<&str>) {
        if let Some(link) = &self.link {
            link.bulk.stop();
        }
        self.memory = None;
        self.prepared = None;
        if let Err(cause) = self.end_dump(Verdict::Release) {
            log::debug!("criu: {cause}");
        }
        let event = match self.container.thaw() {
            Ok(()) => Event::RolledBack,
            Err(cause) => Event::RollbackFailed { cause: causes(cause.as_ref()) },
        };
        self.take_leave(tell);
        self.images = None;
        self.report(News::Event(event));
    }

    /// Tells the target why, if it takes it in time, and ends the link.
    fn take_leave(&mut self, tell: Option<&str>) {
        let Some(Connected { bulk, breaker }) = self.link.take() else { return };
        if let Some(detail) = tell.map(str::to_owned) {
            let (told, done) = channel();
            thread::spawn(move || {
                bulk.send_always(&Message::Abort { detail: &detail }).ok();
                told.send(()).ok();
            });
            // The loop of the receiving thread drains what the target still sends meanwhile.
            done.recv_timeout(LAST_WORD_MAX).ok();
        }
        breaker.break_link();
    }

    pub(super) fn leave_frozen(&mut self) {
        // Before CRIU is let go, so that no guard thaws what CRIU gives back frozen.
        self.container.leave_frozen();
        if let Err(cause) = self.end_dump(Verdict::Release) {
            log::debug!("criu: {cause}");
        }
    }

    pub(super) fn clean_up(&mut self) {
        self.take_leave(None);
        if let Err(cause) = self.origin.clean_up() {
            log::warn!("something of the moved container is left here: {}", causes(cause.as_ref()));
        }
        self.report(News::Event(Event::CleanedUp));
    }
}

fn send_pass(
    copier: &mut Copier,
    pass: Pass,
    untraced: &BTreeSet<Vec<u8>>,
    bulk: &BulkLink,
    sent: &Sent,
) -> Result<(), BulkError> {
    let mut sender = RootfsSender::over(bulk);
    let copied = copier.copy(pass, untraced, &mut sender);
    sent.rootfs.fetch_add(sender.bytes, Ordering::Relaxed);
    bulk.check()?;
    Ok(copied?)
}

/// How often page files are looked at while CRIU writes.
const GROWTH_POLL: Duration = Duration::from_micros(500);
/// How long a last message may take in either direction.
pub(super) const LAST_WORD_MAX: Duration = Duration::from_millis(500);
/// Bulk streams on a host with many processors: more only share the same network.
const STREAMS_USUAL_MAX: usize = 4;
