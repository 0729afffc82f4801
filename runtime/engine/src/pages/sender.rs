//! One stream's sending end: a link and a buffer, and what stands in the pages of a process.

use godwit_memory::reader::{self, Batch};
use godwit_memory::{MemoryError, PAGE_BYTES, PageRange, PageSet};
use godwit_protocol::wire::Message;
use godwit_protocol::wire::pages::{Run, StreamId};

use super::PagesError;
use super::share;
use crate::link::SendHalf;

/// Sends pages on one stream.
#[derive(Debug)]
pub(super) struct Sender {
    stream: StreamId,
    link: SendHalf,
    buffer: Vec<u8>,
}

/// What one pass over a set of pages found in them.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Sent with their contents.
    pub(super) normal: PageSet,
    /// Only zeros; sent as names.
    pub(super) zero: PageSet,
    /// Not there any more; not sent.
    pub(super) gone: PageSet,
}

impl Sender {
    pub(super) fn new(stream: StreamId, link: SendHalf) -> Self {
        Self { stream, link, buffer: Vec::new() }
    }

    /// Reads `pages` of the process `pid` and sends what it finds.
    ///
    /// # Errors
    /// [`PagesError`]; with [`godwit_sys::SysError::NoProcess`] in it when the process has ended: all that was sent
    /// before was its own.
    pub(super) fn send_pages(
        &mut self,
        space: i32,
        pid: i32,
        pages: &PageSet,
        found: &mut Contents,
    ) -> Result<(), PagesError> {
        if pages.is_empty() {
            return Ok(());
        }
        let Self { stream, link, buffer } = self;
        buffer.resize(BUFFER_BYTES, 0);
        let mut zero = PageSet::new();
        let read = reader::read(pid, pages, buffer, |batch| {
            let skipped = batch.zero.union(&batch.gone);
            let normal: PageSet = batch.ranges.iter().copied().collect();
            let normal = if skipped.is_empty() { normal } else { normal.difference(&skipped) };
            send_contents(link, space, &batch, &normal).map_err(broke(*stream))?;
            found.normal.extend(normal.ranges().iter().copied());
            found.gone.extend(batch.gone.ranges().iter().copied());
            zero.extend(batch.zero.ranges().iter().copied());
            Ok::<(), PagesError>(())
        });
        // Also what was found before a failure: who counts must know what the target has.
        self.send_zero(space, &zero)?;
        found.zero.extend(zero.ranges().iter().copied());
        read
    }

    /// Names pages that hold only zeros.
    pub(super) fn send_zero(&mut self, space: i32, pages: &PageSet) -> Result<(), PagesError> {
        self.send_names(pages, |runs| Message::ZeroPages { space, runs })
    }

    /// Names pages that are not there.
    pub(super) fn send_absent(&mut self, space: i32, pages: &PageSet) -> Result<(), PagesError> {
        self.send_names(pages, |runs| Message::AbsentPages { space, runs })
    }

    /// Says that everything of `round` has been sent.
    pub(super) fn send_mark(&mut self, round: u32) -> Result<(), PagesError> {
        self.link.send(&Message::StreamMark { round }).map_err(broke(self.stream))
    }

    fn send_names(
        &mut self,
        pages: &PageSet,
        message: impl Fn(Vec<Run>) -> Message<'static>,
    ) -> Result<(), PagesError> {
        for runs in share::frames(pages) {
            self.link.send(&message(runs)).map_err(broke(self.stream))?;
        }
        Ok(())
    }
}

/// Sends the pages of `batch` that are in `normal`, straight from where they were read to.
fn send_contents(
    link: &mut SendHalf,
    space: i32,
    batch: &Batch<'_>,
    normal: &PageSet,
) -> Result<(), crate::LinkError> {
    if normal.is_empty() {
        return Ok(());
    }
    let (mut runs, mut parts) = (Vec::new(), Vec::new());
    let mut at = 0;
    for range in batch.ranges {
        for piece in share::within(normal, *range) {
            runs.extend(share::runs(piece));
            parts.push(slice(batch.bytes, at, *range, piece));
        }
        at += range.bytes();
    }
    link.send_scattered(&Message::Pages { space, runs, bytes: &[] }, &parts)
}

/// The bytes of `piece`, when those of `range`, which it is a part of, begin at `at`.
fn slice(bytes: &[u8], at: u64, range: PageRange, piece: PageRange) -> &[u8] {
    let start = at + (piece.start() - range.start());
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    &bytes[index(start)..index(start + piece.bytes())]
}

fn broke(stream: StreamId) -> impl Fn(crate::LinkError) -> PagesError {
    move |source| PagesError::Link { stream, source }
}

/// Whether the process that was read has ended.
pub(super) fn is_end_of_process(error: &PagesError) -> bool {
    matches!(error, PagesError::Memory(MemoryError::Sys(godwit_sys::SysError::NoProcess { .. })))
}

/// Bytes read and sent at a time: they stay in a processor's cache on their way through checksum and socket.
pub(super) const BUFFER_BYTES: usize = 128 << 10;

/// Pages read and sent at a time.
pub(super) const BUFFER_PAGES: u64 = BUFFER_BYTES as u64 / PAGE_BYTES;
