//! The points at which CRIU stops and asks whether to go on.
//!
//! Names and order are those of CRIU's `criu/action-scripts.c`.

use std::os::fd::OwnedFd;

/// One question of CRIU. It waits until [`crate::Session::answer`].
#[derive(Debug)]
pub struct Notification {
    /// Which point has been reached.
    pub script: Script,
    /// The tree's root as the host sees it; with [`Script::SetupNamespaces`] and [`Script::PostRestore`].
    pub pid: Option<i32>,
    /// The master of a pseudo terminal; with [`Script::OrphanPtsMaster`].
    pub fd: Option<OwnedFd>,
}

/// Where CRIU stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Script {
    /// Options read, kernel probed, nothing of the tasks touched yet.
    PreDump,
    /// Everything is in the images and the tasks are stopped. Refusing lets them run on.
    PostDump,
    /// Before anything is created.
    PreRestore,
    /// The namespaces of the root task exist and are empty.
    SetupNamespaces,
    /// The namespaces have their content.
    PostSetupNamespaces,
    /// The tasks are restored and stopped, the network is locked. Refusing kills them.
    PostRestore,
    /// Network unlocked, credentials set, tasks stopped at their last instruction. Refusing is ignored.
    PreResume,
    /// The tasks run.
    PostResume,
    /// Network connections are about to be locked.
    NetworkLock,
    /// Network connections are about to be unlocked.
    NetworkUnlock,
    /// A pseudo terminal whose master was outside needs a new owner of its master.
    OrphanPtsMaster,
    /// The page server of a lazy dump accepts connections.
    StatusReady,
    /// CRIU asks for external files.
    QueryExternalFiles,
    /// A point this crate has no name for.
    Unnamed(String),
}

impl Script {
    /// CRIU's name of the point.
    pub fn name(&self) -> &str {
        match self {
            Self::Unnamed(name) => name,
            known => NAMES.iter().find(|(script, _)| script == known).map_or("", |(_, name)| name),
        }
    }

    /// The point with CRIU's name `name`.
    pub fn from_name(name: &str) -> Self {
        NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map_or_else(|| Self::Unnamed(name.to_owned()), |(script, _)| script.clone())
    }
}

const NAMES: [(Script, &str); 13] = [
    (Script::PreDump, "pre-dump"),
    (Script::PostDump, "post-dump"),
    (Script::PreRestore, "pre-restore"),
    (Script::SetupNamespaces, "setup-namespaces"),
    (Script::PostSetupNamespaces, "post-setup-namespaces"),
    (Script::PostRestore, "post-restore"),
    (Script::PreResume, "pre-resume"),
    (Script::PostResume, "post-resume"),
    (Script::NetworkLock, "network-lock"),
    (Script::NetworkUnlock, "network-unlock"),
    (Script::OrphanPtsMaster, "orphan-pts-master"),
    (Script::StatusReady, "status-ready"),
    (Script::QueryExternalFiles, "query-ext-files"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_point() {
        for (script, name) in NAMES {
            assert_eq!(script.name(), name);
            assert_eq!(Script::from_name(name), script);
        }
        assert_eq!(Script::from_name("new-in-5.0").name(), "new-in-5.0");
    }
}
