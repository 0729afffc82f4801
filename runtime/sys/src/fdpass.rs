//! File descriptors through unix sockets (`SCM_RIGHTS`).
//!
//! One message carries bytes and at most [`FDS_MAX`] descriptors. Received descriptors are close-on-exec and
//! owned, so none leaks when a message is refused.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

use crate::{Result, SysError};

/// Most descriptors in one message.
pub const FDS_MAX: usize = 64;

/// What one [`receive`] returned.
#[derive(Debug)]
pub struct Received {
    /// Number of bytes written to the start of the buffer.
    pub length_bytes: usize,
    /// The descriptors that came along, in the sender's order.
    pub fds: Vec<OwnedFd>,
}

/// Makes a connected pair of `SOCK_SEQPACKET` sockets, both close-on-exec.
///
/// # Errors
/// [`SysError::Call`] when no descriptor is left.
pub fn seqpacket_pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(SysError::call("socketpair"))
}

/// Sends `bytes` with `fds` as one message; blocks until the peer's buffer has room.
///
/// A stream socket carries descriptors only together with at least one byte.
///
/// # Errors
/// [`SysError::Closed`] when the peer is gone, [`SysError::Call`] otherwise.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let socket = socket.as_fd().as_raw_fd();
    loop {
        match sendmsg::<()>(socket, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(sent) => return Ok(sent),
            Err(Errno::EINTR) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(SysError::Closed),
            Err(errno) => return Err(SysError::Call { call: "sendmsg", errno }),
        }
    }
}

/// Receives one message (or, on a stream, the next bytes) into `buffer`; blocks until something arrives.
///
/// # Errors
/// [`SysError::Closed`] at end of file, [`SysError::Oversized`] when the message did not fit, [`SysError::Call`]
/// otherwise. Descriptors of a refused message are closed.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<Received> {
    let socket = socket.as_fd().as_raw_fd();
    let limit_bytes = buffer.len();
    loop {
        let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
        let mut slices = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket, &mut slices, Some(&mut control), flags) {
            Ok(message) => {
                let mut fds = Vec::new();
                for item in message.cmsgs().map_err(SysError::call("recvmsg"))? {
                    if let ControlMessageOwned::ScmRights(raw) = item {
                        fds.extend(raw.into_iter().map(own));
                    }
                }
                if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
                    return Err(SysError::Oversized { limit_bytes });
                }
                if message.bytes == 0 && fds.is_empty() {
                    return Err(SysError::Closed);
                }
                return Ok(Received { length_bytes: message.bytes, fds });
            }
            Err(Errno::EINTR) => {}
            Err(Errno::ECONNRESET) => return Err(SysError::Closed),
            Err(errno) => return Err(SysError::Call { call: "recvmsg", errno }),
        }
    }
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just installed `fd` for the message that is being read, and the message is read
    // once, so nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_usable_and_close_on_exec() {
        let (left, right) = seqpacket_pair().unwrap();
        let (mut reader, writer) = UnixStream::pair().unwrap();
        send(&left, b"take", &[writer.as_fd()]).unwrap();
        drop(writer);
        let mut buffer = [0; 16];
        let got = receive(&right, &mut buffer).unwrap();
        assert_eq!(&buffer[..got.length_bytes], b"take");
        let [fd] = <[OwnedFd; 1]>::try_from(got.fds).unwrap();
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        UnixStream::from(fd).write_all(b"x").unwrap();
        let mut one = [0; 1];
        std::io::Read::read_exact(&mut reader, &mut one).unwrap();
        assert_eq!(&one, b"x");
    }

    #[test]
    fn a_closed_peer_and_a_long_message_are_errors() {
        let (left, right) = seqpacket_pair().unwrap();
        send(&left, &[7; 32], &[]).unwrap();
        let mut buffer = [0; 16];
        assert!(matches!(receive(&right, &mut buffer), Err(SysError::Oversized { limit_bytes: 16 })));
        drop(left);
        assert!(matches!(receive(&right, &mut buffer), Err(SysError::Closed)));
        assert!(matches!(send(&right, b"x", &[]), Err(SysError::Closed)));
    }
}
