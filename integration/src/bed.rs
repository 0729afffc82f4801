//! The bed: two nodes, the link between them, and the record by which it is found again.
//!
//! A bed's files are in a directory of its name. A bed that a test made is locked (`flock` on that
//! directory) by the test's process for as long as it lives: an unlocked one that is not marked as kept was
//! left by a process that died, and [`sweep`] or the next bed of the name removes it. Beds made by hand are
//! kept until they are taken down.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::containerd::Version;
use crate::error::{BedError, Result};
use crate::node::{AGENT, CONTAINERD, Node, NodeName};
use crate::process::run;
use crate::tools;

/// Where the containerds of a bed keep images and snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// On the file system of the bed's directory.
    #[default]
    Disk,
    /// In the node's `/run`, a tmpfs.
    Memory,
}

/// What a bed is to be like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BedOptions {
    /// Its name: letters, digits and dashes, at most 40.
    pub name: String,
    /// The containerd of both nodes.
    pub containerd: Version,
    /// The rate of the link in each direction, as tc(8) writes rates (`1gbit`); unlimited if absent.
    pub rate: Option<String>,
    /// Directories searched for programs before all others, in the nodes.
    pub bin_dirs: Vec<PathBuf>,
    /// Whether this build's shim also takes the place of `containerd-shim-runc-v2`.
    pub replace_runc_shim: bool,
    /// Where containerd keeps its data.
    pub storage: Storage,
    /// Whether each node runs `godwit agent`.
    pub agent: bool,
    /// Whether it outlives the process that made it.
    pub keep: bool,
}

impl BedOptions {
    /// Returns the options of a plain bed with Debian 12's containerd, kept until it is taken down.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            containerd: Version::default(),
            rate: None,
            bin_dirs: Vec::new(),
            replace_runc_shim: false,
            storage: Storage::default(),
            agent: false,
            keep: true,
        }
    }

    /// Returns the options of a bed for one test. Its name is unique to this process, and the bed goes when
    /// it is dropped, or, where `$GODWIT_KEEP_BED` is set, stays to be looked at.
    #[must_use]
    pub fn for_test(name: &str) -> Self {
        let keep = std::env::var_os("GODWIT_KEEP_BED").is_some();
        Self { keep, ..Self::new(&format!("{name}-{}", std::process::id())) }
    }

    /// Chooses the containerd.
    #[must_use]
    pub fn containerd(self, containerd: Version) -> Self {
        Self { containerd, ..self }
    }
}

/// A bed that is up.
#[derive(Debug)]
pub struct Bed {
    options: BedOptions,
    dir: PathBuf,
    nodes: [Node; 2],
    /// Held while the bed is this process's to remove.
    lock: Option<Flock<File>>,
}

impl Bed {
    /// Makes a bed: both nodes with their daemons answering, and no image.
    ///
    /// # Errors
    /// [`BedError::Exists`] when a bed of this name is up; else what could not be made, and then nothing of the
    /// bed is left.
    pub fn up(options: BedOptions) -> Result<Self> {
        check_name(&options.name)?;
        let dir = tools::state().join(&options.name);
        let mut bed = Self::open(options, dir)?;
        bed.lock = Some(claim(&bed.options.name, &bed.dir)?);
        if let Err(error) = bed.build() {
            // The reason why it failed matters more than what then hindered its removal.
            drop(bed.down());
            return Err(error);
        }
        if bed.options.keep {
            bed.lock = None;
        }
        Ok(bed)
    }

    /// Returns a bed that is up, made by this or another process.
    ///
    /// # Errors
    /// [`BedError::Unknown`] when there is none of this name, [`BedError::Record`] when its record is damaged.
    pub fn attach(name: &str) -> Result<Self> {
        check_name(name)?;
        let dir = tools::state().join(name);
        let options = read_record(&dir)?.ok_or_else(|| BedError::Unknown { name: name.to_owned() })?;
        Self::open(options, dir)
    }

    /// Returns one of its nodes.
    #[must_use]
    pub fn node(&self, name: NodeName) -> &Node {
        match name {
            NodeName::A => &self.nodes[0],
            NodeName::B => &self.nodes[1],
        }
    }

    /// Returns node a.
    #[must_use]
    pub fn a(&self) -> &Node {
        self.node(NodeName::A)
    }

    /// Returns node b.
    #[must_use]
    pub fn b(&self) -> &Node {
        self.node(NodeName::B)
    }

    /// Returns what it was made like.
    #[must_use]
    pub fn options(&self) -> &BedOptions {
        &self.options
    }

    /// Returns the directory of its files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Imports an image archive into both nodes.
    ///
    /// # Errors
    /// As [`Node::import`].
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.import(archive))
    }

    /// Starts a node's containerd again after [`Node::stop_containerd`].
    ///
    /// # Errors
    /// As [`Node::start_containerd`].
    pub fn start_containerd(&self, name: NodeName) -> Result<()> {
        let node = self.node(name);
        let root = match self.options.storage {
            Storage::Disk => node.dir().join("root"),
            Storage::Memory => PathBuf::from("/run/containerd-root"),
        };
        node.start_containerd(self.options.containerd, &root)
    }

    /// Removes the bed and everything that runs in it.
    ///
    /// # Errors
    /// [`BedError::Leftover`] or [`BedError::Io`] when something cannot be removed.
    pub fn down(mut self) -> Result<()> {
        self.lock = None;
        down(&self.options.name)
    }

    /// Returns the bed of these options, whose lock is the caller's affair.
    fn open(options: BedOptions, dir: PathBuf) -> Result<Self> {
        let path = tools::search_path(&options.bin_dirs, &dir.join("bin"), options.containerd)?;
        let node = |name| Node::new(name, dir.join(name.as_str()), object(&options.name, name), path.clone());
        let nodes = [node(NodeName::A)?, node(NodeName::B)?];
        Ok(Self { options, dir, nodes, lock: None })
    }

    fn build(&self) -> Result<()> {
        let record = self.dir.join(RECORD);
        let text = serde_json::to_string_pretty(&self.options)
            .map_err(|source| BedError::Record { path: record.clone(), source })?;
        fs::write(&record, text).map_err(BedError::io("write", &record))?;
        self.link_programs()?;
        link_nodes(&self.options)?;
        let hosts = self.dir.join("hosts");
        fs::write(&hosts, hosts_file()).map_err(BedError::io("write", &hosts))?;
        // The two nodes have nothing to do with each other until both are up.
        thread::scope(|scope| {
            let other = scope.spawn(|| self.build_node(NodeName::B, &hosts));
            let one = self.build_node(NodeName::A, &hosts);
            let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            one.and(other)
        })
    }

    fn build_node(&self, name: NodeName, hosts: &Path) -> Result<()> {
        self.node(name).create(hosts)?;
        self.start_containerd(name)?;
        if self.options.agent {
            self.node(name).start_agent::<[&str; 0], _>([])?;
        }
        Ok(())
    }

    /// Makes the directory of links through which the nodes find this build's programs. A later build of
    /// the same target directory is thereby in effect at once.
    fn link_programs(&self) -> Result<()> {
        let bin = self.dir.join("bin");
        fs::create_dir_all(&bin).map_err(BedError::io("make", &bin))?;
        let built = tools::built()?;
        let mut links = vec![("godwit", "godwit"), (SHIM, SHIM)];
        if self.options.replace_runc_shim {
            links.push((SHIM, "containerd-shim-runc-v2"));
        }
        for (program, name) in links {
            let link = bin.join(name);
            std::os::unix::fs::symlink(built.join(program), &link).map_err(BedError::io("make", &link))?;
        }
        Ok(())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if self.lock.take().is_none() {
            return;
        }
        if thread::panicking() {
            for node in &self.nodes {
                for daemon in [CONTAINERD, AGENT] {
                    let log = node.log_tail(daemon);
                    if !log.is_empty() {
                        eprintln!("-- the end of {daemon}'s log on node {}:\n{log}", node.name());
                    }
                }
            }
        }
        if let Err(error) = down(&self.options.name) {
            eprintln!("failed to {error}");
        }
    }
}

/// Removes everything of a bed by its name alone. A bed that does not exist is no error.
///
/// # Errors
/// [`BedError::Leftover`] or [`BedError::Io`] when something cannot be removed.
pub fn down(name: &str) -> Result<()> {
    check_name(name)?;
    let dir = tools::state().join(name);
    for node in NodeName::ALL {
        let object = object(name, node);
        Node::new(node, dir.join(node.as_str()), object.clone(), String::new())?.destroy()?;
        if Path::new("/run/netns").join(&object).exists() {
            run(Command::new("ip").args(["netns", "delete", &object]))?;
        }
    }
    // All mounts were in the nodes' namespaces. One that is here was made by somebody else, and what is
    // under it is not the bed's to delete.
    let table =
        fs::read_to_string("/proc/self/mountinfo").map_err(BedError::io("read", "/proc/self/mountinfo"))?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    if let Some(point) = points.map(Path::new).find(|point| point.starts_with(&dir)) {
        return Err(BedError::Leftover { name: name.to_owned(), what: format!("mount {}", point.display()) });
    }
    match fs::remove_dir_all(&dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(BedError::io("remove", &dir)(error)),
    }
    // It stays where other beds are in it.
    drop(fs::remove_dir(tools::state()));
    Ok(())
}

/// Returns the options of every bed that has a record.
///
/// # Errors
/// [`BedError::Io`] when the directory of beds cannot be read, [`BedError::Record`] when a record is damaged.
pub fn list() -> Result<Vec<BedOptions>> {
    let state = tools::state();
    let entries = match fs::read_dir(&state) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(BedError::io("read", &state)(error)),
    };
    let mut beds = Vec::new();
    for entry in entries.flatten() {
        beds.extend(read_record(&entry.path())?);
    }
    beds.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(beds)
}

/// Takes down the beds whose makers died, and returns their names.
///
/// # Errors
/// As [`list`] and [`down`].
pub fn sweep() -> Result<Vec<String>> {
    let mut swept = Vec::new();
    for bed in list()? {
        if !bed.keep && lock(&tools::state().join(&bed.name))?.is_some() {
            down(&bed.name)?;
            swept.push(bed.name);
        }
    }
    Ok(swept)
}

/// Makes a bed's directory and locks it. A bed that is nobody's any more gives way.
fn claim(name: &str, dir: &Path) -> Result<Flock<File>> {
    let exists = || BedError::Exists { name: name.to_owned() };
    if let Some(old) = read_record(dir)? {
        if old.keep || lock(dir)?.is_none() {
            return Err(exists());
        }
        down(name)?;
    }
    make(dir)?;
    lock(dir)?.ok_or_else(exists)
}

/// Makes a bed's directory. The last other bed may go, and the directory of beds with it, between the making
/// of that and of this one, so it is tried again.
fn make(dir: &Path) -> Result<()> {
    let mut last = fs::create_dir_all(dir);
    for _ in 0..MAKE_RETRIES {
        if !matches!(&last, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            break;
        }
        last = fs::create_dir_all(dir);
    }
    last.map_err(BedError::io("make", dir))
}

/// Locks a bed's directory; `None` when another process has it.
fn lock(dir: &Path) -> Result<Option<Flock<File>>> {
    let file = File::open(dir).map_err(BedError::io("open", dir))?;
    Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok())
}

fn read_record(dir: &Path) -> Result<Option<BedOptions>> {
    let path = dir.join(RECORD);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(BedError::io("read", &path)(error)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|source| BedError::Record { path, source })
}

fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if (1..=NAME_MAX).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('-') {
        return Ok(());
    }
    let expected = "letters, digits and dashes, at most 40, not beginning with a dash";
    Err(BedError::Invalid { what: "bed name", value: name.to_owned(), expected })
}

/// Makes the network namespaces and the link between them.
fn link_nodes(options: &BedOptions) -> Result<()> {
    let objects = NodeName::ALL.map(|node| object(&options.name, node));
    for object in &objects {
        run(Command::new("ip").args(["netns", "add", object]))?;
    }
    let [a, b] = &objects;
    let link = ["link", "add", LINK, "netns", a, "type", "veth", "peer", "name", LINK, "netns", b];
    run(Command::new("ip").args(link))?;
    for (object, node) in objects.iter().zip(NodeName::ALL) {
        let address = format!("{}/24", node.address());
        let ip = |args: &[&str]| run(Command::new("ip").args(["-n", object]).args(args));
        ip(&["address", "add", &address, "dev", LINK])?;
        ip(&["link", "set", LINK, "up"])?;
        ip(&["link", "set", "lo", "up"])?;
        if let Some(rate) = &options.rate {
            let qdisc = ["qdisc", "add", "dev", LINK, "root", "tbf", "rate", rate];
            run(Command::new("tc")
                .args(["-n", object])
                .args(qdisc)
                .args(["burst", "1mb", "latency", "50ms"]))?;
        }
    }
    Ok(())
}

fn hosts_file() -> String {
    let nodes = NodeName::ALL.map(|node| format!("{} node-{node}\n", node.address()));
    format!("127.0.0.1 localhost\n{}", nodes.concat())
}

/// Returns what a node's network namespace and cgroups are called.
fn object(bed: &str, node: NodeName) -> String {
    format!("{PREFIX}{bed}-{node}")
}

/// What the names of all namespaces and cgroups begin with.
pub const PREFIX: &str = "godwit-";

const SHIM: &str = "containerd-shim-godwit-v1";
const RECORD: &str = "bed.json";
const LINK: &str = "eth0";
const NAME_MAX: usize = 40;
const MAKE_RETRIES: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_or_options_are_refused() {
        for name in ["", ".", "..", "a/b", "-n", "a b", &"x".repeat(41)] {
            assert!(matches!(check_name(name), Err(BedError::Invalid { .. })), "{name:?}");
        }
        check_name("native-1-6").unwrap();
    }
}
