//! The fault server with a test in CRIU's place: against memory of this process, which needs no privilege, and
//! against a child that forks.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use godwit_memory::fault::{FaultConfig, FaultServer, Lent, MemoryStore, PageSource, SOCKET_NAME, SpacePlan};
use godwit_memory::{MemoryError, PAGE_BYTES, PageRange, PageSet, Result, reader};
use godwit_sys::arena::Arena;
use godwit_sys::fdpass;
use godwit_sys::inject;
use godwit_sys::process;
use godwit_sys::userfaultfd::{Features, Mode, Userfaultfd};

const PID: i32 = 7;
const LIMIT: Duration = Duration::from_secs(30);
const CONFIG: FaultConfig =
    FaultConfig { fill_threads: 3, fill_pages: 64, fault_pages: 16, request_pages: 8 };

fn held(held: PageSet) -> SpacePlan {
    SpacePlan { held, ..SpacePlan::default() }
}

/// An arena whose faults a server serves.
struct Restored {
    arena: Arena,
    server: FaultServer,
    criu: UnixStream,
    _directory: tempfile::TempDir,
}

impl Restored {
    /// `None`, and says so, where userfaultfd is forbidden.
    fn new(pages: u64, plan: impl FnOnce(PageRange) -> PageSet, source: Arc<dyn PageSource>) -> Option<Self> {
        let arena = Arena::map(pages * PAGE_BYTES).unwrap();
        let faults = match Userfaultfd::for_arena(&arena) {
            Ok(faults) => faults,
            Err(error) => {
                eprintln!("SKIP: {error}");
                return None;
            }
        };
        let events = Features::EVENT_REMAP.with(Features::EVENT_REMOVE).with(Features::EVENT_UNMAP);
        faults.enable(events).unwrap();
        let faults = faults.register(Mode::Missing).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let plan = BTreeMap::from([(PID, held(plan(arena.range())))]);
        let server = FaultServer::start(directory.path(), &plan, source, None, None, CONFIG).unwrap();
        let mut criu = UnixStream::connect(directory.path().join(SOCKET_NAME)).unwrap();
        criu.write_all(&PID.to_ne_bytes()).unwrap();
        fdpass::send(&criu, &[0], &[faults.as_fd()]).unwrap();
        Some(Self { arena, server, criu, _directory: directory })
    }

    fn finish_restore(&self) {
        (&self.criu).write_all(&0x5253_5446_i32.to_ne_bytes()).unwrap();
        assert!(self.server.wait_restored(LIMIT).unwrap());
    }
}

/// Page `index` of the arena holds this everywhere.
fn word(index: u64) -> u64 {
    index.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A source that computes its pages and counts what is released.
#[derive(Default)]
struct Computed {
    start: AtomicU64,
    lent: AtomicU64,
    released: AtomicU64,
    finished: AtomicU64,
}

impl PageSource for Computed {
    fn lend(
        &self,
        pid: i32,
        pages: PageRange,
        install: &mut dyn FnMut(Lent<'_>) -> Result<()>,
    ) -> Result<()> {
        assert_eq!(pid, PID);
        let start = self.start.load(Ordering::SeqCst);
        let mut bytes = Vec::new();
        for page in pages.chunks(1) {
            let index = (page.start() - start) / PAGE_BYTES;
            bytes.extend((0..512).flat_map(|_| word(index).to_ne_bytes()));
        }
        self.lent.fetch_add(pages.pages(), Ordering::SeqCst);
        install(Lent::Bytes(&bytes))
    }

    fn keep(&self, pid: i32, _: PageRange, _: &[u8]) -> Result<()> {
        Err(MemoryError::Plan { pid, what: "computed pages are not brought".to_owned() })
    }

    fn release(&self, _: i32, pages: PageRange) {
        self.released.fetch_add(pages.pages(), Ordering::SeqCst);
    }

    fn finish(&self, _: i32) {
        self.finished.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn missed_pages_come_before_the_restore_is_done_and_the_rest_behind() {
    let source = Arc::new(Computed::default());
    let pages = 2000;
    let plan = |range: PageRange| {
        source.start.store(range.start(), Ordering::SeqCst);
        // Every tenth page has no contents.
        range.chunks(10).filter_map(|part| PageRange::new(part.start() + PAGE_BYTES, part.end())).collect()
    };
    let Some(restored) = Restored::new(pages, plan, source.clone()) else { return };
    let check = |page: u64| {
        let expected = if page.is_multiple_of(10) { 0 } else { word(page) };
        for index in [0, 1, 511] {
            assert_eq!(restored.arena.load(page * 512 + index), expected, "page {page}");
        }
    };
    [0, 3, 1999, 1001, 1000].into_iter().for_each(check);
    assert!(!restored.server.wait_drained(Duration::from_millis(20)).unwrap(), "nothing is filled in yet");
    restored.finish_restore();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || (thread..pages).step_by(3).for_each(check));
        }
    });
    assert!(restored.server.wait_drained(LIMIT).unwrap());
    (0..pages).for_each(check);
    let progress = restored.server.progress();
    assert_eq!(progress.installed_on_fault_pages + progress.installed_behind_pages, 1800, "{progress:?}");
    assert_eq!((progress.held_pages, progress.present_already_pages, progress.spaces), (0, 0, 1));
    assert_eq!(source.lent.load(Ordering::SeqCst), 1800, "no page twice");
    assert_eq!(source.released.load(Ordering::SeqCst), 1800);
    drop(restored);
    assert_eq!(source.finished.load(Ordering::SeqCst), 1);
}

#[test]
fn what_a_task_dropped_never_comes_back() {
    for seed in 1..30_u64 {
        let source = Arc::new(Computed::default());
        let pages = 600;
        let plan = |range: PageRange| {
            source.start.store(range.start(), Ordering::SeqCst);
            [range].into_iter().collect()
        };
        let Some(restored) = Restored::new(pages, plan, source.clone()) else { return };
        restored.finish_restore();
        let (mut random, mut dropped) = (seed, PageSet::new());
        let mut arena = restored.arena;
        for _ in 0..60 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (page, count) = ((random >> 33) % 590, (random >> 20) % 9 + 1);
            match (random >> 50) % 8 {
                0..3 => {
                    let start = arena.range().start() + page * PAGE_BYTES;
                    arena.discard(PageRange::new(start, start + count * PAGE_BYTES).unwrap()).unwrap();
                    dropped.insert(PageRange::new(page * PAGE_BYTES, (page + count) * PAGE_BYTES).unwrap());
                }
                3 => arena = arena.relocate().unwrap(),
                _ => {
                    let expected = if dropped.contains(page * PAGE_BYTES) { 0 } else { word(page) };
                    assert_eq!(arena.load(page * 512), expected, "seed {seed}, page {page}");
                }
            }
        }
        assert!(restored.server.wait_drained(LIMIT).unwrap());
        for page in 0..pages {
            let expected = if dropped.contains(page * PAGE_BYTES) { 0 } else { word(page) };
            assert_eq!(arena.load(page * 512 + 17), expected, "seed {seed}, page {page}");
        }
    }
}

#[test]
fn a_store_gives_its_memory_back_while_pages_are_installed() {
    let store = Arc::new(MemoryStore::new(64 << 20).unwrap());
    let pages = 4096;
    let plan = |range: PageRange| {
        for chunk in range.chunks(256) {
            let first = (chunk.start() - range.start()) / PAGE_BYTES;
            let bytes: Vec<u8> = (first..first + chunk.pages())
                .flat_map(|page| std::iter::repeat_n(word(page).to_ne_bytes(), 512).flatten())
                .collect();
            store.put(PID, chunk.start(), &bytes).unwrap();
        }
        store.pages(PID)
    };
    let Some(restored) = Restored::new(pages, plan, store.clone()) else { return };
    assert_eq!(store.resident_bytes().unwrap(), pages * PAGE_BYTES);
    restored.server.begin_fill();
    restored.finish_restore();
    assert!(restored.server.wait_drained(LIMIT).unwrap());
    assert_eq!(store.resident_bytes().unwrap(), 0);
    for page in 0..pages {
        assert_eq!(restored.arena.load(page * 512 + page % 512), word(page));
    }
}

/// Goal: what tasks will want first is there before they run, and nothing else.
#[test]
fn the_working_set_is_filled_in_alone_and_the_rest_behind() {
    let pages = 4096;
    let source = Arc::new(Computed::default());
    let plan = |range: PageRange| {
        source.start.store(range.start(), Ordering::SeqCst);
        [range].into_iter().collect()
    };
    let Some(restored) = Restored::new(pages, plan, source.clone()) else { return };
    let start = restored.arena.range().start();
    let range = |first: u64, count: u64| {
        PageRange::new(start + first * PAGE_BYTES, start + (first + count) * PAGE_BYTES).unwrap()
    };
    // Apart, twice, overlapping, and of a process that is not here.
    let working_set =
        [(PID, range(7, 1)), (PID, range(4000, 90)), (PID, range(3990, 20)), (PID, range(7, 1))];
    let nobodys = (PID + 1, range(100, 1));
    while restored.server.progress().spaces == 0 {
        std::thread::yield_now();
    }
    restored.server.begin_working_set(&[&working_set[..], &[nobodys]].concat());
    assert!(restored.server.wait_working_set(LIMIT));
    let wanted: PageSet = {
        let mut ranges = working_set.map(|(_, range)| range);
        ranges.sort_unstable_by_key(|range| range.start());
        ranges.into_iter().collect()
    };
    let begin = Instant::now();
    while restored.server.progress().held_pages > pages - wanted.pages() {
        assert!(begin.elapsed() < LIMIT, "what a thread has in hand");
    }
    assert_eq!(restored.server.progress().held_pages, pages - wanted.pages());
    assert_eq!(restored.server.progress().installed_behind_pages, wanted.pages());
    restored.finish_restore();
    assert!(restored.server.wait_drained(LIMIT).unwrap());
    assert_eq!(source.lent.load(Ordering::SeqCst), pages);
    for page in 0..pages {
        assert_eq!(restored.arena.load(page * 512 + page % 512), word(page));
    }
    assert_eq!(restored.server.progress().local.count, 0, "no fault was needed");
}

#[test]
fn pages_in_a_mapping_that_was_split_are_installed_all_the_same() {
    let source = Arc::new(Computed::default());
    let plan = |range: PageRange| {
        source.start.store(range.start(), Ordering::SeqCst);
        [range].into_iter().collect()
    };
    let Some(restored) = Restored::new(300, plan, source.clone()) else { return };
    // Other rights make another mapping.
    let start = restored.arena.range().start();
    let part =
        |from: u64, to: u64| PageRange::new(start + from * PAGE_BYTES, start + to * PAGE_BYTES).unwrap();
    for range in [part(5, 6), part(17, 90), part(120, 121)] {
        restored.arena.forbid(range, true).unwrap();
    }
    restored.finish_restore();
    assert!(restored.server.wait_drained(LIMIT).unwrap());
    restored.arena.forbid(restored.arena.range(), false).unwrap();
    for page in 0..300 {
        assert_eq!(restored.arena.load(page * 512), word(page));
    }
}

#[test]
fn a_restore_that_breaks_off_and_memory_that_is_not_there_are_errors() {
    let source = Arc::new(Computed::default());
    let Some(restored) = Restored::new(10, |_| PageSet::new(), source.clone()) else { return };
    let Restored { server, criu, .. } = restored;
    drop(criu);
    let answer = server.wait_restored(LIMIT);
    assert!(matches!(answer, Err(MemoryError::Protocol { .. })), "{answer:?}");
    drop(server);
    // A plan for memory that no mapping of the task has.
    let elsewhere = PageRange::page_at(0x10_0000);
    let Some(restored) = Restored::new(10, |_| [elsewhere].into_iter().collect(), source) else { return };
    restored.finish_restore();
    let answer = restored.server.wait_drained(LIMIT);
    assert!(matches!(answer, Err(MemoryError::NotInstalled { address: 0x10_0000, .. })), "{answer:?}");
}

/// A child that does as it is told, whose one map is served.
struct Obedient {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Obedient {
    fn new() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_memory-workload"))
            .arg("obey")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, orders, answers }
    }

    fn order(&mut self, line: &str) -> String {
        writeln!(self.orders, "{line}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }
}

impl Drop for Obedient {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// The first words of pages of another process.
///
/// Read again while some cannot be: the kernel refuses a fault from outside on an absent page just while the server
/// lets go of the userfaultfd.
fn first_words(pid: i32, range: PageRange) -> Vec<u64> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let (mut words, mut complete) = (Vec::new(), true);
        let mut buffer = vec![0; usize::try_from(range.bytes()).unwrap()];
        reader::read(pid, &[range].into_iter().collect(), &mut buffer, |batch| {
            complete &= batch.gone.is_empty();
            words.extend(
                batch.bytes.chunks(4096).map(|page| u64::from_ne_bytes(page[..8].try_into().unwrap())),
            );
            Ok::<(), MemoryError>(())
        })
        .unwrap();
        if complete {
            return words;
        }
        assert!(Instant::now() < deadline, "pages of {pid} cannot be read");
    }
}

#[test]
fn forked_children_get_their_parents_pages_and_nobody_elses() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP: events of a fork need CAP_SYS_PTRACE");
        return;
    }
    process::set_subreaper(true).unwrap();
    let mut parent = Obedient::new();
    let answer = parent.order("map 2000");
    let start: u64 = answer.split_once(' ').unwrap().1.parse().unwrap();
    let range = PageRange::new(start, start + 2000 * PAGE_BYTES).unwrap();
    let injected = inject::userfaultfd(i32::try_from(parent.child.id()).unwrap(), LIMIT).unwrap();
    let faults = Userfaultfd::from_fd(injected.fd);
    let events = Features::EVENT_FORK.with(Features::EVENT_REMAP);
    faults.enable(events.with(Features::EVENT_REMOVE).with(Features::EVENT_UNMAP)).unwrap();
    faults.register(range, Mode::Missing).unwrap();

    let source = Arc::new(Computed::default());
    source.start.store(start, Ordering::SeqCst);
    let directory = tempfile::tempdir().unwrap();
    let plan = BTreeMap::from([(PID, held([range].into_iter().collect()))]);
    let server = FaultServer::start(directory.path(), &plan, source.clone(), None, None, CONFIG).unwrap();
    let mut criu = UnixStream::connect(directory.path().join(SOCKET_NAME)).unwrap();
    criu.write_all(&PID.to_ne_bytes()).unwrap();
    fdpass::send(&criu, &[0], &[faults.as_fd()]).unwrap();
    drop(faults);

    assert_eq!(parent.order("read 0 1500"), word(1500).to_string());
    let mut children = vec![parent.order("fork 77").parse::<i32>().unwrap()];
    parent.order("drop 0 10 20");
    children.push(parent.order("fork 78").parse().unwrap());
    assert_eq!(parent.order("read 0 12"), "0");
    criu.write_all(&0x5253_5446_i32.to_ne_bytes()).unwrap();
    children.push(parent.order("fork 79").parse().unwrap());
    assert!(server.wait_drained(LIMIT).unwrap());
    assert!(server.progress().spaces >= 3, "{:?}", server.progress());

    let whole: Vec<u64> = (0..2000).map(word).collect();
    let mut holed = whole.clone();
    holed[10..30].fill(0);
    let pages = |pid| first_words(pid, range);
    let with_first = |words: &[u64], first| [&[first], &words[1..]].concat();
    assert_eq!(pages(i32::try_from(parent.child.id()).unwrap()), holed);
    assert_eq!(pages(children[0]), with_first(&whole, 77));
    assert_eq!(pages(children[1]), with_first(&holed, 78));
    assert_eq!(pages(children[2]), with_first(&holed, 79));
    drop(server);
    assert_eq!(source.finished.load(Ordering::SeqCst), 1);
    for child in children {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::SIGKILL).unwrap();
    }
}
