//! A filtered child sees of another process exactly what is not hidden.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use godwit_memory::hide::{self, Hidden};
use godwit_memory::{PAGE_BYTES, PageRange, PageSet};

const WORKLOAD: &str = env!("CARGO_BIN_EXE_memory-workload");

/// A process with one map in which every page but each tenth is written.
struct Subject {
    child: Child,
    range: PageRange,
}

impl Subject {
    fn new(pages: u64) -> Self {
        let mut child =
            Command::new(WORKLOAD).arg("obey").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut orders = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut order = |line: String| {
            writeln!(orders, "{line}").unwrap();
            let mut answer = String::new();
            answers.read_line(&mut answer).unwrap();
            answer
        };
        let answer = order(format!("map {pages}"));
        let start: u64 = answer.split_whitespace().nth(1).unwrap().parse().unwrap();
        for page in (0..pages).filter(|page| page % 10 != 0) {
            order(format!("write 0 {page} 1"));
        }
        // The child lives as long as its input is open.
        child.stdin = Some(orders);
        Self { child, range: PageRange::new(start, start + pages * PAGE_BYTES).unwrap() }
    }

    fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    fn pages(&self, from: u64, to: u64) -> PageRange {
        let start = self.range.start();
        PageRange::new(start + from * PAGE_BYTES, start + to * PAGE_BYTES).unwrap()
    }

    fn command(&self, room: usize) -> Command {
        let mut command = Command::new(WORKLOAD);
        command.args(["scan", &self.pid().to_string()]);
        command.args([self.range.start().to_string(), self.range.end().to_string(), room.to_string()]);
        command.stdout(Stdio::piped());
        command
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn parse(child: Child) -> PageSet {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let range = |line: &str| {
        let (start, end) = line.split_once('-').unwrap();
        let number = |digits| u64::from_str_radix(digits, 16).unwrap();
        PageRange::new(number(start), number(end)).unwrap()
    };
    text.lines().map(range).collect()
}

#[test]
fn hidden_pages_look_empty_and_regions_are_split_at_them() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP: a filter without no_new_privs needs CAP_SYS_ADMIN");
        return;
    }
    if let Err(error) = hide::probe() {
        eprintln!("SKIP: {error}");
        return;
    }
    let subject = Subject::new(200);
    let all = parse(subject.command(1000).spawn().unwrap());
    assert_eq!(all.pages(), 180);
    // Parts of regions, whole regions, several at once, and pages of no region.
    let hidden: PageSet = [(3, 5), (15, 42), (50, 51), (100, 120), (199, 200)]
        .map(|(from, to)| subject.pages(from, to))
        .into_iter()
        .collect();
    for room in [1, 2, 3, 7, 1000] {
        let mut command = subject.command(room);
        let prepared = hide::prepare(&mut command).unwrap();
        let shared = Hidden::default();
        shared.set(subject.pid(), hidden.clone());
        let child = command.spawn().unwrap();
        drop(command);
        let supervisor = prepared.start(shared).unwrap();
        assert_eq!(parse(child), all.difference(&hidden), "room for {room}");
        let answered = supervisor.stop().unwrap();
        assert!(answered.filtered > 0 && answered.failed == 0, "{answered:?}");
    }
}

#[test]
fn processes_with_nothing_hidden_are_left_to_the_kernel() {
    if !nix::unistd::geteuid().is_root() || hide::probe().is_err() {
        eprintln!("SKIP: hiding is not available");
        return;
    }
    let subject = Subject::new(20);
    let mut command = subject.command(100);
    let prepared = hide::prepare(&mut command).unwrap();
    let child = command.spawn().unwrap();
    drop(command);
    let supervisor = prepared.start(Hidden::default()).unwrap();
    assert_eq!(parse(child).pages(), 18);
    let answered = supervisor.stop().unwrap();
    assert!(answered.passed > 0 && answered.filtered == 0, "{answered:?}");
}

#[test]
fn without_a_supervisor_the_child_fails_and_sees_nothing() {
    if !nix::unistd::geteuid().is_root() || hide::probe().is_err() {
        eprintln!("SKIP: hiding is not available");
        return;
    }
    let subject = Subject::new(20);
    let mut command = subject.command(100);
    let prepared = hide::prepare(&mut command).unwrap();
    let child = command.stderr(Stdio::null()).spawn().unwrap();
    drop((command, prepared));
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
}
