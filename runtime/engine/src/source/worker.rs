//! The loop that steps the machine and executes its actions.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use godwit_protocol::failure::Fate;
use godwit_protocol::offer::{self, Accept};
use godwit_protocol::report::{Bytes, CpuSeconds, DowntimeParts, Outcome, Pages, Report, Tick};
use godwit_protocol::rootfs::Pass;
use godwit_protocol::source::{Action, End, Event, Moved, PeerEvent, Source, Step};
use godwit_protocol::wire::Message;
use godwit_protocol::worker::{self, Command, Snapshot};
use godwit_protocol::{Failure, Phase};

use super::bulk::{BulkError, BulkLink, RootfsSender};
use super::container::{Cause, Checkpointer, Dumping, Verdict};
use super::images::ImageStream;
use super::listen::{Heard, listen};
use super::progress::{INTERVAL, Rate};
use super::{Order, Origin, ask, blobs};
use crate::clock::Clock;
use crate::image_dir::{self, ImageDir};
use crate::link::{Breaker, Link, LinkError};
use crate::rootfs::{Copier, LayerRoot};
use crate::text::causes;
use crate::usage::Usage;

/// What the threads report.
enum News<D> {
    Event(Event),
    Connected(Box<Link>),
    Accepted(Box<Accept>),
    /// The live pass is over and CRIU is ready; what both need for the second half.
    Copied {
        copier: Box<Copier>,
        dump: D,
    },
    /// A command, or `None` when nobody will give one any more.
    Command(Option<Command>),
}

/// The open link.
#[derive(Debug)]
struct Connected {
    bulk: BulkLink,
    breaker: Breaker,
}

/// CRIU at work.
#[derive(Debug)]
struct Dump {
    verdict: Sender<Verdict>,
    thread: JoinHandle<Result<(), String>>,
}

/// What was sent, by what it was for.
#[derive(Debug, Default)]
struct Sent {
    rootfs: AtomicU64,
    pages: AtomicU64,
    state: AtomicU64,
}

pub(super) struct Worker<C: Checkpointer, T> {
    order: Order,
    origin: Arc<dyn Origin>,
    container: C,
    clock: Clock,
    tell: T,
    teller: Sender<News<C::Dump>>,
    news: Receiver<News<C::Dump>>,
    link: Option<Connected>,
    offered: Vec<offer::Blob>,
    missing: Vec<String>,
    images: Option<ImageDir>,
    prepared: Option<(Box<Copier>, C::Dump)>,
    dump: Option<Dump>,
    sent: Arc<Sent>,
    expected_bytes: u64,
    rate: Rate,
    told_at: Tick,
    phase: Option<(Phase, Tick)>,
    moved_at: Tick,
}

impl<C: Checkpointer, T: FnMut(&worker::Event)> Worker<C, T> {
    pub(super) fn new(order: Order, origin: Arc<dyn Origin>, container: C, clock: Clock, tell: T) -> Self {
        let (teller, news) = channel();
        Self {
            order,
            origin,
            container,
            clock,
            tell,
            teller,
            news,
            link: None,
            offered: Vec::new(),
            missing: Vec::new(),
            images: None,
            prepared: None,
            dump: None,
            sent: Arc::default(),
            expected_bytes: 0,
            rate: Rate::default(),
            told_at: Tick::default(),
            phase: None,
            moved_at: Tick::default(),
        }
    }

    pub(super) fn run(mut self, commands: Receiver<Command>, first: Step) -> End {
        self.listen_for_commands(commands);
        let mut source = self.take(first);
        loop {
            if let Some(end) = source.end() {
                self.log_phase(None);
                return end.clone();
            }
            let Some(event) = self.next_event(&source) else { continue };
            log::debug!("{} takes {}", source.label(), event.label());
            let now = self.clock.now();
            let step = source.step(event, now);
            source = self.take(step);
        }
    }

    /// Executes the actions of a step.
    fn take(&mut self, step: Step) -> Source {
        let Step { state, actions } = step;
        let phase = state.phase();
        if self.phase.is_none_or(|(before, _)| before != phase) {
            self.log_phase(Some(phase));
            self.tell_progress(phase);
        }
        for action in actions {
            self.act(action, state.moved());
        }
        state
    }

    /// Waits for the next event; `None` if it is time for something else.
    fn next_event(&mut self, source: &Source) -> Option<Event> {
        let deadline = source.deadline();
        let wait = deadline.map_or(INTERVAL, |tick| self.clock.until(tick).min(INTERVAL));
        let news = match self.news.recv_timeout(wait) {
            Ok(news) => news,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                if deadline.is_some_and(|tick| tick <= self.clock.now()) {
                    return Some(Event::Deadline);
                }
                self.tell_progress(source.phase());
                return None;
            }
        };
        if self.told_at.ms_since(Tick::default()) + INTERVAL.as_secs_f64() * 1e3
            < self.clock.now().ms_since(Tick::default())
        {
            self.tell_progress(source.phase());
        }
        self.event_of(news)
    }

    fn event_of(&mut self, news: News<C::Dump>) -> Option<Event> {
        match news {
            News::Event(event) => Some(event),
            News::Connected(link) => {
                self.attach(*link);
                Some(Event::LinkUp)
            }
            News::Accepted(accept) => {
                let size = |digest: &String| {
                    self.offered.iter().find(|blob| blob.digest == *digest).map(|blob| blob.size)
                };
                self.expected_bytes += accept.missing.iter().filter_map(size).sum::<u64>();
                self.missing = accept.missing;
                Some(Event::Peer(PeerEvent::Accepted))
            }
            News::Copied { copier, dump } => {
                self.prepared = Some((copier, dump));
                None
            }
            News::Command(Some(Command::Cancel)) => Some(Event::Cancel),
            News::Command(Some(Command::Release)) => Some(Event::Release),
            News::Command(None) => {
                // Each of the two matters only where the other does not.
                self.report(News::Event(Event::Release));
                Some(Event::Cancel)
            }
        }
    }

    fn act(&mut self, action: Action, moved: Option<Moved>) {
        let result = match action {
            Action::Connect => {
                self.connect();
                Ok(())
            }
            Action::SendOffer => self.send_offer(),
            Action::SendBlobs => {
                self.send_blobs();
                Ok(())
            }
            Action::SendRootfs => self.send_rootfs(),
            Action::Freeze => self.freeze(),
            Action::Dump => self.start_dump(),
            Action::Commit => self.commit(),
            Action::AskFate { pause } => {
                self.ask_fate(pause);
                Ok(())
            }
            Action::Kill => {
                self.kill();
                Ok(())
            }
            Action::ReportMoved => {
                self.report_moved(moved);
                Ok(())
            }
            Action::CleanUp => {
                self.clean_up();
                Ok(())
            }
            Action::RollBack { tell } => {
                self.roll_back(tell.as_deref());
                Ok(())
            }
            Action::LeaveFrozen => {
                self.leave_frozen();
                Ok(())
            }
            Action::ReportChecked => {
                let report = self.report_of(Outcome::Checked, None);
                (self.tell)(&worker::Event::Committed { report: Box::new(report) });
                Ok(())
            }
            Action::ReportFailed { failure } => {
                self.report_failed(failure);
                Ok(())
            }
        };
        if let Err(cause) = result {
            self.report(News::Event(Event::Failed { cause: causes(cause.as_ref()) }));
        }
    }

    fn report(&self, news: News<C::Dump>) {
        // Fails only when the loop has ended, which nothing that is reported could change.
        self.teller.send(news).ok();
    }

    fn listen_for_commands(&self, commands: Receiver<Command>) {
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

    fn connect(&self) {
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

    fn attach(&mut self, link: Link) {
        let breaker = link.breaker();
        let (send, receive) = link.split();
        let news = self.teller.clone();
        thread::spawn(move || {
            listen(receive, |heard| {
                let heard = match heard {
                    Heard::Event(event) => News::Event(event),
                    Heard::Accepted(accept) => News::Accepted(accept),
                };
                news.send(heard).is_ok()
            });
        });
        self.link = Some(Connected { bulk: BulkLink::over(send), breaker });
    }

    fn bulk(&self) -> Result<BulkLink, Cause> {
        let link = self.link.as_ref().ok_or(LinkError::Closed)?;
        Ok(link.bulk.clone())
    }

    fn send_offer(&mut self) -> Result<(), Cause> {
        let offer = self.origin.offer()?;
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

    fn send_blobs(&mut self) {
        let origin = Arc::clone(&self.origin);
        let (offered, missing) = (std::mem::take(&mut self.offered), std::mem::take(&mut self.missing));
        self.in_background(move |bulk, _| blobs::send(bulk, origin.as_ref(), &offered, &missing));
    }

    /// Prepares CRIU first: what is in the way of a dump is best known before anything is copied.
    fn send_rootfs(&mut self) -> Result<(), Cause> {
        let images = ImageDir::new(image_dir::room_bytes())?;
        let dump = self.container.prepare(images.path())?;
        self.images = Some(images);
        let rootfs: PathBuf = self.order.rootfs.clone();
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

    fn freeze(&mut self) -> Result<(), Cause> {
        self.container.freeze()?;
        self.report(News::Event(Event::Froze));
        Ok(())
    }

    fn start_dump(&mut self) -> Result<(), Cause> {
        let prepared = self.prepared.take().zip(self.images.as_ref());
        let ((copier, dump), images) = prepared.ok_or("the dump was not prepared")?;
        let untraced = self.container.untraced_files();
        let dumped = Arc::new(AtomicBool::new(false));
        let (verdict, verdicts) = channel();
        let news = self.teller.clone();
        let thread = thread::spawn({
            let dumped = Arc::clone(&dumped);
            move || {
                let decide = || {
                    news.send(News::Event(Event::Dumped)).ok();
                    // After the event: the state can be complete only behind it.
                    dumped.store(true, Ordering::Release);
                    // Without a verdict nobody is left to give one, and the container goes on.
                    verdicts.recv().unwrap_or(Verdict::Release)
                };
                dump.run(decide).map_err(|cause| {
                    let cause = causes(cause.as_ref());
                    news.send(News::Event(Event::Failed { cause: cause.clone() })).ok();
                    cause
                })
            }
        });
        self.dump = Some(Dump { verdict, thread });
        self.stream(copier, untraced, ImageStream::of(images.path()), dumped);
        Ok(())
    }

    /// Sends the final pass, and the images while CRIU writes them.
    fn stream(
        &self,
        mut copier: Box<Copier>,
        untraced: BTreeSet<Vec<u8>>,
        mut images: ImageStream,
        dumped: Arc<AtomicBool>,
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
            sent.pages.store(images.page_bytes(), Ordering::Relaxed);
            sent.state.store(images.state_bytes(), Ordering::Relaxed);
            news.send(News::Event(Event::StateSent)).ok();
            images.send_manifest(bulk)
        });
    }

    fn commit(&mut self) -> Result<(), Cause> {
        (self.tell)(&worker::Event::Committing);
        Ok(self.bulk()?.send_always(&Message::Commit)?)
    }

    fn ask_fate(&self, pause: Duration) {
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

    /// Lets CRIU kill the tasks, and kills what it leaves. The container runs elsewhere: nothing here is an error
    /// that could change that.
    fn kill(&mut self) {
        self.moved_at = self.clock.now();
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
    fn roll_back(&mut self, tell: Option<&str>) {
        if let Some(link) = &self.link {
            link.bulk.stop();
        }
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

    fn leave_frozen(&mut self) {
        // Before CRIU is let go, so that no guard thaws what CRIU gives back frozen.
        self.container.leave_frozen();
        if let Err(cause) = self.end_dump(Verdict::Release) {
            log::debug!("criu: {cause}");
        }
    }

    fn clean_up(&mut self) {
        self.take_leave(None);
        if let Err(cause) = self.origin.clean_up() {
            log::warn!("something of the moved container is left here: {}", causes(cause.as_ref()));
        }
        self.report(News::Event(Event::CleanedUp));
    }

    fn report_moved(&mut self, moved: Option<Moved>) {
        let report = self.report_of(Outcome::Migrated, moved);
        log::info!(
            migration = self.order.migration.as_str(), side = "source", mode = self.order.request.mode.name();
            "moved: down {:.1} ms, {:.1} ms in all, {} bytes", report.downtime_ms, report.total_ms, report.bytes.wire
        );
        (self.tell)(&worker::Event::Committed { report: Box::new(report) });
    }

    fn report_failed(&mut self, failure: Failure) {
        log::error!(
            migration = self.order.migration.as_str(), side = "source", mode = self.order.request.mode.name(),
            phase = failure.phase.label();
            "{failure}"
        );
        (self.tell)(&worker::Event::Failed { failure });
    }

    fn report_of(&self, outcome: Outcome, moved: Option<Moved>) -> Report {
        let usage = Usage::so_far();
        let resumed = moved.map(|moved| moved.resumed).unwrap_or_default();
        let downtime = moved.map_or_else(DowntimeParts::default, |moved| moved.downtime);
        let memory = self.sent.pages.load(Ordering::Relaxed);
        let pages = memory / PAGE_BYTES;
        let ended_at = if moved.is_some() { self.moved_at } else { self.clock.now() };
        Report {
            id: self.order.id.clone(),
            migration: self.order.migration.clone(),
            mode: self.order.request.mode,
            outcome,
            fate: if moved.is_some() { Fate::RunningOnTarget } else { Fate::RunningOnSource },
            total_ms: ended_at.ms_since(Tick::default()),
            downtime_ms: downtime.total_ms(),
            downtime,
            // CRIU leaves out pages that were never touched and keeps no account of zero ones it finds.
            pages: Pages { total: pages, normal: pages, zero: 0 },
            bytes: Bytes {
                state: self.sent.state.load(Ordering::Relaxed),
                memory,
                rootfs: self.sent.rootfs.load(Ordering::Relaxed),
                wire: self.sent_bytes(),
            },
            disk_bytes_written: usage.disk_bytes_written + resumed.disk_bytes_written,
            cpu_s: CpuSeconds { source: seconds(usage.cpu_us), target: seconds(resumed.cpu_us) },
        }
    }

    fn sent_bytes(&self) -> u64 {
        self.link.as_ref().map_or(0, |link| link.bulk.sent_bytes())
    }

    fn tell_progress(&mut self, phase: Phase) {
        let now = self.clock.now();
        let sent_bytes = self.sent_bytes();
        let snapshot = Snapshot {
            migration: self.order.migration.clone(),
            id: self.order.id.clone(),
            mode: self.order.request.mode,
            phase,
            elapsed_ms: now.0 / 1_000_000,
            sent_bytes,
            expected_bytes: self.expected_bytes.max(sent_bytes),
            rate_bytes_per_s: self.rate.sample(now, sent_bytes),
            ended: None,
        };
        self.told_at = now;
        (self.tell)(&worker::Event::Progress { snapshot });
    }

    /// Logs the end of the phase that was and the begin of the one that is, each once.
    fn log_phase(&mut self, next: Option<Phase>) {
        let now = self.clock.now();
        let (migration, mode) = (self.order.migration.as_str(), self.order.request.mode.name());
        if let Some((phase, since)) = self.phase {
            let ms = now.ms_since(since);
            log::info!(migration, side = "source", mode, phase = phase.label(); "{phase} ends after {ms:.1} ms");
        }
        if let Some(phase) = next {
            log::info!(migration, side = "source", mode, phase = phase.label(); "{phase} begins");
        }
        self.phase = next.map(|phase| (phase, now));
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

fn seconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64()
}

const PAGE_BYTES: u64 = 4096;
/// How often page files are looked at while CRIU writes.
const GROWTH_POLL: Duration = Duration::from_micros(500);
/// How long a last message may take in either direction.
const LAST_WORD_MAX: Duration = Duration::from_millis(500);
