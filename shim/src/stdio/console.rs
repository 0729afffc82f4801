//! The socket by which a runtime hands over the master of a container's terminal.

use std::{
    fs,
    fs::File,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use godwit_sys::fdpass;
use tokio::net::UnixListener;

use crate::error::{Result, ShimError};

/// Short, because the path of a socket has at most 107 bytes and a bundle's may be longer than that.
const DIRECTORY: &str = "/run/godwit/console";

/// The runtime has already ended well when the master is waited for.
const RECEIVE_LIMIT: Duration = Duration::from_secs(10);

/// Longest name of a terminal that may come with the master, in bytes.
const NAME_MAX: usize = 4096;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A listening socket, removed when dropped.
#[derive(Debug)]
pub(super) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens under a name of its own.
    pub(super) fn bind() -> Result<Self> {
        Self::bind_in(Path::new(DIRECTORY))
    }

    fn bind_in(directory: &Path) -> Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(ShimError::io(format!("make {}", directory.display())))?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("{}-{number}", std::process::id()));
        // Left by a former process with our pid.
        fs::remove_file(&path).ok();
        let listener =
            UnixListener::bind(&path).map_err(ShimError::io(format!("bind {}", path.display())))?;
        let socket = Self { listener, path };
        fs::set_permissions(&socket.path, fs::Permissions::from_mode(0o600))
            .map_err(ShimError::io(format!("protect {}", socket.path.display())))?;
        Ok(socket)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the master that the runtime sent.
    pub(super) async fn receive(self) -> Result<File> {
        let timed_out = |_| ShimError::TimedOut { what: "the container's terminal" };
        let accepted =
            tokio::time::timeout(RECEIVE_LIMIT, self.listener.accept()).await.map_err(timed_out)?;
        let (stream, _) = accepted.map_err(ShimError::io("accept the runtime's connection"))?;
        tokio::time::timeout(RECEIVE_LIMIT, stream.readable())
            .await
            .map_err(timed_out)?
            .map_err(ShimError::io("wait for the terminal"))?;
        let mut name = [0; NAME_MAX];
        let mut received = fdpass::receive(&stream, &mut name)
            .map_err(std::io::Error::other)
            .map_err(ShimError::io("receive the terminal"))?;
        match (received.fds.pop(), received.fds.is_empty()) {
            (Some(master), true) => Ok(master.into()),
            _ => Err(ShimError::io("receive the terminal")(std::io::Error::other("expected one descriptor"))),
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::debug!("failed to remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn one_descriptor_is_the_terminal() {
        let directory = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::bind_in(directory.path()).unwrap();
        let path = socket.path().to_owned();
        let (reader, writer) = std::io::pipe().unwrap();
        let runtime = std::os::unix::net::UnixStream::connect(&path).unwrap();
        fdpass::send(&runtime, b"/dev/pts/ptmx", &[writer.as_fd()]).unwrap();
        drop(writer);
        let master = socket.receive().await.unwrap();
        std::io::Write::write_all(&mut &master, b"x").unwrap();
        drop(master);
        assert_eq!(std::io::read_to_string(reader).unwrap(), "x");
        assert!(!path.exists());
    }
}
