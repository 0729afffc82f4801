//! `descriptors.json`: what standard input, output and error were when the container was dumped.
//!
//! A JSON array of three strings, the targets of `/proc/PID/fd/{0,1,2}`, as runc writes it. On restore, those
//! that are pipes (`pipe:[INODE]`) are replaced by the caller's.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::error::{CheckpointError, Result};

/// The descriptors of the process `pid`; `/dev/null` stands for one that is closed.
///
/// # Errors
/// [`CheckpointError::File`] when they cannot be looked at.
pub fn of_process(pid: i32) -> Result<Vec<String>> {
    (0..STDIO)
        .map(|number| {
            let path = format!("/proc/{pid}/fd/{number}");
            match fs::read_link(&path) {
                Ok(target) => Ok(target.to_string_lossy().into_owned()),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok("/dev/null".to_owned()),
                Err(error) => Err(CheckpointError::file(path)(error)),
            }
        })
        .collect()
}

/// Writes them into the image directory.
///
/// # Errors
/// [`CheckpointError::File`].
pub fn write(images: &Path, descriptors: &[String]) -> Result<()> {
    let path = images.join(NAME);
    let text = serde_json::to_vec(descriptors).map_err(std::io::Error::from);
    text.and_then(|text| {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).open(&path)?.write_all(&text)
    })
    .map_err(CheckpointError::file(path))
}

/// Reads them from the image directory.
///
/// # Errors
/// [`CheckpointError::NoCheckpoint`] when the file is missing or is something else.
pub fn read(images: &Path) -> Result<Vec<String>> {
    let wrong = |reason: String| CheckpointError::NoCheckpoint { path: images.to_owned(), reason };
    let text = fs::read(images.join(NAME)).map_err(|error| wrong(format!("{NAME}: {error}")))?;
    if text.len() > BYTES_MAX {
        return Err(wrong(format!("{NAME} is longer than {BYTES_MAX} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| wrong(format!("{NAME}: {error}")))
}

/// The pipes among `descriptors`: key and the number (0 to 2) of the standard descriptor to take its place.
///
/// A pipe that is two of them (output and error alike) is one pipe to CRIU and named once.
pub fn pipes(descriptors: &[String]) -> Vec<(&str, usize)> {
    let mut found: Vec<(&str, usize)> = Vec::new();
    for (number, text) in descriptors.iter().enumerate().take(STDIO) {
        if text.starts_with("pipe:") && !found.iter().any(|(key, _)| key == text) {
            found.push((text, number));
        }
    }
    found
}

const NAME: &str = "descriptors.json";
const STDIO: usize = 3;
/// Three paths fit easily.
const BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_used_twice_is_named_once() {
        let descriptors = ["/dev/null", "pipe:[7]", "pipe:[7]"].map(str::to_owned);
        assert_eq!(pipes(&descriptors), [("pipe:[7]", 1)]);
        let descriptors = ["pipe:[1]", "pipe:[2]", "pipe:[3]", "pipe:[4]"].map(str::to_owned);
        assert_eq!(pipes(&descriptors), [("pipe:[1]", 0), ("pipe:[2]", 1), ("pipe:[3]", 2)]);
    }

    #[test]
    fn what_is_written_is_read_and_anything_else_is_no_checkpoint() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(read(directory.path()), Err(CheckpointError::NoCheckpoint { .. })));
        let descriptors = ["/dev/null", "pipe:[7]", "/dev/pts/0"].map(str::to_owned);
        write(directory.path(), &descriptors).unwrap();
        assert_eq!(
            fs::read_to_string(directory.path().join(NAME)).unwrap(),
            r#"["/dev/null","pipe:[7]","/dev/pts/0"]"#
        );
        assert_eq!(read(directory.path()).unwrap(), descriptors);
        fs::write(directory.path().join(NAME), "{}").unwrap();
        assert!(matches!(read(directory.path()), Err(CheckpointError::NoCheckpoint { .. })));
    }
}
