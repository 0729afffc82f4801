//! The command line: global options before the verb, as runc has them, and one variant per verb.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::commands;

/// OCI runtime with live migration: creates and runs containers from bundles, and moves running ones
///
/// The verbs take runc's arguments and give its answers, so godwit can stand wherever a container engine
/// calls runc (containerd, dockerd, Podman). A bundle is a directory with config.json and a root file system:
///
///     mkdir -p web/rootfs && tar -C web/rootfs -xf image.tar
///     godwit spec --bundle web
///     godwit create --bundle web web && godwit start web
#[derive(Debug, Parser)]
#[command(name = "godwit", version = VERSION, verbatim_doc_comment, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every verb; they stand before it.
#[derive(Debug, Args)]
pub(crate) struct Globals {
    /// Directory for the state of containers; must not outlive a reboot
    #[arg(long, value_name = "DIR", default_value = "/run/godwit")]
    pub(crate) root: PathBuf,
    /// Append log records to this file [default: stderr]
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// How log records look
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Log debug records as well
    #[arg(long)]
    pub(crate) debug: bool,
    /// Let systemd manage cgroups; cgroupsPath is then "slice:prefix:name"
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
    /// Accepted for runc's callers: criu is looked up in PATH
    #[arg(long, value_name = "PATH", hide = true)]
    pub(crate) criu: Option<PathBuf>,
    /// Accepted for runc's callers: godwit needs root
    #[arg(long, value_name = "WHEN", hide = true, action = ArgAction::Set)]
    pub(crate) rootless: Option<String>,
}

/// Formats of log records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// key=value
    Text,
    /// One JSON object a line
    Json,
}

/// The verbs, each in its file of [`commands`].
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(commands::create::Create),
    Start(commands::start::Start),
    State(commands::state::State),
    Kill(commands::kill::Kill),
    Delete(commands::delete::Delete),
    Exec(Box<commands::exec::Exec>),
    Ps(commands::ps::Ps),
    Pause(commands::pause::Pause),
    Resume(commands::resume::Resume),
    Check(commands::check::Check),
    Checkpoint(Box<commands::checkpoint::Checkpoint>),
    Restore(Box<commands::restore::Restore>),
    Update(Box<commands::update::Update>),
    Events(commands::events::Events),
    List(commands::list::List),
    Run(commands::run::Run),
    Spec(commands::spec::Spec),
    Features(commands::features::Features),
    Migrate(Box<commands::migrate::Migrate>),
    Status(commands::status::Status),
    Cancel(commands::status::Cancel),
    #[command(hide = true)]
    MigrateSource(Box<commands::migrate_source::MigrateSource>),
    #[command(hide = true)]
    MigrateTarget(commands::migrate_target::MigrateTarget),
    #[command(hide = true)]
    MigrateWarden(commands::migrate_warden::MigrateWarden),
    Agent(commands::agent::Agent),
}

/// What `--version` says after the name: container engines look for the word, and for the specification's version.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.1.0");

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_version_names_the_specification() {
        let spec = format!("\nspec: {}", oci_spec::runtime::VERSION);
        assert!(VERSION.ends_with(&spec), "{VERSION}");
    }
}
