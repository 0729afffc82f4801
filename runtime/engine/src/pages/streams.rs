//! The source's end of the page streams: opening them, and the rounds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use godwit_memory::PageSet;
use godwit_protocol::MigrationId;
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::{BULK_STREAMS_MAX, ROUND_LAST, StreamId};

use super::sender::{self, Contents, Sender};
use super::share::{share, sorted};
use super::{PagesError, SpaceWork};
use crate::link::{Breaker, Link, LinkError, ReceiveHalf};

/// The page streams of one migration, at its source.
///
/// To be kept until the target has everything: a connection that is closed while a request waits in it is reset, and
/// a reset takes from the target what it has not read yet.
#[derive(Debug)]
pub struct PageStreams {
    pub(super) bulk: Vec<Mutex<Sender>>,
    /// Held from the claim of a page to the end of its sending, so that whoever has it last knows that all is sent.
    pub(super) fault: Mutex<Sender>,
    pub(super) requests: Mutex<ReceiveHalf>,
    pub(super) fault_breaker: Breaker,
    breaker: StreamsBreaker,
    sent_bytes: Vec<Arc<AtomicU64>>,
    stored: Mutex<BTreeMap<i32, PageSet>>,
    pub(super) served_pages: AtomicU64,
    pub(super) served_zero_pages: AtomicU64,
}

/// Stops all streams, from any thread.
#[derive(Debug, Clone)]
pub struct StreamsBreaker {
    links: Arc<[Breaker]>,
    stopped: Arc<AtomicBool>,
}

/// What one round sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundSent {
    /// Pages sent with their contents.
    pub normal_pages: u64,
    /// Pages that hold only zeros, known before or found so.
    pub zero_pages: u64,
    /// Pages that the target was told to forget.
    pub absent_pages: u64,
    /// Pages that vanished before they were read: the next collection says so.
    pub gone_pages: u64,
    /// Processes that ended before all their pages were read.
    pub ended_processes: u64,
    /// Bytes sent, with headers.
    pub bytes: u64,
}

/// What one stream sent of one round, by space.
type Sent = BTreeMap<i32, Contents>;

impl PageStreams {
    /// Opens `bulk_count` bulk streams, at least one and at most [`BULK_STREAMS_MAX`], and the fault stream, once the
    /// target's worker is ready.
    ///
    /// # Errors
    /// [`LinkError`] if a connection cannot be made. That the target refuses one is seen when it is used.
    pub fn open(host: &str, port: u16, migration: &MigrationId, bulk_count: u8) -> Result<Self, LinkError> {
        let open = |stream| -> Result<Link, LinkError> {
            let mut link = Link::connect(host, port)?;
            link.send(&Message::JoinStream { migration: migration.clone(), stream })?;
            Ok(link)
        };
        let bulk_count = bulk_count.clamp(1, BULK_STREAMS_MAX);
        let (mut bulk, mut breakers, mut sent_bytes) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..bulk_count {
            let link = open(StreamId::Bulk(index))?;
            breakers.push(link.breaker());
            // Nothing comes back on a bulk stream but its end.
            let (send, _) = link.split();
            sent_bytes.push(send.sent_bytes());
            bulk.push(Mutex::new(Sender::new(StreamId::Bulk(index), send)));
        }
        let link = open(StreamId::Fault)?;
        let fault_breaker = link.breaker();
        breakers.push(fault_breaker.clone());
        let (send, receive) = link.split();
        sent_bytes.push(send.sent_bytes());
        Ok(Self {
            bulk,
            fault: Mutex::new(Sender::new(StreamId::Fault, send)),
            requests: Mutex::new(receive),
            fault_breaker,
            breaker: StreamsBreaker { links: breakers.into(), stopped: Arc::default() },
            sent_bytes,
            stored: Mutex::default(),
            served_pages: AtomicU64::new(0),
            served_zero_pages: AtomicU64::new(0),
        })
    }

    /// Sends one round: of every space what must be forgotten, what is zero, and the contents of its dirty pages as
    /// they are now. Returns when everything is on its way and every bulk stream is marked with `round`.
    ///
    /// A process that ends meanwhile is no error, and its later pages are not sent.
    ///
    /// # Errors
    /// [`PagesError`]; all streams are broken then.
    pub fn send_round(&self, round: u32, work: &[SpaceWork]) -> Result<RoundSent, PagesError> {
        let bytes_before = self.sent_bytes();
        let sent = self.on_all(|sender, index| self.send_share(sender, index, round, work))?;
        let mut all = RoundSent { bytes: self.sent_bytes() - bytes_before, ..RoundSent::default() };
        let mut stored = lock(&self.stored);
        for space in work {
            all.zero_pages += space.zero.pages();
            all.absent_pages += space.absent.pages();
            let mut held = stored.remove(&space.space).unwrap_or_default();
            held = held.difference(&space.absent.union(&space.zero));
            let mut ended = false;
            let (mut normal, mut zero) = (Vec::new(), Vec::new());
            for contents in sent.iter().filter_map(|(sent, _)| sent.get(&space.space)) {
                all.normal_pages += contents.normal.pages();
                all.zero_pages += contents.zero.pages();
                all.gone_pages += contents.gone.pages();
                normal.extend_from_slice(contents.normal.ranges());
                zero.extend_from_slice(contents.zero.ranges());
            }
            ended |= sent.iter().any(|(_, ended)| ended.contains(&space.space));
            all.ended_processes += u64::from(ended);
            held = held.difference(&sorted(zero)).union(&sorted(normal));
            if !held.is_empty() {
                stored.insert(space.space, held);
            }
        }
        Ok(all)
    }

    /// Marks the end of all pages on every stream, when there is nothing to serve.
    ///
    /// # Errors
    /// [`PagesError`]; all streams are broken then.
    pub fn finish(&self) -> Result<(), PagesError> {
        self.on_all(|sender, _| sender.send_mark(ROUND_LAST))?;
        lock(&self.fault).send_mark(ROUND_LAST).map_err(|error| self.fail(error))
    }

    /// Returns the pages that the target has with contents after the rounds so far, by space.
    #[must_use]
    pub fn stored(&self) -> BTreeMap<i32, PageSet> {
        lock(&self.stored).clone()
    }

    /// Returns the number of bulk streams.
    #[must_use]
    pub fn bulk_count(&self) -> u8 {
        // `open` makes no more than fit.
        u8::try_from(self.bulk.len()).unwrap_or(BULK_STREAMS_MAX)
    }

    /// Returns the bytes sent so far on all streams, with headers.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.iter().map(|bytes| bytes.load(Ordering::Relaxed)).sum()
    }

    /// Returns what stops all streams from another thread.
    #[must_use]
    pub fn breaker(&self) -> StreamsBreaker {
        self.breaker.clone()
    }

    /// Stops all streams: what sends on them returns [`PagesError::Stopped`].
    pub fn stop(&self) {
        self.breaker.stop();
    }

    /// Runs `body` for every bulk stream, each on a thread of its own.
    pub(super) fn on_all<T: Send>(
        &self,
        body: impl Fn(&mut Sender, u8) -> Result<T, PagesError> + Sync,
    ) -> Result<Vec<T>, PagesError> {
        let body = |sender: &Mutex<Sender>, index: u8| {
            body(&mut lock(sender), index).map_err(|error| self.fail(error))
        };
        let body = &body;
        thread::scope(|scope| {
            let threads: Vec<_> = (0_u8..)
                .zip(&self.bulk)
                .map(|(index, sender)| {
                    let name = format!("pages {index}");
                    thread::Builder::new().name(name).spawn_scoped(scope, move || body(sender, index))
                })
                .collect();
            let mut results = Vec::new();
            for thread in threads {
                results.push(match thread {
                    Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    Err(error) => Err(self.fail(PagesError::Thread(error))),
                });
            }
            // Of several errors the first that is not a consequence: the others' links were broken.
            let (good, mut bad): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
            bad.sort_by_key(|error| matches!(error, Err(PagesError::Link { .. })));
            bad.into_iter().next().map_or_else(
                || good.into_iter().collect(),
                |error| Err(error.err().unwrap_or(PagesError::Stopped)),
            )
        })
    }

    /// Breaks the other streams, and tells apart what was wanted.
    pub(super) fn fail(&self, error: PagesError) -> PagesError {
        let stopped = self.breaker.stopped.load(Ordering::Relaxed);
        self.breaker.break_links();
        if stopped { PagesError::Stopped } else { error }
    }

    fn send_share(
        &self,
        sender: &mut Sender,
        index: u8,
        round: u32,
        work: &[SpaceWork],
    ) -> Result<(Sent, Vec<i32>), PagesError> {
        let (mut sent, mut ended) = (Sent::new(), Vec::new());
        for SpaceWork { space, pid, dirty, zero, absent } in work {
            let (space, streams) = (*space, self.bulk_count());
            sender.send_absent(space, &share(space, absent, index, streams))?;
            sender.send_zero(space, &share(space, zero, index, streams))?;
            let contents = sent.entry(space).or_default();
            match sender.send_pages(space, *pid, &share(space, dirty, index, streams), contents) {
                Err(error) if sender::is_end_of_process(&error) => ended.push(space),
                result => result?,
            }
        }
        sender.send_mark(round)?;
        Ok((sent, ended))
    }
}

impl StreamsBreaker {
    /// Stops all streams.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.break_links();
    }

    fn break_links(&self) {
        self.links.iter().for_each(Breaker::break_link);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the migration, whose streams are broken then.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
