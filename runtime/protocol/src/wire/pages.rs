//! What the page frames carry: which pages, of which address space, and which stream they travel on.
//!
//! A *space* is one address space, named by the process id that its process has inside the container, where it
//! is the same on both hosts. Pages are named by runs of adjacent ones. Every version of one page travels on
//! one stream ([`StreamId::of_page`]), so a page is never overtaken by an older self.

use super::WireError;
use super::codec::{Reader, Writer};
use super::message::DATA_LEN_MAX;

/// Size of a page in bytes, on the wire as in memory.
pub const PAGE_BYTES: u64 = 4096;

/// Most runs in one frame.
pub const RUNS_MAX: usize = 4096;

/// Most bulk streams of one migration.
pub const BULK_STREAMS_MAX: u8 = 64;

/// The round that ends the last of the pages, on every stream.
pub const ROUND_LAST: u32 = u32::MAX;

/// Adjacent pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// Address of the first, a multiple of [`PAGE_BYTES`].
    pub start: u64,
    /// How many, at least one.
    pub pages: u32,
}

/// One of the connections that pages travel on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StreamId {
    /// Carries its share of the pages in every round.
    Bulk(u8),
    /// Carries requests for missed pages, and the answers.
    Fault,
}

impl StreamId {
    /// Returns the bulk stream, of `streams`, on which a page travels: neighbours of 2 MiB share one, so that
    /// runs stay long, and the next 2 MiB go on another.
    #[must_use]
    pub const fn of_page(space: i32, address: u64, streams: u8) -> u8 {
        let chunk = (address / CHUNK_BYTES).wrapping_add(space.unsigned_abs() as u64);
        // A stride of a power of two in the addresses must not put everything on one stream.
        let mixed = chunk.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let streams = if streams == 0 { 1 } else { streams };
        #[expect(clippy::cast_possible_truncation, reason = "a remainder of a u8")]
        let stream = (mixed % streams as u64) as u8;
        stream
    }

    const fn code(self) -> u8 {
        match self {
            Self::Bulk(index) => index,
            Self::Fault => FAULT_CODE,
        }
    }
}

/// Adjacent pages of this many bytes, aligned to as many, travel on one stream.
pub const CHUNK_BYTES: u64 = 2 << 20;

pub(super) fn put_stream(out: &mut Writer<'_>, stream: StreamId) {
    out.u8(stream.code());
}

pub(super) fn take_stream(fields: &mut Reader<'_>) -> Result<StreamId, WireError> {
    match fields.u8()? {
        FAULT_CODE => Ok(StreamId::Fault),
        index if index < BULK_STREAMS_MAX => Ok(StreamId::Bulk(index)),
        _ => Err(fields.bad("a stream's number is out of range")),
    }
}

/// Puts whose pages they are, and which.
pub(super) fn put_pages(out: &mut Writer<'_>, space: i32, runs: &[Run]) {
    put_space(out, space);
    out.u32(u32::try_from(runs.len()).unwrap_or(u32::MAX));
    for run in runs {
        put_run(out, *run);
    }
}

pub(super) fn put_request(out: &mut Writer<'_>, space: i32, run: Run) {
    put_space(out, space);
    put_run(out, run);
}

fn put_space(out: &mut Writer<'_>, space: i32) {
    out.u32(space.unsigned_abs());
}

fn put_run(out: &mut Writer<'_>, Run { start, pages }: Run) {
    out.u64(start).u32(pages);
}

pub(super) fn take_space(fields: &mut Reader<'_>) -> Result<i32, WireError> {
    let space = i32::try_from(fields.u32()?).map_err(|_| fields.bad("a process id is out of range"))?;
    if space == 0 { Err(fields.bad("a process id is out of range")) } else { Ok(space) }
}

/// Takes runs that are aligned, not empty, below the end of user memory, in order and apart.
pub(super) fn take_runs(fields: &mut Reader<'_>) -> Result<Vec<Run>, WireError> {
    let count = fields.u32()? as usize;
    if count > RUNS_MAX {
        return Err(fields.bad("more runs than there may be"));
    }
    let mut runs = Vec::with_capacity(count);
    let mut end = 0;
    for _ in 0..count {
        let run = take_run(fields)?;
        if run.start < end {
            return Err(fields.bad("runs overlap or are out of order"));
        }
        end = run.start + u64::from(run.pages) * PAGE_BYTES;
        runs.push(run);
    }
    Ok(runs)
}

pub(super) fn take_run(fields: &mut Reader<'_>) -> Result<Run, WireError> {
    let run = Run { start: fields.u64()?, pages: fields.u32()? };
    let fits = run.start < ADDRESS_END && u64::from(run.pages) * PAGE_BYTES <= ADDRESS_END - run.start;
    if run.pages == 0 || !run.start.is_multiple_of(PAGE_BYTES) || !fits {
        return Err(fields.bad("a run is empty, misaligned or out of range"));
    }
    Ok(run)
}

/// Takes as many bytes as the runs have pages.
pub(super) fn take_contents<'a>(fields: &mut Reader<'a>, runs: &[Run]) -> Result<&'a [u8], WireError> {
    let bytes = fields.rest();
    let pages: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
    if bytes.is_empty() || bytes.len() > DATA_LEN_MAX || bytes.len() as u64 != pages * PAGE_BYTES {
        return Err(fields.bad("the contents are not as long as the runs say"));
    }
    Ok(bytes)
}

/// Longest payload of a frame of runs without contents.
pub(super) const RUNS_LEN_MAX: u32 = 64 + 12 * 4096;
const _: () = assert!(RUNS_MAX == 4096);

const FAULT_CODE: u8 = 0xff;

/// First address that no user memory has, on the processors whose page tables have five levels.
const ADDRESS_END: u64 = 1 << 56;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn neighbours_share_a_stream_and_large_mappings_use_all_of_them() {
        for streams in [1, 2, 3, 8, BULK_STREAMS_MAX] {
            let base = 0x7f00_0000_0000;
            let used: BTreeSet<u8> = (0..1024)
                .map(|chunk| {
                    let start = base + chunk * CHUNK_BYTES;
                    let first = StreamId::of_page(1, start, streams);
                    assert_eq!(first, StreamId::of_page(1, start + CHUNK_BYTES - PAGE_BYTES, streams));
                    first
                })
                .collect();
            assert_eq!(used, (0..streams).collect());
        }
    }
}
