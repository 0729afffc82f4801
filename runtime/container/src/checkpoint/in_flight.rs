//! Connections that wait to be accepted.
//!
//! The kernel has completed them, their clients may have sent requests, and no process holds them yet: CRIU cannot save
//! them, and refuses (its `criu/sk-inet.c`). Left out (`tcp_skip_in_flight`), they would be reset under their clients. A
//! server that runs accepts them within a moment, so that the answer is to let it run and to freeze it again.
//!
//! Of connections to unix sockets CRIU saves those as well.

//! The listeners are asked for by netlink (sock_diag(7)), and only they. The kernel lists them in `/proc/net/tcp` as well,
//! but goes through its whole table of connections behind them, which takes milliseconds however few there are, with the
//! container frozen.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use godwit_sys::{SysError, netns};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::error::{CheckpointError, Result};
use crate::cgroup;
use crate::state::Stored;

/// Returns the port of a TCP listener of the container at which a connection waits, if there is one. Means something
/// only while the container is frozen, and even then clients outside may connect at any time.
///
/// # Errors
/// When the container's cgroup cannot be looked at, or the kernel does not tell its listeners; a process that ends
/// meanwhile is no error.
pub fn unaccepted(stored: &Stored) -> Result<Option<u16>> {
    let pids = cgroup::processes(stored)?;
    let mut seen = HashSet::new();
    let mut waiting = Vec::new();
    for pid in &pids {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
        if seen.insert(namespace) {
            waiting.extend(listeners_with_clients(*pid)?);
        }
    }
    if waiting.is_empty() {
        return Ok(None);
    }
    // In the network namespace of a host or pod there are listeners of others.
    let held: HashSet<u32> = pids.iter().flat_map(|pid| sockets(*pid)).collect();
    Ok(waiting.into_iter().find(|listener| held.contains(&listener.inode)).map(|listener| listener.port))
}

#[derive(Debug, PartialEq, Eq)]
struct Listener {
    port: u16,
    inode: u32,
}

/// The listeners in the network namespace of process `pid` at which connections wait; none if it has ended.
fn listeners_with_clients(pid: i32) -> Result<Vec<Listener>> {
    let ask = || -> io::Result<Vec<Listener>> {
        let mut found = ask_for(AF_INET, SocketId::new_v4())?;
        found.extend(ask_for(AF_INET6, SocketId::new_v6())?);
        Ok(found)
    };
    match netns::run_in_that_of(pid, ask) {
        Ok(found) => found.map_err(|source| CheckpointError::Listeners { source }),
        Err(SysError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// The same in the network namespace of the calling thread, of one family.
fn ask_for(family: u8, socket_id: SocketId) -> io::Result<Vec<Listener>> {
    let protocol = SockProtocol::NetlinkSockDiag;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::LISTEN,
        socket_id,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty())?;

    let mut found = Vec::new();
    let mut buffer = vec![0; ANSWER_LEN_MAX];
    loop {
        // The kernel's answer is there before the request has returned; so it is with each part of it.
        let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC)?;
        let mut rest =
            buffer.get(..len).ok_or_else(|| io::Error::other("a message of netlink is too long"))?;
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            let len = usize::try_from(message.header.length.next_multiple_of(NETLINK_ALIGNMENT));
            rest = len.ok().and_then(|len| rest.get(len..)).unwrap_or_default();
            match message.payload {
                // Of a listener the receive queue is that of connections.
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(listener))
                    if listener.header.recv_queue > 0 =>
                {
                    let port = listener.header.socket_id.source_port;
                    found.push(Listener { port, inode: listener.header.inode });
                }
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

/// The inodes of the sockets that a process has open.
fn sockets(pid: i32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let inode = |text: &str| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    targets.filter_map(|target| inode(&target.to_string_lossy())).collect()
}

/// As long as the kernel makes one message of an answer.
const ANSWER_LEN_MAX: usize = 32 << 10;
const NETLINK_ALIGNMENT: u32 = 4;

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn connection_is_seen_from_the_handshake_until_it_is_accepted() {
        let own = i32::try_from(std::process::id()).unwrap();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // A machine may be without IPv6.
            let Ok(server) = TcpListener::bind(address) else { continue };
            let address = server.local_addr().unwrap();
            let found = || {
                let all = listeners_with_clients(own).unwrap();
                all.into_iter().find(|listener| listener.port == address.port())
            };
            assert_eq!(found(), None);
            let client = TcpStream::connect(address).unwrap();
            let waiting = found().unwrap();
            assert!(sockets(own).contains(&waiting.inode), "{waiting:?}");
            let accepted = server.accept().unwrap();
            assert_eq!(found(), None);
            drop((client, accepted));
        }
    }

    #[test]
    fn as_many_listeners_as_take_several_messages_are_all_found() {
        let own = i32::try_from(std::process::id()).unwrap();
        let servers: Vec<TcpListener> = (0..400).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: HashSet<u16> = servers.iter().map(|server| server.local_addr().unwrap().port()).collect();
        let clients: Vec<TcpStream> =
            servers.iter().map(|server| TcpStream::connect(server.local_addr().unwrap()).unwrap()).collect();
        let found = listeners_with_clients(own).unwrap();
        let found: HashSet<u16> = found.into_iter().map(|listener| listener.port).collect();
        assert!(found.is_superset(&ports), "{} of {}", found.len(), ports.len());
        drop(clients);
    }

    #[test]
    fn a_process_that_has_ended_has_none() {
        assert_eq!(listeners_with_clients(i32::MAX).unwrap(), []);
    }
}
