//! Peers that do not keep to the protocol, for either end of a migration to meet.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use godwit_protocol::wire::hello::{HELLO_LEN, Hello};
use godwit_protocol::wire::{FrameHeader, Kind};

use super::page::mix;

/// What a false agent does with whoever connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Manner {
    /// Hangs up.
    HangsUp,
    /// Says nothing.
    Silent,
    /// Answers as a web server does.
    Web,
    /// Greets as an agent of a version that does not exist yet.
    Future,
    /// Greets properly, and then sends what is no frame.
    Garbles,
}

/// Listens on `port` and treats whoever connects in one manner, for ever.
///
/// # Errors
/// When the port cannot be listened on.
pub fn serve(port: u16, manner: Manner) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    for stream in listener.incoming() {
        let stream = stream?;
        // One that goes wrong is of no interest: whoever connected says what it was like.
        thread::spawn(move || treat(stream, manner));
    }
    Ok(())
}

fn treat(mut stream: TcpStream, manner: Manner) -> io::Result<()> {
    let greeting = match manner {
        Manner::HangsUp => return Ok(()),
        Manner::Silent => Vec::new(),
        Manner::Web => b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec(),
        Manner::Future => Hello::of(0xff00, 0xff01, 0).to_bytes().to_vec(),
        Manner::Garbles => [&Hello::OURS.to_bytes()[..], &[0xa5; 4096]].concat(),
    };
    stream.write_all(&greeting)?;
    io::copy(&mut stream, &mut io::sink()).map(drop)
}

/// Connects to `target` `count` times and sends what is malformed in another way each time; `seed` decides in
/// which. Returns when every connection has been closed by the other end.
///
/// # Errors
/// When a connection cannot be made, or is not closed within [`PATIENCE`] after all has been sent.
pub fn pester(target: &str, seed: u64, count: u64) -> io::Result<()> {
    for turn in 0..count {
        let mut stream = TcpStream::connect(target)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // The agent may hang up as soon as it has seen enough, so that the rest cannot be written.
        drop(stream.write_all(&malformed(mix(seed).wrapping_add(turn))));
        drop(stream.shutdown(Shutdown::Write));
        match stream.read_to_end(&mut Vec::new()) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                let text = format!("connection {turn} of seed {seed} is not closed");
                return Err(io::Error::new(error.kind(), text));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Returns bytes that no proper peer sends. They never amount to an offer.
fn malformed(choice: u64) -> Vec<u8> {
    let noise = |count: u64| -> Vec<u8> {
        (0..count).flat_map(|place| mix(choice ^ place.rotate_left(32)).to_le_bytes()).collect()
    };
    let hello = Hello::OURS.to_bytes();
    let kind = |choice: u64| Kind::ALL[usize::try_from(choice).unwrap_or_default() % Kind::ALL.len()];
    let framed = |payload: &[u8]| {
        let header = FrameHeader::seal(kind(choice >> 8), 0, payload, &[]);
        [&hello[..], &header.map(FrameHeader::to_bytes).unwrap_or_default(), payload].concat()
    };
    match choice % 8 {
        0 => Vec::new(),
        1 => hello[..usize::try_from(choice >> 8).unwrap_or_default() % HELLO_LEN].to_vec(),
        2 => noise((choice >> 8) % 64 + 2),
        3 => Hello::of(u16::MAX, 0, u64::MAX).to_bytes().to_vec(),
        4 => [&hello[..], &noise((choice >> 8) % 8192)].concat(),
        // A header that announces four gibibytes.
        5 => [&hello[..], &[kind(choice >> 8).code(), 0, 0, 0], &[0xff; 12]].concat(),
        6 => framed(&noise((choice >> 16) % 64)),
        _ => framed(b"{\"container\":{\"id\":\"../../etc\"},\"mode\":\"teleport\"}"),
    }
}

const PATIENCE: Duration = Duration::from_secs(25);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_choice_makes_the_same_bytes_and_others_differ() {
        assert_eq!(malformed(2), malformed(2));
        let kinds = (0..8).map(malformed).collect::<std::collections::BTreeSet<_>>();
        assert!(kinds.len() >= 7, "{}", kinds.len());
    }
}
