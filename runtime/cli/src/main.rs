//! `godwit`: an OCI runtime that can move its containers between machines while they run.
//!
//! One process per verb, with one thread until the verb has forked what it forks: `main` parses the command
//! line ([`cli`]), sends log records where the caller wants them ([`logging`]) and runs the verb
//! ([`commands`], one file each). Exit codes are in `docs/runtime.md`.

#![forbid(unsafe_code)]

mod cli;
mod commands;
mod error;
mod foreground;
mod logging;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::cli::Cli;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = logging::install(&cli.globals) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    godwit_container::trace::install();
    match commands::run(&cli) {
        Ok(code) => code,
        Err(error) => {
            logging::report(&error, &cli.globals);
            error.exit_code()
        }
    }
}

/// Help and version are answers; everything else about the arguments is an error with runc's exit code,
/// or `migrate`'s.
fn refuse(error: &clap::Error) -> ExitCode {
    let answer = matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    // Nobody is left to tell when stdout or stderr is closed.
    drop(error.print());
    match answer {
        true => ExitCode::SUCCESS,
        // Its exit codes are its own: 1 says that the container runs as before.
        false if std::env::args().skip(1).any(|arg| arg == "migrate") => ExitCode::from(2),
        false => ExitCode::FAILURE,
    }
}
