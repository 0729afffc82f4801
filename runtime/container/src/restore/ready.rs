//! CRIU, started before there is anything to restore: that takes some milliseconds, in which a container that is on its
//! way here would stand still.
//!
//! What it inherits has to be known by then. That is everything that an image may name, and how CRIU is started is a
//! guess: where the images want another way, another CRIU is started.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use godwit_criu::{Program, Session, Setup};
use godwit_sys::netns;
use libcontainer::oci_spec::runtime::Spec;

use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::shortcuts::Shortcuts;
use crate::checkpoint::{descriptors, external};

/// How CRIU is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// In a network namespace of its own, which becomes the container's.
    network: bool,
    /// Without breakpoints in the tasks.
    quick: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) session: Session,
    way: Way,
    /// CRIU's numbers of the standard descriptors.
    standard: [io::Result<i32>; 3],
    /// Key and CRIU's number of each namespace that comes from outside.
    namespaces: Vec<(String, i32)>,
}

impl Way {
    /// What a container that comes from another host will want, most likely.
    pub(super) fn expected(spec: &Spec) -> Self {
        Self { network: Shortcuts::may_leave_network(spec), quick: Shortcuts::may_be_taken(spec) }
    }

    /// What these images want.
    pub(super) fn of(shortcuts: &Shortcuts) -> Self {
        Self { network: shortcuts.network, quick: !shortcuts.is_empty() }
    }
}

impl Ready {
    /// Starts CRIU for a restore of a container of `spec`.
    ///
    /// # Errors
    /// Where there is no CRIU, or a namespace is missing.
    pub(super) fn start(program: &Program, spec: &Spec, shell_job: bool, way: Way) -> Result<Self> {
        let mut setup = Setup::new();
        let standard = [0, 1, 2].map(|number| Ok(setup.inherit_fd(standard_descriptor(number)?)));
        let mut namespaces = Vec::new();
        for (kind, path) in external::namespaces(spec) {
            let (Some((name, key)), Some(path)) = (external::external_key(kind), path) else { continue };
            let file = File::open(path).map_err(|error| CheckpointError::Namespace {
                kind: name,
                path: path.to_owned(),
                reason: error.to_string(),
            })?;
            namespaces.push((key.to_owned(), setup.inherit_fd(file.into())));
        }
        if shell_job {
            setup.stdin(standard_descriptor(0).map_err(CheckpointError::file("stdin"))?);
        }
        if way.quick {
            setup.without_breakpoints();
        }
        let session = if way.network {
            netns::run_in_new(|| Session::start(program, setup))??
        } else {
            Session::start(program, setup)?
        };
        Ok(Self { session, way, standard, namespaces })
    }

    /// Returns it, or another, so that it was started in this way.
    pub(super) fn in_way(self, program: &Program, spec: &Spec, shell_job: bool, way: Way) -> Result<Self> {
        if self.way == way {
            return Ok(self);
        }
        log::debug!("criu is started anew: {:?} was expected, and the images want {way:?}", self.way);
        drop(self);
        Self::start(program, spec, shell_job, way)
    }

    /// Returns key and CRIU's number of what the container had from outside, whose standard descriptors these were.
    ///
    /// # Errors
    /// If it had a pipe where this process has nothing open.
    pub(super) fn inherited(&self, descriptors: &[String]) -> Result<Vec<(String, i32)>> {
        let mut inherited = self.namespaces.clone();
        for (key, number) in descriptors::pipes(descriptors) {
            match &self.standard[number.min(2)] {
                Ok(number) => inherited.push((key.to_owned(), *number)),
                Err(error) => return Err(CheckpointError::file("stdio")(error.kind().into())),
            }
        }
        Ok(inherited)
    }
}

fn standard_descriptor(number: usize) -> io::Result<OwnedFd> {
    match number {
        0 => io::stdin().as_fd().try_clone_to_owned(),
        1 => io::stdout().as_fd().try_clone_to_owned(),
        _ => io::stderr().as_fd().try_clone_to_owned(),
    }
}
