//! Paths inside a root file system.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

/// Resolves `path` as a process with the root `root` would, and returns it relative to that root (absolute
/// in the container's eyes). Parts that do not exist are taken as they are.
///
/// A container may hold any symbolic link it likes, so links are followed here and not by the kernel, which
/// would take an absolute one for a path of the host.
pub(crate) fn resolve_in_root(root: &Path, path: &Path) -> PathBuf {
    let mut waiting: VecDeque<OsString> = parts(path).collect();
    let mut done = PathBuf::new();
    let mut links = 0;
    while let Some(part) = waiting.pop_front() {
        if part == ".." {
            done.pop();
            continue;
        }
        let here = root.join(&done).join(&part);
        match here.read_link() {
            Ok(target) if links < LINKS_MAX => {
                links += 1;
                if target.is_absolute() {
                    done.clear();
                }
                for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
                    waiting.push_front(part);
                }
            }
            _ => done.push(part),
        }
    }
    Path::new("/").join(done)
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// The kernel's own limit.
const LINKS_MAX: u32 = 40;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_never_lead_out_of_the_root() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        std::fs::create_dir_all(root.join("run/lock")).unwrap();
        std::fs::create_dir_all(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../../../etc", root.join("var/up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let resolve = |path: &str| resolve_in_root(root, Path::new(path));
        assert_eq!(resolve("/var/run/lock"), Path::new("/run/lock"));
        assert_eq!(resolve("/var/up/hosts"), Path::new("/etc/hosts"));
        assert_eq!(resolve("../../x"), Path::new("/x"));
        assert_eq!(resolve("loop"), Path::new("/loop"));
    }
}
