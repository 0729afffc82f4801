//! The project's chores that are more than a line of shell: tidiness, benchmarks and the demonstration.
//!
//! `hack/test`, `hack/bench` and `hack/demo` call it; no test depends on it.
#![forbid(unsafe_code)]

mod bench;
mod demo;
mod draw;
mod figure;
mod observer;
mod spread;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the godwit tree; run through `hack/test`, `hack/bench` and `hack/demo`.
#[derive(Debug, Parser)]
#[command(name = "xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Checks what compiler and clippy do not: file sizes, where unsafe code stands, unfinished places.
    Check {
        /// The root of the tree.
        #[arg(long, default_value = ".")]
        root: PathBuf,
    },
    /// Measures one figure against its peer, in turns, and writes it as JSON, CSV and SVG.
    Bench(bench::Arguments),
    /// Moves a memhog and a counter between two nodes while they run, and shows what came of it.
    Demo(demo::Arguments),
}

/// The one error type of the chores: a sentence for the terminal.
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let outcome = match Arguments::parse().chore {
        Chore::Check { root } => tidy::check(&root),
        Chore::Bench(arguments) => bench::run(&arguments),
        Chore::Demo(arguments) => demo::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
