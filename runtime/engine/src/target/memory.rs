//! The tasks' memory at the target: received while they run at the source, served once they run here.
//!
//! ```text
//! page streams ──► store ──┐                       Gate: images complete + plan kept ──► Complete
//!       │     main link ── plan ─► FaultServer ◄── CRIU's lazy restore, then the tasks ──► Filled
//!       └── once it is there ─────────┘  └── pages that stayed at the source ──► request ──► page streams
//!
//! the source is back ──► on_main ──► Rejoined ──► reopen: what is lacking; then the page streams, as before
//! ```
//! What the source says is checked against what came: the restore begins only when the store holds exactly as many
//! pages of each space as the plan says, and nothing of a space that the plan does not name.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use godwit_memory::fault::{
    FaultConfig, FaultServer, Keeper, Lacking, Latency, MemoryStore, Requester, SpacePlan, ThreadWaited,
    Waiters,
};
use godwit_memory::{MemoryError, PageRange, PageSet};
use godwit_protocol::report::{Faults, TargetMemory, ThreadWait, Waits};
use godwit_protocol::request::Images;
use godwit_protocol::target::Event;
use godwit_protocol::wire::pages::{PAGE_BYTES, ROUND_LAST, Run};

use super::main_link::MainLink;
use crate::Cause;
use crate::handover::Streams;
use crate::link::Link;
use crate::pages::{Arrivals, PageReceiver, PagesError};
use crate::text::causes;
use crate::usage::Usage;
use crate::warden::Warden;

/// The pages of one container.
#[derive(Debug)]
pub(super) struct Memory {
    gate: Arc<Gate>,
    receiver: Arc<PageReceiver>,
    warden: Option<Arc<Warden>>,
}

impl Memory {
    /// Begins to receive pages into `store`; `tell` gets what happens.
    ///
    /// # Errors
    /// What cannot be made.
    pub(super) fn receive(
        streams: Streams,
        bulk_count: u8,
        store: MemoryStore,
        images: Images,
        warden: Option<Warden>,
        main: MainLink,
        tell: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, Cause> {
        let store = Arc::new(store);
        let gate = Arc::new(Gate {
            store: Arc::clone(&store),
            images,
            main,
            state: Mutex::default(),
            server: OnceLock::new(),
            arrived_pages: AtomicU64::new(0),
            peak_bytes: AtomicU64::new(0),
            tell: Box::new(tell),
        });
        let arrivals: Arc<dyn Arrivals> = Arc::clone(&gate) as _;
        let receiver = Arc::new(PageReceiver::start(streams, bulk_count, arrivals)?);
        Ok(Self { gate, receiver, warden: warden.map(Arc::new) })
    }

    /// Returns what the main link's messages go to.
    pub(super) fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }

    /// Begins to serve page faults to a restore whose CRIU works in `work_path`.
    ///
    /// # Errors
    /// What cannot be made, or that it was called before.
    pub(super) fn serve(&self, work_path: &Path) -> Result<(), Cause> {
        let plan = std::mem::take(&mut self.gate.lock().plan);
        let plan: BTreeMap<i32, SpacePlan> = plan
            .into_iter()
            .map(|(space, promised)| {
                let held = self.gate.store.pages(space);
                (space, SpacePlan { held, remote: promised.remote })
            })
            .collect();
        let requester: Arc<dyn Requester> = Arc::new(Requests(Arc::clone(&self.receiver)));
        let keeper = self.warden.clone().map(|warden| warden as Arc<dyn Keeper>);
        let source = Arc::clone(&self.gate.store);
        let server =
            FaultServer::start(work_path, &plan, source, Some(requester), keeper, FaultConfig::default())?;
        let server = Arc::new(server);
        let mut state = self.gate.lock();
        self.gate.server.set(Arc::clone(&server)).map_err(|_| "the memory is served already")?;
        for (space, pages) in state.early.drain(..) {
            server.arrived(space, pages);
        }
        Ok(())
    }

    /// Begins to put those pages into their tasks which were written last, and which they will want first. CRIU holds the
    /// tasks complete from here on, while the source is asked to commit.
    pub(super) fn begin_working_set(&self) {
        if let Some(server) = self.gate.server.get() {
            server.begin_working_set(&self.gate.lock().written_last);
        }
    }

    /// Puts the other pages into their tasks, when those of the working set are there or a moment has passed, and tells
    /// when that is done. `processes` are those of the container, by their ids on this host.
    pub(super) fn fill(&self, processes: impl Fn() -> Result<Vec<i32>, Cause> + Send + 'static) {
        let gate = Arc::clone(&self.gate);
        if let Some(server) = gate.server.get() {
            if !server.wait_working_set(WORKING_SET_MAX) {
                log::info!(
                    "the working set is not in place after {WORKING_SET_MAX:?}: the container runs without"
                );
            }
            server.begin_fill();
        }
        let body = move || {
            let event = match gate.wait_filled(processes) {
                Ok(memory) => Event::Filled(memory),
                Err(cause) => Event::Failed { cause },
            };
            (gate.tell)(event);
        };
        if let Err(error) = thread::Builder::new().name("filled".to_owned()).spawn(body) {
            (self.gate.tell)(Event::Failed { cause: format!("no thread can be started: {error}") });
        }
    }

    /// Tells whoever watches that the container is gone.
    pub(super) fn container_is_gone(&self) {
        if let Some(warden) = &self.warden {
            warden.stand_down();
        }
    }

    /// Takes new streams, and returns what has not come over those before, by space.
    pub(super) fn reopen(&self) -> BTreeMap<i32, PageSet> {
        let lacking =
            self.gate.lacking().into_iter().map(|(space, lacking)| (space, lacking.pages)).collect();
        self.receiver.reopen();
        lacking
    }

    /// Ends the streams.
    pub(super) fn stop(&self) {
        self.receiver.stop();
    }
}

/// Decides when everything has come.
pub(super) struct Gate {
    store: Arc<MemoryStore>,
    images: Images,
    main: MainLink,
    state: Mutex<State>,
    server: OnceLock<Arc<FaultServer>>,
    /// Pages that came after the plan was kept.
    arrived_pages: AtomicU64,
    peak_bytes: AtomicU64,
    tell: Box<dyn Fn(Event) + Send + Sync>,
}

#[derive(Debug, Default)]
struct State {
    plan: BTreeMap<i32, Promised>,
    remote_pages: u64,
    marked: Option<u32>,
    images_complete: bool,
    is_complete: bool,
    /// Pages with contents that the latest round with any has brought, but for the first, up to a number of pieces; and
    /// those of the round that is under way.
    written_last: Vec<(i32, PageRange)>,
    coming: Vec<(i32, PageRange)>,
    /// Pages that came after the plan was kept, and before there was a server.
    early: Vec<(i32, PageRange)>,
}

/// What the source promised of one space.
#[derive(Debug)]
struct Promised {
    round: u32,
    stored_pages: u64,
    remote: PageSet,
}

impl Gate {
    /// Takes a part of the plan.
    ///
    /// # Errors
    /// What makes no sense in it.
    pub(super) fn promise(
        &self,
        space: i32,
        round: u32,
        stored_pages: u64,
        remote: &[Run],
    ) -> Result<(), String> {
        let mut state = self.lock();
        if state.is_complete {
            return Err(format!("a plan for process {space} came after everything else"));
        }
        let promised = state.plan.entry(space).or_insert_with(|| Promised {
            round,
            stored_pages,
            remote: PageSet::new(),
        });
        if (promised.round, promised.stored_pages) != (round, stored_pages) {
            return Err(format!("two different plans for process {space} came"));
        }
        // Decoding has checked that each fits an address space.
        let ranges = remote
            .iter()
            .filter_map(|run| PageRange::new(run.start, run.start + u64::from(run.pages) * PAGE_BYTES));
        promised.remote.extend(ranges);
        Ok(())
    }

    /// Takes that the images are complete.
    pub(super) fn images_complete(&self) {
        self.lock().images_complete = true;
        self.check();
    }

    /// Tells, once, that everything has come, or what is wrong with it. Whatever is told of the state is told with the
    /// lock held: what one thread tells for a change may not overtake the word for the change.
    fn check(&self) {
        let mut state = self.lock();
        let marked = |round: u32| state.marked.is_some_and(|marked| marked >= round);
        let is_due = state.images_complete && state.plan.values().all(|promised| marked(promised.round));
        if !is_due || state.is_complete {
            return;
        }
        state.is_complete = true;
        let event = match self.keep(&state.plan) {
            Ok(()) => Event::Complete,
            Err(what) => Event::Nonsense { what },
        };
        state.remote_pages = state.plan.values().map(|promised| promised.remote.pages()).sum();
        (self.tell)(event);
        if state.remote_pages == 0 {
            (self.tell)(Event::Arrived);
        }
    }

    /// Holds the store against the plan. What stays at the source is not had here: a copy of it is an old one.
    fn keep(&self, plan: &BTreeMap<i32, Promised>) -> Result<(), String> {
        if plan.is_empty() {
            return Err("the source sent no plan of the memory".to_owned());
        }
        for (space, promised) in plan {
            for pages in promised.remote.ranges() {
                self.store.forget(*space, *pages);
            }
            let held = self.store.pages(*space).pages();
            if held != promised.stored_pages {
                return Err(format!(
                    "{held} pages of process {space} are here, and the source says {}",
                    promised.stored_pages
                ));
            }
        }
        self.note_peak();
        Ok(())
    }

    /// Waits until every page is in its task, and looks meanwhile at what waits for one.
    fn wait_filled(&self, processes: impl Fn() -> Result<Vec<i32>, Cause>) -> Result<TargetMemory, String> {
        let server = self.server.get().ok_or("the memory is not served")?;
        let mut waiters = Waiters::begin();
        let mut pause = Duration::ZERO;
        let mut survey: Option<(Instant, Vec<i32>)> = None;
        while !server.wait_drained(pause).map_err(|error| causes(&error))? {
            if survey.as_ref().is_none_or(|(at, _)| at.elapsed() > SURVEY_PAUSE) {
                self.note_peak();
                // A container that is not known yet, or is on its way out, has none.
                survey = Some((Instant::now(), processes().unwrap_or_default()));
            }
            pause = waiters.look(survey.as_ref().map_or(&[], |(_, processes)| processes));
        }
        let progress = server.progress();
        let usage = Usage::so_far();
        let threads = waiters.longest(THREADS_MAX).into_iter().map(thread_wait).collect();
        Ok(TargetMemory {
            faults: Faults { network: waits(progress.network), local: waits(progress.local), threads },
            peak_bytes: usage.peak_bytes + self.peak_bytes.load(Ordering::Relaxed),
            duplicate_pages: self
                .arrived_pages
                .load(Ordering::Relaxed)
                .saturating_sub(self.lock().remote_pages),
            cpu_us: usage.cpu_us,
            disk_bytes_written: usage.disk_bytes_written,
        })
    }

    fn lacking(&self) -> BTreeMap<i32, Lacking> {
        self.server.get().map(|server| server.lacking()).unwrap_or_default()
    }

    fn note_peak(&self) {
        if let Ok(bytes) = self.store.resident_bytes() {
            self.peak_bytes.fetch_max(bytes, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arrivals for Gate {
    fn on_mark(&self, round: u32) {
        let mut state = self.lock();
        if round == ROUND_LAST {
            if state.is_complete {
                (self.tell)(Event::Arrived);
            }
            return;
        }
        state.marked = Some(round);
        if !state.coming.is_empty() {
            state.written_last = std::mem::take(&mut state.coming);
        }
        (self.tell)(Event::RoundComplete(round));
        drop(state);
        self.check();
    }

    fn on_pages(&self, space: i32, pages: PageRange, contents: &[u8]) -> Result<(), MemoryError> {
        // Through storage if that was asked for, also when their tasks are there.
        if self.images == Images::Cache
            && let Some(server) = self.server.get()
        {
            self.arrived_pages.fetch_add(pages.pages(), Ordering::Relaxed);
            return server.bring(space, pages, contents);
        }
        self.store.put(space, pages.start(), contents)?;
        let mut state = self.lock();
        if state.is_complete {
            self.arrived_pages.fetch_add(pages.pages(), Ordering::Relaxed);
            match self.server.get() {
                Some(server) => server.arrived(space, pages),
                None => state.early.push((space, pages)),
            }
        } else if state.marked.is_some() && state.coming.len() < WORKING_SET_RANGES_MAX {
            state.coming.push((space, pages));
        }
        Ok(())
    }

    fn on_zero(&self, space: i32, pages: PageRange) -> Result<(), MemoryError> {
        if !self.lock().is_complete {
            self.store.forget(space, pages);
            return Ok(());
        }
        // A task may wait for it, and gets what the source has: zeros.
        pages.chunks(ZEROS.len() as u64 / PAGE_BYTES).try_for_each(|part| {
            let zeros = usize::try_from(part.bytes()).ok().and_then(|bytes| ZEROS.get(..bytes));
            self.on_pages(space, part, zeros.unwrap_or_default())
        })
    }

    fn on_error(&self, error: PagesError) {
        let event = match error {
            PagesError::Link { .. } | PagesError::Agent(_) => Event::LinkLost { cause: causes(&error) },
            PagesError::Aborted { detail } => Event::Abort { detail },
            PagesError::Memory(_) | PagesError::Thread(_) | PagesError::Stopped => {
                Event::Failed { cause: causes(&error) }
            }
            _ => Event::Nonsense { what: causes(&error) },
        };
        (self.tell)(event);
    }

    fn on_main(&self, link: Link) {
        self.main.replace(link);
        (self.tell)(Event::Rejoined);
    }

    fn waited_for(&self) -> Vec<(i32, PageSet)> {
        self.lacking().into_iter().map(|(space, lacking)| (space, lacking.requested)).collect()
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Gate").field("state", &self.state).finish_non_exhaustive()
    }
}

fn waits(latency: Latency) -> Waits {
    let Latency { count, p50_us, p99_us, max_us, total_us } = latency;
    Waits { count, p50_us, p99_us, max_us, blocked_us: total_us }
}

fn thread_wait(thread: ThreadWaited) -> ThreadWait {
    let ThreadWaited { pid, tid, waited } = thread;
    ThreadWait { pid, tid, blocked_us: u64::try_from(waited.as_micros()).unwrap_or(u64::MAX) }
}

/// Asks the source for what tasks wait for.
struct Requests(Arc<PageReceiver>);

impl Requester for Requests {
    fn request(&self, space: i32, pages: PageRange) {
        self.0.request(space, pages);
    }

    fn finished(&self, _space: i32) {}
}

/// As many zeros as are put into a task at a time.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// How long the container waits for pages that it will want first: in less than that it would miss them one by one, but
/// it stands still meanwhile.
const WORKING_SET_MAX: Duration = Duration::from_millis(10);
/// More pieces than can be put in place in that time: a program that writes everything has no working set, and to name
/// all of it would take longer than that.
const WORKING_SET_RANGES_MAX: usize = 4096;
/// Between two looks at the memory taken and at which processes there are.
const SURVEY_PAUSE: Duration = Duration::from_millis(50);
/// As many threads as a report names: more say no more.
const THREADS_MAX: usize = 64;
