//! Benchmarks: godwit against what a user would run instead, in turns, on the same bed or on equal ones.
//!
//! Absolute times on a shared machine say little, so contenders alternate within one run, every row is kept, and
//! the summary holds ratios of medians with their spread.

mod by_hand;
mod link;
mod paper;
mod peers;
mod predump;
mod scaling;
mod shim;
mod stage;
mod tracker;

use std::path::PathBuf;

use clap::ValueEnum;
use godwit_integration::Version;

use crate::Result;
use crate::figure::Figure;

/// Measures one figure and writes NAME.json, NAME.csv and NAME.svg.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("length").required(true).args(["quick", "full"])))]
pub(crate) struct Arguments {
    /// The figure.
    name: Name,
    /// A few runs: minutes at most.
    #[arg(long)]
    quick: bool,
    /// Everything, with enough runs for a spread to mean something.
    #[arg(long)]
    full: bool,
    /// So many runs instead of the usual number: with --quick, medians of the few things that it looks at.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Where the files go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The containerd that both contenders run under.
    #[arg(long, value_name = "VERSION", default_value = "1.7")]
    containerd: Version,
}

impl Arguments {
    /// How often everything is measured.
    fn runs(&self, quick: u32, full: u32) -> u32 {
        self.runs.unwrap_or(if self.full { full } else { quick })
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Name {
    /// `ctr run --rm` latency and resident memory of the shim, against containerd-shim-runc-v2 with runc.
    Shim,
    /// Downtime of a memhog by native migration, against checkpoint, export, copy, import and restore by ctr.
    Native,
    /// The paper's figure: total time and downtime against memory, by mode, with images on disk and in memory.
    Figure,
    /// Downtime in every mode, against ctr, runc with CRIU by hand, and CRIU's lazy pages.
    Peers,
    /// Downtime by pre-copy, against CRIU's pre-dump and page server, on two emulated machines with soft-dirty bits.
    Predump,
    /// A program that writes pages at random after a post-copy move, against CRIU's lazy pages.
    Access,
    /// Downtime and its parts against memory and against the rate at which it is written.
    Scaling,
    /// Goodput by streams against iperf3.
    Link,
    /// What following a program's memory costs it.
    Tracker,
}

/// Measures the figure that was asked for.
///
/// # Errors
/// If the bed, a contender or the writing of the figure fails; the rows until then are in NAME.csv.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match arguments.name {
        Name::Shim => shim::run(arguments),
        Name::Native => peers::run_native(arguments),
        Name::Figure => paper::run(arguments),
        Name::Peers => peers::run(arguments),
        Name::Predump => predump::run(arguments),
        Name::Access => peers::run_access(arguments),
        Name::Scaling => scaling::run(arguments),
        Name::Link => link::run(arguments),
        Name::Tracker => tracker::run(arguments),
    }
}

/// Notes the versions of everything that takes part.
fn note_versions(figure: &mut Figure, version: Version) -> Result<()> {
    let tools = godwit_integration::tools::containerd(version)?;
    figure.note_version("containerd", &tools.join("containerd"));
    for (program, kept) in [("runc", "runc/bin/runc"), ("criu", "criu/sbin/criu")] {
        let kept = godwit_integration::tools::cache().join(kept);
        figure.note_version(program, if kept.exists() { &kept } else { program.as_ref() });
    }
    figure.note_version("godwit", &godwit_integration::tools::built()?.join("godwit"));
    Ok(())
}

/// Of the contents of a page.
const PAGE_BITS: f64 = 4096.0 * 8.0;
/// containerd's own shim, with runc.
const RUNC: &str = "io.containerd.runc.v2";
/// The shim under test.
const GODWIT: &str = "io.containerd.godwit.v1";
