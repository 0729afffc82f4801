//! What system tests run: in containers, memory that is checked, a lock that is held, a connection that is kept;
//! on nodes, peers that break the migration protocol.
//!
//! Exit status: 0, or 1 with the reason on standard error. All but `ask` and `pester` run until they are killed.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};
use godwit_integration::workload::hold::{self, Content, Pace};
use godwit_integration::workload::peer::{self, Manner};
use godwit_integration::workload::storm::{self, Kind, Size};
use godwit_integration::workload::{program, visit};
use godwit_sys::seccomp_deny::{self, Denial};

/// Keeps memory whose content can be checked.
#[derive(Parser)]
#[command(name = "workload")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Writes pages for ever.
    Pages {
        /// How many processes.
        #[arg(long, default_value_t = 1)]
        processes: u64,
        /// How many writers in each, a thread of its own each.
        #[arg(long, default_value_t = 1)]
        threads: u64,
        /// How many pages each writer has.
        #[arg(long, default_value_t = 4096)]
        pages: usize,
    },
    /// Asks the one that is process 1 to check every page, and prints what it found.
    Ask,
    /// Holds memory of a given content, writes to it at a given pace, and ticks: what benchmarks move.
    Hold {
        /// How much.
        #[arg(long, default_value_t = 64)]
        megabytes: usize,
        /// What is in it.
        #[arg(long, default_value = "byte")]
        content: Content,
        /// Pages to write a second, chosen at random.
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// Write without rest, one page after so many turns of a calculation.
        #[arg(long, conflicts_with = "rate")]
        busy: Option<u64>,
    },
    /// Ticks beside another program.
    Beside {
        /// Read nothing of what the program writes, and let it write no more than so many bytes.
        #[arg(long)]
        room: Option<usize>,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Treats memory in one way, checks it, and writes what it finds into a file for each writer.
    Storm {
        /// The way.
        kind: Kind,
        /// How many pages each writer has; frames of each stack.
        #[arg(long, default_value_t = 1024)]
        pages: u64,
        /// How many writers; how many mappings, where it is about those.
        #[arg(long, default_value_t = 16)]
        count: u64,
    },
    /// Fetches a page from a web server, again and again, and counts what goes wrong.
    Visit {
        /// The server, as HOST:PORT.
        server: String,
        /// What the page holds, without the end of the line.
        content: String,
        /// Connections that are kept.
        #[arg(long, default_value_t = 4)]
        connections: u64,
    },
    /// Runs a program that is refused some system calls, as by another kernel.
    Deny {
        /// Refuse userfaultfd.
        #[arg(long)]
        userfaultfd: bool,
        /// Refuse the scan of page tables that came with kernel 6.7.
        #[arg(long)]
        pagemap_scan: bool,
        /// Refuse to have system calls answered by another process.
        #[arg(long)]
        seccomp_listener: bool,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Holds a lock on a file.
    Lock {
        /// The file.
        path: PathBuf,
    },
    /// Holds both ends of a TCP connection.
    Connection,
    /// Listens as an agent would, and does something else.
    Peer {
        /// The TCP port.
        port: u16,
        /// What it does.
        manner: Manner,
    },
    /// Sends an agent what it must refuse.
    Pester {
        /// The agent, as HOST:PORT.
        target: String,
        /// Decides what is sent.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How many connections are made.
        #[arg(long, default_value_t = 100)]
        count: u64,
    },
    /// A further process of `pages`; not for use by hand.
    #[command(hide = true)]
    Other {
        /// The number of its first writer.
        first_writer: u64,
        /// How many writers.
        threads: u64,
        /// How many pages each has.
        pages: usize,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Pages { processes, threads, pages } => program::run(processes, threads, pages),
        Verb::Ask => program::ask().map(|line| print!("{line}")),
        Verb::Hold { megabytes, content, rate, busy } => {
            let pace = busy.map_or(if rate == 0 { Pace::Idle } else { Pace::Rate(rate) }, Pace::Busy);
            hold::run(megabytes, content, pace)
        }
        Verb::Beside { room, command } => hold::beside(&command, room),
        Verb::Storm { kind, pages, count } => storm::run(kind, Size { pages, count }),
        Verb::Visit { server, content, connections } => {
            visit::run(&server, connections, &format!("{content}\n"))
        }
        Verb::Deny { userfaultfd, pagemap_scan, seccomp_listener, command } => {
            let denials = [
                (userfaultfd, Denial::USERFAULTFD),
                (pagemap_scan, Denial::PAGEMAP_SCAN),
                (seccomp_listener, Denial::SECCOMP_LISTENER),
            ];
            Err(deny(&denials, &command))
        }
        Verb::Lock { path } => program::hold_lock(&path),
        Verb::Connection => program::hold_connection(),
        Verb::Peer { port, manner } => peer::serve(port, manner),
        Verb::Pester { target, seed, count } => peer::pester(&target, seed, count),
        Verb::Other { first_writer, threads, pages } => program::run_as_other(first_writer, threads, pages),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Becomes the command, without what is asked to be refused; returns why it could not.
fn deny(denials: &[(bool, Denial)], command: &[String]) -> io::Error {
    let denials: Vec<_> = denials.iter().filter(|(asked, _)| *asked).map(|(_, denial)| *denial).collect();
    match (seccomp_deny::deny(&denials), command) {
        (Err(error), _) => io::Error::other(error),
        (Ok(()), [program, args @ ..]) => Command::new(program).args(args).exec(),
        (Ok(()), []) => io::Error::from(io::ErrorKind::InvalidInput),
    }
}
