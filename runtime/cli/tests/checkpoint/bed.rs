//! Bundles, runtimes and containers for checkpoints, and what it takes to look at the result from outside.

use std::cell::Cell;
use std::fs;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, pipe};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::spawn;
use std::time::{Duration, Instant};

use godwit_criu::{CriuError, Program, Session, Setup};
use nix::unistd::Uid;
use serde_json::{Value, json};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Runtime {
    Runc,
    Godwit,
}

/// A directory with a state root per runtime, a root file system, and bundles over it.
#[derive(Debug)]
pub(crate) struct Bed {
    directory: tempfile::TempDir,
    name: String,
}

impl Bed {
    /// Runs a test, unless something it needs is missing.
    pub(crate) fn with(runtimes: &[Runtime], test: impl FnOnce(&Self)) {
        if let Some(reason) = missing(runtimes) {
            assert!(std::env::var_os("SKIP_IS_FAILURE").is_none(), "{reason}");
            eprintln!("SKIP: {reason}");
            return;
        }
        // Containers are orphaned by the verbs that make them; here they must be reaped.
        godwit_sys::process::set_subreaper(true).unwrap();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("godwit-test-checkpoint-{}-{number}", std::process::id());
        let bed = Self { directory: tempfile::tempdir().unwrap(), name };
        bed.make_rootfs();
        test(&bed);
        bed.assert_nothing_left();
    }

    fn make_rootfs(&self) {
        let rootfs = self.path("rootfs");
        fs::create_dir_all(rootfs.join("bin")).unwrap();
        fs::copy(BUSYBOX, rootfs.join("bin/busybox")).unwrap();
        for name in ["cat", "echo", "ip", "sh", "sleep", "nc", "stty"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name)).unwrap();
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Makes the bundle `id`, whose process is a counter writing a line every 20 ms, changed by `change`.
    pub(crate) fn bundle(&self, id: &str, change: impl FnOnce(&mut Value)) {
        let mut spec: Value = serde_json::from_str(include_str!("../../src/commands/spec.json")).unwrap();
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(["sh", "-c", COUNTER]);
        spec["root"] = json!({"path": self.path("rootfs"), "readonly": false});
        spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", self.name));
        change(&mut spec);
        fs::create_dir_all(self.path(id)).unwrap();
        fs::write(self.path(id).join("config.json"), spec.to_string()).unwrap();
    }

    /// The runtime with its global options.
    pub(crate) fn command(&self, runtime: Runtime) -> Command {
        let (program, root) = match runtime {
            Runtime::Runc => ("runc", "root-runc"),
            Runtime::Godwit => (env!("CARGO_BIN_EXE_godwit"), "root"),
        };
        let mut command = Command::new(program);
        command.arg("--root").arg(self.path(root)).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, runtime: Runtime, args: &[&str]) -> Output {
        self.command(runtime).args(args).output().unwrap()
    }

    /// Runs a verb that must succeed; what it printed.
    pub(crate) fn ok(&self, runtime: Runtime, args: &[&str]) -> String {
        let output = self.run(runtime, args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{runtime:?} {args:?}: {:?} {error}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a verb of godwit that must fail with exit code 1; what it said.
    pub(crate) fn fails(&self, args: &[&str]) -> String {
        let output = self.run(Runtime::Godwit, args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Creates and starts the container of the bundle `id`, with its output on a pipe.
    pub(crate) fn start(&self, runtime: Runtime, id: &str) -> Container<'_> {
        let container = self.launch(runtime, id, "create", &[]);
        self.ok(runtime, &["start", id]);
        container
    }

    /// Restores the bundle `id` from `images`, with its output on a new pipe.
    pub(crate) fn restore(&self, runtime: Runtime, id: &str, images: &str) -> Container<'_> {
        let (images, work) = (self.text(images), self.text("work"));
        self.launch(runtime, id, "restore", &["--image-path", &images, "--work-path", &work, "--detach"])
    }

    fn launch(&self, runtime: Runtime, id: &str, verb: &str, options: &[&str]) -> Container<'_> {
        let (reader, writer) = pipe().unwrap();
        let status = self.launch_status(runtime, id, verb, options, writer);
        assert!(status, "{verb} {id}: {}", self.log_tail());
        Container::new(self, runtime, id, Some(reader))
    }

    pub(crate) fn launch_status(
        &self,
        runtime: Runtime,
        id: &str,
        verb: &str,
        options: &[&str],
        output: PipeWriter,
    ) -> bool {
        let mut command = self.command(runtime);
        command.arg(verb).arg("--bundle").arg(self.path(id)).args(options);
        command.arg("--pid-file").arg(self.path(&format!("{id}.pid"))).arg(id);
        command.stdout(output.try_clone().unwrap()).stderr(output);
        command.status().unwrap().success()
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.path("work").join("restore.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    pub(crate) fn status(&self, runtime: Runtime, id: &str) -> String {
        let state: Value = serde_json::from_str(&self.ok(runtime, &["state", id])).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    pub(crate) fn pid(&self, id: &str) -> i32 {
        fs::read_to_string(self.path(&format!("{id}.pid"))).unwrap().trim().parse().unwrap()
    }

    /// Directories of the bed's cgroups, one per hierarchy that has some.
    pub(crate) fn cgroups(&self, id: &str) -> Vec<PathBuf> {
        let name = format!("{}/{id}", self.name);
        let mut found = vec![Path::new("/sys/fs/cgroup").join(&name)];
        for entry in fs::read_dir("/sys/fs/cgroup").unwrap() {
            found.push(entry.unwrap().path().join(&name));
        }
        found.retain(|path| path.is_dir());
        found
    }

    fn assert_nothing_left(&self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let directory = self.directory.path().to_str().unwrap();
        assert!(!mounts.contains(directory), "{mounts}");
        for runtime in ["root", "root-runc"] {
            let left = fs::read_dir(self.path(runtime)).map_or(0, Iterator::count);
            assert_eq!(left, 0, "state left in {runtime}");
        }
        // The runtimes remove a container's cgroup but not its parents, which are this test's.
        for cgroup in self.cgroups("") {
            if self.path("root-runc").exists() {
                // runc gives up on hierarchies in which a killed process has not been reaped soon enough.
                for id in ["one", "two"] {
                    eventually("runc's cgroup is empty", || {
                        let path = cgroup.join(id);
                        !path.exists() || fs::remove_dir(path).is_ok()
                    });
                }
            }
            fs::remove_dir(&cgroup).unwrap();
        }
    }
}

/// A container that is killed, reaped and deleted when the test is over.
#[derive(Debug)]
pub(crate) struct Container<'a> {
    bed: &'a Bed,
    pub(crate) runtime: Runtime,
    pub(crate) id: String,
    pub(crate) pid: i32,
    lines: Option<Receiver<String>>,
    seen: Cell<u32>,
}

impl<'a> Container<'a> {
    pub(crate) fn new(bed: &'a Bed, runtime: Runtime, id: &str, output: Option<PipeReader>) -> Self {
        let lines = output.map(|output| {
            let (sender, lines) = channel();
            spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
            lines
        });
        Self { bed, runtime, id: id.to_owned(), pid: bed.pid(id), lines, seen: Cell::new(0) }
    }

    pub(crate) fn status(&self) -> String {
        self.bed.status(self.runtime, &self.id)
    }

    /// The next line of the counter.
    pub(crate) fn tick(&self) -> u32 {
        let line = self.lines.as_ref().unwrap().recv_timeout(Duration::from_secs(20)).unwrap();
        let tick = line.strip_prefix("tick ").and_then(|tick| tick.parse().ok());
        self.seen.set(tick.unwrap_or_else(|| panic!("{line}")));
        self.seen.get()
    }

    /// The last line, once the container has let go of its output.
    pub(crate) fn last_tick(&self) -> u32 {
        let mut last = self.seen.get();
        while let Ok(line) = self.lines.as_ref().unwrap().recv_timeout(Duration::from_secs(20)) {
            last = line.strip_prefix("tick ").unwrap().parse().unwrap();
        }
        last
    }

    /// Fails unless the counter counts on by ones.
    pub(crate) fn assert_counting(&self) {
        let first = self.tick();
        for tick in first + 1..first + 5 {
            assert_eq!(self.tick(), tick);
        }
    }

    /// Checkpoints to the directory `images` and stops.
    pub(crate) fn checkpoint(&self, images: &str, options: &[&str]) {
        let (images, work) = (self.bed.text(images), self.bed.text("work"));
        let mut args = vec!["checkpoint", "--image-path", &images, "--work-path", &work];
        args.extend(options);
        args.push(&self.id);
        // runc removes the cgroup right away, which a zombie in it would prevent.
        let pid = self.pid;
        let reaper = (!options.contains(&"--leave-running")).then(|| spawn(move || reap(pid)));
        self.bed.ok(self.runtime, &args);
        if let Some(reaper) = reaper {
            assert!(reaper.join().unwrap(), "process {pid} does not end");
        }
    }

    /// The end of init.
    pub(crate) fn reap(&self) {
        assert!(reap(self.pid), "process {} does not end", self.pid);
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let pid = self.pid;
        let reaper = spawn(move || reap(pid));
        self.bed.run(self.runtime, &["delete", "--force", &self.id]);
        drop(reaper.join());
    }
}

/// Reaps a process that became ours; false when it does not end.
fn reap(pid: i32) -> bool {
    godwit_sys::process::reap(pid, Duration::from_secs(20)).unwrap().is_some()
}

/// Waits until `check` holds.
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn missing(runtimes: &[Runtime]) -> Option<String> {
    if !Uid::effective().is_root() {
        return Some("checkpoints need root".to_owned());
    }
    if !Path::new(BUSYBOX).exists() {
        return Some(format!("{BUSYBOX} is missing (package busybox-static)"));
    }
    match Program::find().and_then(|program| Session::start(&program, Setup::new())) {
        Err(error @ (CriuError::NotFound { .. } | CriuError::TooOld { .. })) => {
            return Some(error.to_string());
        }
        other => drop(other.unwrap()),
    }
    let runc = runtimes.contains(&Runtime::Runc);
    (runc && Command::new("runc").arg("--version").output().is_err()).then(|| "runc is missing".to_owned())
}

const BUSYBOX: &str = "/bin/busybox";
const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.02; done";
