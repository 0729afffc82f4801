//! Where the streams of a task go on the target.
//!
//! ```text
//! source's stream          target's stream
//! (none)                   none
//! file://… binary://…      the same: a log file or logging program of the same name
//! a FIFO                   a FIFO of its own, made as containerd's clients make theirs
//! ```
//! A client finds the FIFOs in the task's record, so `ctr tasks attach` works after the move; the shim holds both
//! ends open, so a container that writes while nobody reads gets no SIGPIPE. As everywhere under containerd, its
//! output waits once a FIFO that nobody reads is full.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use godwit_protocol::offer::Stdio;
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{cleanup::remove_fifo, error::NodeError};

/// The FIFOs made for one task; they are removed again unless they are [handed on](Fifos::into_paths).
#[derive(Debug, Default)]
pub(crate) struct Fifos {
    made: Vec<PathBuf>,
}

impl Fifos {
    /// Returns the streams of the target's task, and the FIFOs made for them under `root`.
    ///
    /// # Errors
    /// [`NodeError::File`] if one cannot be made; none is left then.
    pub(crate) fn make(
        root: &Path,
        unique: &str,
        id: &str,
        source: &Stdio,
    ) -> Result<(Stdio, Self), NodeError> {
        let mut fifos = Self::default();
        let directory = root.join(format!("godwit-{unique}"));
        let mut place = |stream: &str, of_source: &str| -> Result<String, NodeError> {
            if of_source.is_empty() || of_source.contains("://") && !of_source.starts_with("fifo://") {
                return Ok(of_source.to_owned());
            }
            let path = directory.join(format!("{id}-{stream}"));
            fifos.add(&directory, &path)?;
            Ok(path.display().to_string())
        };
        let target = Stdio {
            terminal: source.terminal,
            stdin: place("stdin", &source.stdin)?,
            stdout: place("stdout", &source.stdout)?,
            // A terminal has one output.
            stderr: if source.terminal { String::new() } else { place("stderr", &source.stderr)? },
        };
        Ok((target, fifos))
    }

    /// Returns the FIFOs' paths and leaves their removal to the caller.
    pub(crate) fn into_paths(mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.made)
    }

    fn add(&mut self, directory: &Path, path: &Path) -> Result<(), NodeError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(NodeError::file("create directory", directory))?;
        // A fifo of that name can only be left over from an agent that was killed in the same migration.
        if path.exists() {
            fs::remove_file(path).map_err(NodeError::file("replace", path))?;
        }
        mkfifo(path, Mode::from_bits_truncate(0o700))
            .map_err(|errno| NodeError::file("make fifo", path)(errno.into()))?;
        self.made.push(path.to_owned());
        Ok(())
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        for path in &self.made {
            remove_fifo(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use super::*;

    fn stdio(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Stdio {
        Stdio { terminal, stdin: stdin.to_owned(), stdout: stdout.to_owned(), stderr: stderr.to_owned() }
    }

    #[test]
    fn fifos_are_made_anew_and_uris_are_kept() {
        let root = tempfile::tempdir().unwrap();
        let source = stdio("/run/containerd/fifo/1/x-stdin", "file:///var/log/x", "", false);
        let (target, fifos) = Fifos::make(root.path(), "m", "x", &source).unwrap();
        assert!(fs::metadata(&target.stdin).unwrap().file_type().is_fifo());
        assert_eq!((target.stdout.as_str(), target.stderr.as_str()), ("file:///var/log/x", ""));
        drop(fifos);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_terminal_has_no_stream_for_errors_and_fifos_handed_on_stay() {
        let root = tempfile::tempdir().unwrap();
        let source = stdio("/f/x-stdin", "/f/x-stdout", "/f/x-stderr", true);
        let (target, fifos) = Fifos::make(root.path(), "m", "x", &source).unwrap();
        assert_eq!(fifos.into_paths().len(), 2);
        assert!(target.terminal && target.stderr.is_empty());
        assert!(Path::new(&target.stdout).exists());
        let (_, again) = Fifos::make(root.path(), "m", "x", &source).unwrap();
        drop(again);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
