//! The whole chain: a program that checks its own memory is followed while it runs, frozen, dumped by CRIU
//! without its memory, killed, restored lazily, and finds every page as it was.
//!
//! Needs root and criu in PATH. `GODWIT_MEMORY_MIB` sets the size.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_memory::fault::{FaultConfig, FaultServer, MemoryStore, SpacePlan};
use godwit_memory::hide::{self, Hidden};
use godwit_memory::tracker::{Collection, DirtyTracker, WpAsyncTracker};
use godwit_memory::{MemoryError, PageSet, maps, reader};
use godwit_sys::freezer::Freezer;
use godwit_sys::process;

const LIMIT: Duration = Duration::from_secs(60);

/// A cgroup of its own with a freezer, removed on drop.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(pid: i32) -> Self {
        let root = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.is_dir());
        let path = root.unwrap().join(format!("godwit-memory-{pid}"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("cgroup.procs"), pid.to_string()).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} is left over", self.0.display());
    }
}

/// Kills and reaps whatever has this id in the end.
struct Reaper(i32);

impl Drop for Reaper {
    fn drop(&mut self) {
        let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), nix::sys::signal::SIGKILL);
        process::reap(self.0, LIMIT).unwrap();
    }
}

/// Rewritten pages, wrong words and full passes, as the program reports them.
fn report(path: &Path) -> Option<[u64; 3]> {
    let text = fs::read_to_string(path).ok()?;
    let numbers: Vec<u64> = text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().ok()
}

fn wait_passes(path: &Path, passes: u64) -> [u64; 3] {
    let begin = Instant::now();
    loop {
        if let Some(numbers) = report(path)
            && numbers[2] >= passes
        {
            return numbers;
        }
        assert!(begin.elapsed() < LIMIT, "no progress: {:?}", report(path));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Does what a receiver must do with a collection; returns the number of pages read.
fn receive(store: &MemoryStore, pid: i32, collection: &Collection) -> u64 {
    let [delta] = &collection.deltas[..] else { panic!("{collection:?}") };
    for pages in delta.absent.ranges().iter().chain(delta.zero.ranges()) {
        store.forget(pid, *pages);
    }
    let mut buffer = vec![0; 1 << 20];
    reader::read(pid, &delta.dirty, &mut buffer, |batch| {
        let mut rest = batch.bytes;
        for range in batch.ranges {
            let (bytes, later) = rest.split_at(usize::try_from(range.bytes()).unwrap());
            store.put(pid, range.start(), bytes)?;
            rest = later;
        }
        for pages in batch.zero.ranges().iter().chain(batch.gone.ranges()) {
            store.forget(pid, *pages);
        }
        Ok::<(), MemoryError>(())
    })
    .unwrap();
    delta.dirty.pages()
}

fn criu(arguments: &[&str], images: &Path) -> Command {
    let mut command = Command::new("criu");
    command.args(arguments).args(["--shell-job", "--manage-cgroups=ignore", "-v4", "-D"]).arg(images);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn assert_success(mut child: Child, log: &Path) {
    let status = child.wait().unwrap();
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error")).collect();
    assert!(status.success(), "{status}: {errors:#?}");
}

/// What CRIU's own clock showed when it wrote a line with these words.
fn moment(log: &Path, words: &str) -> String {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned();
    let line = text.lines().find(|line| line.contains(words)).unwrap_or("(not found)");
    line.split_whitespace().next().unwrap_or("").to_owned()
}

/// Why the test cannot run here.
fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if Command::new("criu").arg("--version").stdout(Stdio::null()).status().is_err() {
        return Some("no criu in PATH".to_owned());
    }
    hide::probe().err().or_else(|| WpAsyncTracker::new(LIMIT).err()).map(|error| error.to_string())
}

#[test]
fn a_program_moves_with_its_memory_outside_criu() {
    if let Some(obstacle) = obstacle() {
        eprintln!("SKIP: {obstacle}");
        return;
    }
    let mebibytes = std::env::var("GODWIT_MEMORY_MIB").map_or(256, |text| text.parse().unwrap());
    process::set_subreaper(true).unwrap();
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("report");
    let mut child = Command::new(env!("CARGO_BIN_EXE_memory-workload"))
        .args(["check", &format!("{mebibytes}")])
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    // Dropped last: a cgroup can be removed once nothing lives in it.
    let cgroup = Cgroup::new(pid);
    let _reaper = Reaper(pid);
    wait_passes(&path, 1);

    let (store, plan) = move_away(pid, &cgroup, directory.path());
    child.wait().unwrap();
    let planned = plan.pages();
    let before = report(&path).unwrap();

    let begin = Instant::now();
    let plan = BTreeMap::from([(pid, SpacePlan { held: plan, ..SpacePlan::default() })]);
    let config = FaultConfig::default();
    let server = FaultServer::start(directory.path(), &plan, store.clone(), None, None, config).unwrap();
    let restore =
        criu(&["restore", "-d", "--lazy-pages", "-o", "restore.log"], directory.path()).spawn().unwrap();
    assert!(server.wait_restored(LIMIT).unwrap());
    let restored = begin.elapsed();
    assert!(server.wait_drained(LIMIT).unwrap());
    let drained = begin.elapsed();
    assert_success(restore, &directory.path().join("restore.log"));
    println!(
        "{mebibytes} MiB: restore to resumed {restored:?}, drained {:?} later, {:?}",
        drained.checked_sub(restored).unwrap(),
        server.progress()
    );
    assert_eq!(store.resident_bytes().unwrap(), 0, "all memory of the store was given back");
    let progress = server.progress();
    assert!(planned >= mebibytes * 256);
    let installed = progress.installed_on_fault_pages + progress.installed_behind_pages;
    assert_eq!(installed + progress.present_already_pages, planned);

    let after = wait_passes(&path, before[2] + 2);
    assert_eq!(after[1], 0, "words found wrong");
    assert!(after[0] > before[0], "it goes on");
}

/// Follows the program, freezes it, and lets CRIU dump and kill it; returns its memory.
fn move_away(pid: i32, cgroup: &Cgroup, images: &Path) -> (Arc<MemoryStore>, PageSet) {
    let store = Arc::new(MemoryStore::new(64 << 30).unwrap());
    let mut tracker = WpAsyncTracker::new(Duration::from_millis(500)).unwrap();
    let armed = tracker.arm(&[pid]).unwrap();
    println!("stopped for the injection: {:?}", armed.stopped[0].1);
    for round in 0..5 {
        let begin = Instant::now();
        let collection = tracker.collect(&[pid]).unwrap();
        let read = receive(&store, pid, &collection);
        println!("round {round}: {read} pages, scan {:?}, all {:?}", collection.scan, begin.elapsed());
    }
    let hidden = Hidden::default();
    let mut dump = criu(&["dump", "-o", "dump.log", "-t", &pid.to_string()], images);
    dump.arg("--freeze-cgroup").arg(&cgroup.0);
    let prepared = hide::prepare(&mut dump).unwrap();

    let begin = Instant::now();
    let frozen = Freezer::open(&cgroup.0).unwrap().freeze(LIMIT).unwrap();
    let (freeze, collection) = (begin.elapsed(), tracker.collect(&[pid]).unwrap());
    let read = receive(&store, pid, &collection);
    let lazy = maps::lazy(pid).unwrap();
    let plan = store.pages(pid).intersection(&lazy);
    hidden.set(pid, lazy);
    let residue = begin.elapsed();
    let child = dump.spawn().unwrap();
    drop(dump);
    let supervisor = prepared.start(hidden).unwrap();
    assert_success(child, &images.join("dump.log"));
    println!(
        "freeze {freeze:?}, residue of {read} pages {:?} (scan {:?}), dump {:?}, {:?}",
        residue - freeze,
        collection.scan,
        begin.elapsed() - residue,
        supervisor.stop().unwrap()
    );
    let log = images.join("dump.log");
    println!(
        "criu's clock: seized {}, state dumped {}, tasks killed {}",
        moment(&log, "Seized task"),
        moment(&log, "Unseizing"),
        moment(&log, "Dumping finished")
    );
    let bytes: u64 =
        fs::read_dir(images).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    println!("images and logs: {} KiB", bytes >> 10);
    assert!(bytes < 8 << 20, "criu dumped no bulk memory");
    // The tasks are gone; there is nothing left to thaw.
    frozen.commit();
    for pages in store.pages(pid).difference(&plan).ranges() {
        store.forget(pid, *pages);
    }
    (store, plan)
}
