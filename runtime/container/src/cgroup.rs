//! The cgroup of a container: libcgroups' manager for what it does well, its directories for the rest.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_sys::freezer::{Freezer, FreezerState};
use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, CgroupSetup, DEFAULT_CGROUP_ROOT, create_cgroup_manager,
    get_cgroup_setup,
};
use libcgroups::v1;

use crate::bare_cgroups;
use crate::error::{ContainerError, Result};
use crate::state::Stored;

/// How long a cgroup may take to freeze.
pub const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// libcgroups' manager of the container's cgroup.
///
/// # Errors
/// When the container's configuration or the cgroup file system cannot be read.
pub fn manager(stored: &Stored) -> Result<AnyCgroupManager> {
    let config = CgroupConfig {
        cgroup_path: stored.cgroup_path()?,
        systemd_cgroup: stored.uses_systemd(),
        container_name: stored.id().to_owned(),
    };
    create_cgroup_manager(config).map_err(ContainerError::cgroup)
}

/// Removes the cgroup at `path` of a container that did not come to be, and that nobody has recorded. libcontainer has
/// tried, for a tenth of a second, when its last process may not have left it yet. What has processes now is somebody
/// else's, and stays.
pub(crate) fn remove_unrecorded(path: &Path) -> Result<()> {
    if !bare_cgroups::is_below_the_root(path) {
        return Ok(());
    }
    for root in roots()? {
        let directory = below(&root, path);
        match fs::remove_dir(&directory) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("{} stays: {error}", directory.display());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where the hierarchies with controllers are mounted.
fn roots() -> Result<Vec<PathBuf>> {
    if is_unified()? {
        return Ok(vec![PathBuf::from(DEFAULT_CGROUP_ROOT)]);
    }
    Ok(v1::util::list_supported_mount_points().map_err(ContainerError::cgroup)?.into_values().collect())
}

/// The freezer of the container's cgroup.
///
/// # Errors
/// When the cgroup does not exist (any more), or has no freezer.
pub fn freezer(stored: &Stored) -> Result<Freezer> {
    Ok(Freezer::open(&directory(stored, v1::ControllerType::Freezer)?)?)
}

/// Whether the cgroup is frozen; a cgroup that is gone is not.
pub(crate) fn is_frozen(stored: &Stored) -> Result<bool> {
    if stored.config().is_err() {
        return Ok(false);
    }
    match freezer(stored) {
        Ok(freezer) => Ok(freezer.state()? != FreezerState::Thawed),
        Err(ContainerError::Sys(godwit_sys::SysError::NoFreezer { .. })) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The process ids in the container's cgroup and below, ascending.
///
/// # Errors
/// When the cgroup exists but cannot be read.
pub fn processes(stored: &Stored) -> Result<Vec<i32>> {
    let directory = directory(stored, v1::ControllerType::Devices)?;
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let found = manager(stored)?.get_all_pids().map_err(ContainerError::cgroup)?;
    let mut pids: Vec<i32> = found.into_iter().map(|pid| pid.as_raw()).collect();
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// Whether the machine has the unified hierarchy (version 2) alone.
///
/// # Errors
/// When `/sys/fs/cgroup` is neither.
pub fn is_unified() -> Result<bool> {
    Ok(matches!(get_cgroup_setup().map_err(ContainerError::cgroup)?, CgroupSetup::Unified))
}

/// The directory of the container's cgroup in the hierarchy of `controller` (there is only one on version 2).
///
/// # Errors
/// When the hierarchy is not mounted.
pub fn directory(stored: &Stored, controller: v1::ControllerType) -> Result<PathBuf> {
    let path = stored.cgroup_path()?;
    if !is_unified()? {
        let mount = v1::util::get_subsystem_mount_point(&controller).map_err(ContainerError::cgroup)?;
        return Ok(below(&mount, &path));
    }
    let root = Path::new(DEFAULT_CGROUP_ROOT);
    if !stored.uses_systemd() || path.is_absolute() {
        return Ok(below(root, &path));
    }
    let Some(pid) = stored.pid() else {
        // systemd removed the scope together with its last process.
        return Ok(root.join("removed-by-systemd"));
    };
    let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&file).map_err(ContainerError::file(&file))?;
    let of_init = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    Ok(below(root, &scope_of(Path::new(of_init), &path.to_string_lossy(), stored.id())))
}

/// systemd's unit for `slice:prefix:name`, as a path: init may have moved itself further down, so the path is
/// cut after the scope.
fn scope_of(of_init: &Path, triple: &str, id: &str) -> PathBuf {
    let mut parts = triple.splitn(3, ':').skip(1);
    let prefix = parts.next().unwrap_or_default();
    let name = parts.next().filter(|name| !name.is_empty()).unwrap_or(id);
    let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
    let mut cut = PathBuf::new();
    for component in of_init.components() {
        cut.push(component);
        if component.as_os_str() == unit.as_str() {
            return cut;
        }
    }
    of_init.to_owned()
}

/// The directory of the cgroup `path` in the hierarchy that is mounted at `root`.
pub(crate) fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A create may fail in a cgroup in which somebody else runs.
    #[test]
    fn a_cgroup_that_has_processes_stays_and_they_live() {
        let path = PathBuf::from(format!("/godwit-unrecorded-{}", std::process::id()));
        let directories: Vec<PathBuf> = roots().unwrap().iter().map(|root| below(root, &path)).collect();
        if let Err(error) = directories.iter().try_for_each(fs::create_dir_all) {
            return eprintln!("SKIP: no cgroup can be made: {error}");
        }
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let freezer = directories.iter().find(|directory| directory.join("freezer.state").exists());
        let taken = freezer.unwrap_or(&directories[0]);
        fs::write(taken.join("cgroup.procs"), other.id().to_string()).unwrap();
        remove_unrecorded(&path).unwrap();
        assert_eq!(directories.iter().filter(|directory| directory.exists()).collect::<Vec<_>>(), [taken]);
        assert_eq!(other.try_wait().unwrap(), None);
        other.kill().unwrap();
        other.wait().unwrap();
        remove_unrecorded(&path).unwrap();
        assert!(!taken.exists());
    }

    #[test]
    fn a_scope_is_found_above_where_init_went() {
        let init = Path::new("/system.slice/runc-web.scope/inner/leaf");
        assert_eq!(scope_of(init, "system.slice:runc:web", "x"), Path::new("/system.slice/runc-web.scope"));
        assert_eq!(scope_of(init, ":runc:", "web"), Path::new("/system.slice/runc-web.scope"));
        assert_eq!(scope_of(init, "a:b:c", "x"), init);
    }
}
