//! The source's end of the streams: what their threads do.

use std::collections::BTreeSet;

use godwit_protocol::source;
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::{ROUND_LAST, StreamId};

use crate::link::{Frame, Job, addresses, put_page, runs};
use crate::program::{Page, Pages};
use crate::world::World;

/// Pages read and sent at a time.
const BATCH: usize = 4;

/// The round that is sent in the freeze.
pub(crate) const ROUND_FINAL: u32 = 1_000;

impl World {
    fn stream_of(&self, (space, address): Page) -> usize {
        usize::from(StreamId::of_page(space, address, self.streams))
    }

    /// Gives every bulk stream its share of what was found, and the mark of the round.
    pub(crate) fn send_round(&mut self, round: u32) {
        let found = std::mem::take(&mut self.found);
        for (space, pages) in found.absent.iter().chain(&found.zero) {
            if let Some(stored) = self.stored.get_mut(space) {
                stored.retain(|address| !pages.contains(address));
            }
        }
        self.sent = source::RoundSent::default();
        self.marking = usize::from(self.streams);
        for stream in 0..usize::from(self.streams) {
            let mut jobs = Vec::new();
            // What is to be forgotten goes first: it may name pages that come again.
            for (space, pages) in self.share(&found.absent, stream) {
                let runs = runs(&pages);
                jobs.push(Job::Frame(Frame::of(&Message::AbsentPages { space, runs })));
            }
            for (space, pages) in self.share(&found.zero, stream) {
                let runs = runs(&pages);
                jobs.push(Job::Frame(Frame::of(&Message::ZeroPages { space, runs })));
            }
            for (space, pages) in self.share(&found.dirty, stream) {
                let batches = pages.chunks(BATCH).map(<[u64]>::to_vec);
                jobs.extend(batches.map(|pages| Job::Read { space, pages, last: false }));
            }
            jobs.push(Job::Mark(round));
            self.give(stream, jobs);
        }
    }

    fn share(&self, set: &Pages, stream: usize) -> Vec<(i32, Vec<u64>)> {
        let own = |space: i32, pages: &BTreeSet<u64>| -> Vec<u64> {
            pages.iter().copied().filter(|address| self.stream_of((space, *address)) == stream).collect()
        };
        let shares = set.iter().map(|(space, pages)| (*space, own(*space, pages)));
        shares.filter(|(_, pages)| !pages.is_empty()).collect()
    }

    /// Does a job; returns what is to be sent now.
    pub(crate) fn do_job(&mut self, lane: usize, job: Job) -> Option<Frame> {
        match job {
            Job::Frame(frame) => Some(frame),
            Job::Read { space, pages, last } => self.read(lane, space, &pages, last),
            Job::Push => {
                self.push(lane);
                None
            }
            Job::Mark(round) => {
                if round == ROUND_LAST {
                    self.pushed(lane);
                } else {
                    self.marked(round);
                }
                Some(Frame::of(&Message::StreamMark { round }))
            }
            Job::Tell(event) => {
                self.feed_source(event);
                None
            }
        }
    }

    /// Reads pages of a process as they are now. `last`: the process stands still, and these are sent once.
    fn read(&mut self, lane: usize, space: i32, pages: &[u64], last: bool) -> Option<Frame> {
        assert!(!self.source_killed, "read from a process that is gone");
        let memory = self.memory.get(&space);
        let content = |address: &u64| memory.and_then(|pages| pages.get(address)).copied();
        let there: Vec<(u64, u64)> =
            pages.iter().filter_map(|address| Some((*address, content(address)?))).collect();
        assert!(!last || there.len() == pages.len(), "a page vanished from a process that stands still");
        let (normal, zero): (Vec<_>, Vec<_>) = there.into_iter().partition(|(_, content)| *content != 0);
        let stored = self.stored.entry(space).or_default();
        stored.retain(|address| zero.iter().all(|(zero, _)| zero != address));
        stored.extend(normal.iter().map(|(address, _)| *address));
        self.sent.normal_pages += normal.len() as u64;
        self.sent.zero_pages += zero.len() as u64;
        let mut frames = Vec::new();
        if !normal.is_empty() {
            let mut bytes = Vec::new();
            normal.iter().for_each(|(_, content)| put_page(&mut bytes, *content));
            self.sent.bytes += bytes.len() as u64;
            let addresses: Vec<u64> = normal.iter().map(|(address, _)| *address).collect();
            frames.push(Frame::of(&Message::Pages { space, runs: runs(&addresses), bytes: &bytes }));
        }
        if !zero.is_empty() {
            let addresses: Vec<u64> = zero.iter().map(|(address, _)| *address).collect();
            frames.push(Frame::of(&Message::ZeroPages { space, runs: runs(&addresses) }));
        }
        let mut frames = frames.into_iter();
        let first = frames.next();
        if let Some(second) = frames.next() {
            self.lanes[lane].jobs.push_front(Job::Frame(second));
        }
        first
    }

    fn marked(&mut self, round: u32) {
        self.marking -= 1;
        if self.marking > 0 {
            return;
        }
        if round == ROUND_FINAL {
            self.plan_when_ready();
        } else {
            self.rounds += 1;
            self.feed_source(source::Event::RoundSent(self.sent));
        }
    }

    /// Begins to give the target what it lacks.
    pub(crate) fn serve(&mut self) {
        self.marking = usize::from(self.streams);
        for stream in 0..usize::from(self.streams) {
            self.give(stream, [Job::Push]);
        }
    }

    fn push(&mut self, lane: usize) {
        let own = |page: &&Page| self.stream_of(**page) == lane;
        let mut pages: Vec<Page> = self.unclaimed.iter().filter(own).take(BATCH).copied().collect();
        let Some((space, _)) = pages.first().copied() else {
            return self.lanes[lane].jobs.push_back(Job::Mark(ROUND_LAST));
        };
        pages.retain(|page| page.0 == space);
        self.unclaimed.retain(|page| !pages.contains(page));
        let pages = pages.into_iter().map(|(_, address)| address).collect();
        self.lanes[lane].jobs.extend([Job::Read { space, pages, last: true }, Job::Push]);
    }

    /// A stream has nothing left to send; the fault stream ends when all have.
    fn pushed(&mut self, lane: usize) {
        if lane == usize::from(self.streams) {
            return;
        }
        self.marking -= 1;
        if self.marking == 0 {
            assert!(self.unclaimed.is_empty());
            self.give(usize::from(self.streams), [Job::Mark(ROUND_LAST)]);
        }
    }

    /// A task waits for pages: those that nobody sends are sent ahead of the others.
    pub(crate) fn requested(&mut self, message: &Message<'_>) {
        let Message::PageRequest { space, run } = message else { panic!("{message:?}") };
        self.requests += 1;
        let wanted = addresses(std::slice::from_ref(run));
        let claimed: Vec<u64> = wanted.filter(|address| self.unclaimed.remove(&(*space, *address))).collect();
        if !claimed.is_empty() {
            let job = Job::Read { space: *space, pages: claimed, last: true };
            self.give(usize::from(self.streams), [job]);
        }
    }
}
