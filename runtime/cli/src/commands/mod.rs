//! The verbs, one file each. A verb is a struct of its arguments (its doc comment is its help) with a method
//! `run`, which returns the exit code.

pub(crate) mod agent;
pub(crate) mod check;
pub(crate) mod checkpoint;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod features;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod migrate;
pub(crate) mod migrate_source;
pub(crate) mod migrate_target;
pub(crate) mod migrate_warden;
pub(crate) mod pause;
pub(crate) mod ps;
pub(crate) mod restore;
pub(crate) mod resume;
pub(crate) mod run;
pub(crate) mod spec;
pub(crate) mod start;
pub(crate) mod state;
pub(crate) mod status;
pub(crate) mod update;
mod worker_events;

use std::io::Write;
use std::process::ExitCode;

use clap::ValueEnum;
use godwit_container::Store;
use serde::Serialize;

use crate::cli::{Cli, Command};
use crate::error::{CliError, Result};

/// Runs the verb of a command line.
pub(crate) fn run(cli: &Cli) -> Result<ExitCode> {
    let globals = &cli.globals;
    let store = Store::new(&globals.root);
    match &cli.command {
        Command::Create(verb) => verb.run(&store, globals),
        Command::Start(verb) => verb.run(&store),
        Command::State(verb) => verb.run(&store),
        Command::Kill(verb) => verb.run(&store),
        Command::Delete(verb) => verb.run(&store),
        Command::Exec(verb) => verb.run(&store),
        Command::Ps(verb) => verb.run(&store),
        Command::Pause(verb) => verb.run(&store),
        Command::Resume(verb) => verb.run(&store),
        Command::Check(verb) => verb.run(),
        Command::Checkpoint(verb) => verb.run(&store),
        Command::Restore(verb) => verb.run(&store, globals),
        Command::Update(verb) => verb.run(&store),
        Command::Events(verb) => verb.run(&store),
        Command::List(verb) => verb.run(&store),
        Command::Run(verb) => verb.run(&store, globals),
        Command::Spec(verb) => verb.run(),
        Command::Features(verb) => verb.run(),
        Command::Migrate(verb) => verb.run(),
        Command::Status(verb) => verb.run(),
        Command::Cancel(verb) => verb.run(),
        Command::MigrateSource(verb) => verb.run(&store),
        Command::MigrateTarget(verb) => verb.run(&store, globals),
        Command::MigrateWarden(verb) => verb.run(&store),
        Command::Agent(verb) => verb.run(),
    }
}

/// Output of verbs that list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns with a heading
    Table,
    /// JSON
    Json,
}

/// Prints one line of JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(CliError::json("output"))?;
    print_line(&text)
}

/// Prints JSON over several lines, indented by two.
pub(crate) fn print_json_indented(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(CliError::json("output"))?;
    print_line(&text)
}

/// Prints a line; a closed stdout is an error, not a panic.
pub(crate) fn print_line(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").map_err(CliError::io("stdout"))
}
