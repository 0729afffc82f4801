//! One node of a bed: its namespaces, its cgroups and the daemons in them.
//!
//! A node is held by one sleeping process, the holder, in the node's network, mount and cgroup
//! namespaces. To run something in the node is to join the node's cgroups and then the holder's
//! namespaces (`node_enter.sh`). Daemons are found by their pid files, and believed only when the pid is in
//! the node's cgroups.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::cgroup::Cgroups;
use crate::containerd::{SOCKET, Version};
use crate::error::{BedError, Result};
use crate::process::{Daemon, output, run, wait_until};

/// Which of a bed's two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeName {
    /// The first; migrations in tests start here.
    A,
    /// The second.
    B,
}

impl NodeName {
    /// Both nodes.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// Returns its name, `a` or `b`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// Returns the other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Returns its address on the link between the nodes. In a node, `node-a` and `node-b` resolve to these.
    #[must_use]
    pub const fn address(self) -> Ipv4Addr {
        match self {
            Self::A => Ipv4Addr::new(10, 77, 0, 1),
            Self::B => Ipv4Addr::new(10, 77, 0, 2),
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for NodeName {
    type Err = BedError;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|name| name.as_str() == text).ok_or_else(|| BedError::Invalid {
            what: "node",
            value: text.to_owned(),
            expected: "a or b",
        })
    }
}

/// A node of a bed that is up.
#[derive(Debug)]
pub struct Node {
    name: NodeName,
    dir: PathBuf,
    search_path: String,
    cgroups: Cgroups,
    netns: PathBuf,
}

impl Node {
    /// Returns the node `name` whose files are in `dir`, whether it is up or not.
    pub(crate) fn new(name: NodeName, dir: PathBuf, object: String, search_path: String) -> Result<Self> {
        let netns = Path::new("/run/netns").join(&object);
        Ok(Self { name, dir, search_path, cgroups: Cgroups::new(object)?, netns })
    }

    /// Returns which node it is.
    #[must_use]
    pub fn name(&self) -> NodeName {
        self.name
    }

    /// Returns its address on the link between the nodes.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.name.address()
    }

    /// Returns the directory of its files on the machine: logs, pid files, containerd's root.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the path, from outside, of something that the node has at the absolute path `inside`: what is
    /// in its `/run`, for example. It is gone with the node.
    #[must_use]
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let holder = self.daemon(HOLDER).map_or(0, |holder| holder.pid);
        Path::new("/proc")
            .join(holder.to_string())
            .join("root")
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// Returns its cgroups.
    #[must_use]
    pub fn cgroups(&self) -> &Cgroups {
        &self.cgroups
    }

    /// Returns a command that runs `argv` in the node: its stdio is the caller's to choose. The working
    /// directory is `/`, so arguments have to name files by absolute paths. A node that is down makes the
    /// command fail.
    pub fn command<I, S>(&self, argv: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        // Namespaces of pid 0 do not exist, so nsenter reports what is wrong.
        let holder = self.daemon(HOLDER).map_or(0, |holder| holder.pid).to_string();
        let mut command = Command::new("bash");
        command.args(enter(&holder, Path::new("-"), &self.cgroups.init_files())).args(argv);
        self.environment(&mut command);
        command
    }

    /// Returns a command that runs the node's `ctr` with `args`.
    pub fn ctr_command<I, S>(&self, args: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = self.command(["ctr"]);
        command.args(args);
        command
    }

    /// Runs `argv` in the node and returns what it wrote to standard output.
    ///
    /// # Errors
    /// [`BedError::Command`] when it fails, with what it wrote to standard error.
    pub fn exec<I, S>(&self, argv: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        run(&mut self.command(argv))
    }

    /// Runs the node's `ctr` and returns what it wrote to standard output.
    ///
    /// # Errors
    /// As [`Node::exec`].
    pub fn ctr<I, S>(&self, args: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        run(&mut self.ctr_command(args))
    }

    /// Runs the node's `ctr` whatever comes of it: for a command that is expected to fail.
    ///
    /// # Errors
    /// [`BedError::Start`] when it cannot be started.
    pub fn ctr_output<I, S>(&self, args: I) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        output(&mut self.ctr_command(args))
    }

    /// Imports an image archive into the node's containerd and unpacks it.
    ///
    /// # Errors
    /// As [`Node::exec`].
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.ctr([OsStr::new("image"), OsStr::new("import"), archive.as_os_str()]).map(drop)
    }

    /// Starts containerd and returns when it answers.
    ///
    /// # Errors
    /// [`BedError::Daemon`] when it ends or does not answer within thirty seconds.
    pub fn start_containerd(&self, version: Version, root: &Path) -> Result<()> {
        let config = self.dir.join("containerd.toml");
        fs::write(&config, version.config(root)).map_err(BedError::io("write", &config))?;
        self.start(CONTAINERD, [OsStr::new("containerd"), OsStr::new("--config"), config.as_os_str()])?;
        self.await_daemon(CONTAINERD, "it does not answer", || {
            self.path(SOCKET).exists() && self.ctr(["version"]).is_ok()
        })
    }

    /// Ends containerd with SIGTERM. Its shims and containers go on.
    pub fn stop_containerd(&self) {
        self.stop(CONTAINERD, Signal::SIGTERM);
    }

    /// Starts `godwit agent` on the node's address, with `args` after its own, and returns when it listens.
    ///
    /// # Errors
    /// [`BedError::Daemon`] when it ends or does not listen within thirty seconds.
    pub fn start_agent<I, S>(&self, args: I) -> Result<()>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let listen = format!("{}:{AGENT_PORT}", self.address());
        let mut argv: Vec<OsString> = ["godwit", "agent", "--listen", &listen].map(OsString::from).to_vec();
        argv.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self.start(AGENT, argv)?;
        self.await_daemon(AGENT, "it does not listen", || self.listens(AGENT_PORT))
    }

    /// Ends the agent with `signal`.
    pub fn stop_agent(&self, signal: Signal) {
        self.stop(AGENT, signal);
    }

    /// Starts a daemon of a test's own in the node, known by `name`; its output goes to `NAME.log` in
    /// [`Node::dir`]. Returns when its process exists.
    ///
    /// # Errors
    /// [`BedError::Daemon`] when it does not come to exist.
    pub fn start<I, S>(&self, name: &'static str, argv: I) -> Result<Daemon>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let holder = self.daemon(HOLDER).map_or(0, |holder| holder.pid).to_string();
        self.spawn(name, &holder, &self.cgroups.init_files(), argv)
    }

    /// Ends a daemon with `signal`, if it runs.
    pub fn stop(&self, name: &str, signal: Signal) {
        if let Some(daemon) = self.daemon(name) {
            daemon.stop(signal);
        }
    }

    /// Returns a daemon of the node, if it runs.
    #[must_use]
    pub fn daemon(&self, name: &str) -> Option<Daemon> {
        let pid = fs::read_to_string(self.dir.join(format!("{name}.pid"))).ok()?.trim().parse().ok()?;
        Daemon::of(pid).filter(|_| self.cgroups.processes().contains(&pid))
    }

    /// Returns the end of a daemon's log.
    #[must_use]
    pub fn log_tail(&self, name: &str) -> String {
        let text = fs::read(self.dir.join(format!("{name}.log"))).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// Returns whether something listens on a TCP port (IPv4) of the node.
    #[must_use]
    pub fn listens(&self, port: u16) -> bool {
        let Some(holder) = self.daemon(HOLDER) else { return false };
        let table = fs::read_to_string(format!("/proc/{}/net/tcp", holder.pid)).unwrap_or_default();
        // Columns of proc(5): sl, local_address as ADDRESS:PORT in hexadecimal, rem_address, st; 0A is LISTEN.
        table.lines().any(|line| {
            let columns: Vec<_> = line.split_whitespace().collect();
            matches!(columns[..], [_, local, _, "0A", ..] if local.ends_with(&format!(":{port:04X}")))
        })
    }

    /// Makes the node's cgroups and namespaces. Its network namespace exists already.
    pub(crate) fn create(&self, hosts: &Path) -> Result<()> {
        fs::create_dir_all(&self.dir).map_err(BedError::io("make", &self.dir))?;
        self.cgroups.create()?;
        let mut argv: Vec<OsString> = ["bash", "-c", INIT, "node-init"].map(OsString::from).to_vec();
        argv.push(hosts.into());
        argv.extend(self.cgroups.hierarchies().iter().map(|hierarchy| hierarchy.argument().into()));
        let netns = self.netns.to_string_lossy();
        self.spawn(HOLDER, &netns, &self.cgroups.root_files(), argv)?;
        self.await_daemon(HOLDER, "it did not set up its mounts", || self.log_tail(HOLDER).ends_with("ready"))
    }

    /// Ends everything in the node and removes its cgroups. Its mounts go with its last process.
    pub(crate) fn destroy(&self) -> Result<()> {
        self.cgroups.destroy()
    }

    fn spawn<I, S>(&self, name: &'static str, holder: &str, cgroups: &[PathBuf], argv: I) -> Result<Daemon>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let pid_file = self.dir.join(format!("{name}.pid"));
        drop(fs::remove_file(&pid_file));
        let log_file = self.dir.join(format!("{name}.log"));
        let log = fs::OpenOptions::new().create(true).append(true).open(&log_file);
        let log = log.map_err(BedError::io("open", &log_file))?;
        let errors = log.try_clone().map_err(BedError::io("open", &log_file))?;
        let mut command = Command::new("setsid");
        command.args(["--fork", "bash"]).args(enter(holder, &pid_file, cgroups)).args(argv);
        command.stdin(Stdio::null()).stdout(log).stderr(errors).current_dir("/");
        self.environment(&mut command);
        command.status().map_err(|source| BedError::Start { command: name.to_owned(), source })?;
        let mut daemon = None;
        wait_until(SPAWN, || {
            daemon = self.daemon(name);
            daemon.is_some()
        });
        daemon.ok_or_else(|| self.daemon_error(name, "its process did not appear"))
    }

    fn await_daemon(&self, name: &'static str, reason: &str, ready: impl Fn() -> bool) -> Result<()> {
        let mut is_ready = false;
        wait_until(READY, || {
            is_ready = ready();
            is_ready || self.daemon(name).is_none()
        });
        if is_ready {
            return Ok(());
        }
        let reason = if self.daemon(name).is_none() { "it has ended" } else { reason };
        Err(self.daemon_error(name, reason))
    }

    fn daemon_error(&self, daemon: &'static str, reason: &str) -> BedError {
        let (node, log) = (self.name.to_string(), self.log_tail(daemon));
        BedError::Daemon { daemon, node, reason: reason.to_owned(), log }
    }

    fn environment(&self, command: &mut Command) {
        command.env("PATH", &self.search_path).env("TMPDIR", "/run/tmp");
        for name in ["XDG_RUNTIME_DIR", "NOTIFY_SOCKET", "CONTAINERD_ADDRESS", "CONTAINERD_NAMESPACE"] {
            command.env_remove(name);
        }
    }
}

/// Returns bash's arguments for `node_enter.sh`, to be followed by the command.
fn enter(holder: &str, pid_file: &Path, cgroups: &[PathBuf]) -> Vec<OsString> {
    let mut args: Vec<OsString> = ["-c", ENTER, "node-enter", holder].map(OsString::from).to_vec();
    args.push(pid_file.into());
    args.push(cgroups.len().to_string().into());
    args.extend(cgroups.iter().map(OsString::from));
    args
}

/// The TCP port of a node's agent.
pub const AGENT_PORT: u16 = 7450;
/// The name of containerd among a node's daemons.
pub const CONTAINERD: &str = "containerd";
/// The name of the agent among a node's daemons.
pub const AGENT: &str = "agent";
/// The name of the process that holds a node's namespaces.
pub const HOLDER: &str = "holder";

const INIT: &str = include_str!("node_init.sh");
const ENTER: &str = include_str!("node_enter.sh");
const LOG_LINES: usize = 40;
const SPAWN: Duration = Duration::from_secs(10);
const READY: Duration = Duration::from_secs(30);
