//! Threads whose memory is their stack: contents in every frame, checked on the way back.

use std::io;
use std::thread;

use super::super::page::{Identity, SIZE};
use super::{Subject, drive};

/// Runs `count` threads with `depth` frames of a page each, for ever; the first is the process's own.
pub(super) fn run(depth: u64, count: u64) -> io::Result<()> {
    let bytes = usize::try_from(depth).unwrap_or_default() * FRAME_BYTES_MAX + SPARE_BYTES;
    let start = |writer| {
        thread::Builder::new().stack_size(bytes).spawn(move || drive(writer, Stack::new(writer, depth)))
    };
    let threads = (1..count).map(start).collect::<io::Result<Vec<_>>>()?;
    drive(0, Stack::new(0, depth))?;
    drop(threads);
    Ok(())
}

#[derive(Debug)]
struct Stack {
    writer: u64,
    depth: u64,
    version: u64,
}

impl Stack {
    fn new(writer: u64, depth: u64) -> Self {
        Self { writer, depth, version: 0 }
    }
}

impl Subject for Stack {
    fn pages(&self) -> u64 {
        self.depth
    }

    fn step(&mut self) -> io::Result<u64> {
        self.version += 1;
        Ok(descend(Identity { writer: self.writer, index: self.depth, version: self.version }))
    }

    /// Every step checks all there is.
    fn check(&mut self) -> io::Result<Option<u64>> {
        Ok(Some(0))
    }

    fn batch(&self) -> u32 {
        1
    }

    fn pass(&self) -> u32 {
        4
    }
}

/// Fills a page, goes as deep as the index says, stays there for a moment, and checks the pages on the way back;
/// returns how many were wrong.
#[inline(never)]
fn descend(identity: Identity) -> u64 {
    let mut page = [0; SIZE];
    identity.fill(&mut page);
    let page = std::hint::black_box(&mut page);
    let deeper = match identity.index {
        0 => {
            thread::sleep(REST);
            0
        }
        index => descend(Identity { index: index - 1, ..identity }),
    };
    deeper + u64::from(!identity.holds(page))
}

/// Larger than a frame becomes without optimisation.
const FRAME_BYTES_MAX: usize = 3 * SIZE;
const SPARE_BYTES: usize = 256 << 10;
const REST: std::time::Duration = std::time::Duration::from_millis(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deep_stack_is_found_whole() {
        let run = || descend(Identity { writer: 1, index: 100, version: 1 });
        let bytes = 100 * FRAME_BYTES_MAX + SPARE_BYTES;
        let thread = thread::Builder::new().stack_size(bytes).spawn(run).unwrap();
        assert_eq!(thread.join().unwrap(), 0);
    }
}
