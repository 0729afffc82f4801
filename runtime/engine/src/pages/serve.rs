//! Serving what stayed at the source: pushed from behind, and sent first where a task waits.
//!
//! ```text
//! push threads (one a bulk stream) ── claim a piece ── read ── send        next chunk: behind the page missed last
//! fault thread ── PageRequest ── claim ── read ── send on the fault stream
//! ```
//! A task that misses a page will soon want those behind it, so a request draws the push to its place.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use godwit_memory::fault::prefer_this_thread;
use godwit_memory::{PageRange, PageSet};
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::{CHUNK_BYTES, ROUND_LAST, StreamId};

use super::claims::Claims;
use super::sender::{BUFFER_PAGES, Contents, Sender};
use super::share::{self, share};
use super::streams::{PageStreams, lock};
use super::{PagesError, SpaceWork};
use crate::link::LinkError;

/// What serving sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Served {
    /// Pages sent, those without contents included.
    pub pages: u64,
    /// Those of them that hold only zeros.
    pub zero_pages: u64,
    /// Those of them that were asked for.
    pub requested_pages: u64,
    /// Requests that came.
    pub requests: u64,
    /// Bytes sent, with headers.
    pub bytes: u64,
}

/// What the threads of one serving share.
struct Serving<'w> {
    work: &'w [SpaceWork],
    claims: Claims,
    /// Where a page was missed last; the number tells a new one.
    missed: Mutex<(u64, i32, u64)>,
    pages: &'w AtomicU64,
    zero_pages: &'w AtomicU64,
    requested_pages: AtomicU64,
    requests: AtomicU64,
    /// All pages are sent: the end of the fault stream is no error.
    ending: AtomicBool,
}

impl PageStreams {
    /// Sends the pages in `dirty` of every space, each once: in order from behind, those that are asked for first.
    /// The processes must stand still. Returns when all are on their way and every stream is marked with
    /// [`ROUND_LAST`]; nothing can be sent afterwards.
    ///
    /// Requests are answered from the first moment, since whoever restores the tasks misses pages, too; the push waits
    /// for `begin_push`, and an end of it without a word stops everything.
    ///
    /// The target must be ready to hear of single pages before this begins.
    ///
    /// # Errors
    /// [`PagesError`]; all streams are broken then.
    pub fn serve(&self, work: &[SpaceWork], begin_push: &Receiver<()>) -> Result<Served, PagesError> {
        let bytes_before = self.sent_bytes();
        let serving = Serving {
            work,
            claims: Claims::of(work),
            missed: Mutex::default(),
            pages: &self.served_pages,
            zero_pages: &self.served_zero_pages,
            requested_pages: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            ending: AtomicBool::new(false),
        };
        thread::scope(|scope| {
            let answering = thread::Builder::new()
                .name("page faults".to_owned())
                .spawn_scoped(scope, || self.answer(&serving).map_err(|error| self.fail(error)))
                .map_err(|error| self.fail(PagesError::Thread(error)))?;
            let pushed = match word(begin_push, &answering) {
                Some(()) => self.on_all(|sender, index| serving.push(sender, index, self.bulk_count())),
                None => {
                    // Not told, and so not wanted; or the fault stream broke, which says more.
                    self.stop();
                    Err(PagesError::Stopped)
                }
            };
            // All pages are claimed: who gets the fault stream now finds all of them sent.
            let marked = pushed
                .and_then(|_| lock(&self.fault).send_mark(ROUND_LAST).map_err(|error| self.fail(error)));
            serving.ending.store(true, Ordering::Relaxed);
            self.fault_breaker.stop_receiving();
            let answered = answering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match (answered, marked) {
                (Ok(()), Ok(())) => Ok(()),
                // Whichever broke the other's link is the cause.
                (Err(PagesError::Link { .. }), Err(error)) if !matches!(error, PagesError::Stopped) => {
                    Err(error)
                }
                (Err(error), _) | (Ok(()), Err(error)) => Err(error),
            }
        })?;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(Served {
            pages: read(serving.pages),
            zero_pages: read(serving.zero_pages),
            requested_pages: read(&serving.requested_pages),
            requests: read(&serving.requests),
            bytes: self.sent_bytes() - bytes_before,
        })
    }

    /// Returns how many pages were served so far, and how many of them hold only zeros: also of a serving that has not
    /// ended yet, or that ended because the target has everything and has closed its streams.
    pub fn served_pages(&self) -> (u64, u64) {
        (self.served_pages.load(Ordering::Relaxed), self.served_zero_pages.load(Ordering::Relaxed))
    }

    /// Body of the fault thread.
    fn answer(&self, serving: &Serving<'_>) -> Result<(), PagesError> {
        prefer_this_thread();
        let stream = StreamId::Fault;
        let mut requests = lock(&self.requests);
        loop {
            let (space, run) = match requests.receive() {
                Ok(Message::PageRequest { space, run }) => (space, run),
                Ok(Message::Abort { detail }) => {
                    return Err(PagesError::Aborted { detail: detail.to_owned() });
                }
                Ok(other) => {
                    let source = LinkError::Unexpected { kind: other.kind(), expected: "a request" };
                    return Err(PagesError::Link { stream, source });
                }
                Err(_) if serving.ending.load(Ordering::Relaxed) => return Ok(()),
                Err(source) => return Err(PagesError::Link { stream, source }),
            };
            serving.requests.fetch_add(1, Ordering::Relaxed);
            let Some(wanted) = share::range(run) else { continue };
            serving.draw(space, wanted.end());
            let sent = serving.send(&mut lock(&self.fault), space, wanted)?;
            serving.requested_pages.fetch_add(sent, Ordering::Relaxed);
        }
    }
}

/// Waits for the word to push; none if it will not come, or the thread that answers has failed.
fn word<T>(begin_push: &Receiver<()>, answering: &ScopedJoinHandle<'_, T>) -> Option<()> {
    loop {
        match begin_push.recv_timeout(WORD_POLL) {
            Ok(()) => return Some(()),
            Err(RecvTimeoutError::Timeout) if !answering.is_finished() => {}
            Err(_) => return None,
        }
    }
}

impl Serving<'_> {
    /// Body of a push thread: sends the share of one bulk stream.
    fn push(&self, sender: &mut Sender, index: u8, streams: u8) -> Result<(), PagesError> {
        let chunks: Vec<(i32, PageRange)> = self
            .work
            .iter()
            .flat_map(|work| {
                let own = share(work.space, &work.dirty, index, streams);
                starts(&own).map(|chunk| (work.space, chunk)).collect::<Vec<_>>()
            })
            .collect();
        let mut order = Order::of(chunks);
        while let Some((space, chunk)) = order.next(*lock(&self.missed)) {
            let Some(work) = self.work.iter().find(|work| work.space == space) else { continue };
            for piece in pieces(&work.dirty, chunk) {
                self.send(sender, space, piece)?;
            }
        }
        sender.send_mark(ROUND_LAST)
    }

    /// Sends those of `wanted` that nobody else has; returns how many.
    fn send(&self, sender: &mut Sender, space: i32, wanted: PageRange) -> Result<u64, PagesError> {
        let Some((pid, claimed)) = self.claims.claim(space, wanted) else { return Ok(0) };
        let mut found = Contents::default();
        sender.send_pages(space, pid, &claimed, &mut found)?;
        // The process stands still, so these never were: its task finds zeros there.
        sender.send_absent(space, &found.gone)?;
        self.pages.fetch_add(claimed.pages(), Ordering::Relaxed);
        self.zero_pages.fetch_add(found.zero.pages(), Ordering::Relaxed);
        Ok(claimed.pages())
    }

    fn draw(&self, space: i32, address: u64) {
        let mut missed = lock(&self.missed);
        *missed = (missed.0 + 1, space, address);
    }
}

/// The order in which one thread takes its chunks: one after the other, from where a page was missed last.
struct Order {
    chunks: Vec<(i32, PageRange)>,
    rest: BTreeSet<usize>,
    at: usize,
    seen: u64,
}

impl Order {
    fn of(mut chunks: Vec<(i32, PageRange)>) -> Self {
        chunks.sort_unstable_by_key(|(space, chunk)| (*space, chunk.start()));
        Self { rest: (0..chunks.len()).collect(), chunks, at: 0, seen: 0 }
    }

    fn next(&mut self, (number, space, address): (u64, i32, u64)) -> Option<(i32, PageRange)> {
        if number != self.seen {
            self.seen = number;
            self.at = self.chunks.partition_point(|(of, chunk)| (*of, chunk.end()) <= (space, address));
        }
        let index = self.rest.range(self.at..).next().or_else(|| self.rest.first()).copied()?;
        self.rest.remove(&index);
        self.at = index + 1;
        self.chunks.get(index).copied()
    }
}

/// The chunks that have pages of `set`.
fn starts(set: &PageSet) -> impl Iterator<Item = PageRange> {
    let chunks: BTreeSet<u64> = set
        .ranges()
        .iter()
        .flat_map(|range| share::chunks(*range))
        .map(|piece| piece.start() / CHUNK_BYTES)
        .collect();
    chunks.into_iter().filter_map(|chunk| PageRange::new(chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES))
}

/// What of `set` lies in `chunk`, as windows of about as many pages as are sent at a time.
fn pieces(set: &PageSet, chunk: PageRange) -> Vec<PageRange> {
    let mut pieces: Vec<PageRange> = Vec::new();
    let mut pages = 0;
    for range in share::within(set, chunk) {
        for range in range.chunks(BUFFER_PAGES) {
            pages += range.pages();
            match pieces.last_mut() {
                Some(last) if pages <= BUFFER_PAGES => {
                    // What lies between is nobody's, so claiming the window claims nothing else.
                    *last = PageRange::new(last.start(), range.end()).unwrap_or(range);
                }
                _ => {
                    pages = range.pages();
                    pieces.push(range);
                }
            }
        }
    }
    pieces
}

/// How soon a fault stream that breaks before the push is noticed.
const WORD_POLL: Duration = Duration::from_millis(50);
