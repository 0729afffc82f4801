//! Where a container's control groups are, what they have used, and when they ran out of memory.
//!
//! Only files are read: nothing here changes a group, that is the runtime's business. The groups are found
//! once, when the container's init exists, and stay known when it has ended.

mod metrics;
mod metrics_v2;
mod oom;
mod read;

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use protobuf::{Message, well_known_types::any::Any};

use crate::error::{Result, ShimError};

pub(crate) use oom::OomWatch;

/// A container's groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cgroup {
    /// One directory per controller (cgroup v1, also when v2 is mounted beside it).
    V1(HashMap<String, PathBuf>),
    /// One directory.
    V2(PathBuf),
}

/// Deepest nesting of groups in which processes are looked for.
const DEPTH_MAX: usize = 16;

impl Cgroup {
    /// Returns the groups of the process `pid`.
    ///
    /// # Errors
    /// When `/proc` cannot be read or names no group.
    pub(crate) fn of(pid: i32) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).map_err(ShimError::io(format!("read {path}")));
        Self::parse(&read(&format!("/proc/{pid}/cgroup"))?, &read("/proc/self/mountinfo")?).ok_or_else(|| {
            ShimError::io(format!("find the cgroups of {pid}"))(std::io::ErrorKind::NotFound.into())
        })
    }

    fn parse(groups: &str, mountinfo: &str) -> Option<Self> {
        let mounts: Vec<Mount<'_>> = mountinfo.lines().filter_map(Mount::parse).collect();
        if let [line] = groups.lines().collect::<Vec<_>>().as_slice() {
            let path = line.strip_prefix("0::")?;
            return mounts.iter().find(|mount| mount.kind == "cgroup2")?.directory(path).map(Self::V2);
        }
        let mut found = HashMap::new();
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            for controller in
                controllers.split(',').filter(|name| !name.is_empty() && !name.starts_with("name="))
            {
                let holds = |mount: &&Mount<'_>| {
                    mount.kind == "cgroup" && mount.options.split(',').any(|option| option == controller)
                };
                if let Some(directory) = mounts.iter().find(holds).and_then(|mount| mount.directory(path)) {
                    found.insert(controller.to_owned(), directory);
                }
            }
        }
        (!found.is_empty()).then_some(Self::V1(found))
    }

    /// Returns the ids of every process in the container; none when it is gone.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let directory = match self {
            Self::V2(directory) => Some(directory),
            // Those that a runtime always makes a group in.
            Self::V1(found) => {
                ["devices", "memory", "pids", "freezer"].iter().find_map(|name| found.get(*name))
            }
        };
        let mut pids = BTreeSet::new();
        if let Some(directory) = directory {
            collect_processes(directory, DEPTH_MAX, &mut pids);
        }
        pids.into_iter().collect()
    }

    /// Returns what the container has used, as the message containerd expects for the kind of groups.
    ///
    /// # Errors
    /// [`ShimError::Undecodable`] when the message cannot be encoded; missing files count as 0.
    pub(crate) fn metrics(&self) -> Result<Any> {
        let encode = |source| ShimError::Undecodable { what: "metrics", source };
        let (type_url, value) = match self {
            Self::V1(found) => (
                "io.containerd.cgroups.v1.Metrics",
                metrics::collect(found).write_to_bytes().map_err(encode)?,
            ),
            Self::V2(directory) => (
                "io.containerd.cgroups.v2.Metrics",
                metrics_v2::collect(directory).write_to_bytes().map_err(encode)?,
            ),
        };
        Ok(Any { type_url: type_url.to_owned(), value, ..Any::default() })
    }
}

/// A line of mountinfo, as far as it matters here.
struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let mut filesystem = filesystem.split(' ');
        Some(Self {
            root: mount.next()?,
            point: mount.next()?,
            kind: filesystem.next()?,
            options: filesystem.nth(1)?,
        })
    }

    /// Returns where the group `path` is seen in this mount, if it is.
    fn directory(&self, path: &str) -> Option<PathBuf> {
        let below = if self.root == "/" { path } else { path.strip_prefix(self.root)? };
        Some(Path::new(self.point).join(below.trim_start_matches('/')))
    }
}

fn collect_processes(directory: &Path, depth: usize, pids: &mut BTreeSet<u32>) {
    if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
        pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    let Some(depth) = depth.checked_sub(1) else { return };
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), depth, pids);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
33 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct
34 30 0:31 /node /sys/fs/cgroup/memory rw shared:12 - cgroup cgroup rw,memory";

    #[test]
    fn each_controller_is_found_where_it_is_mounted() {
        let groups = "5:memory:/node/web\n4:cpu,cpuacct:/default/web\n1:name=systemd:/\n0::/";
        let Cgroup::V1(found) = Cgroup::parse(groups, MOUNTS).unwrap() else { panic!("it is v1") };
        assert_eq!(found["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct/default/web"));
        assert_eq!(found["memory"], Path::new("/sys/fs/cgroup/memory/web"));
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn one_line_is_version_2() {
        let groups = Cgroup::parse("0::/system.slice/web", MOUNTS).unwrap();
        assert_eq!(groups, Cgroup::V2("/sys/fs/cgroup/unified/system.slice/web".into()));
        assert_eq!(Cgroup::parse("", MOUNTS), None);
    }

    #[test]
    fn processes_of_nested_groups_count() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("sub")).unwrap();
        fs::write(directory.path().join("cgroup.procs"), "7\n").unwrap();
        fs::write(directory.path().join("sub/cgroup.procs"), "9\n8\n").unwrap();
        assert_eq!(Cgroup::V2(directory.path().to_owned()).processes(), [7, 8, 9]);
    }
}
