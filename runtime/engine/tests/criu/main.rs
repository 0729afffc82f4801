//! The rules of a checkpointer, and whether CRIU and the pretended one of `tests/loopback` follow them.
//!
//! Needs root, CRIU and a static busybox. Without the test harness, because a container is made by a process with one
//! thread: this program calls itself for that.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{env, fs};

use godwit_container::create::{CreateOptions, create};
use godwit_container::{Store, lifecycle};
use godwit_engine::image_dir::ImageDir;
use godwit_engine::source::{Checkpointer, Confirm, CriuCheckpointer, Dumping, Verdict};
use godwit_memory::ahead::Ahead;
use serde_json::json;

#[path = "../loopback/pretend.rs"]
mod pretend;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().collect();
    if let [_, role, root, bundle, id] = &args[..]
        && role == MAKE
    {
        return make_container(root, bundle, id);
    }
    // What test runners ask of a program that they know nothing of.
    if args.iter().any(|arg| arg == "--list") {
        println!("{NAME}: test");
        return ExitCode::SUCCESS;
    }
    conforms(&mut PretendedBed::new());
    println!("test a_pretended_checkpointer_follows_the_rules ... ok");
    match RealBed::new() {
        Ok(mut bed) => {
            conforms(&mut bed);
            println!("test {NAME} ... ok");
        }
        Err(reason) => {
            assert!(env::var_os("SKIP_IS_FAILURE").is_none(), "{reason}");
            println!("SKIP: {reason}");
        }
    }
    ExitCode::SUCCESS
}

/// Somewhere that containers run.
trait Bed {
    type Checkpointer: Checkpointer;

    /// Starts a new container.
    fn start(&mut self);
    /// Takes the running container.
    fn take(&self) -> Self::Checkpointer;
    /// Takes a container that another checkpointer left frozen.
    fn adopt(&self) -> Self::Checkpointer;
    /// Tells whether the container's tasks make progress; waits for it, however busy the machine is.
    fn runs(&self) -> bool;
    /// Tells whether the container's tasks make none.
    fn stands_still(&self) -> bool;
    /// Tells whether no task is left.
    fn is_gone(&self) -> bool;
    /// Makes an empty directory for images.
    fn images(&self) -> ImageDir {
        ImageDir::new(256 << 20).expect("room for images")
    }
}

/// The rules, one after the other on one container, until it is gone.
fn conforms(bed: &mut impl Bed) {
    bed.start();

    let images = bed.images();
    let mut container = bed.take();
    drop(container.prepare(images.path(), None, &Ahead::default()).expect("prepare"));
    assert!(bed.runs(), "a dump that is only prepared touches nothing");

    container.freeze().expect("freeze");
    assert!(bed.stands_still(), "a frozen container makes no progress");
    assert_eq!(container.unsettled().expect("a look at it"), None, "it has nothing under way");
    drop(container);
    assert!(bed.runs(), "dropping thaws");

    let images = bed.images();
    let mut container = bed.take();
    let dump = container.prepare(images.path(), None, &Ahead::default()).expect("prepare");
    container.freeze().expect("freeze");
    let mut complete = false;
    let decide = |_: Confirm<'_>| {
        complete = images.path().join("inventory.img").exists() && images.path().join("pages-1.img").exists();
        Verdict::Release
    };
    dump.run(decide).expect("a released dump");
    assert!(complete, "the images are complete when the verdict is asked for");
    assert!(bed.stands_still(), "a released container stays frozen until it is thawed");
    container.thaw().expect("thaw");
    assert!(bed.runs(), "a released and thawed container runs");
    drop(container);

    let images = bed.images();
    let mut container = bed.take();
    let dump = container.prepare(images.path(), None, &Ahead::default()).expect("prepare");
    container.freeze().expect("freeze");
    container.leave_frozen();
    dump.run(|_| Verdict::Release).expect("a released dump");
    drop(container);
    assert!(bed.stands_still() && !bed.is_gone(), "what is left frozen stays so");

    let mut container = bed.adopt();
    container.thaw().expect("thaw");
    assert!(bed.runs(), "an adopted container can be thawed");
    drop(container);

    let images = bed.images();
    let mut container = bed.take();
    let dump = container.prepare(images.path(), None, &Ahead::default()).expect("prepare");
    container.freeze().expect("freeze");
    dump.run(|_| Verdict::Kill).expect("a committed dump");
    container.kill().expect("kill");
    assert!(bed.is_gone(), "a committed dump leaves no task");

    bed.start();
    let mut container = bed.take();
    container.freeze().expect("freeze");
    container.leave_frozen();
    let mut container = bed.adopt();
    container.kill().expect("kill");
    assert!(bed.is_gone(), "an adopted container can be killed");
}

/// A container that is a value.
struct PretendedBed {
    tasks: pretend::Side,
    rootfs: tempfile::TempDir,
}

impl PretendedBed {
    fn new() -> Self {
        let (tasks, _) = pretend::Side::pair([pretend::Tasks::Running, pretend::Tasks::Stopped]);
        Self { tasks, rootfs: tempfile::tempdir().expect("a directory") }
    }
}

impl Bed for PretendedBed {
    type Checkpointer = pretend::PretendedCheckpointer;

    fn start(&mut self) {
        *self = Self::new();
    }

    fn take(&self) -> Self::Checkpointer {
        pretend::PretendedCheckpointer::new(self.tasks.clone(), self.rootfs.path().to_owned(), None, 0)
    }

    fn adopt(&self) -> Self::Checkpointer {
        self.take()
    }

    fn runs(&self) -> bool {
        self.tasks.get() == pretend::Tasks::Running
    }

    fn stands_still(&self) -> bool {
        !self.runs()
    }

    fn is_gone(&self) -> bool {
        self.tasks.get() == pretend::Tasks::Gone
    }
}

/// A busybox that counts in a file of its root.
struct RealBed {
    directory: tempfile::TempDir,
    id: String,
    count: u32,
}

impl RealBed {
    fn new() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root".to_owned());
        }
        if !Path::new(BUSYBOX).exists() {
            return Err(format!("needs {BUSYBOX} (package busybox-static)"));
        }
        godwit_criu::Program::find().map_err(|error| format!("needs criu: {error}"))?;
        godwit_sys::process::set_subreaper(true).map_err(|error| error.to_string())?;
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        Ok(Self { directory, id: String::new(), count: 0 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn store(&self) -> Store {
        Store::new(self.path("root"))
    }

    fn write_bundle(&self) {
        let rootfs = self.path("rootfs");
        fs::create_dir_all(rootfs.join("bin")).expect("a root");
        fs::copy(BUSYBOX, rootfs.join("bin/sh")).expect("a shell");
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
                "args": ["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/count; done"],
            },
            "root": {"path": &rootfs},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {
                "cgroupsPath": format!("/godwit-test-{}", self.id),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            },
        });
        fs::create_dir_all(self.path("bundle")).expect("a bundle");
        fs::create_dir_all(rootfs.join("proc")).expect("a mount point");
        fs::create_dir_all(rootfs.join("dev")).expect("a mount point");
        fs::write(self.path("bundle/config.json"), spec.to_string()).expect("a spec");
    }

    fn counted(&self) -> String {
        fs::read_to_string(self.path("rootfs/count")).unwrap_or_default()
    }

    fn counts_within(&self, limit: Duration) -> bool {
        let mut seen = BTreeSet::new();
        let deadline = Instant::now() + limit;
        while seen.len() < 2 && Instant::now() < deadline {
            // An empty file is one that is just being written.
            seen.extend(Some(self.counted()).filter(|count| !count.is_empty()));
            sleep(Duration::from_millis(5));
        }
        seen.len() >= 2
    }
}

impl Bed for RealBed {
    type Checkpointer = CriuCheckpointer;

    fn start(&mut self) {
        self.count += 1;
        self.id = format!("engine-{}-{}", std::process::id(), self.count);
        self.write_bundle();
        let program = env::current_exe().expect("this program");
        let text = |name| self.path(name).display().to_string();
        // Pipes that nobody reads: a container's streams must be ones that CRIU can name.
        let made = Command::new(program)
            .args([MAKE, &text("root"), &text("bundle"), &self.id])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(made.expect("a process").success(), "the container cannot be made");
        assert!(self.runs(), "the container does not run");
    }

    fn take(&self) -> CriuCheckpointer {
        let stored = self.store().open(&self.id).expect("a container");
        fs::create_dir_all(self.path("work")).expect("a directory");
        CriuCheckpointer::new(stored, self.path("work")).expect("a checkpointer")
    }

    fn adopt(&self) -> CriuCheckpointer {
        let stored = self.store().open(&self.id).expect("a container");
        CriuCheckpointer::adopt(stored, self.path("work")).expect("a checkpointer")
    }

    fn runs(&self) -> bool {
        self.counts_within(PROGRESS)
    }

    fn stands_still(&self) -> bool {
        !self.counts_within(STANDSTILL)
    }

    fn is_gone(&self) -> bool {
        let stored = self.store().open(&self.id).expect("a container");
        godwit_container::cgroup::processes(&stored).is_ok_and(|pids| pids.is_empty())
    }
}

impl Drop for RealBed {
    fn drop(&mut self) {
        for number in 1..=self.count {
            let id = format!("engine-{}-{number}", std::process::id());
            if let Err(error) = lifecycle::delete(&self.store(), &id, true) {
                eprintln!("{id} is left: {error}");
            }
        }
    }
}

fn make_container(root: &str, bundle: &str, id: &str) -> ExitCode {
    let store = Store::new(root);
    let options = CreateOptions { bundle: bundle.into(), detach: true, ..CreateOptions::default() };
    let made = create(&store, id, &options).and_then(|mut stored| lifecycle::start(&mut stored));
    if let Err(error) = made {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

const NAME: &str = "criu_follows_the_rules";
const MAKE: &str = "make-container";
const BUSYBOX: &str = "/bin/busybox";
/// A container that counts as fast as it can and has not counted for so long stands still.
const STANDSTILL: Duration = Duration::from_millis(300);
/// A container that runs counts within so long, even if others keep every processor.
const PROGRESS: Duration = Duration::from_secs(30);
