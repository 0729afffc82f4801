//! The running program: processes, threads, and the answer to whoever asks.
//!
//! The first process starts the others, which are further copies of it talking over pipes, and waits for
//! SIGUSR1. On each one it checks its own writers' pages, has the others check theirs, and writes the findings
//! to [`REPORT`], by another name first, so that whoever waits for the file reads all of it. Between two batches
//! a writer sleeps a little: a test machine has few processors.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use super::memory::{Findings, Memory};
use crate::process::wait_until;

/// Runs `processes` processes of `threads` writers with `pages` pages each, for ever.
///
/// # Errors
/// When a process cannot be started, the signal not be waited for, or the findings not be written.
pub fn run(processes: u64, threads: u64, pages: usize) -> io::Result<()> {
    // Before any thread exists: all inherit the mask, and nothing but `wait` sees the signal.
    let signals = SigSet::from(Signal::SIGUSR1);
    signals.thread_block()?;
    let mut others = (1..processes)
        .map(|process| Other::start(process * threads, threads, pages))
        .collect::<io::Result<Vec<_>>>()?;
    let writers = start_writers(0, threads, pages);
    println!("ready");
    loop {
        signals.wait()?;
        let mut findings = check(&writers);
        for other in &mut others {
            findings = findings.and(other.check()?);
        }
        let next = Path::new(REPORT).with_extension("next");
        fs::write(&next, to_line(findings))?;
        fs::rename(&next, REPORT)?;
    }
}

/// Runs writers in this process, and answers each line of standard input with a line of findings.
///
/// # Errors
/// When the first process is gone.
pub fn run_as_other(first_writer: u64, threads: u64, pages: usize) -> io::Result<()> {
    let writers = start_writers(first_writer, threads, pages);
    println!("ready");
    for line in io::stdin().lines() {
        line?;
        print!("{}", to_line(check(&writers)));
        io::stdout().flush()?;
    }
    Ok(())
}

/// Asks the program that runs as process 1 here for its findings, and returns them as a line of text.
///
/// # Errors
/// When it is not there or does not answer.
pub fn ask() -> io::Result<String> {
    match fs::remove_file(REPORT) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    kill(Pid::from_raw(1), Signal::SIGUSR1)?;
    wait_until(ANSWER, || Path::new(REPORT).exists());
    fs::read_to_string(REPORT)
}

/// Holds a lock on a file for ever.
///
/// # Errors
/// When it cannot be taken.
pub fn hold_lock(path: &Path) -> io::Result<()> {
    let file = fs::File::create(path)?;
    let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    println!("ready");
    loop {
        thread::park();
    }
}

/// Holds both ends of a TCP connection for ever, and sends a byte through it every now and then.
///
/// # Errors
/// When it cannot be made, or breaks.
pub fn hold_connection() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    println!("ready");
    for byte in (0..=u8::MAX).cycle() {
        client.write_all(&[byte])?;
        let mut received = [0];
        server.read_exact(&mut received)?;
        if received != [byte] {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        thread::sleep(REST);
    }
    Ok(())
}

/// Reads findings as the program prints them.
#[must_use]
pub fn parse_line(line: &str) -> Option<Findings> {
    let mut numbers = line
        .split_whitespace()
        .zip(NAMES)
        .map(|(word, name)| word.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok());
    let mut next = || numbers.next().flatten();
    Some(Findings { pages: next()?, bad: next()?, rewrites: next()? })
}

fn to_line(Findings { pages, bad, rewrites }: Findings) -> String {
    let [first, second, third] = NAMES;
    format!("{first}={pages} {second}={bad} {third}={rewrites}\n")
}

type Writers = Vec<Arc<Mutex<Memory>>>;

fn start_writers(first: u64, count: u64, pages: usize) -> Writers {
    let start = |writer| {
        let memory = Arc::new(Mutex::new(Memory::new(writer, pages)));
        let own = Arc::clone(&memory);
        thread::spawn(move || {
            loop {
                let mut memory = lock(&own);
                (0..BATCH).for_each(|_| memory.step());
                drop(memory);
                thread::sleep(REST);
            }
        });
        memory
    };
    (first..first + count).map(start).collect()
}

fn check(writers: &Writers) -> Findings {
    writers.iter().map(|memory| lock(memory).check()).fold(Findings::default(), Findings::and)
}

fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Another process of the program.
#[derive(Debug)]
struct Other {
    _child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Other {
    fn start(first_writer: u64, threads: u64, pages: usize) -> io::Result<Self> {
        let args = [first_writer, threads, pages as u64].map(|number| number.to_string());
        let mut child = Command::new(std::env::current_exe()?)
            .arg("other")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let stdin = child.stdin.take().ok_or_else(gone)?;
        let stdout = BufReader::new(child.stdout.take().ok_or_else(gone)?);
        let mut other = Self { _child: child, stdin, stdout };
        other.read_line()?;
        Ok(other)
    }

    fn check(&mut self) -> io::Result<Findings> {
        self.stdin.write_all(b"\n")?;
        let line = self.read_line()?;
        parse_line(&line).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        Ok(line)
    }
}

/// Where the first process writes its findings; a tmpfs in most containers.
const REPORT: &str = "/run/workload.report";
const NAMES: [&str; 3] = ["pages", "bad", "rewrites"];
const ANSWER: Duration = Duration::from_secs(20);
/// Pages written between two rests.
const BATCH: usize = 16;
const REST: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_read_back() {
        let findings = Findings { pages: 10, bad: 2, rewrites: 30 };
        assert_eq!(parse_line(&to_line(findings)), Some(findings));
        assert_eq!(parse_line("pages=10 bad=x"), None);
    }
}
