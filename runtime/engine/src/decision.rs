//! The target's record of one migration's fate, in a file.
//!
//! The record has to outlive the worker that resumes the container and the agent that answers questions about
//! it, so it belongs to neither: it is a file on the host's `/run`, and a step of it is taken under a lock by
//! whoever comes first. `godwit_protocol::fate` says which steps there are. A second file is locked by the worker
//! for as long as it lives, so that an agent, also one that was restarted, can tell whether to wait for it.
//!
//! The record vanishes with the host's memory, and so does everything that was restored on that host: a question
//! that finds no record after a reboot is rightly answered with `NotHere`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use godwit_protocol::MigrationId;
use godwit_protocol::fate::{Decision, FateAnswer};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// A record that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DecisionError {
    /// A file of the record cannot be used.
    #[error("no access to the migration's record {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds none of the decisions.
    #[error("the migration's record {} is damaged", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Another worker holds the migration.
    #[error("the migration of the record {} has a worker already", .path.display())]
    Taken {
        /// The file.
        path: PathBuf,
    },
}

/// The record of one migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    path: PathBuf,
    worker_path: PathBuf,
}

/// Says that the worker lives, until it is dropped or the process ends.
#[derive(Debug)]
#[must_use = "dropping it says that the worker is dead"]
pub struct WorkerAlive {
    _lock: Flock<File>,
}

impl Record {
    /// Returns the record of `migration` in `directory`, which must exist; nothing is created yet.
    #[must_use]
    pub fn of(directory: &Path, migration: &MigrationId) -> Self {
        let file = |suffix: &str| directory.join(format!("{migration}.{suffix}"));
        Self { path: file("fate"), worker_path: file("worker") }
    }

    /// Makes the record unless there is one, and returns what it holds.
    ///
    /// All later steps overwrite what is written here, so that they can be taken on a file system that is full.
    ///
    /// # Errors
    /// [`DecisionError`].
    pub fn begin(&self) -> Result<Decision, DecisionError> {
        let file = self.locked()?;
        let decision = self.read(&file)?;
        if decision == Decision::Undecided {
            self.write(&file, decision)?;
        }
        Ok(decision)
    }

    /// Takes the step to `next` if the record allows it, and returns what the record holds afterwards.
    ///
    /// # Errors
    /// [`DecisionError`]; the record is unchanged.
    pub fn decide(&self, next: Decision) -> Result<Decision, DecisionError> {
        let file = self.locked()?;
        let decision = self.read(&file)?;
        if !decision.may_become(next) {
            return Ok(decision);
        }
        self.write(&file, next)?;
        Ok(next)
    }

    /// Answers the source's question, deciding the migration if it is undecided.
    ///
    /// `kill` is called, with the record locked, if what was restored must be gone before the answer is given: its
    /// worker died between the decision and the resume, or while the container lacked memory.
    ///
    /// # Errors
    /// [`DecisionError`], or what `kill` returned; the record is unchanged.
    pub fn ask<E: From<DecisionError>>(&self, kill: impl FnOnce() -> Result<(), E>) -> Result<FateAnswer, E> {
        let file = self.locked()?;
        let decision = self.read(&file)?;
        let asked = decision.asked(self.worker_is_alive()?);
        if asked.kill_first {
            kill()?;
        }
        if asked.decision != decision {
            self.write(&file, asked.decision)?;
        }
        Ok(asked.answer)
    }

    /// Says that this process is the migration's worker, for as long as the answer lives.
    ///
    /// # Errors
    /// [`DecisionError::Taken`] if another process has said so.
    pub fn work(&self) -> Result<WorkerAlive, DecisionError> {
        match Flock::lock(self.open(&self.worker_path)?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(WorkerAlive { _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(DecisionError::Taken { path: self.worker_path.clone() }),
            Err((_, errno)) => Err(self.failed(&self.worker_path, errno.into())),
        }
    }

    /// Tells whether a worker lives that has called [`Record::work`].
    ///
    /// # Errors
    /// [`DecisionError::File`].
    pub fn worker_is_alive(&self) -> Result<bool, DecisionError> {
        match Flock::lock(self.open(&self.worker_path)?, FlockArg::LockSharedNonblock) {
            Ok(_lock) => Ok(false),
            Err((_, Errno::EWOULDBLOCK)) => Ok(true),
            Err((_, errno)) => Err(self.failed(&self.worker_path, errno.into())),
        }
    }

    /// Removes the record. A later question would be answered with `NotHere`, so this is for migrations that can
    /// no longer be asked about.
    ///
    /// # Errors
    /// [`DecisionError::File`].
    pub fn remove(&self) -> Result<(), DecisionError> {
        for path in [&self.worker_path, &self.path] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(self.failed(path, error)),
                _ => {}
            }
        }
        Ok(())
    }

    fn locked(&self) -> Result<Flock<File>, DecisionError> {
        let file = self.open(&self.path)?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| self.failed(&self.path, errno.into()))
    }

    fn open(&self, path: &Path) -> Result<File, DecisionError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.open(path).map_err(|error| self.failed(path, error))
    }

    fn read(&self, file: &File) -> Result<Decision, DecisionError> {
        let mut word = [0; WORD_LEN];
        let len = file.read_at(&mut word, 0).map_err(|error| self.failed(&self.path, error))?;
        DECISIONS
            .iter()
            .find(|(_, known)| word[..len] == known[..len] && (len == WORD_LEN || len == 0))
            .map(|(decision, _)| *decision)
            .ok_or_else(|| DecisionError::Damaged { path: self.path.clone() })
    }

    /// Writes one word of fixed length at the start: a single small write, which no death can tear.
    fn write(&self, file: &File, decision: Decision) -> Result<(), DecisionError> {
        let word =
            DECISIONS.iter().find(|(known, _)| *known == decision).map_or(DECISIONS[0].1, |(_, word)| *word);
        file.write_all_at(word, 0).map_err(|error| self.failed(&self.path, error))
    }

    #[expect(clippy::unused_self, reason = "reads as `self.failed(…)` beside the calls that can fail")]
    fn failed(&self, path: &Path, source: io::Error) -> DecisionError {
        DecisionError::File { path: path.to_owned(), source }
    }
}

const WORD_LEN: usize = 10;

/// The words in the file. An empty file, as it is created, matches the first.
const DECISIONS: [(Decision, &[u8; WORD_LEN]); 6] = [
    (Decision::Undecided, b"undecided\n"),
    (Decision::Aborted, b"aborted  \n"),
    (Decision::Committed, b"committed\n"),
    (Decision::Filling, b"filling  \n"),
    (Decision::Resumed, b"resumed  \n"),
    (Decision::Lost, b"lost     \n"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> (tempfile::TempDir, Record) {
        let directory = tempfile::tempdir().unwrap();
        let record = Record::of(directory.path(), &"m".to_owned().try_into().unwrap());
        (directory, record)
    }

    fn ask(record: &Record) -> (FateAnswer, bool) {
        let mut killed = false;
        let answer = record.ask(|| {
            killed = true;
            Ok::<(), DecisionError>(())
        });
        (answer.unwrap(), killed)
    }

    #[test]
    fn a_question_before_the_decision_bars_the_commit() {
        let (_directory, record) = record();
        let _alive = record.work().unwrap();
        assert_eq!(ask(&record), (FateAnswer::NotHere, false));
        assert_eq!(record.decide(Decision::Committed).unwrap(), Decision::Aborted);
        assert_eq!(record.decide(Decision::Resumed).unwrap(), Decision::Aborted);
    }

    #[test]
    fn the_answer_waits_for_a_live_worker_and_takes_over_from_a_dead_one() {
        let (_directory, record) = record();
        let alive = record.work().unwrap();
        assert_eq!(record.decide(Decision::Committed).unwrap(), Decision::Committed);
        assert_eq!(ask(&record), (FateAnswer::Pending, false));
        drop(alive);
        assert_eq!(ask(&record), (FateAnswer::NotHere, true));
        assert_eq!(ask(&record), (FateAnswer::NotHere, false));
    }

    #[test]
    fn a_container_that_lacks_memory_is_ended_with_its_worker() {
        let (_directory, record) = record();
        let alive = record.work().unwrap();
        record.decide(Decision::Committed).unwrap();
        assert_eq!(record.decide(Decision::Filling).unwrap(), Decision::Filling);
        assert_eq!(ask(&record), (FateAnswer::Filling, false));
        drop(alive);
        record.ask(|| Err(DecisionError::Damaged { path: PathBuf::new() })).unwrap_err();
        assert_eq!(record.begin().unwrap(), Decision::Filling);
        assert_eq!(ask(&record), (FateAnswer::Lost, true));
        assert_eq!(ask(&record), (FateAnswer::Lost, false));
        assert_eq!(record.decide(Decision::Resumed).unwrap(), Decision::Lost);
    }

    #[test]
    fn a_container_that_runs_stays_where_it_is() {
        let (_directory, record) = record();
        record.decide(Decision::Committed).unwrap();
        assert_eq!(record.decide(Decision::Resumed).unwrap(), Decision::Resumed);
        assert_eq!(record.decide(Decision::Aborted).unwrap(), Decision::Resumed);
        assert_eq!(ask(&record), (FateAnswer::Here, false));
        record.remove().unwrap();
    }

    /// The room that all steps need is taken when it begins.
    #[test]
    fn steps_overwrite_what_was_written_at_first() {
        let (_directory, record) = record();
        assert_eq!(record.begin().unwrap(), Decision::Undecided);
        let len = fs::metadata(&record.path).unwrap().len();
        for decision in [Decision::Committed, Decision::Filling, Decision::Resumed] {
            record.decide(decision).unwrap();
            assert_eq!(record.begin().unwrap(), decision);
        }
        assert_eq!((len, fs::metadata(&record.path).unwrap().len()), (WORD_LEN as u64, len));
    }

    #[test]
    fn a_migration_has_one_worker_and_a_damaged_record_is_an_error() {
        let (directory, record) = record();
        let _alive = record.work().unwrap();
        assert!(matches!(record.work(), Err(DecisionError::Taken { .. })));
        fs::write(directory.path().join("m.fate"), "resu").unwrap();
        assert!(matches!(record.begin(), Err(DecisionError::Damaged { .. })));
    }
}
