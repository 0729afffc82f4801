//! Mappings that CRIU is told instead of asking the kernel, which takes long ([`godwit_memory::ahead`]).
//!
//! CRIU reads `/proc/PID/smaps`. In its own mount namespace a file in memory is bound over that of each process while
//! the container runs; it is written when the container is frozen and before CRIU may go on: with what was read ahead
//! if that is still true, and else with what is read then. A process that came later has its own smaps. The mounts end
//! with their process or with CRIU.
//!
//! A program that changes the flags of its mappings all the time could never be dumped so. One that was found to have
//! changed them is remembered, beside the container's state, and CRIU asks the kernel from then on.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use godwit_memory::MemoryError;
use godwit_memory::ahead::{Ahead, Mappings};
use godwit_sys::mount::Mounted;
use godwit_sys::{SysError, mountns};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use crate::cgroup;
use crate::state::Stored;

use super::error::{CheckpointError, Result};

/// What one CRIU is told.
#[derive(Debug, Default)]
pub struct Told {
    /// An empty file over each process's smaps.
    files: Vec<(i32, File)>,
    /// What stands in them that was read ahead.
    ahead: Vec<(i32, Mappings)>,
    /// Is made when the container is found to change its flags.
    fickle: PathBuf,
}

impl Told {
    /// Prepares to tell the CRIU with process id `criu`, which waits, about the container's processes.
    ///
    /// The calling thread's working directory is `/` afterwards.
    ///
    /// # Errors
    /// If that can neither be done nor undone: CRIU may read an empty file, and take a process for one without memory.
    pub(super) fn prepare(criu: i32, stored: &Stored) -> Result<Self> {
        let fickle = stored.directory().join(FICKLE);
        if fickle.exists() {
            return Ok(Self::default());
        }
        let files = cover(criu, &cgroup::processes(stored)?)?;
        Ok(Self { files, ahead: Vec::new(), fickle })
    }

    /// Writes what CRIU is to read. The tasks are frozen.
    ///
    /// # Errors
    /// If a process cannot be read, or the files cannot be written; CRIU may not go on then.
    pub(super) fn write(&mut self, ahead: &Ahead) -> Result<()> {
        for (pid, file) in &mut self.files {
            let mappings = match current(*pid, ahead) {
                Ok((mappings, was_read_ahead)) => {
                    if was_read_ahead {
                        self.ahead.push((*pid, mappings.clone()));
                    }
                    mappings
                }
                // Its file in /proc is gone as well, and the one over it with that.
                Err(MemoryError::Sys(SysError::NoProcess { .. })) => continue,
                Err(error) => return Err(error.into()),
            };
            let path = || PathBuf::from(format!("/proc/{pid}/smaps"));
            file.write_all(mappings.as_bytes()).map_err(|error| CheckpointError::file(path())(error))?;
        }
        Ok(())
    }

    /// Of how many processes CRIU was told what had been read ahead.
    pub fn read_ahead(&self) -> usize {
        self.ahead.len()
    }

    /// Makes sure that what was read ahead is true of the tasks as they are, dumped and still frozen.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] if it is not: the dump is good for nothing.
    pub fn confirm(&self) -> Result<()> {
        for (pid, mappings) in &self.ahead {
            if !mappings.still_holds(&Mappings::read(*pid)?) {
                File::create(&self.fickle).map_err(CheckpointError::file(&self.fickle))?;
                return Err(CheckpointError::Changed { pid: *pid });
            }
        }
        Ok(())
    }
}

/// Returns the mappings of a frozen process, and whether they are those that were read ahead.
fn current(pid: i32, ahead: &Ahead) -> godwit_memory::Result<(Mappings, bool)> {
    match ahead.of(pid) {
        Some(mappings) if mappings.is_current(pid)? => Ok((mappings, true)),
        _ => Ok((Mappings::read(pid)?, false)),
    }
}

/// Binds an empty file over each smaps, in the mount namespace of `criu`; over none, where the kernel does not let us.
fn cover(criu: i32, processes: &[i32]) -> Result<Vec<(i32, File)>> {
    let path = PathBuf::from(format!("/proc/{criu}/ns/mnt"));
    let namespace = File::open(&path).map_err(CheckpointError::file(&path))?;
    // Only a thread with a working directory of its own may change its mount namespace.
    unshare(CloneFlags::CLONE_FS).map_err(|errno| CheckpointError::file(&path)(errno.into()))?;
    mountns::run_in(&namespace, || {
        // The files outlive its place in the tree.
        let directory = Mounted::tmpfs(Path::new("/tmp"), SIZE_BYTES)?;
        let mut covers: Vec<(i32, File, Mounted)> = Vec::new();
        for pid in processes {
            match bind(directory.path(), *pid) {
                Ok((file, mounted)) => covers.push((*pid, file, mounted)),
                // The process has ended.
                Err(CheckpointError::Sys(SysError::Mount { errno: Errno::ENOENT, .. })) => {}
                Err(error) => {
                    log::info!("criu reads the mappings of the tasks itself: {error}");
                    covers.into_iter().try_for_each(|(_, _, mounted)| mounted.unmount())?;
                    return Ok(Vec::new());
                }
            }
        }
        let keep = |(pid, file, mounted): (i32, File, Mounted)| {
            mounted.keep();
            (pid, file)
        };
        Ok(covers.into_iter().map(keep).collect())
    })?
}

/// Binds an empty file of `directory` over one smaps.
fn bind(directory: &Path, pid: i32) -> Result<(File, Mounted)> {
    let path = directory.join(format!("smaps-{pid}"));
    let file = File::create(&path).map_err(CheckpointError::file(&path))?;
    Ok((file, Mounted::bind(&path, &PathBuf::from(format!("/proc/{pid}/smaps")))?))
}

/// In the directory of the container's state.
const FICKLE: &str = "mappings-change";
/// Room for text: a hundred thousand mappings take some 20 MB.
const SIZE_BYTES: u64 = 1 << 30;
