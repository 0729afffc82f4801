//! The last error lines of a CRIU log.
//!
//! CRIU's response carries the first error it logged, often one it went on from. What made it give up is near
//! the end of the log, above a few closing lines that say only that it gave up.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The end of a log, reduced to what explains a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogTail {
    path: Option<PathBuf>,
    lines: Vec<String>,
}

impl LogTail {
    /// Reads the log at `path`; one that is missing or unreadable yields no lines.
    pub fn read(path: &Path) -> Self {
        let lines = read_end(path).map_or_else(|_| Vec::new(), |text| telling_lines(&text));
        Self { path: Some(path.to_owned()), lines }
    }

    /// Where the whole log is.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The last errors, oldest first, at most [`LINES_MAX`].
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}

impl fmt::Display for LogTail {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, line) in self.lines.iter().enumerate() {
            write!(formatter, "{} {line}", if index == 0 { ":" } else { ";" })?;
        }
        match &self.path {
            Some(path) => write!(formatter, " (log: {})", path.display()),
            None => Ok(()),
        }
    }
}

fn read_end(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length_bytes = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length_bytes.saturating_sub(READ_BYTES_MAX)))?;
    let mut bytes = Vec::new();
    file.take(READ_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn telling_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .filter_map(|line| line.find("Error (").map(|at| &line[at..]))
        .filter(|line| !EMPTY_WORDS.iter().any(|words| line.contains(words)))
        .map(|line| line.chars().take(LINE_CHARS_MAX).collect())
        .collect();
    let excess = lines.len().saturating_sub(LINES_MAX);
    lines.drain(..excess);
    lines
}

/// Most lines kept.
pub const LINES_MAX: usize = 4;
/// Longest line kept, in characters.
const LINE_CHARS_MAX: usize = 300;
/// How much of the log's end is looked at.
const READ_BYTES_MAX: u64 = 256 * 1024;
/// Lines that say nothing about the cause.
const EMPTY_WORDS: [&str; 6] = [
    "Dumping FAILED",
    "Restoring FAILED",
    "Pre-dumping FAILED",
    "Can't setup RLIMIT_NOFILE",
    "Can't request service daemon",
    "Killing processes because of failure",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_kept_and_the_closing_words_are_not() {
        let text = "(00.000100) Error (criu/rlimit.c:21): rlimit: Can't setup RLIMIT_NOFILE for self\n\
                    (00.010000) Collecting fds\n\
                    (00.020000) Error (criu/files-ext.c:99): Can't dump file 3 of that type [20600]\n\
                    (00.020001) Error (criu/cr-dump.c:1635): Dump files (pid: 7) failed with -1\n\
                    (00.030000) Error (criu/cr-dump.c:2128): Dumping FAILED.\n";
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dump.log");
        std::fs::write(&path, text).unwrap();
        let tail = LogTail::read(&path);
        assert_eq!(
            tail.lines(),
            [
                "Error (criu/files-ext.c:99): Can't dump file 3 of that type [20600]",
                "Error (criu/cr-dump.c:1635): Dump files (pid: 7) failed with -1",
            ]
        );
        assert!(tail.to_string().ends_with(&format!("(log: {})", path.display())));
    }

    #[test]
    fn a_missing_log_is_no_error() {
        let tail = LogTail::read(Path::new("/nonexistent/dump.log"));
        assert_eq!(tail.to_string(), " (log: /nonexistent/dump.log)");
    }

    #[test]
    fn a_log_that_is_not_text_does_not_panic() {
        let mut bytes = b"Error (\xff\xfe".to_vec();
        bytes.extend(std::iter::repeat_n(0xc3_u8, 10_000));
        assert_eq!(telling_lines(&String::from_utf8_lossy(&bytes)).len(), 1);
    }
}
