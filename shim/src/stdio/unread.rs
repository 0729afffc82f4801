//! What a process has written and nobody has read yet.
//!
//! A client may stop to read at the moment it hears of a process's end: ctr closes its ends of the FIFOs then, and
//! what is still in a pipe or in a FIFO is lost. So an end is told only when the last output has been read, or when
//! nobody seems to read it.

use std::{
    fs::OpenOptions,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use nix::libc::O_NONBLOCK;
use tokio::{
    task::yield_now,
    time::{Instant, sleep},
};

/// How long nobody reads anything before it is taken that nobody will.
const IDLE_LIMIT: Duration = Duration::from_millis(200);
/// How long an end is held back for a reader that is slow.
const LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(1);

/// The outputs of a process that go through FIFOs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unread(Arc<Vec<Output>>);

#[derive(Debug)]
pub(super) struct Output {
    /// The shim's end of the process's pipe; nothing for a terminal.
    pub(super) pipe: Option<OwnedFd>,
    pub(super) fifo: PathBuf,
}

impl Unread {
    pub(super) fn new(outputs: Vec<Output>) -> Self {
        Self(Arc::new(outputs))
    }

    /// Waits until all has been read, for as long as somebody reads.
    pub(crate) async fn none_left(&self) {
        let end = Instant::now() + LIMIT;
        let (mut left, mut since) = (u64::MAX, Instant::now());
        loop {
            let now = self.bytes();
            if now == 0 {
                // A copy that was made to yield between a read and its write has been resumed when we are.
                yield_now().await;
                if self.bytes() == 0 {
                    return;
                }
            }
            if now < left {
                (left, since) = (now, Instant::now());
            } else if since.elapsed() >= IDLE_LIMIT || Instant::now() >= end {
                return;
            }
            sleep(POLL).await;
        }
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(Output::bytes).sum()
    }
}

impl Output {
    fn bytes(&self) -> u64 {
        let in_pipe = self.pipe.as_ref().map_or(0, readable);
        // Opened anew every time: a reader that the shim kept would hide that the client's has gone.
        let fifo = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(&self.fifo);
        in_pipe + fifo.map_or(0, |fifo| readable(&fifo))
    }
}

fn readable(fd: impl AsFd) -> u64 {
    rustix::io::ioctl_fionread(fd).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn an_end_is_held_back_while_somebody_reads_and_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("out");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let mut both = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let unread = Unread::new(vec![Output { pipe: Some(reader.into()), fifo }]);
        unread.none_left().await;
        both.write_all(b"word").unwrap();
        writer.write_all(b"more").unwrap();
        assert_eq!(unread.bytes(), 8);
        let began = Instant::now();
        unread.none_left().await;
        assert!(began.elapsed() >= IDLE_LIMIT);
        let mut pipe = File::from(unread.0[0].pipe.as_ref().unwrap().try_clone().unwrap());
        let reading = tokio::task::spawn_blocking(move || {
            let mut word = [0; 4];
            both.read_exact(&mut word).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            pipe.read_exact(&mut word).unwrap();
        });
        unread.none_left().await;
        assert_eq!(unread.bytes(), 0);
        reading.await.unwrap();
    }
}
