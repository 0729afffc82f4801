//! The cgroup of a container to be restored.
//!
//! CRIU is moved into the container's cgroup before it forks anything, and told to take that cgroup for the
//! root of what it restores (`cg_root`, per controller): the path in the images is the source's, and may be
//! another one here.

use std::fs;
use std::path::{Path, PathBuf};

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use libcontainer::config::YoukiConfig;
use libcontainer::container::Container;
use libcontainer::oci_spec::runtime::Spec;

use crate::bare_cgroups;
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::mountinfo::{self, Mount};
use crate::checkpoint::{external, path_text};
use crate::devices;
use crate::error::{ContainerError, causes};

/// The cgroup as CRIU has to know it.
#[derive(Debug)]
pub(super) struct Joined {
    /// Controller (empty for the unified hierarchy) and path of the container's cgroup.
    pub(super) roots: Vec<(String, String)>,
    /// Key and source of the hierarchies that the container sees as bind mounts.
    pub(super) mounts: Vec<(String, String)>,
}

/// Makes the cgroup with the spec's limits and moves CRIU into it.
pub(super) fn join(
    spec: &Spec,
    container: &Container,
    directory: &Path,
    criu: Option<i32>,
) -> Result<Joined> {
    let failed = |detail: String| ContainerError::Cgroup { detail };
    let config = YoukiConfig::load(directory).map_err(|error| failed(causes(&error)))?;
    let path = config.cgroup_path.clone();
    let manager = create_cgroup_manager(CgroupConfig {
        cgroup_path: config.cgroup_path,
        systemd_cgroup: container.systemd(),
        container_name: container.id().to_owned(),
    })
    .map_err(ContainerError::cgroup)?;
    // libcgroups wants the pid in its own type, which libcontainer's record hands out.
    let mut record = container.clone();
    let criu = criu.ok_or_else(|| failed("criu has no process id".to_owned()))?;
    let pid = record.set_pid(criu).pid().ok_or_else(|| failed(format!("criu {criu} has ended")))?;
    manager.add_task(pid).map_err(ContainerError::cgroup)?;
    if !container.systemd() {
        bare_cgroups::join(&path, criu);
    }
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone());
    let resources = resources.unwrap_or_default();
    let limits = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    manager.apply(&limits).map_err(ContainerError::cgroup)?;
    devices::confine(criu, spec)?;
    let path = format!("/proc/{criu}/cgroup");
    let memberships = parse(&fs::read_to_string(&path).map_err(CheckpointError::file(path))?);
    let mounts = match external::cgroup_mount_point(spec) {
        Some(point) if external::has_external_cgroups(spec)? => {
            external_mounts(point, &mountinfo::read("self")?, &memberships)?
        }
        _ => Vec::new(),
    };
    let roots = memberships.into_iter().flat_map(Membership::roots).collect();
    Ok(Joined { roots, mounts })
}

/// One line of `/proc/PID/cgroup`: controllers (or a name, or nothing) and the path in that hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Membership {
    controllers: Vec<String>,
    path: String,
}

impl Membership {
    fn roots(self) -> Vec<(String, String)> {
        self.controllers.into_iter().map(|controller| (controller, self.path.clone())).collect()
    }

    /// Whether `mount` shows this hierarchy.
    fn is_shown_by(&self, mount: &Mount) -> bool {
        match mount.kind.as_str() {
            "cgroup2" => self.controllers == [""],
            "cgroup" => {
                let shown: Vec<&str> = mount.options.split(',').collect();
                self.controllers.iter().all(|controller| shown.contains(&controller.as_str()))
            }
            _ => false,
        }
    }
}

fn parse(text: &str) -> Vec<Membership> {
    let line = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?.split(',').map(str::to_owned).collect();
        Some(Membership { controllers, path: fields.next()?.to_owned() })
    };
    text.lines().filter_map(line).collect()
}

/// Where each hierarchy's cgroup of the container is on the host, keyed by where the container sees it.
fn external_mounts(
    point: &Path,
    host: &[Mount],
    memberships: &[Membership],
) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for mount in host {
        let Some(membership) = memberships.iter().find(|membership| membership.is_shown_by(mount)) else {
            continue;
        };
        let Some(name) = mount.point.file_name() else { continue };
        let path = Path::new(&membership.path);
        // A mount need not show its hierarchy from the top.
        let below = path.strip_prefix(&mount.root).or_else(|_| path.strip_prefix("/")).unwrap_or(path);
        let source: PathBuf = mount.point.join(below);
        let key = point.join(name);
        let pair = (path_text(&key)?.to_owned(), path_text(&source)?.to_owned());
        if !found.iter().any(|(known, _)| *known == pair.0) {
            found.push(pair);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(point: &str, kind: &str, options: &str) -> Mount {
        Mount {
            id: 1,
            root: "/".into(),
            point: point.into(),
            kind: kind.to_owned(),
            options: options.to_owned(),
            ..Mount::default()
        }
    }

    #[test]
    fn each_controller_gets_the_path_of_its_hierarchy() {
        let text = "5:cpu,cpuacct:/godwit/web\n1:name=systemd:/\n0::/unified/web\n";
        let memberships = parse(text);
        let roots: Vec<_> = memberships.iter().cloned().flat_map(Membership::roots).collect();
        let pair = |controller: &str, path: &str| (controller.to_owned(), path.to_owned());
        assert_eq!(
            roots,
            [
                pair("cpu", "/godwit/web"),
                pair("cpuacct", "/godwit/web"),
                pair("name=systemd", "/"),
                pair("", "/unified/web"),
            ]
        );
        let host = [
            mount("/sys/fs/cgroup", "tmpfs", "rw,mode=755"),
            mount("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
            mount("/sys/fs/cgroup/systemd", "cgroup", "rw,xattr,name=systemd"),
            mount("/sys/fs/cgroup/unified", "cgroup2", "rw"),
            mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
        ];
        assert_eq!(
            external_mounts(Path::new("/sys/fs/cgroup"), &host, &memberships).unwrap(),
            [
                pair("/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct/godwit/web"),
                pair("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/systemd/"),
                pair("/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified/unified/web"),
            ]
        );
    }
}
