//! Both ends over the loopback, with memory of this process.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use godwit_memory::fault::{Lent, MemoryStore, PageSource};
use godwit_memory::{MemoryError, PAGE_BYTES, PageRange};
use godwit_protocol::MigrationId;
use godwit_protocol::wire::pages::{CHUNK_BYTES, ROUND_LAST, Run};
use godwit_protocol::wire::{FrameHeader, Message};
use godwit_sys::arena::Arena;

use super::*;
use crate::handover::{self, Streams};
use crate::link::Link;

/// What a target hears.
#[derive(Debug)]
enum Heard {
    Mark(u32),
    Error(PagesError),
    Main,
}

struct Ears {
    store: Arc<MemoryStore>,
    heard: Mutex<Sender<Heard>>,
    /// How often each page was told of: with contents, and without.
    pages: Mutex<BTreeMap<(i32, u64), (u32, u32)>>,
    waited_for: Mutex<Vec<(i32, PageSet)>>,
}

impl Arrivals for Ears {
    fn on_mark(&self, round: u32) {
        self.heard.lock().unwrap().send(Heard::Mark(round)).unwrap();
    }

    fn on_pages(&self, space: i32, pages: PageRange, contents: &[u8]) -> Result<(), MemoryError> {
        self.store.put(space, pages.start(), contents)?;
        let mut told = self.pages.lock().unwrap();
        pages.chunks(1).for_each(|page| told.entry((space, page.start())).or_default().0 += 1);
        Ok(())
    }

    fn on_zero(&self, space: i32, pages: PageRange) -> Result<(), MemoryError> {
        self.store.forget(space, pages);
        let mut told = self.pages.lock().unwrap();
        pages.chunks(1).for_each(|page| told.entry((space, page.start())).or_default().1 += 1);
        Ok(())
    }

    fn on_error(&self, error: PagesError) {
        self.heard.lock().unwrap().send(Heard::Error(error)).unwrap();
    }

    fn on_main(&self, _: Link) {
        self.heard.lock().unwrap().send(Heard::Main).unwrap();
    }

    fn waited_for(&self) -> Vec<(i32, PageSet)> {
        self.waited_for.lock().unwrap().clone()
    }
}

/// A target whose agent passes on what joins.
struct Target {
    port: u16,
    receiver: PageReceiver,
    store: Arc<MemoryStore>,
    ears: Arc<Ears>,
    heard: Receiver<Heard>,
}

impl Target {
    fn new(bulk_count: u8, room_bytes: u64) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (agent, worker) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            for socket in listener.incoming() {
                let mut link = Link::accept(socket.unwrap()).unwrap();
                let given = match link.receive().unwrap() {
                    Message::JoinStream { stream, .. } => handover::give_stream(&agent, stream, link),
                    Message::Rejoin { .. } => handover::give_again(&agent, link),
                    other => panic!("{:?} joins", other.kind()),
                };
                given.unwrap();
            }
        });
        let store = Arc::new(MemoryStore::new(room_bytes).unwrap());
        let (sender, heard) = channel();
        let ears = Arc::new(Ears {
            store: Arc::clone(&store),
            heard: Mutex::new(sender),
            pages: Mutex::default(),
            waited_for: Mutex::default(),
        });
        let arrivals: Arc<dyn Arrivals> = Arc::<Ears>::clone(&ears);
        let receiver = PageReceiver::start(Streams::of(worker), bulk_count, arrivals).unwrap();
        Self { port, receiver, store, ears, heard }
    }

    fn source(&self, bulk_count: u8) -> PageStreams {
        PageStreams::open("127.0.0.1", self.port, &migration(), bulk_count).unwrap()
    }

    /// A link that has joined as a stream, to send on it what no source would.
    fn join(&self, stream: StreamId) -> Link {
        let mut link = Link::connect("127.0.0.1", self.port).unwrap();
        link.send(&Message::JoinStream { migration: migration(), stream }).unwrap();
        link
    }

    fn wait_mark(&self, round: u32) {
        match self.heard.recv_timeout(PATIENCE).unwrap() {
            Heard::Mark(marked) => assert_eq!(marked, round),
            other => panic!("{other:?}"),
        }
    }

    fn wait_error(&self) -> PagesError {
        match self.heard.recv_timeout(PATIENCE).unwrap() {
            Heard::Error(error) => error,
            other => panic!("{other:?}"),
        }
    }

    /// Compares the store with what stands in `arena` at the pages of `expected`.
    fn check(&self, space: i32, arena: &Arena, expected: &PageSet) {
        assert_eq!(&self.store.pages(space), expected);
        let base = arena.range().start();
        for page in expected.ranges().iter().flat_map(|range| range.chunks(1)) {
            let mut found = vec![0; 4096];
            self.store
                .lend(space, page, &mut |lent| {
                    let Lent::Window(window, offset) = lent else { unreachable!("a store lends its window") };
                    Ok::<(), MemoryError>(window.read(offset, &mut found)?)
                })
                .unwrap();
            for (word, bytes) in (0..).zip(found.as_chunks::<8>().0) {
                assert_eq!(
                    u64::from_le_bytes(*bytes),
                    arena.load((page.start() - base) / 8 + word),
                    "{page}"
                );
            }
        }
    }
}

/// A generator that is good enough for tests (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn migration() -> MigrationId {
    "m".to_owned().try_into().unwrap()
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

fn page(arena: &Arena, index: u64) -> PageRange {
    PageRange::page_at(arena.range().start() + index * PAGE_BYTES)
}

/// The word to push, given already.
fn at_once() -> Receiver<()> {
    let (word, words) = channel();
    word.send(()).unwrap();
    words
}

/// Goal: after every round the target has exactly what the source has. Method: rounds of random pages, written, set
/// to zero, and taken away, of two spaces, over one and over three streams.
#[test]
fn after_every_round_the_store_holds_what_the_source_has() {
    for streams in [1, 3] {
        let target = Target::new(streams, 64 << 20);
        let source = target.source(streams);
        assert_eq!(source.bulk_count(), streams);
        let arenas = [Arena::map(3 * CHUNK_BYTES).unwrap(), Arena::map(CHUNK_BYTES / 2).unwrap()];
        let mut held = [PageSet::new(), PageSet::new()];
        let mut dice = Dice(u64::from(streams) * 0x9e37_79b9);
        for round in 0..5 {
            let mut work = Vec::new();
            let mut expected = RoundSent::default();
            for ((arena, held), space) in arenas.iter().zip(&mut held).zip(1..) {
                let count = arena.range().pages();
                let mut todo = SpaceWork { space, pid: own_pid(), ..SpaceWork::default() };
                for index in 0..count {
                    let pages = page(arena, index);
                    let fate = if round == 0 { dice.below(3) } else { dice.below(12) };
                    let one: PageSet = [pages].into_iter().collect();
                    match fate {
                        0 | 1 => {
                            arena.store(index * 512 + dice.below(512), dice.below(u64::MAX) | 1);
                            todo.dirty.insert(pages);
                            *held = held.union(&one);
                            expected.normal_pages += 1;
                        }
                        2 => {
                            (0..512).for_each(|word| arena.store(index * 512 + word, 0));
                            let known = dice.below(2) == 0;
                            let named = if known { &mut todo.zero } else { &mut todo.dirty };
                            named.insert(pages);
                            *held = held.difference(&one);
                            expected.zero_pages += 1;
                        }
                        3 if round > 0 => {
                            todo.absent.insert(pages);
                            *held = held.difference(&one);
                            expected.absent_pages += 1;
                        }
                        _ => {}
                    }
                }
                work.push(todo);
            }
            let sent = source.send_round(round, &work).unwrap();
            assert!(sent.bytes > sent.normal_pages * PAGE_BYTES);
            assert_eq!(RoundSent { bytes: 0, ..sent }, expected);
            target.wait_mark(round);
            for ((arena, held), space) in arenas.iter().zip(&held).zip(1..) {
                target.check(space, arena, held);
                assert_eq!(source.stored().get(&space).unwrap_or(&PageSet::new()), held);
            }
        }
        source.finish().unwrap();
        target.wait_mark(ROUND_LAST);
        drop(source);
        drop(target.receiver);
        assert!(target.heard.try_recv().is_err(), "the end of the streams is no error after the last mark");
    }
}

/// Goal: each page comes once, whoever asks for it how often, and all come. Method: two threads that ask for random
/// pages, some of them twice, some not there, while everything is pushed.
#[test]
fn serving_sends_each_page_once() {
    for (streams, asking) in [(1, true), (3, true), (2, false)] {
        let target = Target::new(streams, 64 << 20);
        let source = target.source(streams);
        let arena = Arena::map(6 * CHUNK_BYTES).unwrap();
        // Nothing is ever mapped so low.
        let gone = PageRange::new(PAGE_BYTES, 3 * PAGE_BYTES).unwrap();
        let (mut dice, mut remote, mut held) = (Dice(77), PageSet::new(), PageSet::new());
        for index in 0..arena.range().pages() {
            if dice.below(4) > 0 {
                remote.insert(page(&arena, index));
                if dice.below(3) > 0 {
                    arena.store(index * 512 + 511, index + 1);
                    held.insert(page(&arena, index));
                }
            }
        }
        let dirty = remote.union(&[gone].into_iter().collect());
        let work = [SpaceWork { space: 9, pid: own_pid(), dirty, ..SpaceWork::default() }];
        // The fault stream has joined when something has come of it: until then requests are refused.
        while asking && !target.receiver.request(9, page(&arena, 0)) {
            thread::yield_now();
        }
        let served = thread::scope(|scope| {
            for seed in 0..if asking { 2 } else { 0 } {
                let (receiver, arena) = (&target.receiver, &arena);
                scope.spawn(move || {
                    let mut dice = Dice(1000 + seed);
                    for _ in 0..300 {
                        let first = page(arena, dice.below(arena.range().pages()));
                        let wanted = PageRange::new(first.start(), first.end() + dice.below(16) * PAGE_BYTES);
                        // The source has left when all is sent.
                        if !receiver.request(9, wanted.unwrap()) {
                            return;
                        }
                        receiver.request(10, first);
                    }
                });
            }
            source.serve(&work, &at_once()).unwrap()
        });
        target.wait_mark(ROUND_LAST);
        target.check(9, &arena, &held);
        let told = target.ears.pages.lock().unwrap();
        assert_eq!(told.len() as u64, remote.pages() + gone.pages());
        for ((space, address), counts) in told.iter() {
            let expected = if held.contains(*address) { (1, 0) } else { (0, 1) };
            assert_eq!((*space, *counts), (9, expected), "page {address:x}");
        }
        assert_eq!(served.pages, remote.pages() + gone.pages());
        assert_eq!(served.zero_pages, remote.pages() - held.pages());
        assert!(served.requested_pages <= served.pages && (asking || served.requests == 0));
        drop(source);
    }
}

/// Goal: after streams that broke amid the pages, others bring what had not come, once each, and what tasks wait for first.
/// Method: streams that are broken three times when what is waited for has come, each time another main link, and then
/// a push; with a count of how often each page came.
#[test]
fn streams_that_broke_are_followed_by_others() {
    let target = Target::new(2, 64 << 20);
    let arena = Arena::map(16 * CHUNK_BYTES).unwrap();
    (0..arena.range().pages()).for_each(|index| arena.store(index * 512, index + 1));
    let all: PageSet = [arena.range()].into_iter().collect();
    let come = || -> PageSet {
        let told = target.ears.pages.lock().unwrap();
        told.keys().map(|(_, address)| PageRange::page_at(*address)).collect()
    };
    for wanted in [CHUNK_BYTES, 3 * CHUNK_BYTES / 2, 3 * PAGE_BYTES, 0] {
        let is_last = wanted == 0;
        let lacking = all.difference(&come());
        let first = lacking.ranges()[0].start();
        let waited_for: PageSet = PageRange::new(first, first + wanted).into_iter().collect();
        *target.ears.waited_for.lock().unwrap() = vec![(3, waited_for.clone())];
        let source = target.source(2);
        let work = [SpaceWork { space: 3, pid: own_pid(), dirty: lacking, ..SpaceWork::default() }];
        thread::scope(|scope| {
            let (push, begin_push) = channel();
            let (source, work) = (&source, &work);
            let serving = scope.spawn(move || source.serve(work, &begin_push));
            while !waited_for.difference(&come()).is_empty() {
                thread::yield_now();
            }
            if is_last {
                push.send(()).unwrap();
            } else {
                source.stop();
            }
            assert_eq!(serving.join().unwrap().is_ok(), is_last);
        });
        if is_last {
            target.wait_mark(ROUND_LAST);
            break;
        }
        let mut link = Link::connect("127.0.0.1", target.port).unwrap();
        link.send(&Message::Rejoin { migration: migration() }).unwrap();
        // The end of the streams may be heard of before, or not at all.
        while !matches!(target.heard.recv_timeout(PATIENCE).unwrap(), Heard::Main) {}
        assert!(!target.receiver.request(3, page(&arena, 0)), "nobody is there to be asked");
        target.receiver.reopen();
    }
    target.check(3, &arena, &all);
    let told = target.ears.pages.lock().unwrap();
    assert!(told.values().all(|counts| *counts == (1, 0)), "each page came once");
}

/// Goal: what breaks a rule is one error, which ends the other streams as well. Method: every rule broken once by a
/// source whose frames are good.
#[test]
fn what_breaks_a_rule_is_one_error() {
    type Breach = fn(&Target) -> Vec<Link>;
    let (bulk, fault) = (StreamId::Bulk, StreamId::Fault);
    let breaches: [(&str, StreamId, Breach); 9] = [
        ("came on page stream 0", fault, |target| send(target, 0, &[foreign()])),
        ("came on page stream 0", fault, |target| {
            let runs = vec![Run { start: foreign_start() - PAGE_BYTES, pages: 2 }];
            send(target, 0, &[Message::ZeroPages { space: 1, runs }])
        }),
        ("page stream 2 came twice, or there is none", fault, |target| vec![target.join(StreamId::Bulk(2))]),
        ("the fault stream came twice", bulk(0), |target| {
            vec![target.join(StreamId::Fault), target.join(StreamId::Fault)]
        }),
        ("round 0 was marked after round 1", fault, |target| {
            send(target, 1, &[Message::StreamMark { round: 1 }, Message::StreamMark { round: 0 }])
        }),
        ("page stream 1 broke", fault, |target| {
            send(target, 1, &[Message::StreamMark { round: ROUND_LAST }, foreign()])
        }),
        ("page stream 1 broke", fault, |target| send(target, 1, &[Message::Commit])),
        ("gave up: no", fault, |target| send(target, 1, &[Message::Abort { detail: "no" }])),
        ("store is full", fault, |target| send(target, 1, &[frame_of_pages(0), frame_of_pages(256)])),
    ];
    for (expected, other, breach) in breaches {
        let target = Target::new(2, ROOM_BYTES);
        let mut other = target.join(other);
        let _links = breach(&target);
        let error = target.wait_error().to_string();
        assert!(error.contains(expected), "{error} for {expected}");
        assert!(other.receive().is_err(), "the other stream lives on after: {expected}");
        assert!(target.heard.try_recv().is_err(), "a second error after: {expected}");
        assert!(target.store.resident_bytes().unwrap() <= ROOM_BYTES);
    }
}

/// Goal: bytes that are no frame, or no whole one, are one error. Method: a frame of pages with each of some bytes
/// changed, and cut at some places.
#[test]
fn frames_that_are_damaged_or_break_off_are_one_error() {
    let mut head = Vec::new();
    let message = foreign();
    let (kind, bulk) = message.encode(&mut head).unwrap();
    let header = FrameHeader::seal(kind, 1, &head, bulk).unwrap().to_bytes();
    let frame = [&header[..], &head, bulk].concat();
    let damaged = [0, 4, 7, 8, 12, 20, 30, 40, frame.len() - 1].map(|at| {
        let mut damaged = frame.clone();
        damaged[at] ^= 0x40;
        damaged
    });
    let cut = [1, 15, 16, 40, frame.len() - 1].map(|at| frame[..at].to_vec());
    for bytes in damaged.into_iter().chain(cut) {
        let target = Target::new(2, ROOM_BYTES);
        let link = target.join(StreamId::Bulk(1));
        let socket = TcpStream::from(link.as_fd().try_clone_to_owned().unwrap());
        (&socket).write_all(&bytes).unwrap();
        link.breaker().stop_sending();
        let error = target.wait_error();
        assert!(matches!(error, PagesError::Link { stream: StreamId::Bulk(1), .. }), "{error:?}");
        assert!(target.store.pages(1).is_empty());
    }
}

/// A process that ends between collection and reading is no error of a round; one that cannot be served is.
#[test]
fn a_process_that_has_ended_ends_no_round_and_no_other() {
    let mut child = Command::new("true").spawn().unwrap();
    let ended = i32::try_from(child.id()).unwrap();
    child.wait().unwrap();
    let target = Target::new(2, ROOM_BYTES);
    let source = target.source(2);
    let arena = Arena::map(CHUNK_BYTES).unwrap();
    arena.store(0, 1);
    let dirty: PageSet = [arena.range()].into_iter().collect();
    let of = |space, pid| SpaceWork { space, pid, dirty: dirty.clone(), ..SpaceWork::default() };
    let sent = source.send_round(0, &[of(1, ended), of(2, own_pid())]).unwrap();
    assert_eq!((sent.ended_processes, sent.normal_pages, sent.zero_pages), (1, 1, 511));
    target.wait_mark(0);
    target.check(2, &arena, &[page(&arena, 0)].into_iter().collect());
    assert!(target.store.pages(1).is_empty());
    let error = source.serve(&[of(1, ended)], &at_once()).unwrap_err();
    assert!(matches!(error, PagesError::Memory(_)), "{error:?}");
    target.wait_error();
}

/// Goal: a source that is told to stop does so at once, also within a send that the target does not take. Method: a
/// target that reads nothing.
#[test]
fn a_stopped_round_returns_although_nobody_reads() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let silent = thread::spawn(move || {
        (0..3).map(|_| Link::accept(listener.accept().unwrap().0).unwrap()).collect::<Vec<_>>()
    });
    let source = PageStreams::open("127.0.0.1", port, &migration(), 2).unwrap();
    let _links = silent.join().unwrap();
    let arena = Arena::map(32 * CHUNK_BYTES).unwrap();
    (0..arena.range().pages()).for_each(|index| arena.store(index * 512, 1));
    let work = [SpaceWork {
        space: 1,
        pid: own_pid(),
        dirty: [arena.range()].into_iter().collect(),
        ..SpaceWork::default()
    }];
    let error = thread::scope(|scope| {
        let sending = scope.spawn(|| source.send_round(0, &work).unwrap_err());
        // Longer than it takes to fill the sockets' buffers is not needed: stopping works at any time.
        while source.sent_bytes() < 1 << 20 {
            thread::yield_now();
        }
        source.breaker().stop();
        sending.join().unwrap()
    });
    assert!(matches!(error, PagesError::Stopped), "{error:?}");
}

/// A target that gives up ends a round with an error, and one that leaves ends a serving.
#[test]
fn a_target_that_stops_ends_round_and_serving() {
    for serves in [false, true] {
        let target = Target::new(2, ROOM_BYTES);
        let source = target.source(2);
        while !target.receiver.request(1, PageRange::page_at(0x1000)) {
            thread::yield_now();
        }
        target.receiver.stop();
        let arena = Arena::map(8 * CHUNK_BYTES).unwrap();
        (0..arena.range().pages()).for_each(|index| arena.store(index * 512, 1));
        let dirty = [arena.range()].into_iter().collect();
        let work = [SpaceWork { space: 1, pid: own_pid(), dirty, ..SpaceWork::default() }];
        let ended = (0..).find_map(|round| {
            if serves { source.serve(&work, &at_once()).err() } else { source.send_round(round, &work).err() }
        });
        assert!(matches!(ended, Some(PagesError::Link { .. })), "{ended:?}");
        assert!(target.heard.try_recv().is_err(), "what was wanted is no error");
    }
}

/// Goal: before the push only what is asked for travels, and a target that leaves then is noticed. Method: a push whose
/// time does not come.
#[test]
fn requests_are_answered_before_the_push_begins() {
    let target = Target::new(2, ROOM_BYTES);
    let source = target.source(2);
    let arena = Arena::map(CHUNK_BYTES).unwrap();
    (0..arena.range().pages()).for_each(|index| arena.store(index * 512, 1));
    let dirty = [arena.range()].into_iter().collect();
    let work = [SpaceWork { space: 1, pid: own_pid(), dirty, ..SpaceWork::default() }];
    let (_push, begin_push) = channel();
    thread::scope(|scope| {
        let (source, work) = (&source, &work);
        let serving = scope.spawn(move || source.serve(work, &begin_push).unwrap_err());
        while !target.receiver.request(1, page(&arena, 5)) {
            thread::yield_now();
        }
        while target.ears.pages.lock().unwrap().is_empty() {
            thread::yield_now();
        }
        target.check(1, &arena, &[page(&arena, 5)].into_iter().collect());
        target.receiver.stop();
        let error = serving.join().unwrap();
        assert!(matches!(error, PagesError::Link { stream: StreamId::Fault, .. }), "{error:?}");
    });
}

/// Prints how fast pages travel over the loopback: `cargo test -p godwit-engine --lib -- --ignored goodput --nocapture`.
#[test]
#[ignore = "measures instead of checking"]
fn goodput_over_the_loopback() {
    const PAGES: u64 = 256 << 8;
    let arena = Arena::map(PAGES * PAGE_BYTES).unwrap();
    let mut dice = Dice(3);
    (0..PAGES * 512).for_each(|word| arena.store(word, dice.below(u64::MAX)));
    for streams in [1, 2, 4] {
        let target = Target::new(streams, 2 * PAGES * PAGE_BYTES);
        let source = target.source(streams);
        let dirty: PageSet = [arena.range()].into_iter().collect();
        let work = [SpaceWork { space: 1, pid: own_pid(), dirty, ..SpaceWork::default() }];
        let rates: Vec<String> = (0..5)
            .map(|round| {
                let begin = Instant::now();
                source.send_round(round, &work).unwrap();
                target.wait_mark(round);
                let bytes = u32::try_from(PAGES * PAGE_BYTES).unwrap();
                format!("{:.2}", f64::from(bytes) / begin.elapsed().as_secs_f64() / 1e9)
            })
            .collect();
        println!("{streams} streams, rounds of 256 MiB: {} GB/s", rates.join(" "));
    }
}

fn foreign_start() -> u64 {
    (1..).map(|chunk| chunk * CHUNK_BYTES).find(|at| StreamId::of_page(1, *at, 2) == 1).unwrap()
}

/// A page of stream 1, where there are two.
fn foreign() -> Message<'static> {
    let runs = vec![Run { start: foreign_start(), pages: 1 }];
    Message::Pages { space: 1, runs, bytes: &[7; 4096] }
}

/// As many pages of stream 1 as fit a frame.
fn frame_of_pages(first: u64) -> Message<'static> {
    let runs = vec![Run { start: foreign_start() + first * PAGE_BYTES, pages: 256 }];
    Message::Pages { space: 1, runs, bytes: &[7; 1 << 20] }
}

fn send(target: &Target, stream: u8, messages: &[Message<'_>]) -> Vec<Link> {
    let mut link = target.join(StreamId::Bulk(stream));
    for message in messages {
        // The target may have ended the stream after the first.
        link.send(message).ok();
    }
    vec![link]
}

const ROOM_BYTES: u64 = 1 << 20;

const PATIENCE: Duration = Duration::from_secs(20);
