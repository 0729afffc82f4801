//! Which containerd a suite runs on, and by which name its containers ask for a runtime.

use std::fmt;

use crate::bed::BedOptions;
use crate::containerd::Version;

/// A shim with its runtime, and the name by which containers ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// containerd's own shim with runc: what every expectation is checked against.
    Runc,
    /// This build under its own name.
    Godwit,
    /// This build under a name that passes for one of runc's: containerd and ctr send such a name options
    /// that they keep from others.
    RuncGodwit,
    /// This build installed in the place of containerd's own shim.
    InPlace,
}

impl Runtime {
    /// Returns the name that a container asks by.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Runc | Self::InPlace => "io.containerd.runc.v2",
            Self::Godwit => "io.containerd.godwit.v1",
            Self::RuncGodwit => "io.containerd.runc.godwit.v1",
        }
    }

    /// Returns whether it is this build rather than runc.
    #[must_use]
    pub fn is_godwit(self) -> bool {
        self != Self::Runc
    }
}

/// A containerd and a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// The containerd of both nodes.
    pub containerd: Version,
    /// What runs the containers.
    pub runtime: Runtime,
}

impl Lane {
    /// Returns the lane of a containerd and a runtime.
    #[must_use]
    pub const fn new(containerd: Version, runtime: Runtime) -> Self {
        Self { containerd, runtime }
    }

    /// Returns a lane for every containerd with every one of `runtimes`.
    #[must_use]
    pub fn all(runtimes: &[Runtime]) -> Vec<Self> {
        let of = |containerd| runtimes.iter().map(move |runtime| Self::new(containerd, *runtime));
        Version::ALL.into_iter().flat_map(of).collect()
    }

    /// Returns whether this lane's `ctr tasks checkpoint` sends its flags to the shim. Those of 1.6 and 1.7 do so
    /// for containerd's own runtime name only, and drop them silently for any other.
    #[must_use]
    pub fn ctr_sends_checkpoint_flags(self) -> bool {
        self.containerd >= Version::V2_1 || self.runtime.name() == Runtime::Runc.name()
    }

    /// Returns the options of a bed for this lane.
    #[must_use]
    pub fn bed(self, name: &str) -> BedOptions {
        BedOptions {
            replace_runc_shim: self.runtime == Runtime::InPlace,
            ..BedOptions::for_test(name).containerd(self.containerd)
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runtime = match self.runtime {
            Runtime::Runc => "runc",
            Runtime::Godwit => "godwit",
            Runtime::RuncGodwit => "runc.godwit",
            Runtime::InPlace => "in-place",
        };
        write!(f, "{}/{runtime}", self.containerd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_runc_is_not_godwit_although_one_shares_its_name() {
        assert!(!Runtime::Runc.is_godwit());
        assert!(Runtime::InPlace.is_godwit());
        assert_eq!(Runtime::InPlace.name(), Runtime::Runc.name());
    }

    #[test]
    fn old_ctr_sends_flags_to_containerds_own_name_only() {
        assert!(Lane::new(Version::V1_6, Runtime::InPlace).ctr_sends_checkpoint_flags());
        assert!(!Lane::new(Version::V1_7, Runtime::RuncGodwit).ctr_sends_checkpoint_flags());
        assert!(Lane::new(Version::V2_1, Runtime::Godwit).ctr_sends_checkpoint_flags());
    }
}
