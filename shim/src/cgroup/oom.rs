//! Tells when a container ran out of memory.
//!
//! v1: an eventfd registered with `memory.oom_control`, signalled at every such event and once more when the
//! group goes away. v2: `memory.events`, on which poll(2) reports every change; `oom_kill` counts.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::{io::AsyncReadExt, net::unix::pipe, task::JoinHandle};

use super::{Cgroup, read::Table};

/// A running watch; ends when dropped.
#[derive(Debug)]
pub(crate) struct OomWatch(JoinHandle<()>);

impl OomWatch {
    /// Calls `report` at each out-of-memory event of `cgroup`.
    ///
    /// # Errors
    /// When the kernel has no such events for this group.
    pub(crate) fn start(cgroup: &Cgroup, report: impl Fn() + Send + 'static) -> io::Result<Self> {
        let task = match cgroup {
            Cgroup::V1(found) => {
                let directory = found.get("memory").ok_or(io::ErrorKind::NotFound)?;
                let watch = WatchV1::new(directory)?;
                tokio::spawn(async move { watch.run(report).await })
            }
            Cgroup::V2(directory) => {
                let watch = WatchV2::new(directory)?;
                tokio::spawn(async move { watch.run(report).await })
            }
        };
        Ok(Self(task))
    }
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Both kinds of descriptor are waited for through tokio's reader of pipes, which asks nothing of them but
/// read(2) and poll(2). Its buffer is larger than what there is to read: a read that does not fill it tells
/// tokio to wait for the next event.
struct WatchV1 {
    events: pipe::Receiver,
    control: PathBuf,
}

impl WatchV1 {
    fn new(directory: &Path) -> io::Result<Self> {
        let control = directory.join("memory.oom_control");
        let events = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let file = File::open(&control)?;
        let registration = format!("{} {}", events.as_raw_fd(), file.as_raw_fd());
        fs::write(directory.join("cgroup.event_control"), registration)?;
        Ok(Self { events: pipe::Receiver::from_owned_fd_unchecked(OwnedFd::from(events))?, control })
    }

    async fn run(mut self, report: impl Fn()) {
        let mut count = [0; 16];
        while self.events.read(&mut count).await.is_ok() {
            // The last event is that the group is gone.
            if !self.control.exists() {
                return;
            }
            report();
        }
    }
}

struct WatchV2 {
    events: pipe::Receiver,
    /// The same open file: it is read from the beginning at every event.
    file: File,
    kills: u64,
}

impl WatchV2 {
    fn new(directory: &Path) -> io::Result<Self> {
        let mut file = File::open(directory.join("memory.events"))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let events = pipe::Receiver::from_owned_fd_unchecked(file.try_clone()?.into())?;
        Ok(Self { events, file, kills: kills(text.as_bytes()) })
    }

    async fn run(mut self, report: impl Fn()) {
        let mut text = [0; 4096];
        loop {
            // Fails, as the read does (ENODEV), once the group is gone.
            if self.file.rewind().is_err() {
                return;
            }
            let Ok(length) = self.events.read(&mut text).await else { return };
            let kills = kills(&text[..length]);
            if kills > self.kills {
                report();
            }
            self.kills = kills;
        }
    }
}

fn kills(text: &[u8]) -> u64 {
    Table::parse(&String::from_utf8_lossy(text)).get("oom_kill")
}
