//! Connections: frames in order on each, everything lost when one breaks.

use std::collections::VecDeque;

use godwit_protocol::source;
use godwit_protocol::wire::message::DATA_LEN_MAX;
use godwit_protocol::wire::pages::{PAGE_BYTES, Run};
use godwit_protocol::wire::{FRAME_HEADER_LEN, FrameHeader, Kind, Message};

use crate::program::Random;

/// One direction of a connection.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) jobs: VecDeque<Job>,
    /// Whether a frame is being written to the socket.
    pub(crate) busy: bool,
    latency_ns: u64,
    ns_per_byte: u64,
    sent: u32,
    received: u32,
}

/// What a connection's thread is to do next.
#[derive(Debug)]
pub(crate) enum Job {
    /// Send this.
    Frame(Frame),
    /// Read these pages of a process, and send what they hold now.
    Read { space: i32, pages: Vec<u64>, last: bool },
    /// Claim some of what is left of this stream's share, and send it.
    Push,
    /// Say that all of a round has been sent.
    Mark(u32),
    /// Tell the source's machine, before what follows is sent.
    Tell(source::Event),
}

/// A frame as it travels.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    kind: Kind,
    payload: Vec<u8>,
}

impl Frame {
    pub(crate) fn of(message: &Message<'_>) -> Self {
        let mut payload = Vec::new();
        let (kind, bulk) = message.encode(&mut payload).expect("what the world says can be said");
        payload.extend_from_slice(bulk);
        Self { kind, payload }
    }

    pub(crate) fn message(&self) -> Message<'_> {
        Message::decode(self.kind, &self.payload).expect("what was said can be read")
    }
}

impl Lane {
    pub(crate) fn new(random: &mut Random) -> Self {
        Self {
            jobs: VecDeque::new(),
            busy: false,
            latency_ns: random.below(2_000_000),
            ns_per_byte: random.below(200) + 1,
            sent: 0,
            received: 0,
        }
    }

    /// Seals a frame; returns its header, how long the socket is busy with it, and how long it travels.
    pub(crate) fn send(&mut self, frame: &Frame) -> ([u8; FRAME_HEADER_LEN], u64, u64) {
        let header =
            FrameHeader::seal(frame.kind, self.sent, &frame.payload, &[]).expect("a frame that fits");
        self.sent += 1;
        let busy = (frame.payload.len() + FRAME_HEADER_LEN) as u64 * self.ns_per_byte;
        (header.to_bytes(), busy, busy + self.latency_ns)
    }

    /// Checks what came against what was sent.
    pub(crate) fn receive(&mut self, header: [u8; FRAME_HEADER_LEN], frame: &Frame) {
        let header = FrameHeader::from_bytes(header, self.received).expect("frames in order");
        self.received += 1;
        header.verify(&frame.payload).expect("frames unharmed");
    }
}

/// Adjacent addresses as runs.
pub(crate) fn runs(addresses: &[u64]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for address in addresses {
        match runs.last_mut() {
            Some(run) if run.start + u64::from(run.pages) * PAGE_BYTES == *address => run.pages += 1,
            _ => runs.push(Run { start: *address, pages: 1 }),
        }
    }
    runs
}

/// Runs as addresses.
pub(crate) fn addresses(runs: &[Run]) -> impl Iterator<Item = u64> {
    runs.iter().flat_map(|run| (0..u64::from(run.pages)).map(|index| run.start + index * PAGE_BYTES))
}

/// A page that holds `content`: at both ends of it, and zeros between.
pub(crate) fn put_page(bytes: &mut Vec<u8>, content: u64) {
    let start = bytes.len();
    bytes.extend_from_slice(&content.to_le_bytes());
    bytes.resize(start + PAGE - 8, 0);
    bytes.extend_from_slice(&content.to_le_bytes());
}

/// What a page holds.
pub(crate) fn take_page(page: &[u8]) -> u64 {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
    assert_eq!(word(0), word(PAGE - 8), "a torn page");
    word(0)
}

/// [`PAGE_BYTES`].
pub(crate) const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES && PAGE < DATA_LEN_MAX);
