//! Connections that wait to be accepted.
//!
//! The kernel has completed them, their clients may have sent requests, and no process holds them yet: CRIU cannot save
//! them, and refuses (its `criu/sk-inet.c`). Left out (`tcp_skip_in_flight`), they would be reset under their clients. A
//! server that runs accepts them within a moment, so that the answer is to let it run and to freeze it again.
//!
//! Of connections to unix sockets CRIU saves those as well.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};

use super::error::Result;
use crate::cgroup;
use crate::state::Stored;

/// Returns the port of a TCP listener of the container at which a connection waits, if there is one. Means something
/// only while the container is frozen, and even then clients outside may connect at any time.
///
/// # Errors
/// When the container's cgroup cannot be looked at; a process that ends meanwhile is no error.
pub fn unaccepted(stored: &Stored) -> Result<Option<u16>> {
    let pids = cgroup::processes(stored)?;
    let mut seen = HashSet::new();
    let mut waiting = Vec::new();
    for pid in &pids {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
        if seen.insert(namespace) {
            waiting.extend(["tcp", "tcp6"].iter().flat_map(|table| listeners_with_clients(*pid, table)));
        }
    }
    if waiting.is_empty() {
        return Ok(None);
    }
    // In the network namespace of a host or pod there are listeners of others.
    let held: HashSet<String> = pids.iter().flat_map(|pid| sockets(*pid)).collect();
    Ok(waiting.into_iter().find(|listener| held.contains(&listener.inode)).map(|listener| listener.port))
}

#[derive(Debug, PartialEq, Eq)]
struct Listener {
    port: u16,
    /// As text.
    inode: String,
}

fn listeners_with_clients(pid: i32, table: &str) -> Vec<Listener> {
    let Ok(file) = File::open(format!("/proc/{pid}/net/{table}")) else { return Vec::new() };
    // The kernel lists all listeners before the first connection, of which there may be many.
    let rows = BufReader::new(file).lines().map_while(std::io::Result::ok).skip(1);
    rows.map_while(|row| listener(&row)).flatten().collect()
}

/// Reads a row of `/proc/net/tcp`: `None` if it is of no listener, `Some(None)` if nobody waits there.
fn listener(row: &str) -> Option<Option<Listener>> {
    // Columns by the kernel's net/ipv4/tcp_ipv4.c; of a listener the receive queue is that of connections.
    let columns: Vec<&str> = row.split_whitespace().collect();
    let [_, local, _, LISTEN, queues, _, _, _, _, inode, ..] = columns[..] else { return None };
    let (_, waiting) = queues.split_once(':')?;
    let port = local.rsplit_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok())?;
    let is_awaited = u32::from_str_radix(waiting, 16).is_ok_and(|waiting| waiting > 0);
    Some(is_awaited.then(|| Listener { port, inode: inode.to_owned() }))
}

/// The inodes of the sockets that a process has open, as text.
fn sockets(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let inode = |text: &str| Some(text.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned());
    targets.filter_map(|target| inode(&target.to_string_lossy())).collect()
}

/// `TCP_LISTEN`, in hexadecimal.
const LISTEN: &str = "0A";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_is_seen_from_the_handshake_until_it_is_accepted() {
        let own = i32::try_from(std::process::id()).unwrap();
        for (address, table) in [("127.0.0.1:0", "tcp"), ("[::1]:0", "tcp6")] {
            // A machine may be without IPv6.
            let Ok(server) = std::net::TcpListener::bind(address) else { continue };
            let address = server.local_addr().unwrap();
            let found = || {
                let all = listeners_with_clients(own, table);
                all.into_iter().find(|listener| listener.port == address.port())
            };
            assert_eq!(found(), None);
            let client = std::net::TcpStream::connect(address).unwrap();
            let waiting = found().unwrap();
            assert!(sockets(own).contains(&waiting.inode), "{waiting:?}");
            let accepted = server.accept().unwrap();
            assert_eq!(found(), None);
            drop((client, accepted));
        }
    }

    #[test]
    fn rows_of_connections_end_the_listeners() {
        let row = |state: &str, queue: &str| {
            format!(
                "   0: 0100007F:0050 00000000:0000 {state} 00000000:{queue} 00:00000000 00000000     0        0 \
                 4711 1 0000000000000000 100 0 0 10 0"
            )
        };
        assert_eq!(listener(&row("0A", "00000000")), Some(None));
        let waiting = Listener { port: 80, inode: "4711".to_owned() };
        assert_eq!(listener(&row("0A", "00000002")), Some(Some(waiting)));
        assert_eq!(listener(&row("01", "00000002")), None);
        assert_eq!(listener("garbage"), None);
    }
}
