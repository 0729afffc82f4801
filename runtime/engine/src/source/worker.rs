//! The loop that steps the machine and executes its actions.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

use godwit_memory::ahead::Ahead;
use godwit_protocol::offer::{self, Accept};
use godwit_protocol::plan::{Abilities, Plan};
use godwit_protocol::report::{Outcome, Round, Tick};
use godwit_protocol::source::{Action, End, Event, PeerEvent, Source, Step};
use godwit_protocol::worker::{self, Command};
use godwit_protocol::{MigrationRequest, Phase};

use super::bulk::BulkLink;
use super::container::{Checkpointer, Verdict};
use super::listen::Heard;
use super::memory::Memory;
use super::progress::{INTERVAL, Rate};
use super::rejoin::Reopened;
use super::{Order, Origin};
use crate::clock::Clock;
use crate::image_dir::ImageDir;
use crate::link::{Breaker, Link};
use crate::pages::PageStreams;
use crate::rootfs::Copier;
use crate::text::causes;

/// What the threads report.
pub(super) enum News<D> {
    Event(Event),
    /// What came over the link of this number.
    Heard(u32, Heard),
    Reopened(Box<Reopened>),
    Connected(Box<Link>),
    Streams(Arc<PageStreams>),
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
pub(super) struct Connected {
    pub(super) bulk: BulkLink,
    pub(super) breaker: Breaker,
}

/// CRIU at work.
#[derive(Debug)]
pub(super) struct Dump {
    pub(super) verdict: Sender<Verdict>,
    pub(super) thread: JoinHandle<Result<(), String>>,
}

/// What was sent, by what it was for.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pub(super) rootfs: AtomicU64,
    /// Bytes of contents.
    pub(super) pages: AtomicU64,
    /// Pages for which nothing but their names travelled.
    pub(super) zero_pages: AtomicU64,
    pub(super) state: AtomicU64,
}

pub(super) struct Worker<C: Checkpointer, T> {
    pub(super) order: Order,
    pub(super) origin: Arc<dyn Origin>,
    pub(super) container: C,
    pub(super) abilities: Abilities,
    pub(super) clock: Clock,
    pub(super) tell: T,
    pub(super) teller: Sender<News<C::Dump>>,
    pub(super) news: Receiver<News<C::Dump>>,
    pub(super) link: Option<Connected>,
    /// Counts the links: what was said of an earlier one may be heard when there is another.
    pub(super) link_number: u32,
    pub(super) offered: Vec<offer::Blob>,
    pub(super) missing: Vec<String>,
    pub(super) images: Option<ImageDir>,
    pub(super) prepared: Option<(Box<Copier>, C::Dump)>,
    pub(super) dump: Option<Dump>,
    pub(super) plan: Option<Plan>,
    pub(super) memory: Option<Memory>,
    /// What is known of the tasks' mappings before the freeze.
    pub(super) ahead: Ahead,
    pub(super) streams: Option<Arc<PageStreams>>,
    pub(super) sent: Arc<Sent>,
    pub(super) expected_bytes: u64,
    pub(super) rate: Rate,
    pub(super) told_at: Tick,
    pub(super) phase: Option<(Phase, Tick)>,
    /// The latest round that ended.
    pub(super) round: Option<Round>,
    pub(super) moved_at: Tick,
}

impl<C: Checkpointer, T: FnMut(&worker::Event)> Worker<C, T> {
    pub(super) fn new(order: Order, origin: Arc<dyn Origin>, container: C, clock: Clock, tell: T) -> Self {
        let (teller, news) = channel();
        Self {
            order,
            origin,
            abilities: container.abilities(),
            container,
            clock,
            tell,
            teller,
            news,
            link: None,
            link_number: 0,
            offered: Vec::new(),
            missing: Vec::new(),
            images: None,
            prepared: None,
            dump: None,
            plan: None,
            memory: None,
            ahead: Ahead::default(),
            streams: None,
            sent: Arc::default(),
            expected_bytes: 0,
            rate: Rate::default(),
            told_at: Tick::default(),
            phase: None,
            round: None,
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
        self.round = state.rounds().last().copied();
        if self.phase.is_none_or(|(before, _)| before != phase) {
            self.log_phase(Some(phase));
            self.tell_progress(phase);
        }
        for action in actions {
            self.act(action, &state);
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
            News::Heard(number, _) if number != self.link_number => None,
            News::Heard(_, Heard::Event(event)) => Some(event),
            News::Heard(_, Heard::Accepted(accept)) => Some(self.accepted(*accept)),
            News::Reopened(reopened) => Some(self.reopened(*reopened)),
            News::Connected(link) => {
                self.attach(*link);
                Some(Event::LinkUp)
            }
            News::Copied { copier, dump } => {
                self.prepared = Some((copier, dump));
                None
            }
            News::Streams(streams) => {
                if let Some(memory) = &mut self.memory {
                    memory.opened(&streams);
                }
                self.streams = Some(streams);
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

    fn accepted(&mut self, accept: Accept) -> Event {
        let size =
            |digest: &String| self.offered.iter().find(|blob| blob.digest == *digest).map(|blob| blob.size);
        self.expected_bytes += accept.missing.iter().filter_map(size).sum::<u64>();
        self.missing = accept.missing;
        let MigrationRequest { mode, images, limits, .. } = &self.order.request;
        match Plan::choose(*mode, *images, limits, &self.abilities, &accept.abilities) {
            Ok(plan) => {
                let way = plan.way;
                self.plan = Some(plan);
                Event::Peer(PeerEvent::Accepted(way))
            }
            Err(cause) => Event::Failed { cause },
        }
    }

    fn act(&mut self, action: Action, source: &Source) {
        let done = match action {
            Action::SendOffer => self.send_offer(),
            Action::SendRootfs => self.send_rootfs(),
            Action::Freeze => self.freeze(),
            Action::OpenStreams => self.open_streams(),
            Action::Dump { leave_pages } => self.start_dump(leave_pages),
            Action::Commit => self.commit(),
            other => {
                self.act_surely(other, source);
                Ok(())
            }
        };
        if let Err(cause) = done {
            self.report(News::Event(Event::Failed { cause: causes(cause.as_ref()) }));
        }
    }

    /// The actions that report how they end by an event of their own, or cannot fail.
    fn act_surely(&mut self, action: Action, source: &Source) {
        match action {
            Action::Scan => self.with_memory(Memory::scan),
            Action::SendRound { round, hold_back } => {
                self.with_memory(|memory| memory.send_round(round, hold_back));
            }
            Action::Serve => self.with_memory(Memory::serve),
            Action::Connect => self.connect(),
            Action::SendBlobs => self.send_blobs(),
            Action::Rejoin { pause, reopen } => self.rejoin(pause, reopen),
            Action::AskFate { pause } => self.ask_fate(pause),
            Action::Kill => self.kill(),
            Action::ReportMoved => self.report_moved(source),
            Action::CleanUp => self.clean_up(),
            Action::RollBack { tell } => self.roll_back(tell.as_deref()),
            Action::LeaveFrozen => self.leave_frozen(),
            Action::ReportChecked => {
                let report = Box::new(self.report_of(Outcome::Checked, source));
                (self.tell)(&worker::Event::Committed { report });
            }
            Action::ReportFailed { failure } => self.report_failed(failure),
            Action::SendOffer
            | Action::SendRootfs
            | Action::OpenStreams
            | Action::Freeze
            | Action::Dump { .. }
            | Action::Commit => {
                unreachable!("taken by `act`")
            }
        }
    }

    pub(super) fn report(&self, news: News<C::Dump>) {
        // Fails only when the loop has ended, which nothing that is reported could change.
        self.teller.send(news).ok();
    }
}
