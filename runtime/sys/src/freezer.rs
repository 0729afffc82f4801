//! The cgroup freezer, both generations.
//!
//! ```text
//! Freezer --freeze(limit)--> Frozen --thaw()----> (running)
//!                              |  \--commit()---> (stays frozen, or the tasks are gone)
//!                              \---drop---------> (running)
//! ```
//! Version 1 has `freezer.state` with THAWED, FREEZING and FROZEN; a version 1 cgroup can stay FREEZING while a
//! task sits in a state the freezer cannot stop, and a second write of FROZEN moves it on. Version 2 has
//! `cgroup.freeze` to ask and the line `frozen` of `cgroup.events` for the answer. Sources: kernel
//! Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst and cgroup-v2.rst.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::{Result, SysError};

/// State of a cgroup as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezerState {
    /// Every task may run.
    Thawed,
    /// Asked to freeze, not there yet.
    Freezing,
    /// Every task is stopped.
    Frozen,
}

/// The freezer of one cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freezer {
    directory: PathBuf,
    generation: Generation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Generation {
    V1,
    V2,
}

impl Freezer {
    /// Opens the freezer of the cgroup at `directory` (of the freezer hierarchy with version 1).
    ///
    /// # Errors
    /// [`SysError::NoFreezer`] when the directory has neither interface.
    pub fn open(directory: &Path) -> Result<Self> {
        let generation = if directory.join("freezer.state").exists() {
            Generation::V1
        } else if directory.join("cgroup.freeze").exists() {
            Generation::V2
        } else {
            return Err(SysError::NoFreezer { path: directory.to_owned() });
        };
        Ok(Self { directory: directory.to_owned(), generation })
    }

    /// The cgroup's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads the present state.
    ///
    /// # Errors
    /// [`SysError::File`].
    pub fn state(&self) -> Result<FreezerState> {
        match self.generation {
            Generation::V1 => Ok(match self.read("freezer.state")?.trim() {
                "FROZEN" => FreezerState::Frozen,
                "FREEZING" => FreezerState::Freezing,
                _ => FreezerState::Thawed,
            }),
            Generation::V2 => {
                let asked = self.read("cgroup.freeze")?.trim() == "1";
                let frozen = self.read("cgroup.events")?.lines().any(|line| line == "frozen 1");
                Ok(match (asked, frozen) {
                    (_, true) => FreezerState::Frozen,
                    (true, false) => FreezerState::Freezing,
                    (false, false) => FreezerState::Thawed,
                })
            }
        }
    }

    /// Freezes every task of the cgroup and waits until all have stopped.
    ///
    /// Freezing a frozen cgroup succeeds at once; the guard then thaws it all the same.
    ///
    /// # Errors
    /// [`SysError::NotFrozen`] after `limit`, [`SysError::File`] otherwise. In either case the cgroup has been
    /// thawed again.
    pub fn freeze(&self, limit: Duration) -> Result<Frozen> {
        let deadline = Instant::now() + limit;
        // Made before the first write, so that every way out below thaws.
        let frozen = Frozen { freezer: self.clone(), armed: true };
        let mut pause = Duration::from_micros(50);
        loop {
            self.write(FreezerState::Frozen)?;
            if self.state()? == FreezerState::Frozen {
                return Ok(frozen);
            }
            if Instant::now() >= deadline {
                drop(frozen);
                return Err(SysError::NotFrozen {
                    path: self.directory.clone(),
                    limit_ms: limit.as_millis(),
                });
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }

    /// Lets every task of the cgroup run.
    ///
    /// # Errors
    /// [`SysError::File`].
    pub fn thaw(&self) -> Result<()> {
        self.write(FreezerState::Thawed)
    }

    /// The ids of the processes in the cgroup and the cgroups below it.
    ///
    /// # Errors
    /// [`SysError::File`].
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        collect_processes(&self.directory, &mut found)?;
        Ok(found)
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.directory.join(name);
        fs::read_to_string(&path).map_err(SysError::file(path))
    }

    fn write(&self, state: FreezerState) -> Result<()> {
        let freeze = state == FreezerState::Frozen;
        let (name, text) = match self.generation {
            Generation::V1 => ("freezer.state", if freeze { "FROZEN" } else { "THAWED" }),
            Generation::V2 => ("cgroup.freeze", if freeze { "1" } else { "0" }),
        };
        let path = self.directory.join(name);
        fs::write(&path, text).map_err(SysError::file(path))
    }
}

/// A frozen cgroup. Dropping it thaws.
#[derive(Debug)]
#[must_use = "dropping the guard thaws the cgroup"]
pub struct Frozen {
    freezer: Freezer,
    armed: bool,
}

impl Frozen {
    /// Lets the tasks run again.
    ///
    /// # Errors
    /// [`SysError::File`]; the tasks are then still frozen.
    pub fn thaw(mut self) -> Result<()> {
        self.armed = false;
        self.freezer.thaw()
    }

    /// Gives up the duty to thaw: the tasks run elsewhere now, or are to stay frozen.
    pub fn commit(mut self) {
        self.armed = false;
    }

    /// The freezer behind the guard.
    pub fn freezer(&self) -> &Freezer {
        &self.freezer
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        match self.freezer.thaw() {
            // The cgroup went with its tasks: nothing is left that could be thawed.
            Err(SysError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => log::error!("failed to thaw: {error}"),
            Ok(()) => {}
        }
    }
}

fn collect_processes(directory: &Path, found: &mut Vec<i32>) -> Result<()> {
    let path = directory.join("cgroup.procs");
    let text = fs::read_to_string(&path).map_err(SysError::file(path))?;
    found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for entry in fs::read_dir(directory).map_err(SysError::file(directory))? {
        let entry = entry.map_err(SysError::file(directory))?;
        if entry.file_type().map_err(SysError::file(entry.path()))?.is_dir() {
            collect_processes(&entry.path(), found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a cgroup whose kernel answers at once.
    fn pretend(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn dropping_the_guard_thaws_and_committing_it_does_not() {
        let directory = pretend(&[("freezer.state", "THAWED\n")]);
        let freezer = Freezer::open(directory.path()).unwrap();
        let frozen = freezer.freeze(Duration::ZERO).unwrap();
        assert_eq!(freezer.state().unwrap(), FreezerState::Frozen);
        drop(frozen);
        assert_eq!(freezer.state().unwrap(), FreezerState::Thawed);
        freezer.freeze(Duration::ZERO).unwrap().commit();
        assert_eq!(freezer.state().unwrap(), FreezerState::Frozen);
    }

    #[test]
    fn a_cgroup_that_does_not_freeze_in_time_is_thawed() {
        let directory = pretend(&[("cgroup.freeze", "0\n"), ("cgroup.events", "populated 1\nfrozen 0\n")]);
        let freezer = Freezer::open(directory.path()).unwrap();
        let error = freezer.freeze(Duration::from_millis(2)).unwrap_err();
        assert!(matches!(error, SysError::NotFrozen { limit_ms: 2, .. }));
        assert_eq!(fs::read_to_string(directory.path().join("cgroup.freeze")).unwrap(), "0");
    }

    #[test]
    fn a_plain_directory_has_no_freezer() {
        let directory = pretend(&[]);
        assert!(matches!(Freezer::open(directory.path()), Err(SysError::NoFreezer { .. })));
    }

    #[test]
    fn processes_of_nested_cgroups_are_found() {
        let directory = pretend(&[("freezer.state", "THAWED\n"), ("cgroup.procs", "1\n2\n")]);
        fs::create_dir(directory.path().join("inner")).unwrap();
        fs::write(directory.path().join("inner/cgroup.procs"), "3\n").unwrap();
        let freezer = Freezer::open(directory.path()).unwrap();
        assert_eq!(freezer.processes().unwrap(), [1, 2, 3]);
    }
}
