//! The restored tasks: what each page of theirs is, and what happens when they touch it.

use std::collections::{BTreeMap, BTreeSet};

use godwit_protocol::target;
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::Run;

use crate::program::{self, Memory, Op, Page};
use crate::source_side::say;
use crate::world::{Happening, World};

/// A page of a task. Where there is none, the task reads zeros.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cell {
    /// Which page it was at the source, if it is not the task's own.
    pub(crate) origin: Option<Page>,
    pub(crate) had: Had,
}

/// Who has a page's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Had {
    /// The source.
    Remote,
    /// The source, and it has been asked.
    Requested,
    /// The store.
    Held(u64),
    /// The task.
    Installed(u64),
}

impl World {
    /// A page that only the source had has come.
    pub(crate) fn arrived(&mut self, page: Page, content: u64) {
        assert!(self.remote.contains(&page), "{page:?} was no page to come");
        assert!(self.arrived.insert(page), "{page:?} came twice");
        let mut needed = false;
        for ledger in self.ledgers.values_mut() {
            for cell in ledger.values_mut().filter(|cell| cell.origin == Some(page)) {
                if matches!(cell.had, Had::Remote | Had::Requested) {
                    cell.had = Had::Held(content);
                    needed = true;
                }
            }
        }
        self.unneeded += u64::from(!needed);
        if self.lacking_pages().is_empty() {
            self.feed_target(target::Event::Arrived);
        }
        self.begin_fill();
        self.try_again();
    }

    pub(crate) fn begin_fill(&mut self) {
        if !self.filling {
            self.filling = true;
            self.after(1, Happening::Fill);
        }
    }

    /// Puts one page in its place, behind the tasks' backs.
    pub(crate) fn fill(&mut self) {
        let held: Vec<Page> = self
            .ledgers
            .iter()
            .flat_map(|(space, ledger)| ledger.iter().map(|(address, cell)| ((*space, *address), cell)))
            .filter(|(_, cell)| matches!(cell.had, Had::Held(_)))
            .map(|(page, _)| page)
            .collect();
        match self.random.one_of(&held) {
            Some(page) => {
                self.install(page);
                let pause = self.random.below(100_000) + 1;
                self.after(pause, Happening::Fill);
            }
            None => self.filling = false,
        }
        self.check_filled();
    }

    fn cell(&mut self, (space, address): Page) -> Option<&mut Cell> {
        self.ledgers.get_mut(&space).and_then(|ledger| ledger.get_mut(&address))
    }

    fn install(&mut self, page: Page) {
        if let Some(cell) = self.cell(page)
            && let Had::Held(content) = cell.had
        {
            cell.had = Had::Installed(content);
        }
    }

    /// A task touches a page; whether it can go on.
    fn touch(&mut self, page: Page) -> bool {
        self.install(page);
        let Some(cell) = self.cell(page) else { return true };
        match cell.had {
            Had::Remote => {
                let Some((space, start)) = cell.origin else { return true };
                cell.had = Had::Requested;
                let request = Message::PageRequest { space, run: Run { start, pages: 1 } };
                self.give(usize::from(self.streams) + 1, [say(&request)]);
                false
            }
            Had::Requested => false,
            Had::Held(_) | Had::Installed(_) => true,
        }
    }

    /// Does what the program wants, or lets it wait for its page.
    pub(crate) fn do_op(&mut self, op: Op) {
        if let Op::Write(page, _) | Op::Read(page) = &op
            && !self.touch(*page)
        {
            return self.waiting.push(op);
        }
        if let Op::Read(page) = &op {
            let read = match self.cell(*page).map(|cell| cell.had) {
                Some(Had::Installed(content)) => content,
                None => 0,
                other => panic!("a task reads {other:?}"),
            };
            assert_eq!(read, program::read(&self.oracle, *page), "{page:?}");
        }
        program::apply(&mut self.oracle, &op);
        self.change(&op);
        self.waiting.retain(|op| match op {
            Op::Write((space, _), _) | Op::Read((space, _)) => self.ledgers.contains_key(space),
            _ => true,
        });
        self.try_again();
        self.check_filled();
    }

    /// Those that waited touch their pages again.
    fn try_again(&mut self) {
        for op in std::mem::take(&mut self.waiting) {
            self.do_op(op);
        }
    }

    /// What the ledgers make of it: as userfaultfd tells of drops, moves and forks.
    fn change(&mut self, op: &Op) {
        match op {
            Op::Write((space, address), content) => {
                if let Some(ledger) = self.ledgers.get_mut(space) {
                    ledger.insert(*address, Cell { origin: None, had: Had::Installed(*content) });
                }
            }
            Op::Read(_) => {}
            Op::Drop(space, addresses) => {
                if let Some(ledger) = self.ledgers.get_mut(space) {
                    ledger.retain(|address, _| !addresses.contains(address));
                }
            }
            Op::Move(space, moves) => {
                let Some(ledger) = self.ledgers.get_mut(space) else { return };
                let taken: Vec<_> = moves.iter().map(|(from, to)| (*to, ledger.remove(from))).collect();
                for (to, cell) in taken {
                    ledger.remove(&to);
                    ledger.extend(cell.map(|cell| (to, cell)));
                }
            }
            Op::Fork(parent, child) => {
                if let Some(ledger) = self.ledgers.get(parent).cloned() {
                    self.ledgers.insert(*child, ledger);
                }
            }
            Op::Exit(space) => drop(self.ledgers.remove(space)),
        }
    }

    fn cells(&self) -> impl Iterator<Item = &Cell> {
        self.ledgers.values().flat_map(BTreeMap::values)
    }

    /// Whether a task is still to get a page: by the ledgers alone.
    pub(crate) fn is_outstanding(&self) -> bool {
        self.cells().any(|cell| !matches!(cell.had, Had::Installed(_)))
    }

    /// Pages that only the source has and a task may need.
    pub(crate) fn lacking_pages(&self) -> BTreeSet<Page> {
        let lacking = |cell: &&Cell| matches!(cell.had, Had::Remote | Had::Requested);
        self.cells().filter(lacking).filter_map(|cell| cell.origin).collect()
    }

    /// The source is killed only when nothing is missed any more.
    pub(crate) fn check_needless(&self) {
        assert!(self.target_runs, "killed before it ran on the target");
        assert_eq!(self.lacking_pages(), BTreeSet::new(), "killed while the target lacks pages");
    }

    /// Asks again for the pages that tasks wait for.
    pub(crate) fn ask_again(&mut self) {
        for cell in self.ledgers.values_mut().flat_map(BTreeMap::values_mut) {
            if cell.had == Had::Requested {
                cell.had = Had::Remote;
            }
        }
        self.try_again();
    }

    /// What the tasks would read of every page.
    pub(crate) fn tasks_memory(&self) -> Memory {
        let content = |cell: &Cell| match cell.had {
            Had::Installed(content) => content,
            other => panic!("a page was never installed: {other:?}"),
        };
        let pages = |ledger: &BTreeMap<u64, Cell>| {
            ledger.iter().map(|(address, cell)| (*address, content(cell))).collect()
        };
        self.ledgers.iter().map(|(space, ledger)| (*space, pages(ledger))).collect()
    }
}
