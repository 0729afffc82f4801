//! A client of a web server that keeps its connections and counts what goes wrong on them.
//!
//! Each connection is a runner of its own with a line under [`super::storm::REPORTS`]: a *step* is a page that came,
//! *bad* one that did not come whole, or a connection that was closed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use crate::process::wait_until;
use crate::workload::storm::Tally;

/// Fetches `/` from `server` over `connections` connections, again and again, and expects `content`.
///
/// # Errors
/// When the server does not come to listen, or a report cannot be written.
pub fn run(server: &str, connections: u64, content: &str) -> io::Result<()> {
    wait_until(PATIENCE, || TcpStream::connect(server).is_ok());
    let start = |number| {
        let (server, content) = (server.to_owned(), content.to_owned());
        thread::spawn(move || visit(number, &server, &content))
    };
    let threads: Vec<_> = (1..connections).map(start).collect();
    visit(0, server, content)?;
    drop(threads);
    Ok(())
}

fn visit(number: u64, server: &str, content: &str) -> io::Result<()> {
    let mut tally = Tally::of(number, 0);
    loop {
        let stream = TcpStream::connect(server)?;
        // Longer than any move takes: what comes late is late, what does not come is lost.
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut reader = BufReader::new(stream);
        while fetch(&mut reader, server).is_ok_and(|page| page == content.as_bytes()) {
            tally.step(0);
            if tally.steps.is_multiple_of(FETCHES_A_PASS) {
                tally.pass(0)?;
            }
            tally.rest()?;
        }
        tally.step(1);
        tally.pass(0)?;
    }
}

/// Fetches the page and returns its content.
fn fetch(reader: &mut BufReader<TcpStream>, server: &str) -> io::Result<Vec<u8>> {
    let request = format!("GET / HTTP/1.1\r\nHost: {server}\r\n\r\n");
    reader.get_mut().write_all(request.as_bytes())?;
    let mut length = 0;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 && line.trim() != "" {
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        line.clear();
    }
    let mut content = Vec::new();
    reader.take(length).read_to_end(&mut content)?;
    Ok(content)
}

const PATIENCE: Duration = Duration::from_secs(30);
const FETCHES_A_PASS: u64 = 50;
