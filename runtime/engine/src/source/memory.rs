//! The thread that follows the tasks' memory and sends it.
//!
//! ```text
//! orders: open ─► (scan ─► round)… ─► cut ─► serve or finish ─► (ends with its owner)
//!                                       │      ▲ reopen: after the link was lost, or in the place of a dead worker
//!    frozen: hide all of it from CRIU ──► the dump may begin
//!            final scan ──► rest of the pages, or none ──► plan on the main link ──► the state may end
//! ```
//! It decides nothing: when to scan, send, cut and serve is the machine's. What it finds and sends is reported as
//! events. Everything that CRIU restores lazily is ours to move; the rest travels in its images.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use godwit_memory::PageSet;
use godwit_memory::ahead::Ahead;
use godwit_memory::hide::Hidden;
use godwit_memory::maps::{self, Dumped};
use godwit_memory::tracker::{self, Collection, DirtyTracker};
use godwit_protocol::MigrationId;
use godwit_protocol::plan::Way;
use godwit_protocol::source::{Event, RoundSent};
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::{PAGE_BYTES, RUNS_MAX, Run};

use super::bulk::BulkLink;
use super::container::Tasks;
use super::pending::Pending;
use super::work::LAST_WORD_MAX;
use super::worker::Sent;
use crate::Cause;
use crate::pages::{PageStreams, PagesError, SpaceWork, StreamsBreaker};
use crate::text::causes;

/// Where the pages go, and how.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) migration: MigrationId,
    pub(super) streams: u8,
    pub(super) way: Way,
    pub(super) hot_threshold: u32,
}

/// What the thread is told to do.
enum Order {
    Open,
    Scan,
    SendRound {
        round: u32,
        hold_back: bool,
    },
    Cut {
        leave_pages: bool,
        link: BulkLink,
        hidden: Sender<()>,
        planned: Sender<()>,
        begin_push: Receiver<()>,
    },
    Reopen {
        streams: Arc<PageStreams>,
        lacking: BTreeMap<i32, PageSet>,
        begin_push: Receiver<()>,
    },
    Finish,
}

/// The thread, from its owner's side. Dropped, it ends, and the tasks are not followed any more.
#[derive(Debug)]
pub(super) struct Memory {
    orders: Sender<Order>,
    /// What CRIU is not to see; filled in by the cut.
    pub(super) hidden: Hidden,
    streams: Option<StreamsBreaker>,
    /// The word that pages which were left here may be pushed.
    push: Option<Sender<()>>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

/// What the dump and the stream of images wait for in the freeze.
#[derive(Debug)]
pub(super) struct Cut {
    /// Ends with an error if the memory cannot be hidden.
    pub(super) hidden: Receiver<()>,
    /// Ends with an error if the pages cannot be sent.
    pub(super) planned: Receiver<()>,
}

/// What the thread tells.
pub(super) enum Told {
    /// The streams are open.
    Open(Arc<PageStreams>),
    Event(Event),
}

impl Memory {
    /// Starts the thread; it does nothing yet.
    pub(super) fn start(
        route: Route,
        tasks: Box<dyn Tasks>,
        ahead: Ahead,
        sent: Arc<Sent>,
        tell: impl Fn(Told) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (orders, received) = channel();
        let hidden = Hidden::default();
        let pending = Pending::of(route.hot_threshold);
        let follower = Follower {
            route,
            tasks,
            hidden: hidden.clone(),
            ahead,
            tracker: None,
            streams: None,
            pending,
            round: 0,
            remote: Vec::new(),
            sent,
        };
        let (running, ended) = channel();
        let body = move || {
            follower.run(&received, tell);
            drop::<Sender<()>>(running);
        };
        thread::Builder::new().name("memory".to_owned()).spawn(body)?;
        Ok(Self { orders, hidden, streams: None, push: None, ended })
    }

    /// Takes what stops the streams, once they are open.
    pub(super) fn opened(&mut self, streams: &PageStreams) {
        self.streams = Some(streams.breaker());
    }

    pub(super) fn open(&self) {
        self.order(Order::Open);
    }

    pub(super) fn scan(&self) {
        self.order(Order::Scan);
    }

    /// Sends what the last scan found; with `hold_back`, what is written all the time is left.
    pub(super) fn send_round(&self, round: u32, hold_back: bool) {
        self.order(Order::SendRound { round, hold_back });
    }

    /// Finds, hides and sends what is left of the frozen tasks' memory; the plan goes over `link`. Of pages that are left
    /// here, those that are asked for are sent from then on: CRIU's restore misses some as well.
    pub(super) fn cut(&mut self, leave_pages: bool, link: BulkLink) -> Cut {
        let ((hide, hidden), (plan, planned), (push, begin_push)) = (channel(), channel(), channel());
        self.push = leave_pages.then_some(push);
        self.order(Order::Cut { leave_pages, link, hidden: hide, planned: plan, begin_push });
        Cut { hidden, planned }
    }

    /// Takes other streams for what the target lacks.
    pub(super) fn reopen(&mut self, streams: &Arc<PageStreams>, lacking: BTreeMap<i32, PageSet>) {
        self.opened(streams);
        let (push, begin_push) = channel();
        self.push = Some(push);
        self.order(Order::Reopen { streams: Arc::clone(streams), lacking, begin_push });
    }

    /// Sends all pages that were left here, or that the target lacks.
    pub(super) fn serve(&self) {
        match &self.push {
            // A thread that has ended has said why.
            Some(push) => push.send(()).unwrap_or_default(),
            None => self.order(Order::Finish),
        }
    }

    /// Ends the streams.
    pub(super) fn stop(&self) {
        if let Some(streams) = &self.streams {
            streams.stop();
        }
    }

    /// Waits until the thread has counted what it sent: the target may have the last page before that.
    pub(super) fn finish(mut self) {
        self.orders = channel().0;
        self.ended.recv_timeout(LAST_WORD_MAX).ok();
    }

    fn order(&self, order: Order) {
        // A thread that has ended has said why.
        self.orders.send(order).ok();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The thread's own.
struct Follower {
    route: Route,
    tasks: Box<dyn Tasks>,
    hidden: Hidden,
    ahead: Ahead,
    tracker: Option<Box<dyn DirtyTracker + Send>>,
    streams: Option<Arc<PageStreams>>,
    pending: Pending,
    /// The next round's number.
    round: u32,
    /// Pages left here by the cut.
    remote: Vec<SpaceWork>,
    sent: Arc<Sent>,
}

impl Follower {
    fn run(mut self, orders: &Receiver<Order>, tell: impl Fn(Told)) {
        for order in orders {
            let done = match order {
                Order::Open => self.open(&tell),
                Order::Scan => self.scan(false).map(|()| {
                    let (pages, hot_pages) = (self.pending.pages(), self.pending.hot_pages());
                    tell(Told::Event(Event::Scanned { pages, hot_pages }));
                }),
                Order::SendRound { round, hold_back } => {
                    let work = self.pending.take_round(hold_back);
                    self.send(round, &work).map(|sent| tell(Told::Event(Event::RoundSent(sent))))
                }
                Order::Cut { leave_pages, link, hidden, planned, begin_push } => {
                    let cut = self.cut(leave_pages, &link, &hidden).and_then(|()| Ok(planned.send(())?));
                    cut.and_then(|()| if leave_pages { self.serve(&begin_push) } else { Ok(()) })
                }
                Order::Reopen { streams, lacking, begin_push } => {
                    self.reopen(streams, lacking).and_then(|()| self.serve(&begin_push))
                }
                Order::Finish => self.streams().and_then(|streams| Ok(streams.finish()?)),
            };
            if let Err(cause) = done {
                let stopped = matches!(cause.downcast_ref(), Some(PagesError::Stopped));
                if !stopped {
                    let event = event_of(cause.as_ref());
                    if matches!(event, Event::LinkLost { .. }) {
                        // The main link knows better: the target may have said why before it closed the streams.
                        thread::sleep(LAST_WORD_MAX);
                    }
                    tell(Told::Event(event));
                }
            }
        }
    }

    fn open(&mut self, tell: &impl Fn(Told)) -> Result<(), Cause> {
        let Route { host, port, migration, streams, way, .. } = &self.route;
        let streams = Arc::new(PageStreams::open(host, *port, migration, *streams)?);
        self.streams = Some(Arc::clone(&streams));
        if way.has_rounds() {
            let mut tracker = self.tasks.tracker()?;
            let armed = tracker.arm(&self.tasks.processes()?)?;
            for (pid, why) in armed.untracked {
                log::info!("process {pid} cannot be followed, and is sent whole each round: {why}");
            }
            self.tracker = Some(tracker);
        }
        tell(Told::Open(streams));
        tell(Told::Event(Event::StreamsOpen));
        Ok(())
    }

    fn scan(&mut self, frozen: bool) -> Result<(), Cause> {
        let processes = self.tasks.processes()?;
        if self.round > 0 && !frozen {
            // Each scan may be the last before the freeze. Before it, not behind: what is written meanwhile is found by it.
            self.ahead.read(&processes);
        }
        let collection = match &mut self.tracker {
            Some(tracker) if frozen => tracker.collect_frozen(&processes)?,
            Some(tracker) => tracker.collect(&processes)?,
            None => tracker::everything(&processes)?,
        };
        self.note(&collection)
    }

    fn note(&mut self, collection: &Collection) -> Result<(), Cause> {
        let stored = self.streams()?.stored();
        for pid in &collection.gone {
            self.pending.forget(*pid, &stored);
        }
        for delta in &collection.deltas {
            // One that ended since has no memory left, and is missing from the next collection.
            if let Ok(space) = maps::space(delta.pid) {
                self.pending.note(space, delta, stored.get(&space));
            }
        }
        Ok(())
    }

    fn send(&mut self, round: u32, work: &[SpaceWork]) -> Result<RoundSent, Cause> {
        let sent = self.streams()?.send_round(round, work)?;
        self.round = round + 1;
        self.count(sent.normal_pages, sent.zero_pages);
        let bytes = sent.normal_pages * PAGE_BYTES;
        Ok(RoundSent { normal_pages: sent.normal_pages, zero_pages: sent.zero_pages, bytes })
    }

    fn cut(&mut self, leave_pages: bool, link: &BulkLink, hidden: &Sender<()>) -> Result<(), Cause> {
        let mut lazy = BTreeMap::new();
        let mut first = Vec::new();
        for pid in self.tasks.processes()? {
            let Ok(space) = maps::space(pid) else { continue };
            let Dumped { lazy: pages, injected } = maps::dumped(pid)?;
            self.hidden.set(pid, pages.clone());
            if !injected.is_empty() {
                first.push(SpaceWork { space, pid, dirty: injected, ..SpaceWork::default() });
            }
            lazy.insert(space, pages);
        }
        if !first.is_empty() {
            self.send(self.round, &first)?;
        }
        // From here on CRIU is at the tasks as well: it changes none of their pages but those that have been sent.
        hidden.send(())?;
        self.scan(true)?;
        let mut work = self.pending.take_rest();
        let stored = self.streams()?.stored();
        for space in &mut work {
            let lazy = lazy.get(&space.space).cloned().unwrap_or_default();
            // What CRIU puts back from its images is not for the target to hold.
            let foreign = stored.get(&space.space).map(|stored| stored.difference(&lazy)).unwrap_or_default();
            space.absent = space.absent.union(&foreign);
            space.dirty = space.dirty.intersection(&lazy);
            space.zero = space.zero.intersection(&lazy);
            if let Some(sent) = first.iter().find(|sent| sent.space == space.space) {
                space.dirty = space.dirty.difference(&sent.dirty);
                space.zero = space.zero.difference(&sent.dirty);
            }
        }
        if leave_pages {
            let left = |work: &mut SpaceWork| SpaceWork {
                space: work.space,
                pid: work.pid,
                dirty: std::mem::take(&mut work.dirty),
                ..SpaceWork::default()
            };
            self.remote = work.iter_mut().map(left).collect();
        }
        let round = self.round;
        self.send(round, &work)?;
        self.send_plan(round, lazy.keys().copied(), link)
    }

    /// Tells the target what it has to have, and what stays here, of each space.
    fn send_plan(&self, round: u32, spaces: impl Iterator<Item = i32>, link: &BulkLink) -> Result<(), Cause> {
        let stored = self.streams()?.stored();
        for space in spaces {
            let remote = self.remote.iter().find(|work| work.space == space);
            let remote = remote.map(|work| &work.dirty).cloned().unwrap_or_default();
            let stored_pages = stored.get(&space).map_or(0, |stored| stored.difference(&remote).pages());
            let runs = runs_of(&remote);
            // A space without remote pages takes one frame as well.
            let mut frames = runs.chunks(RUNS_MAX);
            let first = frames.next().unwrap_or_default();
            for remote in std::iter::once(first).chain(frames) {
                let message = Message::MemoryPlan { space, round, stored_pages, remote: remote.to_vec() };
                link.send(&message)?;
            }
        }
        Ok(())
    }

    /// The tasks are frozen: whatever the target lacks of them is what it would have got before.
    fn reopen(
        &mut self,
        streams: Arc<PageStreams>,
        mut lacking: BTreeMap<i32, PageSet>,
    ) -> Result<(), Cause> {
        self.streams = Some(streams);
        self.remote.clear();
        for pid in self.tasks.processes()? {
            let space = maps::space(pid)?;
            if let Some(dirty) = lacking.remove(&space) {
                self.remote.push(SpaceWork { space, pid, dirty, ..SpaceWork::default() });
            }
        }
        match lacking.first_key_value() {
            None => Ok(()),
            Some((space, _)) => {
                Err(format!("the target lacks pages of process {space}, which is not here").into())
            }
        }
    }

    fn serve(&self, begin_push: &Receiver<()>) -> Result<(), Cause> {
        let served = self.streams()?.serve(&self.remote, begin_push);
        let (pages, zero_pages) = self.streams()?.served_pages();
        self.count(pages - zero_pages, zero_pages);
        let served = served?;
        log::info!("served {} pages, {} of them on request", served.pages, served.requested_pages);
        Ok(())
    }

    fn count(&self, normal_pages: u64, zero_pages: u64) {
        self.sent.pages.fetch_add(normal_pages * PAGE_BYTES, Ordering::Relaxed);
        self.sent.zero_pages.fetch_add(zero_pages, Ordering::Relaxed);
    }

    fn streams(&self) -> Result<&PageStreams, Cause> {
        Ok(self.streams.as_deref().ok_or("the page streams are not open")?)
    }
}

fn runs_of(pages: &PageSet) -> Vec<Run> {
    let pieces = pages.ranges().iter().flat_map(|range| range.chunks(RUN_PAGES_MAX));
    pieces
        .map(|range| Run { start: range.start(), pages: u32::try_from(range.pages()).unwrap_or(u32::MAX) })
        .collect()
}

/// A broken stream is a broken link: the target may have said more about it on the main one.
fn event_of(cause: &(dyn std::error::Error + Send + Sync + 'static)) -> Event {
    match cause.downcast_ref() {
        Some(PagesError::Link { .. }) => Event::LinkLost { cause: causes(cause) },
        _ => Event::Failed { cause: causes(cause) },
    }
}

const RUN_PAGES_MAX: u64 = 1 << 20;
