//! Brings beds of two containerd nodes up and down by hand, and runs commands in them.
//!
//! A thin shell over `godwit_integration`; `hack/cluster` builds and calls it. Exit status: 0, or 1 with the
//! reason on standard error; `exec` and `ctr` end with the status of what they ran.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::{Args, Parser, Subcommand};
use godwit_integration::bed::{self, Bed, BedOptions, Storage};
use godwit_integration::image::catalog;
use godwit_integration::node::{AGENT, CONTAINERD, HOLDER};
use godwit_integration::{BedError, NodeName, Result, Version};

/// Two containerd nodes, a and b, on this machine.
#[derive(Parser)]
#[command(name = "testbed")]
struct Cli {
    /// The bed's name; beds of different names run side by side.
    #[arg(long, default_value = "hand")]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Makes the bed and imports images into both nodes.
    Up(Up),
    /// Removes the bed and all that runs in it; no error when it is not up.
    Down,
    /// Runs a command in a node.
    Exec {
        /// The node, a or b.
        node: NodeName,
        /// The command.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Runs a node's ctr.
    Ctr {
        /// The node, a or b.
        node: NodeName,
        /// Arguments of ctr.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Builds an image and imports it into both nodes.
    Import {
        /// Names out of the catalogue, or archives.
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Shows what is up: every bed, or what runs in the one named.
    Status,
    /// Removes beds whose makers died.
    Sweep,
}

#[derive(Args)]
struct Up {
    /// The containerd of both nodes: 1.6, 1.7 or 2.1.
    #[arg(long, default_value = "1.6")]
    containerd: Version,
    /// The rate of the link in each direction, such as 1gbit.
    #[arg(long)]
    rate: Option<String>,
    /// A directory to search for programs before all others; may be repeated.
    #[arg(long = "bin-dir")]
    bin_dirs: Vec<PathBuf>,
    /// Put this build's shim in the place of containerd-shim-runc-v2.
    #[arg(long)]
    replace_runc_shim: bool,
    /// Keep containerd's images and snapshots in memory.
    #[arg(long)]
    memory: bool,
    /// Run `godwit agent` on both nodes.
    #[arg(long)]
    agent: bool,
    /// An image to import, a name out of the catalogue or an archive; may be repeated.
    #[arg(long = "image", default_value = "busybox")]
    images: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.name, cli.verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = format!("failed to {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            eprintln!("testbed: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(name: &str, verb: Verb) -> Result<()> {
    match verb {
        Verb::Up(up) => bring_up(name, up),
        Verb::Down => bed::down(name),
        Verb::Exec { node, command } => Err(become_command(Bed::attach(name)?.node(node).command(command))),
        Verb::Ctr { node, args } => Err(become_command(Bed::attach(name)?.node(node).ctr_command(args))),
        Verb::Import { images } => import(&Bed::attach(name)?, &images),
        Verb::Status => status(name),
        Verb::Sweep => {
            bed::sweep()?.iter().for_each(|name| println!("removed {name}"));
            Ok(())
        }
    }
}

fn bring_up(name: &str, up: Up) -> Result<()> {
    let bed = Bed::up(BedOptions {
        containerd: up.containerd,
        rate: up.rate,
        bin_dirs: up.bin_dirs,
        replace_runc_shim: up.replace_runc_shim,
        storage: if up.memory { Storage::Memory } else { Storage::Disk },
        agent: up.agent,
        ..BedOptions::new(name)
    })?;
    import(&bed, &up.images)?;
    println!("bed {name} is up: containerd {}, files in {}", up.containerd, bed.dir().display());
    Ok(())
}

fn import(bed: &Bed, images: &[String]) -> Result<()> {
    for image in images {
        let archive =
            if image.contains('/') { PathBuf::from(image) } else { catalog::by_name(image)?.build()? };
        bed.import(&archive)?;
    }
    Ok(())
}

fn status(name: &str) -> Result<()> {
    for options in bed::list()? {
        let rate = options.rate.as_deref().unwrap_or("unlimited");
        println!("{}: containerd {}, link {rate}", options.name, options.containerd);
        if options.name != name {
            continue;
        }
        let bed = Bed::attach(name)?;
        for node in NodeName::ALL.map(|node| bed.node(node)) {
            let processes = node.cgroups().processes().len();
            println!("  node {} at {}: {processes} processes", node.name(), node.address());
            for daemon in [HOLDER, CONTAINERD, AGENT] {
                let pid = node.daemon(daemon).map_or_else(|| "-".to_owned(), |daemon| daemon.pid.to_string());
                println!("    {daemon}: {pid}");
            }
            for line in node.ctr(["task", "ls"])?.lines().skip(1) {
                println!("    task {line}");
            }
        }
    }
    Ok(())
}

/// Becomes the command, so that its standard streams, signals and status are this process's.
fn become_command(mut command: Command) -> BedError {
    let source = command.exec();
    BedError::Start { command: command.get_program().to_string_lossy().into_owned(), source }
}
