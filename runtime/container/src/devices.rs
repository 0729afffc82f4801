//! Device rules on cgroup version 2.
//!
//! On version 1 libcgroups writes them to the devices controller. On version 2 it attaches a BPF program only
//! when built against libelf, and would replace that program on every update by one without the container's
//! own rules. So godwit attaches its own (`godwit_sys::device_filter`), once, before the container runs.

use std::fs;
use std::path::{Path, PathBuf};

use godwit_sys::device_filter::{self, DeviceKind, DeviceRule};
use libcgroups::common::DEFAULT_CGROUP_ROOT;
use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};

use crate::cgroup;
use crate::error::{ContainerError, Result};

/// Confines the cgroup that the process `pid` is in, and with it the container, to the devices of the spec and
/// those that every container has. Does nothing on version 1.
///
/// # Errors
/// [`ContainerError::Sys`] when the kernel refuses the program.
pub(crate) fn confine(pid: i32, spec: &Spec) -> Result<()> {
    if !cgroup::is_unified()? {
        return Ok(());
    }
    let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&file).map_err(ContainerError::file(&file))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    if path.is_empty() {
        // The root cgroup is the whole machine's: nothing of a container's is to be attached there.
        return Err(ContainerError::Cgroup { detail: format!("process {pid} is in the root cgroup") });
    }
    Ok(device_filter::attach(&Path::new(DEFAULT_CGROUP_ROOT).join(path), &rules(spec))?)
}

/// The spec's rules, then those for what every container has: as on version 1, the spec cannot deny them.
fn rules(spec: &Spec) -> Vec<DeviceRule> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let own = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let always = ALWAYS.iter().map(|(kind, major, minor)| DeviceRule {
        allow: true,
        kind: Some(*kind),
        major: Some(*major),
        minor: *minor,
        read: true,
        write: true,
        make: true,
    });
    // Making a device file gives no access to the device.
    let make_any = [DeviceKind::Character, DeviceKind::Block].map(|kind| DeviceRule {
        allow: true,
        kind: Some(kind),
        major: None,
        minor: None,
        read: false,
        write: false,
        make: true,
    });
    own.iter().map(rule).chain(make_any).chain(always).collect()
}

fn rule(rule: &LinuxDeviceCgroup) -> DeviceRule {
    let kind = match rule.typ() {
        Some(LinuxDeviceType::B) => Some(DeviceKind::Block),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(DeviceKind::Character),
        Some(LinuxDeviceType::A | LinuxDeviceType::P) | None => None,
    };
    // Negative numbers stand for all, as missing ones do.
    let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
    let access = rule.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
    DeviceRule {
        allow: rule.allow(),
        kind,
        major: number(rule.major()),
        minor: number(rule.minor()),
        read: access.contains('r'),
        write: access.contains('w'),
        make: access.contains('m'),
    }
}

/// null, zero, full, random, urandom, tty, ptmx and the pseudo-terminals.
const ALWAYS: [(DeviceKind, u32, Option<u32>); 8] = [
    (DeviceKind::Character, 1, Some(3)),
    (DeviceKind::Character, 1, Some(5)),
    (DeviceKind::Character, 1, Some(7)),
    (DeviceKind::Character, 1, Some(8)),
    (DeviceKind::Character, 1, Some(9)),
    (DeviceKind::Character, 5, Some(0)),
    (DeviceKind::Character, 5, Some(2)),
    (DeviceKind::Character, 136, None),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_the_spec_come_first_and_what_every_container_has_last() {
        let json = r#"{"ociVersion":"1.0.2","linux":{"resources":{"devices":[
            {"allow":false,"access":"rwm"},
            {"allow":true,"type":"c","major":10,"minor":229,"access":"rw"},
            {"allow":true,"type":"b","major":8,"minor":-1}
        ]}}}"#;
        let spec: Spec = serde_json::from_str(json).unwrap();
        let rules = rules(&spec);
        let nothing = DeviceRule {
            allow: false,
            kind: None,
            major: None,
            minor: None,
            read: true,
            write: true,
            make: true,
        };
        assert_eq!(rules[0], nothing);
        let fuse = DeviceRule {
            allow: true,
            kind: Some(DeviceKind::Character),
            major: Some(10),
            minor: Some(229),
            make: false,
            ..nothing
        };
        assert_eq!(rules[1], fuse);
        assert_eq!((rules[2].major, rules[2].minor, rules[2].make), (Some(8), None, true));
        assert_eq!(rules.len(), 3 + 2 + ALWAYS.len());
    }
}
