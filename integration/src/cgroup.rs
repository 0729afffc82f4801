//! A node's cgroups: one in every hierarchy of the machine, the root of the node's cgroup namespace.
//!
//! Both layouts are served: the unified hierarchy alone, and version 1 hierarchies with or without a
//! unified one beside them. Everything a node runs is in these cgroups or below, which is how all of it is
//! found again when the node goes.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{BedError, Result};
use crate::process::wait_until;

/// A cgroup hierarchy as this machine has it mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub point: PathBuf,
    /// The mount options that name a version 1 hierarchy; `None` for the unified one.
    pub options: Option<String>,
}

impl Hierarchy {
    /// Returns all hierarchies that are mounted.
    ///
    /// # Errors
    /// [`BedError::Io`] when the mount table cannot be read.
    pub fn all() -> Result<Vec<Self>> {
        let table = fs::read_to_string(MOUNTINFO).map_err(BedError::io("read", MOUNTINFO))?;
        Ok(parse(&table))
    }

    /// Returns the argument by which `node_init.sh` learns of it.
    pub(crate) fn argument(&self) -> String {
        match &self.options {
            None => format!("{}=v2", self.point.display()),
            Some(options) => format!("{}=v1:{options}", self.point.display()),
        }
    }
}

/// The cgroups of one node.
#[derive(Clone, Debug)]
pub struct Cgroups {
    name: String,
    hierarchies: Vec<Hierarchy>,
}

impl Cgroups {
    /// Returns the cgroups called `name`, which need not exist.
    ///
    /// # Errors
    /// As [`Hierarchy::all`].
    pub fn new(name: String) -> Result<Self> {
        Ok(Self { name, hierarchies: Hierarchy::all()? })
    }

    /// Returns the hierarchies they are in.
    #[must_use]
    pub fn hierarchies(&self) -> &[Hierarchy] {
        &self.hierarchies
    }

    /// Makes them all.
    ///
    /// # Errors
    /// [`BedError::Io`] when one cannot be made.
    pub fn create(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let path = hierarchy.point.join(&self.name);
            fs::create_dir_all(&path).map_err(BedError::io("make cgroup", &path))?;
            if hierarchy.options.is_none() {
                delegate(&hierarchy.point);
            } else if path.join("cpuset.cpus").exists() {
                // A version 1 cpuset takes no process before it has processors and memory nodes.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let parent = hierarchy.point.join(file);
                    let value = fs::read_to_string(&parent).map_err(BedError::io("read", &parent))?;
                    fs::write(path.join(file), value).map_err(BedError::io("write", path.join(file)))?;
                }
            }
        }
        Ok(())
    }

    /// Returns the files that take a process into the node's cgroups before its namespaces exist.
    #[must_use]
    pub fn root_files(&self) -> Vec<PathBuf> {
        self.hierarchies.iter().map(|h| h.point.join(&self.name).join(PROCS)).collect()
    }

    /// Returns the files that take a process into the cgroups of the node's own processes.
    #[must_use]
    pub fn init_files(&self) -> Vec<PathBuf> {
        let leaf = |h: &Hierarchy| if h.options.is_none() { "init" } else { "" };
        self.hierarchies.iter().map(|h| h.point.join(&self.name).join(leaf(h)).join(PROCS)).collect()
    }

    /// Returns every process in them and below.
    #[must_use]
    pub fn processes(&self) -> BTreeSet<i32> {
        let files = self.directories().into_iter().map(|dir| dir.join(PROCS));
        let texts = files.filter_map(|file| fs::read_to_string(file).ok());
        // 0 stands for a process of another pid namespace, which cannot be ended by pid.
        texts
            .flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<_>>())
            .filter(|pid| *pid > 0)
            .collect()
    }

    /// Ends every process in them and below, and removes the cgroups. Cgroups that do not exist are no
    /// error.
    ///
    /// # Errors
    /// [`BedError::Leftover`] when a process or cgroup is still there after twenty seconds.
    pub fn destroy(&self) -> Result<()> {
        let gone = wait_until(DESTROY, || {
            self.kill();
            self.processes().is_empty()
        });
        if !gone {
            let what = format!("the processes {:?}", self.processes());
            return Err(BedError::Leftover { name: self.name.clone(), what });
        }
        let removed = wait_until(DESTROY, || {
            // Deepest first; a cgroup whose last process is just going is busy a moment longer.
            self.directories().iter().rev().all(|dir| match fs::remove_dir(dir) {
                Ok(()) => true,
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            })
        });
        if removed {
            return Ok(());
        }
        let what = format!("cgroups {:?}", self.directories());
        Err(BedError::Leftover { name: self.name.clone(), what })
    }

    /// Sends SIGKILL to all, frozen ones included.
    fn kill(&self) {
        for dir in self.directories() {
            // In a frozen version 1 cgroup, SIGKILL waits for the thaw. In the unified hierarchy it does not.
            // Both files exist only where they mean something, and a cgroup may vanish at any time.
            drop(write_existing(&dir.join("freezer.state"), "THAWED"));
            drop(write_existing(&dir.join("cgroup.kill"), "1"));
        }
        for pid in self.processes() {
            let _ended = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Returns the directories of all cgroups, each parent before its children.
    fn directories(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        for hierarchy in &self.hierarchies {
            collect(&hierarchy.point.join(&self.name), &mut all);
        }
        all
    }
}

fn collect(dir: &Path, all: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    all.push(dir.to_path_buf());
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), all);
        }
    }
}

/// Writes to a file that must exist already: in a cgroup, creating one is refused with a misleading error.
fn write_existing(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

/// Hands the unified hierarchy's controllers to its children, as far as the machine allows.
fn delegate(root: &Path) {
    let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else { return };
    for controller in controllers.split_whitespace() {
        drop(write_existing(&root.join("cgroup.subtree_control"), &format!("+{controller}")));
    }
}

fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut all = Vec::<Hierarchy>::new();
    for line in mountinfo.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else { continue };
        let Some(point) = mount.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut words = file_system.split(' ');
        let options = match words.next() {
            Some("cgroup2") => None,
            Some("cgroup") => {
                let options = words.nth(1).unwrap_or_default().split(',').filter(|word| *word != "rw");
                // A named hierarchy has no controller, which mount(8) wants to hear.
                let options: Vec<_> = options
                    .map(
                        |word| {
                            if word.starts_with("name=") { format!("none,{word}") } else { word.to_owned() }
                        },
                    )
                    .filter(|word| word != "xattr" && !word.starts_with("release_agent="))
                    .collect();
                Some(options.join(","))
            }
            _ => continue,
        };
        if !all.iter().any(|other| other.point == point) {
            all.push(Hierarchy { point, options });
        }
    }
    all
}

const MOUNTINFO: &str = "/proc/self/mountinfo";
const PROCS: &str = "cgroup.procs";
const DESTROY: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_the_mount_table() {
        let table = "\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct\n\
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n\
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let arguments: Vec<_> = parse(table).iter().map(Hierarchy::argument).collect();
        assert_eq!(
            arguments,
            [
                "/sys/fs/cgroup/cpu,cpuacct=v1:cpu,cpuacct",
                "/sys/fs/cgroup/systemd=v1:none,name=systemd",
                "/sys/fs/cgroup/unified=v2",
            ]
        );
    }

    #[test]
    fn unified_hierarchy_alone_is_one() {
        let table = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse(table), [Hierarchy { point: "/sys/fs/cgroup".into(), options: None }]);
    }
}
