//! What a node consists of, to find what is left behind.
//!
//! A footprint names every thing that a container or a migration makes on a node and that must go with it:
//! processes, cgroups, mounts, records, snapshots, tasks, and files in the places where containerd, shims and
//! runtimes keep theirs. It is compared with the node's footprint before the first case.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::site::Site;
use super::trouble::{LIMIT, Outcome, Trouble};
use crate::node::{AGENT, CONTAINERD, HOLDER, Node};
use crate::process::wait_until;

/// The things that a node has. Each is a line of text that begins with its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    things: BTreeSet<String>,
}

impl Footprint {
    /// Returns what a node has now.
    ///
    /// # Errors
    /// When its containerd does not answer.
    pub fn of(site: &Site) -> Result<Self, Trouble> {
        let node = site.node();
        let mut things = BTreeSet::new();
        things.extend(processes(node));
        things.extend(cgroups(node));
        things.extend(mounts(node));
        for (kind, args) in RECORDS {
            let list = site.ctr(args)?;
            things.extend(
                list.lines()
                    .filter_map(|line| line.split_whitespace().next().map(|name| format!("{kind} {name}"))),
            );
        }
        for (dir, depth) in DIRECTORIES {
            list_files(&node.path(dir), *depth, &mut |path| {
                things.insert(format!("file {dir}/{path}"));
            });
        }
        Ok(Self { things })
    }

    /// Returns what this one has and `earlier` has not.
    #[must_use]
    pub fn beyond(&self, earlier: &Self) -> Vec<String> {
        self.things.difference(&earlier.things).cloned().collect()
    }

    /// Waits until the node has nothing beyond this footprint, but for things that `tolerated` accepts.
    ///
    /// # Errors
    /// [`Trouble::Late`] with what is left over.
    pub fn await_again(&self, site: &Site, tolerated: impl Fn(&str) -> bool) -> Outcome {
        let mut left = Vec::new();
        let clean = wait_until(LIMIT, || {
            left = Self::of(site).map(|now| now.beyond(self)).unwrap_or_default();
            left.retain(|thing| !tolerated(thing));
            left.is_empty()
        });
        if clean {
            return Ok(());
        }
        let what = format!(
            "nothing is left on node {}, but there is\n    {}",
            site.node().name(),
            left.join("\n    ")
        );
        Err(Trouble::Late { what, after: LIMIT })
    }
}

/// Every process of the node but its own daemons and ctr, which cases run.
fn processes(node: &Node) -> Vec<String> {
    let daemons = [HOLDER, CONTAINERD, AGENT].map(|name| node.daemon(name).map(|daemon| daemon.pid));
    let ours = |pid: &i32| !daemons.contains(&Some(*pid));
    let lines = node.cgroups().processes().into_iter().filter(ours).filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        (!line.starts_with("ctr ")).then(|| format!("process {pid} {}", line.trim()))
    });
    lines.collect()
}

/// Cgroups of containers. The one directory that runtimes put those of a namespace into may stay.
fn cgroups(node: &Node) -> Vec<String> {
    let mut found = Vec::new();
    for file in node.cgroups().root_files() {
        let root = file.parent().unwrap_or(&file).to_path_buf();
        list_files(&root, 3, &mut |path| {
            if path.contains('/') && root.join(path).is_dir() {
                found.push(format!("cgroup {}/{path}", root.display()));
            }
        });
    }
    found
}

fn mounts(node: &Node) -> Vec<String> {
    // Of any process in the node's mount namespace; `path("/..")` would lead out of /proc/PID/root.
    let table = node.daemon(HOLDER).map(|holder| format!("/proc/{}/mountinfo", holder.pid));
    let table = table.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.map(|point| format!("mount {point}")).collect()
}

/// Calls `found` with the path of everything below `dir` that is at most `depth` levels down.
fn list_files(dir: &Path, depth: usize, found: &mut dyn FnMut(&str)) {
    fn walk(dir: &Path, prefix: &str, depth: usize, found: &mut dyn FnMut(&str)) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
            found(&path);
            if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), &format!("{path}/"), depth - 1, found);
            }
        }
    }
    walk(dir, "", depth, found);
}

/// What containerd has records of, and how ctr lists it.
const RECORDS: &[(&str, &[&str])] = &[
    ("task", &["tasks", "list", "--quiet"]),
    ("container", &["containers", "list", "--quiet"]),
    ("snapshot", &["snapshots", "list"]),
    ("image", &["images", "list", "--quiet"]),
    ("lease", &["leases", "list", "--quiet"]),
    ("unfinished content", &["content", "active"]),
];

/// Where files of containers and migrations are, in the node, and how deep to look.
const DIRECTORIES: &[(&str, usize)] = &[
    ("/run/containerd/io.containerd.runtime.v2.task/default", 1),
    ("/run/containerd/runc/default", 1),
    ("/run/containerd/s", 1),
    ("/run/godwit/default", 1),
    ("/run/godwit/migrations", 2),
    ("/run/godwit/shims/default", 1),
    ("/run/godwit/incoming", 2),
    ("/run/tmp", 1),
];
