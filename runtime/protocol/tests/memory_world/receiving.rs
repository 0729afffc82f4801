//! The target's end of the streams, until the restore: the store, and when it is complete.

use godwit_protocol::target;
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::{ROUND_LAST, Run, StreamId};

use crate::link::{PAGE, addresses, take_page};
use crate::program::Page;
use crate::sending::ROUND_FINAL;
use crate::tasks::{Cell, Had};
use crate::world::World;

impl World {
    /// A frame on a bulk stream, or on the fault stream.
    pub(crate) fn page_frame(&mut self, lane: usize, message: Message<'_>) {
        if self.target.is_none() {
            return;
        }
        match message {
            Message::Pages { space, runs, bytes } => {
                for (address, page) in addresses(&runs).zip(bytes.chunks(PAGE)) {
                    self.page_came(lane, (space, address), Some(take_page(page)));
                }
            }
            Message::ZeroPages { space, runs } => {
                addresses(&runs).for_each(|address| self.page_came(lane, (space, address), Some(0)));
            }
            Message::AbsentPages { space, runs } => {
                addresses(&runs).for_each(|address| self.page_came(lane, (space, address), None));
            }
            Message::StreamMark { round: ROUND_LAST } => {}
            Message::StreamMark { round } => {
                self.marks[lane] = Some(round);
                if self.marks.iter().all(|mark| *mark == Some(round)) {
                    self.feed_target(target::Event::RoundComplete(round));
                    self.complete_when_ready();
                }
            }
            other => panic!("{other:?}"),
        }
    }

    /// What a page holds, or that it is not there any more.
    fn page_came(&mut self, lane: usize, page: Page, content: Option<u64>) {
        let own = usize::from(StreamId::of_page(page.0, page.1, self.streams));
        assert!(lane == own || lane == usize::from(self.streams), "{page:?} on stream {lane}");
        if !self.ledgers.is_empty() {
            return self.arrived(page, content.unwrap_or(0));
        }
        let pages = self.store.entry(page.0).or_default();
        match content {
            Some(content) if content != 0 => drop(pages.insert(page.1, content)),
            _ => drop(pages.remove(&page.1)),
        }
    }

    pub(crate) fn take_plan(&mut self, space: i32, stored_pages: u64, remote: &[Run]) {
        let (stored, pages) = self.plan.entry(space).or_default();
        *stored = stored_pages;
        pages.extend(addresses(remote));
    }

    /// Everything is there when the state is, and every stream has come to the round of the plan.
    pub(crate) fn complete_when_ready(&mut self) {
        if !self.state_ended || self.marks.iter().any(|mark| *mark != Some(ROUND_FINAL)) {
            return;
        }
        for (space, pages) in &self.store {
            assert!(pages.is_empty() || self.plan.contains_key(space), "pages of a process that is gone");
        }
        for (space, (stored_pages, remote)) in &self.plan {
            let stored = self.store.entry(*space).or_default();
            assert_eq!(stored.len() as u64, *stored_pages, "pages of {space}");
            assert!(stored.keys().all(|address| !remote.contains(address)), "an old copy of a page to come");
        }
        self.feed_target(target::Event::Complete);
        if self.plan.values().all(|(_, remote)| remote.is_empty()) {
            self.feed_target(target::Event::Arrived);
        }
    }

    /// Makes the tasks' memory: every page of it is here, still to come, or of zeros.
    pub(crate) fn restore(&mut self) {
        for (space, (_, remote)) in &self.plan {
            let cell = |address: &u64, had| (*address, Cell { origin: Some((*space, *address)), had });
            let held = self.store[space].iter().map(|(address, content)| cell(address, Had::Held(*content)));
            let remote = remote.iter().map(|address| cell(address, Had::Remote));
            self.ledgers.insert(*space, held.chain(remote).collect());
        }
    }
}
