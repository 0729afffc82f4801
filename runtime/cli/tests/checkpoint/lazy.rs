//! Memory outside CRIU: dumped without it, restored with page faults served.
//!
//! The container is this test program itself, several processes with several threads each, that check their memory
//! and say in a file of the root file system how often they did and what they found wrong.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{scope, sleep, spawn};
use std::time::{Duration, Instant};

use godwit_container::checkpoint::{CheckpointError, CheckpointOptions, Decision, Dump, Hiding, Outcome};
use godwit_container::restore::{Hold, RestoreOptions, restore};
use godwit_container::{Store, Stored, cgroup};
use godwit_criu::{CriuError, Program};
use godwit_memory::ahead::Ahead;
use godwit_memory::fault::{FaultConfig, FaultServer, MemoryStore, Requester, SpacePlan};
use godwit_memory::hide::Hidden;
use godwit_memory::{MemoryError, PageRange, PageSet, maps, reader};
use godwit_sys::arena::{Advice, Arena, Backing};
use godwit_sys::mount::Mounted;
use godwit_sys::pagemap_scan::{Categories, Pagemap, Region, Scan};
use godwit_sys::seccomp_deny::{self, Denial};
use serde_json::{Value, json};

use crate::bed::{Bed, Container, Runtime::Godwit, eventually};

#[test]
fn memory_moves_outside_criu_and_what_is_given_up_leaves_no_trace() {
    moves_outside_criu(&[]);
}

/// Where CRIU cannot be filtered it leaves the pages out itself.
#[test]
fn memory_moves_outside_a_lazy_dump_and_what_is_given_up_leaves_no_trace() {
    moves_outside_criu(&[Denial::SECCOMP_LISTENER]);
}

/// Neither can it where it asks for page tables in the old way.
#[test]
fn memory_moves_outside_a_lazy_dump_of_a_kernel_before_6_7() {
    moves_outside_criu(&[Denial::PAGEMAP_SCAN]);
}

fn moves_outside_criu(denials: &'static [Denial]) {
    Bed::with(&[Godwit], |bed| {
        let (one, stored) = start_checking(bed);

        let Some((outcome, _)) = dump(bed, &stored, denials, "given-up", Decision::Rollback) else { return };
        assert_eq!(outcome.unwrap(), Outcome::RolledBack);
        assert_eq!(one.status(), "running");
        assert_checking(bed);

        // It fails when part of it is done.
        fs::create_dir(bed.path("small")).unwrap();
        let small = Mounted::tmpfs(&bed.path("small"), images_bytes(bed, "given-up") * 2 / 3).unwrap();
        let (outcome, _) = dump(bed, &stored, denials, "small", Decision::Commit).unwrap();
        assert!(matches!(outcome, Err(CheckpointError::Criu(CriuError::Failed { .. }))), "{outcome:?}");
        drop(small);
        assert_eq!(one.status(), "running");
        assert_checking(bed);

        let (outcome, memory) = dump(bed, &stored, denials, "images", Decision::Commit).unwrap();
        assert_eq!(outcome.unwrap(), Outcome::Committed);
        one.reap();
        drop(one);
        assert!(memory.len() >= 2, "several processes: {:?}", memory.keys());
        let bytes = images_bytes(bed, "images");
        assert!(bytes < 8 << 20, "the images hold no bulk memory: {bytes} bytes");

        for hold in [Hold::PostRestore, Hold::PreResume] {
            bed.bundle("two", self_checking);
            let (answer, server) = restore_lazily(bed, &memory, hold, Decision::Rollback);
            assert!(matches!(answer, Err(CheckpointError::Abandoned)), "{answer:?}");
            drop(server);
            assert!(!bed.path("root/two").exists() && bed.cgroups("two").is_empty());
            assert_eq!(leftovers(), Vec::<String>::new(), "{hold:?}");

            let (answer, server) = restore_lazily(bed, &memory, hold, Decision::Commit);
            assert_eq!(answer.unwrap().pid(), Some(bed.pid("two")));
            let two = Container::new(bed, Godwit, "two", None);
            assert!(server.wait_drained(LIMIT).unwrap());
            println!("{hold:?}: {:?}", server.progress());
            drop(server);
            assert_eq!(leftovers(), Vec::<String>::new(), "{hold:?}");
            assert_checking(bed);
            drop(two);
        }
    });
}

/// Goal: what CRIU was told of mappings is true, or the dump is refused, and a program that changes their flags is dumped
/// nevertheless.
/// Method: the container changes the flags of a mapping, and no mapping, between what is read ahead and the freeze.
#[test]
fn a_dump_that_rests_on_what_has_changed_is_refused_once() {
    Bed::with(&[Godwit], |bed| {
        let (one, stored) = start_checking(bed);
        let dump = |images: &str, meanwhile: &dyn Fn()| {
            let ahead = Ahead::default();
            let options =
                CheckpointOptions { ahead: Some(ahead.clone()), ..CheckpointOptions::new(bed.path(images)) };
            let dump = Dump::prepare(&Program::find().unwrap(), &stored, &options).unwrap();
            ahead.read(&cgroup::processes(&stored).unwrap());
            meanwhile();
            let frozen = cgroup::freezer(&stored).unwrap().freeze(Duration::from_secs(5)).unwrap();
            let mut seen = None;
            let outcome = dump.run(|told| {
                seen = Some((told.read_ahead(), told.confirm()));
                Decision::Rollback
            });
            assert_eq!(outcome.unwrap(), Outcome::RolledBack);
            frozen.thaw().unwrap();
            seen.unwrap()
        };
        let flip = || {
            let word = bed.path("rootfs/flip");
            fs::write(&word, "").unwrap();
            eventually("the flags are changed", || !word.exists());
        };
        let (told, confirmed) = dump("same", &|| {});
        confirmed.unwrap();
        assert!(told >= 2, "{told} processes were read ahead");
        let (_, confirmed) = dump("changed", &flip);
        assert!(matches!(confirmed, Err(CheckpointError::Changed { .. })), "{confirmed:?}");
        let (told, confirmed) = dump("known to change", &flip);
        confirmed.unwrap();
        assert_eq!(told, 0);
        assert_checking(bed);
        drop(one);
    });
}

fn images_bytes(bed: &Bed, images: &str) -> u64 {
    let files = fs::read_dir(bed.path(images)).unwrap();
    files.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// Starts a container that checks its memory, and returns when it has.
fn start_checking(bed: &Bed) -> (Container<'_>, Stored) {
    fs::copy(std::env::current_exe().unwrap(), bed.path("rootfs/bin/check")).unwrap();
    bed.bundle("one", self_checking);
    let one = bed.start(Godwit, "one");
    let stored = Store::new(bed.path("root")).open("one").unwrap();
    assert_checking(bed);
    (one, stored)
}

/// Changes a bundle so that it runs this program twice, beside a zombie.
fn self_checking(spec: &mut Value) {
    let check = "/bin/check --exact lazy::workload --ignored --nocapture";
    let script = format!("REPORT=/report-a {check} & (sleep 0) & REPORT=/report-b exec {check}");
    spec["process"]["args"] = json!(["sh", "-c", script]);
    for path in ["/usr", "/lib", "/lib64"] {
        // Where they are links, into /usr; CRIU takes no link for the source of a mount.
        let Ok(source) = fs::canonicalize(path) else { continue };
        let mount =
            json!({"destination": path, "source": source, "type": "bind", "options": ["rbind", "ro"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
}

#[test]
#[ignore = "it is what runs in the container"]
fn workload() {
    let Some(report) = std::env::var_os("REPORT") else { return };
    let report = fs::File::create(report).unwrap();
    let counts = Mutex::new([0_u64; 2]);
    scope(|scope| {
        scope.spawn(change_flags_when_told);
        for thread in 0..3_u64 {
            let (counts, report) = (&counts, &report);
            scope.spawn(move || {
                let word = |index: u64, round: u64| (index + thread).wrapping_mul(0x9e37_79b9) ^ round;
                let mut words: Vec<u64> = (0..WORDS).map(|index| word(index, 0)).collect();
                for round in 0.. {
                    let mut wrong = 0;
                    for (index, value) in (0_u64..).zip(&mut words) {
                        wrong += u64::from(*value != word(index, round));
                        *value = word(index, round + 1);
                    }
                    let mut counts = counts.lock().unwrap();
                    *counts = [counts[0] + 1, counts[1] + wrong];
                    report
                        .write_all_at(format!("{:12} {:12}\n", counts[0], counts[1]).as_bytes(), 0)
                        .unwrap();
                    drop(counts);
                    sleep(Duration::from_millis(5));
                }
            });
        }
    });
}

/// Changes the flags of a mapping that is next to none of its kind whenever there is a file `/flip`, and removes that.
fn change_flags_when_told() {
    let arena = Arena::map_on(Backing::Shared, 1 << 20).unwrap();
    for advice in [Advice::HugePage, Advice::NoHugePage].into_iter().cycle() {
        while !Path::new("/flip").exists() {
            sleep(Duration::from_millis(5));
        }
        arena.advise(arena.range(), advice).unwrap();
        // The other process may have been first.
        drop(fs::remove_file("/flip"));
    }
}

/// Passes and wrong words of both processes.
fn reports(bed: &Bed) -> [[u64; 2]; 2] {
    ["a", "b"].map(|name| {
        let text = fs::read_to_string(bed.path(&format!("rootfs/report-{name}"))).unwrap_or_default();
        let numbers: Vec<u64> = text.split_ascii_whitespace().map(|word| word.parse().unwrap()).collect();
        numbers.try_into().unwrap_or_default()
    })
}

/// Waits until every thread has looked at all its memory since the last report, which may be that of a container
/// that was ahead of this one, and fails if anything was found wrong.
fn assert_checking(bed: &Bed) {
    let before = reports(bed);
    eventually("all memory is checked", || {
        reports(bed).iter().zip(&before).all(|(now, then)| now[0] > then[0] + 12)
    });
    assert!(reports(bed).iter().all(|report| report[1] == 0), "{:?}", reports(bed));
}

/// Pages of each process by its id in the container, with their contents in a store.
type Memory = BTreeMap<i32, Vec<(PageRange, Vec<u8>)>>;

/// Dumps without the memory that can be restored lazily, by a CRIU that is denied some calls, and returns that memory.
fn dump(
    bed: &Bed,
    stored: &Stored,
    denials: &'static [Denial],
    images: &str,
    decision: Decision,
) -> Option<(Result<Outcome, CheckpointError>, Memory)> {
    let (hidden, ahead) = (Hidden::default(), Ahead::default());
    let options = CheckpointOptions {
        work_path: Some(bed.path("work")),
        hidden: Some(hidden.clone()),
        ahead: Some(ahead.clone()),
        ..CheckpointOptions::new(bed.path(images))
    };
    // In a thread of its own, which takes the denials along.
    let prepare = || {
        if !denials.is_empty() {
            seccomp_deny::deny(denials).unwrap();
        }
        Dump::prepare(&Program::find().unwrap(), stored, &options).unwrap()
    };
    let dump = scope(|scope| scope.spawn(prepare).join().unwrap());
    match dump.hiding() {
        Hiding::Lazy(reason) if denials.is_empty() => {
            eprintln!("SKIP: {reason}");
            return None;
        }
        hiding => assert_eq!(matches!(hiding, Hiding::Active), denials.is_empty(), "{hiding:?}"),
    }
    ahead.read(&cgroup::processes(stored).unwrap());
    let frozen = cgroup::freezer(stored).unwrap().freeze(Duration::from_secs(5)).unwrap();
    let mut memory = Memory::new();
    for pid in cgroup::processes(stored).unwrap() {
        let Ok(lazy) = maps::lazy(pid) else { continue };
        let pages = read(pid, &lazy);
        if !pages.is_empty() {
            memory.insert(maps::space(pid).unwrap(), pages);
        }
        hidden.set(pid, lazy);
    }
    let begin = Instant::now();
    let outcome = dump.run(|told| {
        println!("frozen to dumped without memory: {:?}", begin.elapsed());
        assert!(told.read_ahead() >= 2);
        told.confirm().unwrap();
        decision
    });
    match outcome {
        Ok(Outcome::Committed) => frozen.commit(),
        Ok(Outcome::RolledBack) | Err(_) => frozen.thaw().unwrap(),
    }
    Some((outcome, memory))
}

fn read(pid: i32, lazy: &PageSet) -> Vec<(PageRange, Vec<u8>)> {
    let resident = Categories::PRESENT.with(Categories::SWAPPED);
    let scan = Scan { any_of: resident, report: resident, ..Scan::default() };
    let pagemap = Pagemap::open(pid).unwrap();
    let mut pages = PageSet::new();
    for range in lazy.ranges() {
        let found = |range: PageRange, _| pages.insert(range);
        pagemap.scan_all(*range, scan, &mut [Region::default(); 64], found).unwrap();
    }
    let mut contents = Vec::new();
    reader::read(pid, &pages, &mut vec![0; 1 << 20], |batch| {
        let mut rest = batch.bytes;
        for range in batch.ranges {
            let (bytes, later) = rest.split_at(usize::try_from(range.bytes()).unwrap());
            contents.push((*range, bytes.to_vec()));
            rest = later;
        }
        Ok::<(), MemoryError>(())
    })
    .unwrap();
    contents
}

/// Brings remote pages a moment after they were asked for.
struct Courier {
    requests: Mutex<Sender<(i32, PageRange)>>,
}

impl Requester for Courier {
    fn request(&self, space: i32, pages: PageRange) {
        // Requests after the end are for nothing.
        let _sent = self.requests.lock().unwrap().send((space, pages));
    }

    fn finished(&self, _: i32) {}
}

/// Restores with the even batches of pages at hand and the odd ones remote: those come when they are asked for, and
/// the rest of them once the container runs.
fn restore_lazily(
    bed: &Bed,
    memory: &Memory,
    hold: Hold,
    decision: Decision,
) -> (Result<Stored, CheckpointError>, Arc<FaultServer>) {
    let store = Arc::new(MemoryStore::new(4 << 30).unwrap());
    let mut plan: BTreeMap<i32, SpacePlan> = BTreeMap::new();
    let (mut odd, mut is_odd) = (Vec::new(), false);
    for (space, pages) in memory {
        for (range, bytes) in pages {
            for (part, bytes) in range.chunks(4).zip(bytes.chunks(4 * 4096)) {
                let plan = plan.entry(*space).or_default();
                if is_odd {
                    plan.remote.insert(part);
                    odd.push((*space, part, bytes.to_vec()));
                } else {
                    plan.held.insert(part);
                    store.put(*space, part.start(), bytes).unwrap();
                }
                is_odd = !is_odd;
            }
        }
    }
    let (requests, requested) = channel::<(i32, PageRange)>();
    let server: Arc<OnceLock<Arc<FaultServer>>> = Arc::default();
    let courier = {
        let (server, store) = (server.clone(), store.clone());
        spawn(move || {
            let bring = |(space, part, bytes): &(i32, PageRange, Vec<u8>)| {
                store.put(*space, part.start(), bytes).unwrap();
                server.wait().arrived(*space, *part);
            };
            for (space, pages) in requested {
                odd.iter()
                    .filter(|(of, part, _)| *of == space && part.intersection(pages).is_some())
                    .for_each(bring);
            }
            odd.iter().rev().for_each(bring);
        })
    };
    let requester = Arc::new(Courier { requests: Mutex::new(requests) });
    fs::create_dir_all(bed.path("work")).unwrap();
    let started = FaultServer::start(
        &bed.path("work"),
        &plan,
        store,
        Some(requester.clone()),
        None,
        FaultConfig::default(),
    );
    let started = server.get_or_init(|| Arc::new(started.unwrap())).clone();
    let options = RestoreOptions {
        work_path: Some(bed.path("work")),
        pid_file: Some(bed.path("two.pid")),
        hold,
        lazy_pages: true,
        ..RestoreOptions::new(bed.path("two"), bed.path("images"))
    };
    let begin = Instant::now();
    let answer = restore(&Store::new(bed.path("root")), "two", &options, |_| {
        println!("restored to {hold:?}: {:?}", begin.elapsed());
        started.begin_fill();
        decision
    });
    // The courier brings the rest when nobody can ask any more.
    drop(std::mem::replace(&mut *requester.requests.lock().unwrap(), channel().0));
    courier.join().unwrap();
    (answer, started)
}

/// Threads and descriptors of servers and filters in this process.
fn leftovers() -> Vec<String> {
    let names = |directory: &str, name: fn(&Path) -> Option<String>| -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.filter_map(|entry| name(&entry.unwrap().path())).collect()
    };
    let mut found = names("/proc/self/task", |path| fs::read_to_string(path.join("comm")).ok());
    found.extend(names("/proc/self/fd", |path| Some(fs::read_link(path).ok()?.display().to_string())));
    let ours = |name: &String| {
        ["faults", "fill", "hide"].contains(&name.trim())
            || name.contains("userfaultfd")
            || name.contains("seccomp")
    };
    found.retain(ours);
    found
}

const LIMIT: Duration = Duration::from_secs(30);
/// 12 MiB for each thread.
const WORDS: u64 = (12 << 20) / 8;
