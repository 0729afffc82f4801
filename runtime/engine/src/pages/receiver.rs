//! The target's end of the page streams: a thread each.
//!
//! ```text
//! agent ──► take thread ── joined stream ──► stream thread ── Pages ──► on_pages
//!                │                                │           Zero, Absent ► on_zero
//!                │                                └────────── StreamMark ─► on_mark, once all streams have it
//!                └── another main link ──► hush ──► on_main ─► (its owner) reopen
//! ```
//! Streams that broke are followed by others when the source is back: those before are hushed, with their threads at
//! an end, before anybody hears of it, and new ones are taken from [`PageReceiver::reopen`] on.
//!
//! Locks: the marks are held while `on_mark` is called, so that rounds are told in order; nothing else is held while
//! another's code runs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use godwit_memory::fault::prefer_this_thread;
use godwit_memory::{PageRange, PageSet, Result as MemoryResult};
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::{BULK_STREAMS_MAX, ROUND_LAST, Run, StreamId};

use super::PagesError;
use super::share;
use super::streams::lock;
use crate::handover::{JoinedStream, Later, Streams};
use crate::link::{Breaker, Link, LinkError, ReceiveHalf, SendHalf};

/// Who gets what comes; from the streams' threads, which wait meanwhile.
pub trait Arrivals: Send + Sync {
    /// Everything of `round` has come. [`ROUND_LAST`]: nothing follows on any stream.
    fn on_mark(&self, round: u32);

    /// Pages have come, with their contents.
    ///
    /// # Errors
    /// Why they cannot be kept: that ends all streams.
    fn on_pages(&self, space: i32, pages: PageRange, contents: &[u8]) -> MemoryResult<()>;

    /// Pages hold only zeros, or are not there.
    ///
    /// # Errors
    /// As [`Arrivals::on_pages`].
    fn on_zero(&self, space: i32, pages: PageRange) -> MemoryResult<()>;

    /// The streams are broken; once, until they are opened again.
    fn on_error(&self, error: PagesError);

    /// The source is back over another main link. The streams there were have ended, and nothing more comes of them.
    fn on_main(&self, link: Link);

    /// Returns the pages that tasks wait for, and that were asked for. Asked before a fault stream is used that takes the
    /// place of another.
    fn waited_for(&self) -> Vec<(i32, PageSet)>;
}

/// Receives the pages of one migration. Stopped on drop, which waits for the threads (except, when it is dropped by
/// [`Arrivals`], for the one that it is called on).
pub struct PageReceiver {
    shared: Arc<Shared>,
}

struct Shared {
    bulk_count: u8,
    arrivals: Arc<dyn Arrivals>,
    streams: Mutex<Joined>,
    marks: Mutex<Marks>,
    /// The sending half of the fault stream, once it has joined.
    requests: Mutex<Option<SendHalf>>,
    received_bytes: AtomicU64,
    /// Failed or stopped: what follows is no news.
    over: AtomicBool,
}

#[derive(Default)]
struct Joined {
    streams: Vec<(StreamId, Breaker)>,
    threads: Vec<thread::JoinHandle<()>>,
    closed: bool,
}

impl PageReceiver {
    /// Begins to take streams from the agent: `bulk_count` of them and the fault stream.
    ///
    /// # Errors
    /// [`PagesError::Thread`].
    pub fn start(
        mut streams: Streams,
        bulk_count: u8,
        arrivals: Arc<dyn Arrivals>,
    ) -> Result<Self, PagesError> {
        let bulk_count = bulk_count.clamp(1, BULK_STREAMS_MAX);
        let shared = Arc::new(Shared {
            bulk_count,
            arrivals,
            streams: Mutex::default(),
            marks: Mutex::new(Marks::of(bulk_count)),
            requests: Mutex::default(),
            received_bytes: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        let taking = Arc::clone(&shared);
        // Ends with the worker's connection to the agent, so nobody waits for it.
        let body = move || loop {
            match streams.take() {
                Ok(Some(Later::Stream(joined))) => {
                    if let Err(error) = taking.join(joined) {
                        taking.fail(error);
                    }
                }
                Ok(Some(Later::Main(link))) => {
                    taking.hush();
                    taking.arrivals.on_main(link);
                }
                Ok(None) => return,
                Err(error) => return taking.fail(error.into()),
            }
        };
        thread::Builder::new().name("page streams".to_owned()).spawn(body).map_err(PagesError::Thread)?;
        Ok(Self { shared })
    }

    /// Asks the source for pages that a task waits for, which come as all pages do; returns whether it could be asked.
    /// If not, the next fault stream begins with what is [`Arrivals::waited_for`].
    pub fn request(&self, space: i32, pages: PageRange) -> bool {
        self.shared.request(space, pages)
    }

    /// Takes new streams in the place of those that ended.
    pub fn reopen(&self) {
        let Shared { bulk_count, streams, marks, over, .. } = &*self.shared;
        let mut joined = lock(streams);
        *joined = Joined::default();
        *lock(marks) = Marks::of(*bulk_count);
        over.store(false, Ordering::Relaxed);
    }

    /// Returns the bytes of contents received so far.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.shared.received_bytes.load(Ordering::Relaxed)
    }

    /// Ends all streams; nothing is told any more.
    pub fn stop(&self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.shared.break_links();
    }
}

impl Drop for PageReceiver {
    fn drop(&mut self) {
        self.shared.hush();
    }
}

impl std::fmt::Debug for PageReceiver {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shared { bulk_count, received_bytes, over, .. } = &*self.shared;
        formatter
            .debug_struct("PageReceiver")
            .field("bulk_count", bulk_count)
            .field("received_bytes", received_bytes)
            .field("over", over)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Ends all streams, of which nothing is told any more, and waits for their threads.
    fn hush(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.break_links();
        *lock(&self.requests) = None;
        let threads = std::mem::take(&mut lock(&self.streams).threads);
        for thread in threads {
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                log::error!("a thread that receives pages panicked");
            }
        }
    }

    fn request(&self, space: i32, pages: PageRange) -> bool {
        let mut requests = lock(&self.requests);
        let asked = requests.as_mut().is_some_and(|link| {
            let mut sent = share::runs(pages).map(|run| link.send(&Message::PageRequest { space, run }));
            sent.all(|sent| sent.is_ok())
        });
        if !asked {
            // The thread that reads from it says so.
            *requests = None;
        }
        asked
    }

    /// Starts a thread for a stream that is due.
    fn join(self: &Arc<Self>, JoinedStream { stream, link }: JoinedStream) -> Result<(), PagesError> {
        let mut joined = lock(&self.streams);
        let is_due = match stream {
            StreamId::Bulk(index) => index < self.bulk_count,
            StreamId::Fault => true,
        };
        if !is_due || joined.streams.iter().any(|(other, _)| *other == stream) {
            return Err(PagesError::NotDue { stream });
        }
        if joined.closed {
            link.breaker().break_link();
            return Ok(());
        }
        joined.streams.push((stream, link.breaker()));
        let (send, receive) = link.split();
        if stream == StreamId::Fault {
            *lock(&self.requests) = Some(send);
        }
        let shared = Arc::clone(self);
        let body = move || {
            if stream == StreamId::Fault {
                prefer_this_thread();
            }
            if let Err(error) = shared.receive(stream, receive) {
                shared.fail(error);
            }
        };
        let thread =
            thread::Builder::new().name(super::name(stream)).spawn(body).map_err(PagesError::Thread)?;
        joined.threads.push(thread);
        drop(joined);
        if stream == StreamId::Fault {
            // What is missed from here on is asked for by whoever misses it.
            for (space, pages) in self.arrivals.waited_for() {
                // If this one breaks as well, it is the next one's to ask.
                pages.ranges().iter().all(|range| self.request(space, *range));
            }
        }
        Ok(())
    }

    /// Body of a stream's thread.
    fn receive(&self, stream: StreamId, mut link: ReceiveHalf) -> Result<(), PagesError> {
        let broke = |source| PagesError::Link { stream, source };
        let mut ended = false;
        loop {
            match link.receive() {
                Err(LinkError::Closed) if ended => return Ok(()),
                Err(error) => return Err(broke(error)),
                Ok(Message::Abort { detail }) => {
                    return Err(PagesError::Aborted { detail: detail.to_owned() });
                }
                Ok(other) if ended => {
                    let expected = "the end of the stream";
                    return Err(broke(LinkError::Unexpected { kind: other.kind(), expected }));
                }
                Ok(Message::Pages { space, runs, bytes }) => self.take(stream, space, &runs, bytes)?,
                Ok(Message::ZeroPages { space, runs } | Message::AbsentPages { space, runs }) => {
                    for pages in self.ranges(stream, space, &runs) {
                        self.arrivals.on_zero(space, pages?)?;
                    }
                }
                Ok(Message::StreamMark { round }) => {
                    ended = round == ROUND_LAST;
                    self.mark(stream, round)?;
                }
                Ok(other) => {
                    return Err(broke(LinkError::Unexpected { kind: other.kind(), expected: "pages" }));
                }
            }
        }
    }

    fn take(&self, stream: StreamId, space: i32, runs: &[Run], bytes: &[u8]) -> Result<(), PagesError> {
        let mut rest = bytes;
        for pages in self.ranges(stream, space, runs) {
            let pages = pages?;
            // Decoding has compared the runs with the contents.
            let len = usize::try_from(pages.bytes()).unwrap_or(usize::MAX).min(rest.len());
            let (contents, later) = rest.split_at(len);
            self.arrivals.on_pages(space, pages, contents)?;
            rest = later;
        }
        self.received_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The runs' pages, each checked to be on its own stream.
    fn ranges(
        &self,
        stream: StreamId,
        space: i32,
        runs: &[Run],
    ) -> impl Iterator<Item = Result<PageRange, PagesError>> {
        runs.iter().filter_map(|run| share::range(*run)).map(move |pages| {
            match share::stranger(space, pages, stream, self.bulk_count) {
                Some(address) => Err(PagesError::WrongStream { space, address, stream }),
                None => Ok(pages),
            }
        })
    }

    fn mark(&self, stream: StreamId, round: u32) -> Result<(), PagesError> {
        let mut marks = lock(&self.marks);
        if let Some(round) = marks.set(stream, round)? {
            self.arrivals.on_mark(round);
        }
        Ok(())
    }

    /// The first failure is told, and ends all streams.
    fn fail(&self, error: PagesError) {
        if !self.over.swap(true, Ordering::Relaxed) {
            self.arrivals.on_error(error);
        }
        self.break_links();
    }

    fn break_links(&self) {
        let mut joined = lock(&self.streams);
        joined.closed = true;
        joined.streams.iter().for_each(|(_, breaker)| breaker.break_link());
    }
}

/// How far each stream has come.
#[derive(Debug)]
struct Marks {
    bulk: Vec<Option<u32>>,
    fault: Option<u32>,
    told: Option<u32>,
}

impl Marks {
    fn of(bulk_count: u8) -> Self {
        Self { bulk: vec![None; usize::from(bulk_count)], fault: None, told: None }
    }

    /// Sets a stream's mark; returns the round that has come on all of them now, if it is a new one.
    fn set(&mut self, stream: StreamId, round: u32) -> Result<Option<u32>, PagesError> {
        let mark = match stream {
            StreamId::Bulk(index) => self.bulk.get_mut(usize::from(index)),
            StreamId::Fault => Some(&mut self.fault),
        };
        let mark = mark.ok_or(PagesError::NotDue { stream })?;
        if let Some(before) = mark.filter(|before| *before >= round) {
            return Err(PagesError::Mark { stream, round, before });
        }
        *mark = Some(round);
        let all = self.bulk.iter().copied().min().flatten();
        let all = all.filter(|all| *all != ROUND_LAST || self.fault == Some(ROUND_LAST));
        let news = all.filter(|_| all > self.told);
        self.told = self.told.max(all);
        Ok(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_told_when_the_slowest_stream_has_it() {
        let mut marks = Marks::of(2);
        let mut set = |stream, round| marks.set(stream, round).map_err(|error| error.to_string());
        let (one, two) = (StreamId::Bulk(0), StreamId::Bulk(1));
        assert_eq!(set(one, 0), Ok(None));
        assert_eq!(set(one, 1), Ok(None));
        assert_eq!(set(two, 0), Ok(Some(0)));
        assert_eq!(set(two, 1), Ok(Some(1)));
        assert_eq!(set(one, 1), Err("round 1 was marked after round 1 on page stream 0".to_owned()));
        assert_eq!(set(one, ROUND_LAST), Ok(None));
        assert_eq!(set(two, ROUND_LAST), Ok(None));
        assert_eq!(set(StreamId::Fault, ROUND_LAST), Ok(Some(ROUND_LAST)));
        set(StreamId::Bulk(2), 0).unwrap_err();
    }
}
