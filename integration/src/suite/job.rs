//! A command that a case runs in a node, with a limit on how long it may take.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::trouble::{LIMIT, Outcome, Trouble, await_that};
use crate::process::wait_until;

/// How a command ended, and what it wrote.
#[derive(Clone, Debug)]
pub struct Done {
    /// The command line, for messages.
    pub line: String,
    /// Its exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Done {
    /// Returns what it wrote to standard output, if its status is 0.
    ///
    /// # Errors
    /// [`Trouble::Command`] for any other status.
    pub fn ok(self) -> Result<String, Trouble> {
        self.with_code(0).map(|done| done.stdout)
    }

    /// Returns it if its status is `code`.
    ///
    /// # Errors
    /// [`Trouble::Command`] for any other status.
    pub fn with_code(self, code: i32) -> Result<Self, Trouble> {
        if self.code == Some(code) {
            return Ok(self);
        }
        Err(self.into_trouble())
    }

    /// Returns what it wrote to standard error, if it failed.
    ///
    /// # Errors
    /// [`Trouble::Command`] if it did not.
    pub fn refused(self) -> Result<String, Trouble> {
        if self.code.is_some_and(|code| code != 0) {
            return Ok(self.stderr);
        }
        Err(self.into_trouble())
    }

    /// Returns it as the reason why a case fails.
    #[must_use]
    pub fn into_trouble(self) -> Trouble {
        Trouble::Command { line: self.line, code: self.code, stdout: self.stdout, stderr: self.stderr }
    }
}

/// A command that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Job {
    line: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Capture,
    stderr: Capture,
}

impl Job {
    /// Starts a command with pipes for its standard streams.
    ///
    /// # Errors
    /// [`Trouble::Io`] when it cannot be started.
    pub fn start(mut command: Command) -> Result<Self, Trouble> {
        let line = command.get_args().map(|word| word.to_string_lossy()).collect::<Vec<_>>();
        // A node's commands come behind the script that enters the node, which nobody wants to read.
        let own = line.iter().rposition(|word| word.starts_with("/sys/fs/cgroup")).map_or(0, |last| last + 1);
        let line = line[own..].join(" ");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(Trouble::io("run", &line))?;
        let stdin = child.stdin.take();
        let (stdout, stderr) = (Capture::of(child.stdout.take()), Capture::of(child.stderr.take()));
        Ok(Self { line, child, stdin, stdout, stderr })
    }

    /// Returns its process id. It is that of the command in the node itself, not of a wrapper.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// [`Trouble::Io`] when nobody reads it, or it is closed.
    pub fn write(&mut self, text: &str) -> Outcome {
        let Some(stdin) = &mut self.stdin else {
            return Err(Trouble::Garbled { what: "an open standard input", text: self.line.clone() });
        };
        stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
            .map_err(Trouble::io("write to", &self.line))
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Returns what it has written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Waits until its standard output has `text` in it.
    ///
    /// # Errors
    /// [`Trouble::Late`] when that does not come to pass.
    pub fn await_stdout(&self, text: &str) -> Outcome {
        await_that(&format!("`{}` writes {text:?}", self.line), || self.stdout().contains(text)).map_err(
            |trouble| match trouble {
                Trouble::Late { what, after } => {
                    let so_far = format!("{what}; it wrote {:?} and {:?}", self.stdout(), self.stderr.text());
                    Trouble::Late { what: so_far, after }
                }
                other => other,
            },
        )
    }

    /// Waits for its end, its standard input closed.
    ///
    /// # Errors
    /// [`Trouble::Late`] when it does not end within [`LIMIT`]; it is then killed.
    pub fn wait(self) -> Result<Done, Trouble> {
        self.wait_for(LIMIT)
    }

    /// As [`Job::wait`], with a limit of the caller's.
    ///
    /// # Errors
    /// [`Trouble::Late`] when it does not end in time; it is then killed.
    pub fn wait_for(mut self, limit: Duration) -> Result<Done, Trouble> {
        self.close_stdin();
        let mut status = None;
        let ended = wait_until(limit, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        if !ended {
            let what = format!(
                "`{}` ends; it wrote {:?} and {:?}",
                self.line,
                self.stdout.text(),
                self.stderr.text()
            );
            return Err(Trouble::Late { what, after: limit });
        }
        let code = status.and_then(|status| status.code());
        let line = self.line.clone();
        Ok(Done { line, code, stdout: self.stdout.finish(), stderr: self.stderr.finish() })
    }

    /// Ends it at once. Its exit status is of no interest.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // Both fail only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a stream has brought so far.
#[derive(Debug)]
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    fn of(stream: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&bytes);
        let reader = stream.map(|mut stream| {
            thread::spawn(move || {
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    lock(&shared).extend_from_slice(&buffer[..count]);
                }
            })
        });
        Self { bytes, reader }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.bytes)).into_owned()
    }

    /// Returns all of it, once the stream has ended. A stream that something else still holds open is not
    /// waited for longer than [`DRAIN`].
    fn finish(&mut self) -> String {
        wait_until(DRAIN, || self.reader.as_ref().is_none_or(JoinHandle::is_finished));
        self.text()
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

const DRAIN: Duration = Duration::from_secs(2);
