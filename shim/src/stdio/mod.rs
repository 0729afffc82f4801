//! What a container's process reads and writes, and where containerd wants it.
//!
//! ```text
//! Address (as sent) ──prepare──► Prepared{fds for the runtime} ──verb──► connect ──► Streams (copying)
//!
//!   FIFO, file://   pipe to the process, copied by the shim; the pipe is what CRIU can dump and find again
//!   binary://       pipes straight into a logging program
//!   terminal        the runtime sends the master by the console socket; copied by the shim
//!   nothing         /dev/null
//! ```
//! The end of a process is told when its output has been read: see [`Unread`].
//!
//! Copies start after the verb, so a failed verb never takes input away. They end when the process and its
//! children have closed their side; [`Streams::shutdown`] waits for that, but not for ever.

mod console;
mod logger;
mod unread;

use std::{
    io::{PipeReader, PipeWriter},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use containerd_shim::io::{IoTasks, Pty};
use nix::unistd::{Gid, Uid, fchown};
use tokio::{
    io::{AsyncRead, AsyncWriteExt},
    net::unix::pipe,
    task::JoinHandle,
};

use crate::{
    error::{Result, ShimError},
    reaper::Reaper,
};

pub(crate) use logger::reserve_descriptors;
pub(crate) use unread::Unread;

use console::ConsoleSocket;
use logger::{Logger, LoggerUri};
use unread::Output;

/// How long a copy into a file may go on after the process has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Where containerd wants a process's stdio, as it was sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// For whom stdio is prepared.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    /// The container's namespace.
    pub(crate) namespace: String,
    /// The container, or the process beside it.
    pub(crate) id: String,
    /// User and group that own the process's ends of the pipes.
    pub(crate) uid: u32,
    /// See `uid`.
    pub(crate) gid: u32,
    /// Starts and collects logging programs.
    pub(crate) reaper: Arc<Reaper>,
}

/// Stdio before the process exists.
#[derive(Debug)]
pub(crate) struct Prepared {
    address: Address,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Null,
    Copied { ours: Ours, theirs: [Option<OwnedFd>; 3] },
    Logged { logger: Logger, theirs: [Option<OwnedFd>; 3] },
    Terminal { socket: ConsoleSocket, logger: Option<(Logger, OwnedFd)> },
}

/// The shim's ends of the pipes.
#[derive(Debug, Default)]
struct Ours {
    stdin: Option<PipeWriter>,
    stdout: Option<PipeReader>,
    stderr: Option<PipeReader>,
}

impl Prepared {
    /// Makes the pipes, the console socket or the logging program that `address` asks for.
    ///
    /// # Errors
    /// [`ShimError::BadStdio`] for an address that cannot be understood, [`ShimError::Io`] otherwise.
    pub(crate) async fn new(address: &Address, owner: &Owner) -> Result<Self> {
        let kind = match (address.terminal, LoggerUri::parse(&address.stdout)?) {
            (true, None) => Kind::Terminal { socket: ConsoleSocket::bind()?, logger: None },
            (true, Some(uri)) => {
                let (logger, [stdout, _stderr]) = Logger::start(&uri, owner).await?;
                Kind::Terminal { socket: ConsoleSocket::bind()?, logger: Some((logger, stdout)) }
            }
            (false, Some(uri)) => {
                let (logger, [stdout, stderr]) = Logger::start(&uri, owner).await?;
                Kind::Logged { logger, theirs: [None, Some(stdout), Some(stderr)] }
            }
            (false, None) => piped(address, owner)?,
        };
        Ok(Self { address: address.clone(), kind })
    }

    /// Returns where the runtime sends the terminal's master, if there is to be one.
    pub(crate) fn console(&self) -> Option<PathBuf> {
        match &self.kind {
            Kind::Terminal { socket, .. } => Some(socket.path().to_owned()),
            _ => None,
        }
    }

    /// Takes the process's ends; nothing when its stdio is a terminal.
    pub(crate) fn take_theirs(&mut self) -> Option<[Option<OwnedFd>; 3]> {
        match &mut self.kind {
            Kind::Null => Some([None, None, None]),
            Kind::Copied { theirs, .. } | Kind::Logged { theirs, .. } => Some(std::mem::take(theirs)),
            Kind::Terminal { .. } => None,
        }
    }

    /// Starts to copy, now that the process exists.
    ///
    /// # Errors
    /// When a FIFO or file cannot be opened, or no terminal came.
    pub(crate) async fn connect(self) -> Result<Streams> {
        let mut streams = Streams::default();
        let address = &self.address;
        match self.kind {
            Kind::Null => {}
            Kind::Logged { logger, .. } => streams.logger = Some(logger),
            Kind::Copied { ours, .. } => {
                if let Some(stdin) = ours.stdin {
                    let sender =
                        pipe::Sender::from_owned_fd(stdin.into()).map_err(ShimError::io("use a pipe"))?;
                    streams.copies.copy_from_fifo(&address.stdin, sender).map_err(library("open stdin"))?;
                }
                let mut outputs = Vec::new();
                for (pipe, to) in [(ours.stdout, &address.stdout), (ours.stderr, &address.stderr)] {
                    let Some(pipe) = pipe else { continue };
                    let ours = pipe.try_clone().map_err(ShimError::io("duplicate a descriptor"))?;
                    outputs.extend(output(Some(ours.into()), to));
                    streams.copy_out(receiver(pipe)?, to)?;
                }
                streams.unread = Unread::new(outputs);
            }
            Kind::Terminal { socket, logger } => {
                let pty = Pty::new(socket.receive().await?).map_err(library("use the terminal"))?;
                streams.console = Some(pty.clone());
                if !address.stdin.is_empty() {
                    streams
                        .copies
                        .copy_from_fifo(&address.stdin, pty.clone())
                        .map_err(library("open stdin"))?;
                }
                if let Some((logger, stdout)) = logger {
                    streams.logger = Some(logger);
                    let sender = pipe::Sender::from_owned_fd(stdout).map_err(ShimError::io("use a pipe"))?;
                    streams.own_copies.push(copy(pty, sender));
                } else if address.stdout.is_empty() {
                    // Nobody wants it, but a terminal that is not read blocks the process.
                    streams.own_copies.push(copy(pty, tokio::io::sink()));
                } else {
                    streams.unread = Unread::new(output(None, &address.stdout).into_iter().collect());
                    streams.copy_out(pty, &address.stdout)?;
                }
            }
        }
        Ok(streams)
    }
}

/// The running copies of one process's stdio.
#[derive(Default)]
pub(crate) struct Streams {
    copies: IoTasks,
    own_copies: Vec<JoinHandle<()>>,
    console: Option<Pty>,
    logger: Option<Logger>,
    unread: Unread,
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams")
            .field("own_copies", &self.own_copies.len())
            .field("console", &self.console.is_some())
            .field("logger", &self.logger)
            .finish_non_exhaustive()
    }
}

impl Streams {
    /// Lets the process see the end of its input once everything written so far is read.
    pub(crate) fn close_input(&self) {
        self.copies.close_input();
    }

    /// Returns what tells whether all that the process wrote has been read.
    pub(crate) fn unread(&self) -> Unread {
        self.unread.clone()
    }

    /// Tells the terminal, if there is one, its new size in characters.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let Some(console) = &self.console else { return Ok(()) };
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(console.as_fd(), size)
            .map_err(|errno| ShimError::io("resize the terminal")(errno.into()))
    }

    /// Waits until what the process wrote has been passed on, then lets go of everything.
    pub(crate) async fn shutdown(mut self) {
        // The copies of the terminal hold it open, and it ends only when the process's side is closed.
        self.console = None;
        let own_copies = std::mem::take(&mut self.own_copies);
        let own = async {
            for mut copy in own_copies {
                if tokio::time::timeout(DRAIN_LIMIT, &mut copy).await.is_err() {
                    copy.abort();
                }
            }
        };
        tokio::join!(self.copies.shutdown(), own);
        if let Some(logger) = self.logger.take() {
            logger.stop().await;
        }
    }

    fn copy_out<R>(&mut self, from: R, to: &str) -> Result<()>
    where
        R: AsyncRead + Send + Unpin + 'static,
    {
        let path = file_path(to)?;
        if is_fifo(&path) {
            return self.copies.copy_to_fifo(from, to).map_err(library("open an output FIFO"));
        }
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(to.starts_with(FILE_SCHEME))
            .open(&path)
            .map_err(ShimError::io(format!("open {}", path.display())))?;
        self.own_copies.push(copy(from, tokio::fs::File::from_std(file)));
        Ok(())
    }
}

const FILE_SCHEME: &str = "file://";

/// Returns the path that an output address names.
fn file_path(address: &str) -> Result<PathBuf> {
    if let Some(path) = address.strip_prefix(FILE_SCHEME) {
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(ShimError::BadStdio { uri: address.to_owned(), reason: "its path is not absolute" });
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(ShimError::io(format!("make {}", parent.display())))?;
        }
        return Ok(path);
    }
    let path = address.strip_prefix("fifo://").unwrap_or(address);
    if path.contains("://") {
        let reason = "expected a path, fifo://, file://, binary:// or binary-v2://";
        return Err(ShimError::BadStdio { uri: address.to_owned(), reason });
    }
    Ok(path.into())
}

/// Returns the output that goes from `pipe` to the address `to`, if that is a FIFO.
fn output(pipe: Option<OwnedFd>, to: &str) -> Option<Output> {
    let fifo = file_path(to).ok().filter(|path| is_fifo(path))?;
    Some(Output { pipe, fifo })
}

fn is_fifo(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|entry| entry.file_type().is_fifo())
}

fn piped(address: &Address, owner: &Owner) -> Result<Kind> {
    if address.stdin.is_empty() && address.stdout.is_empty() && address.stderr.is_empty() {
        return Ok(Kind::Null);
    }
    let (mut ours, mut theirs) = (Ours::default(), [None, None, None]);
    if !address.stdin.is_empty() {
        let (reader, writer) = new_pipe()?;
        theirs[0] = Some(owned(reader.into(), owner)?);
        ours.stdin = Some(writer);
    }
    if !address.stdout.is_empty() {
        file_path(&address.stdout)?;
        let (reader, writer) = new_pipe()?;
        theirs[1] = Some(owned(writer.into(), owner)?);
        ours.stdout = Some(reader);
    }
    if !address.stderr.is_empty() {
        file_path(&address.stderr)?;
        let (reader, writer) = new_pipe()?;
        theirs[2] = Some(owned(writer.into(), owner)?);
        ours.stderr = Some(reader);
    }
    Ok(Kind::Copied { ours, theirs })
}

fn new_pipe() -> Result<(PipeReader, PipeWriter)> {
    std::io::pipe().map_err(ShimError::io("make a pipe"))
}

fn owned(fd: OwnedFd, owner: &Owner) -> Result<OwnedFd> {
    if (owner.uid, owner.gid) != (0, 0) {
        fchown(&fd, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
            .map_err(ShimError::errno("give a pipe to the container's user"))?;
    }
    Ok(fd)
}

fn receiver(reader: PipeReader) -> Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(reader.into()).map_err(ShimError::io("use a pipe"))
}

fn copy<R, W>(mut from: R, mut to: W) -> JoinHandle<()>
where
    R: AsyncRead + Send + Unpin + 'static,
    W: tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    tokio::spawn(async move {
        // A terminal that hangs up (EIO) and a logger that is gone (EPIPE) are how copies end.
        if let Err(error) = tokio::io::copy(&mut from, &mut to).await {
            log::debug!("copying output ended: {error}");
        }
        if let Err(error) = to.flush().await {
            log::debug!("failed to write the last output: {error}");
        }
    })
}

fn library(action: &'static str) -> impl FnOnce(containerd_shim::Error) -> ShimError {
    move |source| ShimError::Library { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner {
            namespace: "test".to_owned(),
            id: "web".to_owned(),
            uid: 0,
            gid: 0,
            reaper: Arc::new(Reaper::default()),
        }
    }

    #[test]
    fn addresses_name_paths_and_unknown_schemes_are_refused() {
        assert_eq!(file_path("/run/x").unwrap(), Path::new("/run/x"));
        assert_eq!(file_path("fifo:///run/x").unwrap(), Path::new("/run/x"));
        let error = file_path("gopher://x").unwrap_err().to_string();
        assert!(error.contains("gopher://x"), "{error}");
        file_path("file://relative").unwrap_err();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn output_arrives_whole_in_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/out.log");
        let stdout = format!("file://{}", path.display());
        let address = Address { stderr: stdout.clone(), stdout, ..Address::default() };
        let mut prepared = Prepared::new(&address, &owner()).await.unwrap();
        let [stdin, stdout, stderr] = prepared.take_theirs().unwrap();
        assert!(stdin.is_none());
        let streams = prepared.connect().await.unwrap();
        for fd in [stdout, stderr] {
            std::io::Write::write_all(&mut std::fs::File::from(fd.unwrap()), b"line\n").unwrap();
        }
        streams.shutdown().await;
        assert_eq!(std::fs::read_to_string(path).unwrap(), "line\nline\n");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn no_address_is_dev_null() {
        let mut prepared = Prepared::new(&Address::default(), &owner()).await.unwrap();
        assert!(prepared.take_theirs().unwrap().iter().all(Option::is_none));
        prepared.connect().await.unwrap().shutdown().await;
    }
}
