//! `update`: new limits for a live container.
//!
//! What is absent, zero or empty stays as it is, as with runc. Device rules are not updated.

use std::fs;

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v1::ControllerType;
use libcontainer::oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, Spec};

use crate::cgroup;
use crate::error::{ContainerError, Result};
use crate::state::{Status, Stored};

/// Applies `resources` to the container's cgroup.
///
/// # Errors
/// [`ContainerError::NotRunning`] for a stopped container, [`ContainerError::Cgroup`] with the limit the
/// kernel refused.
pub fn update(stored: &Stored, mut resources: LinuxResources) -> Result<()> {
    let status = stored.status()?;
    if matches!(status, Status::Stopped | Status::Creating) {
        return Err(ContainerError::NotRunning { status });
    }
    let spec = stored.spec()?;
    let before = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let before_memory = before.and_then(|resources| resources.memory().as_ref());
    let disable_oom_killer = resources
        .memory()
        .as_ref()
        .and_then(LinuxMemory::disable_oom_killer)
        .or_else(|| before_memory.and_then(LinuxMemory::disable_oom_killer))
        .unwrap_or(false);
    resources.set_memory(resources.memory().as_ref().and_then(stated_memory));
    resources.set_cpu(resources.cpu().as_ref().and_then(stated_cpu));
    let pids = resources.pids().filter(|pids: &LinuxPids| pids.limit() != 0);
    resources.set_pids(pids);
    resources.set_devices(None);
    let request =
        ControllerOpt { resources: &resources, disable_oom_killer, oom_score_adj: None, freezer_state: None };
    cgroup::manager(stored)?.apply(&request).map_err(ContainerError::cgroup)
}

/// Switches the OOM killer off where the spec asks for it: libcontainer does not. Version 2 has no such switch.
pub(crate) fn keep_oom_killer_off(stored: &Stored, spec: &Spec) -> Result<()> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|resources| resources.memory().as_ref());
    if memory.and_then(LinuxMemory::disable_oom_killer) != Some(true) || cgroup::is_unified()? {
        return Ok(());
    }
    let file = cgroup::directory(stored, ControllerType::Memory)?.join("memory.oom_control");
    fs::write(&file, "1").map_err(ContainerError::file(file))
}

fn stated_memory(memory: &LinuxMemory) -> Option<LinuxMemory> {
    let stated = |value: Option<i64>| value.filter(|value| *value != 0);
    let mut wanted = LinuxMemory::default();
    wanted
        .set_limit(stated(memory.limit()))
        .set_reservation(stated(memory.reservation()))
        .set_swap(stated(memory.swap()))
        .set_swappiness(memory.swappiness())
        .set_check_before_update(memory.check_before_update());
    (wanted != LinuxMemory::default()).then_some(wanted)
}

fn stated_cpu(cpu: &LinuxCpu) -> Option<LinuxCpu> {
    let mut wanted = cpu.clone();
    let text = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    wanted
        .set_shares(cpu.shares().filter(|value| *value != 0))
        .set_quota(cpu.quota().filter(|value| *value != 0))
        .set_period(cpu.period().filter(|value| *value != 0))
        .set_realtime_runtime(cpu.realtime_runtime().filter(|value| *value != 0))
        .set_realtime_period(cpu.realtime_period().filter(|value| *value != 0))
        .set_cpus(text(cpu.cpus()))
        .set_mems(text(cpu.mems()));
    (wanted != LinuxCpu::default()).then_some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_and_empty_mean_unchanged() {
        let json = r#"{"memory":{"limit":0,"swap":-1},"cpu":{"shares":0,"quota":0,"cpus":""}}"#;
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let memory = stated_memory(resources.memory().as_ref().unwrap()).unwrap();
        assert_eq!((memory.limit(), memory.swap()), (None, Some(-1)));
        assert_eq!(stated_cpu(resources.cpu().as_ref().unwrap()), None);
    }
}
