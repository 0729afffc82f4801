//! This kernel, and children that do as they are told (`memory-workload obey`).

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use godwit_memory::tracker::{Collection, DirtyTracker};
use godwit_memory::{MemoryError, PAGE_BYTES, PageRange, PageSet, maps, reader};
use godwit_sys::pagemap_scan::Entry;
use godwit_sys::pagemap_scan::Pagemap;
use godwit_sys::process;

use super::{Action, World, single};

/// One obedient process and its forked children.
pub(crate) struct Children {
    tracker: Box<dyn DirtyTracker>,
    main: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    forked: Vec<i32>,
    /// Pages of each map, 0 once it is unmapped.
    maps: Vec<u64>,
    /// Pages nobody may touch.
    forbidden: Vec<(usize, u64)>,
}

impl Children {
    pub(crate) fn new(tracker: Box<dyn DirtyTracker>) -> Self {
        // Grandchildren become ours to reap when the child between them and us ends.
        process::set_subreaper(true).unwrap();
        let mut main = Command::new(env!("CARGO_BIN_EXE_memory-workload"))
            .arg("obey")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = main.stdin.take().unwrap();
        let answers = BufReader::new(main.stdout.take().unwrap());
        Self { tracker, main, orders, answers, forked: Vec::new(), maps: Vec::new(), forbidden: Vec::new() }
    }

    fn order(&mut self, line: &str) -> String {
        writeln!(self.orders, "{line}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        assert!(answer.ends_with('\n'), "'{line}' was answered '{answer}'");
        answer.trim().to_owned()
    }

    fn touchable(&self, map: usize, page: u64) -> bool {
        self.maps.get(map).is_some_and(|pages| page < *pages) && !self.forbidden.contains(&(map, page))
    }

    fn main_pid(&self) -> i32 {
        i32::try_from(self.main.id()).unwrap()
    }

    fn reap(pid: i32) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
        process::reap(pid, std::time::Duration::from_secs(5)).unwrap();
        while std::fs::exists(format!("/proc/{pid}/maps")).unwrap()
            && std::fs::read(format!("/proc/{pid}/stat")).is_ok_and(|text| !text.is_empty())
        {
            // A grandchild is reaped by its parent, which obeys orders only; a zombie has no memory.
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if text.contains(") Z ") {
                break;
            }
            std::thread::yield_now();
        }
    }
}

impl World for Children {
    fn act(&mut self, action: Action) {
        match action {
            Action::Map { pages } => {
                self.order(&format!("map {pages}"));
                self.maps.push(pages);
            }
            Action::Write { map, page, value } if self.touchable(map, page) => {
                self.order(&format!("write {map} {page} {value}"));
            }
            Action::Read { map, page } if self.touchable(map, page) => {
                self.order(&format!("read {map} {page}"));
            }
            Action::Drop { map, page, count } if self.touchable(map, page) => {
                let count = count.min(self.maps[map] - page);
                self.order(&format!("drop {map} {page} {count}"));
            }
            Action::Unmap { map } if self.touchable(map, 0) => {
                self.order(&format!("unmap {map}"));
                self.maps[map] = 0;
            }
            // Only one mapping can be moved at once: parts with other rights are others.
            Action::Move { map }
                if self.maps.get(map).is_some_and(|pages| *pages > 0)
                    && self.forbidden.iter().all(|(other, _)| *other != map) =>
            {
                self.order(&format!("move {map}"));
            }
            Action::Forbid { map, page, count } if self.touchable(map, page) && page > 0 => {
                let count = count.min(self.maps[map] - page);
                self.order(&format!("forbid {map} {page} {count}"));
                self.forbidden.extend((page..page + count).map(|page| (map, page)));
            }
            Action::Huge { map } if self.touchable(map, 0) => {
                self.order(&format!("huge {map}"));
            }
            Action::Fork { value } if self.forked.len() < 4 => {
                let pid = self.order(&format!("fork {value}")).parse().unwrap();
                self.forked.push(pid);
            }
            Action::Exit => {
                if let Some(pid) = self.forked.pop() {
                    Self::reap(pid);
                }
            }
            Action::Exec => {
                self.order("exec");
                self.maps.clear();
                self.forbidden.clear();
                // Answers only once the new program runs.
                self.act(Action::Map { pages: 24 });
            }
            _ => {}
        }
    }

    fn processes(&self) -> Vec<i32> {
        std::iter::once(self.main_pid()).chain(self.forked.iter().copied()).collect()
    }

    fn read(&mut self, pid: i32, pages: &PageSet) -> Vec<(u64, Option<u64>)> {
        let mut found = Vec::new();
        let mut buffer = vec![0; 64 * 4096];
        reader::read(pid, pages, &mut buffer, |batch| {
            let addresses = batch.ranges.iter().flat_map(|range| range.chunks(1));
            for (page, bytes) in addresses.zip(batch.bytes.chunks(4096)) {
                let is_gone = batch.gone.contains(page.start());
                let is_zero = bytes.iter().all(|byte| *byte == 0);
                assert_eq!(batch.zero.contains(page.start()), is_zero && !is_gone);
                found.push((page.start(), (!is_gone).then(|| digest(bytes))));
            }
            Ok::<(), MemoryError>(())
        })
        .unwrap();
        found
    }

    fn present(&mut self, pid: i32) -> PageSet {
        let pagemap = Pagemap::open(pid).unwrap();
        let mut present = PageSet::new();
        for range in maps::private_anonymous(pid).unwrap() {
            let mut entries = vec![Entry::default(); usize::try_from(range.pages()).unwrap()];
            pagemap.entries(range.start(), &mut entries).unwrap();
            let pages = single(&[range].into_iter().collect()).collect::<Vec<_>>();
            present.extend(
                pages
                    .iter()
                    .zip(entries)
                    .filter(|(_, entry)| entry.occupied())
                    .map(|(page, _)| PageRange::page_at(*page)),
            );
        }
        present
    }

    fn collect(&mut self, frozen: bool) -> Collection {
        // A process that has answered still has a few steps to do until it waits again.
        for pid in self.processes() {
            while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") S ") {
                std::thread::yield_now();
            }
        }
        let processes = self.processes();
        let collected =
            if frozen { self.tracker.collect_frozen(&processes) } else { self.tracker.collect(&processes) };
        collected.unwrap()
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for pid in self.forked.drain(..) {
            Self::reap(pid);
        }
        self.main.kill().unwrap();
        self.main.wait().unwrap();
    }
}

fn digest(page: &[u8]) -> u64 {
    assert_eq!(page.len() as u64, PAGE_BYTES);
    page.chunks(8).fold(0, |sum: u64, word| {
        sum.wrapping_mul(31).wrapping_add(u64::from_ne_bytes(word.try_into().unwrap()))
    })
}
