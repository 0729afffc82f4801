//! What system tests run: in containers, memory that is checked, a lock that is held, a connection that is kept;
//! on nodes, peers that break the migration protocol.
//!
//! Exit status: 0, or 1 with the reason on standard error. All but `ask` and `pester` run until they are killed.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use godwit_integration::workload::peer::{self, Manner};
use godwit_integration::workload::program;

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
