//! A kernel with soft-dirty bits, as simple as it can be: pages are numbers, and bits are kept as
//! Documentation/admin-guide/mm/soft-dirty.rst says.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use godwit_memory::tracker::{Collection, DirtyTracker, SoftDirtyKernel, SoftDirtyTracker};
use godwit_memory::{MemoryError, PAGE_BYTES, PageRange, PageSet, Result};
use godwit_sys::SysError;
use godwit_sys::pagemap_scan::Entry;

use super::{Action, World, single};

#[derive(Clone, Copy)]
struct Page {
    value: u64,
    soft_dirty: bool,
    /// The kernel's page of zeros.
    zero: bool,
}

#[derive(Clone, Default)]
struct Process {
    life: u64,
    maps: Vec<Option<(u64, u64)>>,
    pages: BTreeMap<u64, Page>,
}

#[derive(Default)]
struct Kernel {
    processes: BTreeMap<i32, Process>,
    next_life: u64,
    next_address: u64,
    halted: bool,
}

/// The world: one process that acts, and its children.
pub(crate) struct Simulated {
    kernel: Rc<RefCell<Kernel>>,
    tracker: SoftDirtyTracker<Shared>,
}

struct Shared(Rc<RefCell<Kernel>>);

struct Halted(Rc<RefCell<Kernel>>);

impl Drop for Halted {
    fn drop(&mut self) {
        self.0.borrow_mut().halted = false;
    }
}

impl Simulated {
    pub(crate) fn new() -> Self {
        let mut kernel = Kernel { next_address: 16, ..Kernel::default() };
        kernel.processes.insert(MAIN, Process::default());
        let kernel = Rc::new(RefCell::new(kernel));
        Self { tracker: SoftDirtyTracker::new(Shared(kernel.clone())), kernel }
    }
}

impl Kernel {
    fn main(&mut self) -> &mut Process {
        self.processes.get_mut(&MAIN).unwrap()
    }

    fn address(&mut self, map: usize, page: u64) -> Option<u64> {
        let (start, pages) = (*self.main().maps.get(map)?)?;
        (page < pages).then_some(start + page)
    }
}

impl World for Simulated {
    fn act(&mut self, action: Action) {
        let mut kernel = self.kernel.borrow_mut();
        match action {
            Action::Map { pages } => {
                let start = kernel.next_address;
                kernel.next_address += pages + 1;
                kernel.main().maps.push(Some((start, pages)));
            }
            Action::Write { map, page, value } => {
                let Some(address) = kernel.address(map, page) else { return };
                kernel.main().pages.insert(address, Page { value, soft_dirty: true, zero: false });
            }
            Action::Read { map, page } => {
                let Some(address) = kernel.address(map, page) else { return };
                // Clean, whatever stood there before.
                let zero = Page { value: 0, soft_dirty: false, zero: true };
                kernel.main().pages.entry(address).or_insert(zero);
            }
            Action::Drop { map, page, count } => {
                for page in page..page + count {
                    let Some(address) = kernel.address(map, page) else { return };
                    kernel.main().pages.remove(&address);
                }
            }
            Action::Unmap { map } => {
                let Some(start) = kernel.address(map, 0) else { return };
                let Some((_, pages)) = kernel.main().maps[map].take() else { return };
                kernel.main().pages.retain(|page, _| !(start..start + pages).contains(page));
            }
            Action::Move { map } => {
                let Some(start) = kernel.address(map, 0) else { return };
                let Some((_, pages)) = kernel.main().maps[map] else { return };
                let target = kernel.next_address;
                kernel.next_address += pages + 1;
                kernel.main().maps[map] = Some((target, pages));
                for page in 0..pages {
                    if let Some(moved) = kernel.main().pages.remove(&(start + page)) {
                        kernel.main().pages.insert(target + page, Page { soft_dirty: true, ..moved });
                    }
                }
            }
            Action::Forbid { .. } | Action::Huge { .. } => {}
            Action::Fork { value } => {
                let mut child = kernel.main().clone();
                kernel.next_life += 1;
                child.life = kernel.next_life;
                for (start, _) in child.maps.iter().flatten() {
                    child.pages.insert(*start, Page { value, soft_dirty: true, zero: false });
                }
                // Few ids, so that they are used again.
                let pid = (MAIN + 1..).find(|pid| !kernel.processes.contains_key(pid)).unwrap();
                kernel.processes.insert(pid, child);
            }
            Action::Exit => {
                let last = *kernel.processes.keys().last().unwrap();
                if last != MAIN {
                    kernel.processes.remove(&last);
                }
            }
            Action::Exec => {
                let life = kernel.main().life;
                *kernel.main() = Process { life, maps: vec![Some((16, 24))], ..Process::default() };
            }
        }
    }

    fn processes(&self) -> Vec<i32> {
        self.kernel.borrow().processes.keys().copied().collect()
    }

    fn read(&mut self, pid: i32, pages: &PageSet) -> Vec<(u64, Option<u64>)> {
        let kernel = self.kernel.borrow();
        let process = &kernel.processes[&pid];
        single(pages)
            .map(|page| (page, process.pages.get(&(page / PAGE_BYTES)).map(|page| page.value)))
            .collect()
    }

    fn present(&mut self, pid: i32) -> PageSet {
        let kernel = self.kernel.borrow();
        kernel.processes[&pid].pages.keys().map(|page| PageRange::page_at(page * PAGE_BYTES)).collect()
    }

    fn collect(&mut self, frozen: bool) -> Collection {
        let processes = self.processes();
        let collected =
            if frozen { self.tracker.collect_frozen(&processes) } else { self.tracker.collect(&processes) };
        let collection = collected.unwrap();
        assert!(!self.kernel.borrow().halted, "let go afterwards");
        collection
    }
}

impl SoftDirtyKernel for Shared {
    type Halt = Halted;
    type Life = u64;

    fn halt(&mut self) -> Result<Halted> {
        self.0.borrow_mut().halted = true;
        Ok(Halted(self.0.clone()))
    }

    fn life(&self, pid: i32) -> Result<Option<u64>> {
        Ok(self.0.borrow().processes.get(&pid).map(|process| process.life))
    }

    fn mappings(&self, pid: i32) -> Result<Vec<PageRange>> {
        let kernel = self.0.borrow();
        let process = kernel.processes.get(&pid).ok_or(MemoryError::Sys(SysError::NoProcess { pid }))?;
        let mut ranges: Vec<PageRange> = process
            .maps
            .iter()
            .flatten()
            .filter_map(|(start, pages)| PageRange::new(start * PAGE_BYTES, (start + pages) * PAGE_BYTES))
            .collect();
        ranges.sort_unstable();
        Ok(ranges)
    }

    fn entries(&self, pid: i32, range: PageRange) -> Result<Vec<Entry>> {
        let kernel = self.0.borrow();
        assert!(kernel.halted, "bits are read while nothing runs");
        let pages = &kernel.processes[&pid].pages;
        let entry = |page: u64| {
            pages.get(&(page / PAGE_BYTES)).map_or(Entry(0), |page| {
                let frame = if page.zero { ZERO_FRAME } else { 99 };
                Entry(1 << 63 | u64::from(page.soft_dirty) << 55 | frame)
            })
        };
        Ok(range.chunks(1).map(|page| entry(page.start())).collect())
    }

    fn clear(&mut self, pid: i32) -> Result<()> {
        let mut kernel = self.0.borrow_mut();
        assert!(kernel.halted, "bits are cleared while nothing runs");
        for page in kernel.processes.get_mut(&pid).unwrap().pages.values_mut() {
            page.soft_dirty = false;
        }
        Ok(())
    }

    fn is_zero(&self, entry: Entry) -> bool {
        entry.0 & 0xffff == ZERO_FRAME
    }
}

const MAIN: i32 = 10;
const ZERO_FRAME: u64 = 7;
