//! Pages that are still elsewhere when the tasks run: late, early, twice, out of order, or no longer wanted.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit_memory::fault::{
    FaultConfig, FaultServer, Keeper, MemoryStore, Requester, SOCKET_NAME, SpacePlan,
};
use godwit_memory::{MemoryError, PAGE_BYTES, PageRange, PageSet, Result, reader};
use godwit_sys::arena::Arena;
use godwit_sys::userfaultfd::{Features, Mode, Userfaultfd};
use godwit_sys::{fdpass, inject, process};

const PID: i32 = 7;
const LIMIT: Duration = Duration::from_secs(30);

/// The other machine, as far as it is asked.
#[derive(Default)]
struct Elsewhere {
    requests: Mutex<Vec<PageRange>>,
    finished: AtomicU64,
    kept: Mutex<BTreeMap<u64, OwnedFd>>,
}

impl Requester for Elsewhere {
    fn request(&self, space: i32, pages: PageRange) {
        assert_eq!(space, PID);
        self.requests.lock().unwrap().push(pages);
    }

    fn finished(&self, _: i32) {
        self.finished.fetch_add(1, Ordering::SeqCst);
    }
}

impl Keeper for Elsewhere {
    fn keep(&self, key: u64, _: i32, faults: OwnedFd) -> Result<()> {
        assert!(self.kept.lock().unwrap().insert(key, faults).is_none());
        Ok(())
    }

    fn release(&self, key: u64) {
        self.kept.lock().unwrap().remove(&key).unwrap();
    }
}

/// A server for one task, all of whose pages are remote.
struct Served {
    server: FaultServer,
    store: Arc<MemoryStore>,
    elsewhere: Arc<Elsewhere>,
    criu: UnixStream,
    range: PageRange,
    brought: AtomicU64,
    _directory: tempfile::TempDir,
}

impl Served {
    fn new(faults: &Userfaultfd, range: PageRange) -> Self {
        let (store, elsewhere) = (Arc::new(MemoryStore::new(64 << 20).unwrap()), Arc::<Elsewhere>::default());
        let directory = tempfile::tempdir().unwrap();
        let remote = [range].into_iter().collect();
        let plan = BTreeMap::from([(PID, SpacePlan { remote, ..SpacePlan::default() })]);
        let server = FaultServer::start(
            directory.path(),
            &plan,
            store.clone(),
            Some(elsewhere.clone()),
            Some(elsewhere.clone()),
            FaultConfig { fill_threads: 3, ..FaultConfig::default() },
        )
        .unwrap();
        let mut criu = UnixStream::connect(directory.path().join(SOCKET_NAME)).unwrap();
        criu.write_all(&PID.to_ne_bytes()).unwrap();
        fdpass::send(&criu, &[0], &[faults.as_fd()]).unwrap();
        Self { server, store, elsewhere, criu, range, brought: AtomicU64::new(0), _directory: directory }
    }

    fn finish_restore(&self) {
        (&self.criu).write_all(&0x5253_5446_i32.to_ne_bytes()).unwrap();
        assert!(self.server.wait_restored(LIMIT).unwrap());
    }

    fn page(&self, index: u64) -> PageRange {
        PageRange::page_at(self.range.start() + index * PAGE_BYTES)
    }

    /// Brings pages from `first` on: every other time by way of the store.
    fn bring(&self, first: u64, count: u64) {
        let bytes: Vec<u8> = (first..first + count)
            .flat_map(|page| std::iter::repeat_n(word(page).to_ne_bytes(), 512).flatten())
            .collect();
        let start = self.page(first).start();
        let pages = PageRange::new(start, start + count * PAGE_BYTES).unwrap();
        if self.brought.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) {
            self.server.bring(PID, pages, &bytes).unwrap();
        } else {
            self.store.put(PID, start, &bytes).unwrap();
            self.server.arrived(PID, pages);
        }
    }

    fn wait_requests(&self, count: usize) -> Vec<PageRange> {
        let begin = Instant::now();
        loop {
            let requests = self.elsewhere.requests.lock().unwrap().clone();
            if requests.len() >= count {
                return requests;
            }
            assert!(begin.elapsed() < LIMIT, "{requests:?}");
            std::thread::yield_now();
        }
    }

    fn assert_done(&self) {
        assert!(self.server.wait_drained(LIMIT).unwrap());
        let progress = self.server.progress();
        assert_eq!((progress.held_pages, progress.remote_pages), (0, 0), "{progress:?}");
        assert_eq!(self.store.resident_bytes().unwrap(), 0, "what came is installed, or given back");
        let kept = self.elsewhere.kept.lock().unwrap();
        assert!(kept.is_empty(), "{kept:?}");
        assert_eq!(self.elsewhere.finished.load(Ordering::SeqCst), 1);
        let requests = self.elsewhere.requests.lock().unwrap();
        let asked: PageSet = requests.iter().copied().collect();
        assert_eq!(asked.pages(), requests.iter().map(|range| range.pages()).sum::<u64>(), "asked once each");
    }
}

fn word(index: u64) -> u64 {
    index.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

fn events() -> Features {
    Features::EVENT_REMAP.with(Features::EVENT_REMOVE).with(Features::EVENT_UNMAP)
}

/// `None`, and says so, where userfaultfd is forbidden.
fn arena(pages: u64) -> Option<(Arena, Served)> {
    let arena = Arena::map(pages * PAGE_BYTES).unwrap();
    let faults = match Userfaultfd::for_arena(&arena) {
        Ok(faults) => faults,
        Err(error) => {
            eprintln!("SKIP: {error}");
            return None;
        }
    };
    faults.enable(events()).unwrap();
    let faults = faults.register(Mode::Missing).unwrap();
    let served = Served::new(&faults, arena.range());
    Some((arena, served))
}

#[test]
fn pages_may_come_in_any_order_early_late_and_twice() {
    let Some((arena, served)) = arena(2000) else { return };
    // One that nobody waits for, before anything runs, and again.
    served.bring(1700, 3);
    served.bring(1700, 3);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let arena = &arena;
            scope.spawn(move || {
                for turn in 0..300 {
                    let page = (turn * 7919 + thread * 501) % 2000;
                    assert_eq!(arena.load(page * 512 + page % 512), word(page), "page {page}");
                }
            });
        }
        // Requests are answered before the restore is done; the push goes from the end, in overlapping parts.
        for range in served.wait_requests(1) {
            served.bring((range.start() - served.range.start()) / PAGE_BYTES, range.pages());
        }
        served.finish_restore();
        for first in (0..=1980).rev().step_by(10) {
            served.bring(first, 20);
        }
    });
    served.assert_done();
    for page in 0..2000 {
        assert_eq!(arena.load(page * 512 + 17), word(page), "page {page}");
    }
    let progress = served.server.progress();
    assert!(progress.network.count > 0 && progress.network.total_us > 0, "{progress:?}");
    assert_eq!(progress.installed_on_fault_pages + progress.installed_behind_pages, 2000, "once each");
}

#[test]
fn what_is_dropped_before_it_arrives_stays_zero() {
    let Some((arena, served)) = arena(100) else { return };
    served.finish_restore();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| arena.load(40 * 512));
        let asked = served.wait_requests(1);
        assert!(asked[0].contains(served.page(40).start()) && asked[0].pages() <= 8, "{asked:?}");
        let dropped = PageRange::new(served.page(30).start(), served.page(60).end()).unwrap();
        arena.discard(dropped).unwrap();
        assert_eq!(waiting.join().unwrap(), 0, "who waits for a dropped page gets zeros");
    });
    let arena = arena.relocate().unwrap();
    served.bring(0, 100);
    served.assert_done();
    for page in 0..100 {
        let expected = if (30..=60).contains(&page) { 0 } else { word(page) };
        assert_eq!(arena.load(page * 512 + 3), expected, "page {page}");
    }
}

#[test]
fn remote_pages_without_anybody_to_ask_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let remote = [PageRange::page_at(0x10_0000)].into_iter().collect();
    let plan = BTreeMap::from([(PID, SpacePlan { remote, ..SpacePlan::default() })]);
    let store = Arc::new(MemoryStore::new(1 << 20).unwrap());
    let answer = FaultServer::start(directory.path(), &plan, store, None, None, FaultConfig::default());
    assert!(matches!(answer, Err(MemoryError::Plan { pid: PID, .. })), "{answer:?}");
}

/// A child with one map of 500 pages, which are served.
fn child() -> Option<(Child, impl FnMut(&str) -> String, Served)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP: events of a fork need CAP_SYS_PTRACE");
        return None;
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_memory-workload"))
        .arg("obey")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut orders = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap());
    let mut order = move |line: &str| {
        writeln!(orders, "{line}").unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    };
    let start: u64 = order("map 500").split_once(' ').unwrap().1.parse().unwrap();
    let range = PageRange::new(start, start + 500 * PAGE_BYTES).unwrap();
    let injected = inject::userfaultfd(i32::try_from(child.id()).unwrap(), LIMIT).unwrap();
    let faults = Userfaultfd::from_fd(injected.fd);
    faults.enable(events().with(Features::EVENT_FORK)).unwrap();
    faults.register(range, Mode::Missing).unwrap();
    let served = Served::new(&faults, range);
    Some((child, order, served))
}

#[test]
fn what_arrives_reaches_forked_children_too() {
    process::set_subreaper(true).unwrap();
    let Some((mut parent, mut order, served)) = child() else { return };
    served.finish_restore();
    served.bring(0, 100);
    assert_eq!(order("read 0 50"), word(50).to_string());
    let forked: i32 = {
        // The child writes to its first page, so that has to be there.
        order("fork 77").parse().unwrap()
    };
    order("drop 0 200 10");
    served.bring(100, 400);
    assert!(served.server.wait_drained(LIMIT).unwrap());
    let words = |pid: i32| -> Vec<u64> {
        let mut words = Vec::new();
        let pages = [served.range].into_iter().collect();
        reader::read(pid, &pages, &mut vec![0; 500 * 4096], |batch| {
            assert!(batch.gone.is_empty());
            let first = |page: &[u8]| u64::from_ne_bytes(page[..8].try_into().unwrap());
            words.extend(batch.bytes.chunks(4096).map(first));
            Ok::<(), MemoryError>(())
        })
        .unwrap();
        words
    };
    let mut expected: Vec<u64> = (0..500).map(word).collect();
    let mut childs = expected.clone();
    childs[0] = 77;
    expected[200..210].fill(0);
    assert!(words(i32::try_from(parent.id()).unwrap()) == expected, "the parent's pages");
    assert!(words(forked) == childs, "the child's pages");
    served.assert_done();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(forked), nix::sys::signal::SIGKILL).unwrap();
    process::reap(forked, LIMIT).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
}

#[test]
fn a_task_that_has_ended_needs_nothing_more_and_says_so() {
    let Some((mut child, _order, served)) = child() else { return };
    served.finish_restore();
    served.bring(0, 10);
    assert!(!served.server.wait_drained(Duration::from_millis(20)).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(served.server.wait_drained(LIMIT).unwrap());
    served.bring(10, 10);
    served.assert_done();
}
