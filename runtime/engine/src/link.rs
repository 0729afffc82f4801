//! A framed link over TCP: what `godwit_protocol::wire` says, with a socket under it.
//!
//! ```text
//! Link::connect / Link::accept ──hello both ways──► Link ──split──► SendHalf (any thread)
//!                                                    │              ReceiveHalf (one thread)
//!                                                    └─into_parts──► socket + LinkState ──(another process)──► Link::resume
//! ```
//! Everything blocks. A frame is read in two exact reads, header and payload, and never a byte beyond it, so a link
//! can change hands between two frames. A send is one vectored write of header, fields and content: content is
//! not copied. A dead peer is found by TCP (keepalive while idle, [`PEER_SILENCE_MAX`] for unacknowledged data),
//! so a thread that waits for a frame needs no timer of its own.
//!
//! This module knows frames, and neither phases nor files.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use godwit_protocol::wire::{
    FRAME_HEADER_LEN, FrameHeader, HELLO_LEN, Hello, Kind, Message, Negotiated, WireError,
};
use nix::sys::socket::{setsockopt, sockopt};

/// Longest time in which data may stay unacknowledged, or a keepalive unanswered, before the link is lost.
pub const PEER_SILENCE_MAX: Duration = Duration::from_secs(20);

/// Longest time to wait for a connection to one address.
pub const CONNECT_MAX: Duration = Duration::from_secs(5);

/// Longest time to wait for the peer's hello.
pub const HELLO_MAX: Duration = Duration::from_secs(5);

/// A link that cannot be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The target's name has no address.
    #[error("no address is known for `{host}`")]
    Resolve {
        /// What was looked up.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing answers at the address.
    #[error("no connection to {address}: is `godwit agent` listening there?")]
    Connect {
        /// The address that was tried last.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something answers, and not with a hello that fits.
    #[error("nothing can be agreed with what listens at {address}, where `godwit agent` should")]
    Greet {
        /// The address that answered.
        address: SocketAddr,
        /// What it did.
        #[source]
        source: Box<Self>,
    },
    /// The peer closed the link.
    #[error("the peer closed the link")]
    Closed,
    /// Nothing came in the time allowed.
    #[error("the peer was silent for {} s", .limit.as_secs())]
    Silent {
        /// The time allowed.
        limit: Duration,
    },
    /// The connection broke.
    #[error("the link is lost")]
    Lost(#[from] io::Error),
    /// The peer sent what the protocol does not allow.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer sent a message that has no place here.
    #[error("the peer sent {kind:?} where {expected} was due")]
    Unexpected {
        /// What it sent.
        kind: Kind,
        /// What was due.
        expected: &'static str,
    },
}

/// How far a link has come; with the socket it is the whole link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LinkState {
    /// What the hellos agreed on.
    pub negotiated: Negotiated,
    /// Number of the next frame to send.
    pub send_seq: u32,
    /// Number of the next frame to receive.
    pub receive_seq: u32,
    /// Bytes sent so far, with headers.
    pub sent_bytes: u64,
    /// Bytes received so far, with headers.
    pub received_bytes: u64,
}

/// A link whose hellos have been exchanged.
#[derive(Debug)]
pub struct Link {
    send: SendHalf,
    receive: ReceiveHalf,
    negotiated: Negotiated,
}

/// The sending half of a link.
#[derive(Debug)]
pub struct SendHalf {
    socket: Arc<TcpStream>,
    head: Vec<u8>,
    seq: u32,
    sent_bytes: Arc<AtomicU64>,
}

/// The receiving half of a link.
#[derive(Debug)]
pub struct ReceiveHalf {
    socket: Arc<TcpStream>,
    payload: Vec<u8>,
    seq: u32,
    received_bytes: u64,
    silence_max: Option<Duration>,
}

/// Breaks a link from another thread.
#[derive(Debug, Clone)]
pub struct Breaker(Arc<TcpStream>);

impl Link {
    /// Connects to `host` and exchanges hellos.
    ///
    /// # Errors
    /// [`LinkError`] if no address of the host answers in [`CONNECT_MAX`], or no version is common.
    pub fn connect(host: &str, port: u16) -> Result<Self, LinkError> {
        let addresses = (host, port)
            .to_socket_addrs()
            .map_err(|source| LinkError::Resolve { host: host.to_owned(), source })?;
        let mut failed = None;
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT_MAX) {
                Ok(socket) => {
                    let greeted = Self::greet(socket, Hello::OURS);
                    return greeted.map_err(|source| LinkError::Greet { address, source: Box::new(source) });
                }
                Err(source) => failed = Some((address, source)),
            }
        }
        Err(match failed {
            Some((address, source)) => LinkError::Connect { address: address.to_string(), source },
            None => LinkError::Resolve { host: host.to_owned(), source: io::ErrorKind::NotFound.into() },
        })
    }

    /// Exchanges hellos on a connection that a peer opened.
    ///
    /// # Errors
    /// [`LinkError`] if the peer is silent, is no godwit, or no version is common; it has been sent this end's
    /// hello and knows why.
    pub fn accept(socket: TcpStream) -> Result<Self, LinkError> {
        Self::greet(socket, Hello::OURS)
    }

    fn greet(socket: TcpStream, ours: Hello) -> Result<Self, LinkError> {
        // An accepted socket does not inherit the listener's mode everywhere; a tokio listener's is non-blocking.
        socket.set_nonblocking(false)?;
        prepare(&socket)?;
        (&socket).write_all(&ours.to_bytes())?;
        let mut theirs = [0; HELLO_LEN];
        let mut receive = ReceiveHalf::over(Arc::new(socket), 0, 0);
        receive.set_silence_max(Some(HELLO_MAX))?;
        receive.fill(&mut theirs)?;
        receive.set_silence_max(None)?;
        let negotiated = ours.negotiate(Hello::from_bytes(theirs)?)?;
        let hello_bytes = HELLO_LEN as u64;
        receive.received_bytes = hello_bytes;
        let send = SendHalf::over(Arc::clone(&receive.socket), 0, hello_bytes);
        Ok(Self { send, receive, negotiated })
    }

    /// Takes over a link from another process.
    ///
    /// # Errors
    /// [`LinkError::Lost`] if the socket takes no options.
    pub fn resume(socket: TcpStream, state: LinkState) -> Result<Self, LinkError> {
        socket.set_nonblocking(false)?;
        prepare(&socket)?;
        let socket = Arc::new(socket);
        Ok(Self {
            send: SendHalf::over(Arc::clone(&socket), state.send_seq, state.sent_bytes),
            receive: ReceiveHalf::over(socket, state.receive_seq, state.received_bytes),
            negotiated: state.negotiated,
        })
    }

    /// Returns how far the link has come, to be handed over with its socket.
    #[must_use]
    pub fn state(&self) -> LinkState {
        LinkState {
            negotiated: self.negotiated,
            send_seq: self.send.seq,
            receive_seq: self.receive.seq,
            sent_bytes: self.send.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.receive.received_bytes,
        }
    }

    /// Returns what the hellos agreed on.
    #[must_use]
    pub const fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Returns the peer's address.
    ///
    /// # Errors
    /// [`LinkError::Lost`] if the connection is gone.
    pub fn peer(&self) -> Result<SocketAddr, LinkError> {
        Ok(self.send.socket.peer_addr()?)
    }

    /// Sends one message; see [`SendHalf::send`].
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), LinkError> {
        self.send.send(message)
    }

    /// Waits for one message; see [`ReceiveHalf::receive`].
    ///
    /// # Errors
    /// As [`ReceiveHalf::receive`].
    pub fn receive(&mut self) -> Result<Message<'_>, LinkError> {
        self.receive.receive()
    }

    /// Sets how long [`Link::receive`] waits for the next byte; `None` waits as long as the peer lives.
    ///
    /// # Errors
    /// [`LinkError::Lost`] if the socket refuses.
    pub fn set_silence_max(&mut self, limit: Option<Duration>) -> Result<(), LinkError> {
        self.receive.set_silence_max(limit)
    }

    /// Returns the two halves.
    #[must_use]
    pub fn split(self) -> (SendHalf, ReceiveHalf) {
        (self.send, self.receive)
    }

    /// Returns what breaks this link from another thread.
    #[must_use]
    pub fn breaker(&self) -> Breaker {
        self.send.breaker()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.send.socket.as_fd()
    }
}

impl SendHalf {
    fn over(socket: Arc<TcpStream>, seq: u32, sent_bytes: u64) -> Self {
        Self { socket, head: Vec::new(), seq, sent_bytes: Arc::new(AtomicU64::new(sent_bytes)) }
    }

    /// Sends one message and returns when the kernel has taken all of it.
    ///
    /// # Errors
    /// [`LinkError::Wire`] if the message exceeds its maximum (nothing was sent then), [`LinkError::Closed`] or
    /// [`LinkError::Lost`] if the peer is gone.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), LinkError> {
        self.send_scattered(message, &[])
    }

    /// Sends one message whose content goes on in `parts`: what lies apart in memory is one frame.
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    pub fn send_scattered(&mut self, message: &Message<'_>, parts: &[&[u8]]) -> Result<(), LinkError> {
        self.head.clear();
        let (kind, bulk) = message.encode(&mut self.head)?;
        let mut payload = Vec::with_capacity(parts.len() + 2);
        payload.extend([self.head.as_slice(), bulk]);
        payload.extend(parts);
        let header = FrameHeader::seal_parts(kind, self.seq, &payload)?.to_bytes();
        let mut slices = Vec::with_capacity(payload.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(payload.iter().map(|part| IoSlice::new(part)));
        let frame_bytes: usize = slices.iter().map(|slice| slice.len()).sum();
        write_all_vectored(&self.socket, &mut slices).map_err(lost_or_closed)?;
        self.seq = self.seq.wrapping_add(1);
        self.sent_bytes.fetch_add(frame_bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Returns a counter of the bytes sent, with headers.
    #[must_use]
    pub fn sent_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.sent_bytes)
    }

    /// Returns what breaks this link from another thread.
    #[must_use]
    pub fn breaker(&self) -> Breaker {
        Breaker(Arc::clone(&self.socket))
    }
}

impl ReceiveHalf {
    fn over(socket: Arc<TcpStream>, seq: u32, received_bytes: u64) -> Self {
        Self { socket, payload: Vec::new(), seq, received_bytes, silence_max: None }
    }

    /// Waits for one message. Its content is valid until the next call.
    ///
    /// # Errors
    /// [`LinkError::Closed`] if the peer closed the link between two frames or within one, [`LinkError::Silent`]
    /// after the time allowed, [`LinkError::Wire`] if the frame is not what it should be. The link is of no use
    /// after any of them.
    pub fn receive(&mut self) -> Result<Message<'_>, LinkError> {
        let mut header = [0; FRAME_HEADER_LEN];
        self.fill(&mut header)?;
        let header = FrameHeader::from_bytes(header, self.seq)?;
        // Bounded by the kind's maximum, which the header's check has enforced. The buffer only grows, and its
        // old content is overwritten: zeroing a megabyte for each frame would cost as much as its checksum.
        let len = header.len as usize;
        if self.payload.len() < len {
            self.payload.resize(len, 0);
        }
        let mut payload = std::mem::take(&mut self.payload);
        let filled = self.fill(&mut payload[..len]);
        self.payload = payload;
        filled?;
        let payload = &self.payload[..len];
        header.verify(payload)?;
        self.seq = self.seq.wrapping_add(1);
        self.received_bytes += (FRAME_HEADER_LEN + len) as u64;
        Ok(Message::decode(header.kind, payload)?)
    }

    /// Reads to the end of the link without looking at what comes.
    pub fn drain(&mut self) {
        self.payload.resize(DRAIN_LEN, 0);
        let mut payload = std::mem::take(&mut self.payload);
        while matches!((&*self.socket).read(&mut payload), Ok(1..)) {}
    }

    /// Sets how long [`ReceiveHalf::receive`] waits for the next byte; `None` waits as long as the peer lives.
    ///
    /// # Errors
    /// [`LinkError::Lost`] if the socket refuses.
    pub fn set_silence_max(&mut self, limit: Option<Duration>) -> Result<(), LinkError> {
        self.socket.set_read_timeout(limit)?;
        self.silence_max = limit;
        Ok(())
    }

    fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), LinkError> {
        while !buffer.is_empty() {
            match (&*self.socket).read(buffer) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(LinkError::Silent { limit: self.silence_max.unwrap_or_default() });
                }
                Err(error) => return Err(lost_or_closed(error)),
            }
        }
        Ok(())
    }
}

impl Breaker {
    /// Ends this end's sending: the peer reads what was sent, and then the end of the link.
    pub fn stop_sending(&self) {
        // A socket that is not connected any more is past it.
        drop(self.0.shutdown(Shutdown::Write));
    }

    /// Ends this end's receiving: a receive that waits ends as if the peer had closed the link.
    pub fn stop_receiving(&self) {
        // A socket that is not connected any more is past it.
        drop(self.0.shutdown(Shutdown::Read));
    }

    /// Ends the link: both ends' pending and later calls fail.
    pub fn break_link(&self) {
        // A socket that is not connected any more is what is wanted.
        drop(self.0.shutdown(Shutdown::Both));
    }
}

/// As much as one read takes from a link that nobody listens to any more.
const DRAIN_LEN: usize = 64 << 10;

fn prepare(socket: &TcpStream) -> io::Result<()> {
    let silence_s = u32::try_from(PEER_SILENCE_MAX.as_secs()).unwrap_or(u32::MAX);
    socket.set_nodelay(true)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &(silence_s / 4))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &(silence_s / 4))?;
    setsockopt(socket, sockopt::TcpKeepCount, &3)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &(silence_s * 1000))?;
    Ok(())
}

fn write_all_vectored(mut socket: &TcpStream, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Empty slices at the front would make a short write of nothing look like the end of the stream.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match socket.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn lost_or_closed(error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
            LinkError::Closed
        }
        _ => LinkError::Lost(error),
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
