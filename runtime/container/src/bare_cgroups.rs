//! The container's cgroups in hierarchies without a controller.
//!
//! Where cgroups are of version 1, libcgroups puts a container into the hierarchy of every controller and leaves it
//! where its creator is in the others: systemd's (`name=systemd`), and a unified one beside them. CRIU takes the cgroup
//! that a container is in for the top of what it saves. So it would save, and make anew wherever the container is
//! restored, the cgroups of everybody else below the creator's.
//!
//! Nothing is limited in these cgroups, and as with runc a container does without one that cannot be had. A container
//! whose cgroup systemd manages is put into them by systemd.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::cgroup;
use crate::checkpoint::mountinfo::{self, Mount};

/// This process in the container's cgroups: what it forks is there from the first instruction. Dropping it brings the
/// process back to where it was.
#[derive(Debug)]
pub(crate) struct Entered {
    back: Vec<PathBuf>,
}

/// Takes this process, which must have no threads, into the cgroups at `path`.
pub(crate) fn enter(path: &Path) -> Entered {
    let mounts = mounts();
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let back = mounts.iter().map(|mount| place(mount, &text)).collect();
    join_in(&mounts, path, std::process::id());
    Entered { back }
}

/// Takes the process `pid` into the cgroups at `path`.
pub(crate) fn join(path: &Path, pid: i32) {
    join_in(&mounts(), path, pid.unsigned_abs());
}

/// Removes the cgroups at `path`, which must be without processes, and those below them.
pub(crate) fn remove(path: &Path) {
    if !is_below_the_root(path) {
        return;
    }
    for mount in mounts() {
        let directory = cgroup::below(&mount.point, path);
        // The last process may still be leaving.
        let mut outcome = remove_tree(&directory);
        for _ in 0..TRIES {
            if outcome.is_ok() {
                break;
            }
            std::thread::sleep(TRY_AGAIN);
            outcome = remove_tree(&directory);
        }
        if let Err(error) = outcome {
            log::warn!("remove {}: {error}", directory.display());
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        for directory in &self.back {
            if let Err(error) = put(directory, std::process::id()) {
                log::warn!("return to {}: {error}", directory.display());
            }
        }
    }
}

fn join_in(mounts: &[Mount], path: &Path, pid: u32) {
    if !is_below_the_root(path) {
        return;
    }
    for mount in mounts {
        let directory = cgroup::below(&mount.point, path);
        if let Err(error) = fs::create_dir_all(&directory).and_then(|()| put(&directory, pid)) {
            log::debug!("join {}: {error}", directory.display());
        }
    }
}

fn put(directory: &Path, pid: u32) -> io::Result<()> {
    fs::write(directory.join("cgroup.procs"), pid.to_string())
}

/// The hierarchies without a controller; none where there is only the unified one.
fn mounts() -> Vec<Mount> {
    if cgroup::is_unified().unwrap_or(true) {
        return Vec::new();
    }
    let mut found: Vec<Mount> = Vec::new();
    for mount in mountinfo::read("self").unwrap_or_default() {
        // A mount may cover another at the same point, and a container's root may have more of them.
        if key(&mount).is_some()
            && mount.point.starts_with(libcgroups::common::DEFAULT_CGROUP_ROOT)
            && !found.iter().any(|known| known.point == mount.point)
        {
            found.push(mount);
        }
    }
    found
}

/// What stands for the hierarchy of a mount in `/proc/PID/cgroup`, if it has no controller.
fn key(mount: &Mount) -> Option<&str> {
    match mount.kind.as_str() {
        "cgroup2" => Some(""),
        "cgroup" => mount.options.split(',').find(|option| option.starts_with("name=")),
        _ => None,
    }
}

/// The directory of the cgroup that `text`, a `/proc/PID/cgroup`, names for the hierarchy of `mount`.
fn place(mount: &Mount, text: &str) -> PathBuf {
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        (fields.next() == key(mount)).then(|| fields.next().map(PathBuf::from)).flatten()
    };
    let path = text.lines().find_map(of_line).unwrap_or_default();
    let below = path.strip_prefix(&mount.root).unwrap_or(&path);
    let leads_out = below.components().any(|part| part == Component::ParentDir);
    if leads_out { mount.point.clone() } else { cgroup::below(&mount.point, below) }
}

/// Tells whether a path names a cgroup other than the root, and stays below it.
pub(crate) fn is_below_the_root(path: &Path) -> bool {
    let parts = path.components();
    let named = parts.clone().any(|part| matches!(part, Component::Normal(_)));
    named && !parts.into_iter().any(|part| part == Component::ParentDir)
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

const TRIES: u32 = 100;
const TRY_AGAIN: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &str, point: &str) -> Mount {
        Mount {
            kind: kind.to_owned(),
            options: options.to_owned(),
            point: point.into(),
            root: "/".into(),
            ..Mount::default()
        }
    }

    #[test]
    fn hierarchies_with_a_controller_are_libcgroups_own() {
        assert_eq!(key(&mount("cgroup", "rw,xattr,name=systemd", "/s")), Some("name=systemd"));
        assert_eq!(key(&mount("cgroup2", "rw", "/u")), Some(""));
        assert_eq!(key(&mount("cgroup", "rw,memory", "/m")), None);
        assert_eq!(key(&mount("tmpfs", "rw", "/t")), None);
    }

    #[test]
    fn a_process_goes_back_to_where_it_was_and_never_out_of_its_hierarchy() {
        let text = "9:name=systemd:/user/1\n4:memory:/\n0::/../other\n";
        assert_eq!(place(&mount("cgroup", "rw,name=systemd", "/s"), text), Path::new("/s/user/1"));
        assert_eq!(place(&mount("cgroup2", "rw", "/u"), text), Path::new("/u"));
    }

    #[test]
    fn the_root_is_nobodys_to_join_or_remove() {
        for path in ["", "/", "/../x", "."] {
            assert!(!is_below_the_root(Path::new(path)), "{path:?}");
        }
        assert!(is_below_the_root(Path::new("/default/web")) && is_below_the_root(Path::new(":youki:web")));
    }
}
