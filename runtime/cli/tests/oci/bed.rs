//! One runtime over one bundle, and what it takes to look at the result from outside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::unistd::Uid;
use serde_json::{Value, json};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Runtime {
    Runc,
    Godwit,
}

/// A state root and a bundle for containers of one runtime.
#[derive(Debug)]
pub(crate) struct Bed {
    program: PathBuf,
    directory: tempfile::TempDir,
    cgroup: String,
}

impl Bed {
    /// Runs a test, unless something it needs is missing; removes the containers it left.
    pub(crate) fn with(runtime: Runtime, test: impl FnOnce(&Self)) {
        if let Some(reason) = missing(runtime) {
            assert_ne!(std::env::var("SKIP_IS_FAILURE").as_deref(), Ok("1"), "{reason}");
            eprintln!("SKIP: {reason}");
            return;
        }
        // Containers are orphaned by the verbs that make them; here they must be reaped.
        godwit_sys::process::set_subreaper(true).unwrap();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let bed = Self {
            program: match runtime {
                Runtime::Runc => "runc".into(),
                Runtime::Godwit => env!("CARGO_BIN_EXE_godwit").into(),
            },
            directory: tempfile::tempdir().unwrap(),
            cgroup: format!("/godwit-test-oci-{}-{number}", std::process::id()),
        };
        bed.make_rootfs();
        bed.configure(|_| {});
        test(&bed);
    }

    fn make_rootfs(&self) {
        let rootfs = self.bundle().join("rootfs");
        for name in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, rootfs.join("bin/busybox")).unwrap();
        for name in ["cat", "echo", "false", "grep", "id", "mkdir", "mknod", "sh", "sleep", "true", "tty"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name)).unwrap();
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.path().join("bundle")
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.path().join("root")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path().join("log")
    }

    /// Writes config.json: `sleep 1000` without a terminal, changed by `change`.
    pub(crate) fn configure(&self, change: impl FnOnce(&mut Value)) {
        let mut spec: Value = serde_json::from_str(include_str!("../../src/commands/spec.json")).unwrap();
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(["sleep", "1000"]);
        spec["linux"]["cgroupsPath"] = json!(self.cgroup);
        spec["annotations"] = json!({"io.godwit.test": "yes"});
        change(&mut spec);
        fs::write(self.bundle().join("config.json"), spec.to_string()).unwrap();
    }

    /// The runtime with its global options.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.root()).arg("--log").arg(self.log());
        command.args(["--log-format", "json"]).stdin(Stdio::null());
        command
    }

    /// Runs a verb to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command().args(args).output().unwrap()
    }

    /// Runs a verb that must succeed; what it printed.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {:?} {error}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a verb that leaves a process with its stdio, which therefore is no pipe of ours; that process's id.
    pub(crate) fn exec_detached(&self, args: &[&str]) -> i32 {
        let pid_file = self.path().join("exec.pid");
        let mut command = self.command();
        command.args(["exec", "--detach", "--pid-file"]).arg(&pid_file).args(args);
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{args:?}: {:?}", fs::read_to_string(self.log()));
        fs::read_to_string(pid_file).unwrap().parse().unwrap()
    }

    /// Runs a verb that must fail with exit code 1; the message in the log, as containerd reads it.
    pub(crate) fn fails(&self, args: &[&str]) -> String {
        self.fails_with(1, args)
    }

    pub(crate) fn fails_with(&self, code: i32, args: &[&str]) -> String {
        drop(fs::remove_file(self.log()));
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        let log = fs::read_to_string(self.log()).unwrap();
        let mut records = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let last = records.rfind(|line| line["level"] == "error").unwrap();
        assert!(last["time"].as_str().unwrap().ends_with('Z'));
        last["msg"].as_str().unwrap().to_owned()
    }

    /// Creates a container whose stdio is /dev/null: an open pipe of ours would never end.
    pub(crate) fn create(&self, id: &str) -> Container<'_> {
        self.create_with(id, &[], Stdio::null())
    }

    pub(crate) fn create_with(&self, id: &str, options: &[&str], stdout: Stdio) -> Container<'_> {
        let pid_file = self.path().join(format!("{id}.pid"));
        let mut command = self.command();
        command.arg("create").arg("--bundle").arg(self.bundle()).arg("--pid-file").arg(&pid_file);
        let status = command.args(options).arg(id).stdout(stdout).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{:?}", fs::read_to_string(self.log()));
        let pid = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
        Container { bed: self, id: id.to_owned(), pid }
    }

    /// Creates a container and starts it.
    pub(crate) fn start(&self, id: &str) -> Container<'_> {
        let container = self.create(id);
        self.ok(&["start", id]);
        container
    }

    pub(crate) fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).unwrap()
    }

    /// Whether cgroup version 2 is the only one.
    #[expect(clippy::unused_self, reason = "a question about where the bed stands")]
    pub(crate) fn is_unified(&self) -> bool {
        Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
    }

    /// Directories of the bed's cgroup, one per hierarchy that has it.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let name = self.cgroup.trim_start_matches('/');
        let mut found = vec![Path::new("/sys/fs/cgroup").join(name)];
        for entry in fs::read_dir("/sys/fs/cgroup").unwrap() {
            found.push(entry.unwrap().path().join(name));
        }
        found.retain(|path| path.is_dir());
        found
    }

    /// The text of a file of the bed's cgroup, by its name on version 1 or 2.
    pub(crate) fn cgroup_file(&self, names: [&str; 2]) -> String {
        let paths = self.cgroups().into_iter().flat_map(|path| names.map(|name| path.join(name)));
        let found = paths.filter_map(|path| fs::read_to_string(path).ok()).next();
        found.unwrap_or_else(|| panic!("none of {names:?}")).trim().to_owned()
    }
}

/// A container that is killed, reaped and deleted when the test is over.
#[derive(Debug)]
pub(crate) struct Container<'a> {
    bed: &'a Bed,
    pub(crate) id: String,
    pub(crate) pid: i32,
}

impl Container<'_> {
    pub(crate) fn status(&self) -> String {
        self.bed.state(&self.id)["status"].as_str().unwrap().to_owned()
    }

    /// Waits for init's end and reaps it; its exit code, 128 + signal when it was killed.
    pub(crate) fn wait(&self) -> i32 {
        reap(self.pid)
    }

    pub(crate) fn kill(&self) {
        self.bed.ok(&["kill", &self.id, "KILL"]);
        assert_eq!(self.wait(), 137);
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // A created container that is killed leaves a zombie that the runtime would wait for: reap meanwhile.
        let pid = self.pid;
        let reaper = std::thread::spawn(move || godwit_sys::process::reap(pid, LIMIT));
        self.bed.run(&["delete", "--force", &self.id]);
        drop(reaper.join());
    }
}

/// Waits for a process that became ours.
pub(crate) fn reap(pid: i32) -> i32 {
    let code = godwit_sys::process::reap(pid, LIMIT).unwrap();
    code.unwrap_or_else(|| panic!("process {pid} does not end"))
}

/// Waits until `check` holds.
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !check() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn missing(runtime: Runtime) -> Option<String> {
    if !Uid::effective().is_root() {
        return Some("running containers needs root".to_owned());
    }
    if !Path::new(BUSYBOX).exists() {
        return Some(format!("{BUSYBOX} is missing (package busybox-static)"));
    }
    let runc = Command::new("runc").arg("--version").output();
    (runtime == Runtime::Runc && runc.is_err()).then(|| "runc is missing".to_owned())
}

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(20);
const BUSYBOX: &str = "/bin/busybox";
