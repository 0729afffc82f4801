//! The demonstration: a looping memhog and a counter move to another node while they run.
//!
//! An outside observer watches what both write; the counter's numbers show that not one was lost or repeated.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_integration::image::catalog::by_name;
use godwit_integration::process::wait_until;
use godwit_integration::{Bed, BedOptions, Version};
use godwit_protocol::{Mode, Report};
use serde_json::{Value, json};

use crate::Result;
use crate::observer::Observer;

/// Moves a memhog and a counter between two nodes while they run, and shows what came of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Prints one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// When memory travels: auto (rounds while they help, the rest after the container runs on the target), or
    /// native, precopy, postcopy or hybrid.
    #[arg(long, value_name = "MODE", default_value_t = Mode::Auto)]
    mode: Mode,
    /// How much memory the memhog fills again and again, in MB.
    #[arg(long, value_name = "MB", default_value_t = 512)]
    memory: u32,
    /// The rate of the link, as tc(8) writes rates; unlimited if absent.
    #[arg(long, value_name = "RATE")]
    rate: Option<String>,
    /// The containerd of both nodes.
    #[arg(long, value_name = "VERSION", default_value = "1.6")]
    containerd: Version,
}

/// Runs the demonstration and takes everything down again.
///
/// # Errors
/// If a node cannot be made, a migration fails, or the counter lost or repeated a number.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let say = |text: &str| {
        if !arguments.json {
            println!("{text}");
        }
    };
    say(&format!("two nodes, a and b, each with its own containerd {} and agent", arguments.containerd));
    let options = BedOptions { agent: true, rate: arguments.rate.clone(), ..BedOptions::for_test("demo") };
    let bed = Bed::up(options.containerd(arguments.containerd))?;
    let (size, hog) = (format!("{}m", arguments.memory), ["memhog", "-r1000000"]);
    let contestants = [
        Contestant::start(&bed, "hog", "memhog", hog.into_iter().chain([size.as_str()]))?,
        Contestant::start(&bed, "counter", "busybox", ["sh", "-c", COUNTER])?,
    ];
    let mut results = Vec::new();
    for contestant in &contestants {
        let command = contestant.command(arguments.mode);
        say(&format!("\nnode a runs {}; {}", contestant.what(), command.join(" ")));
        results.push(contestant.migrate(&bed, &command)?);
        if let Some(result) = results.last() {
            say(&result.text());
        }
    }
    say(&format!("\nnode a now runs:\n{}", bed.a().ctr(["task", "ls"])?.trim_end()));
    say(&format!("node b now runs:\n{}", bed.b().ctr(["task", "ls"])?.trim_end()));
    let ticks = contestants[1].check_counter()?;
    say(&format!("the counter wrote {ticks} numbers on two nodes; none is missing, none came twice"));
    bed.down()?;
    if arguments.json {
        let moved: Vec<Value> = results.iter().map(Moved::json).collect();
        println!("{}", json!({"migrations": moved, "counter": {"numbers": ticks, "lost": 0, "repeated": 0}}));
    }
    Ok(())
}

/// A container that is moved, and the file it writes to on whichever node it runs.
#[derive(Debug)]
struct Contestant {
    id: &'static str,
    command: String,
    output: PathBuf,
}

/// What a migration reported and what the outside observer saw.
#[derive(Debug)]
struct Moved {
    report: Report,
    blackout_ms: f64,
}

impl Contestant {
    fn start<'a>(
        bed: &Bed,
        id: &'static str,
        image: &str,
        command: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self> {
        let image = by_name(image)?;
        bed.import(&image.build()?)?;
        // Both nodes see this directory, and it is memory.
        let output = Path::new("/dev/shm").join(format!("{}-{id}.out", bed.options().name));
        let log = format!("file://{}", output.display());
        let command: Vec<&str> = command.into_iter().collect();
        let reference = image.reference();
        let words = ["run", "--detach", "--runtime", RUNTIME, "--log-uri", &log, &reference, id];
        bed.a().ctr(words.iter().chain(&command))?;
        let contestant = Self { id, command: command.join(" "), output };
        contestant.await_output(1000)?;
        Ok(contestant)
    }

    fn what(&self) -> &str {
        self.command.lines().next().unwrap_or_default()
    }

    fn command(&self, mode: Mode) -> Vec<&'static str> {
        let mut command = vec!["godwit", "migrate", self.id, "--to", "node-b"];
        match mode {
            Mode::Auto => command.push("--allow-postcopy"),
            mode => command.extend(["--mode", mode.name()]),
        }
        command
    }

    fn migrate(&self, bed: &Bed, command: &[&str]) -> Result<Moved> {
        let observer = Observer::watch(&self.output);
        let text = bed.a().exec(command.iter().chain(&["--json"]))?;
        self.await_output(500)?;
        let gap = observer.finish().gaps.into_iter().next();
        let blackout_ms = gap.map_or(0.0, |gap| gap.length.as_secs_f64() * 1e3);
        Ok(Moved { report: serde_json::from_str(&text)?, blackout_ms })
    }

    /// Waits until the container has written `bytes` more.
    fn await_output(&self, bytes: u64) -> Result<()> {
        let size = || fs::metadata(&self.output).map_or(0, |data| data.len());
        let begin = size();
        if wait_until(Duration::from_secs(60), || size() >= begin + bytes) {
            return Ok(());
        }
        Err(format!("container {} writes nothing", self.id).into())
    }

    /// Returns how many numbers the counter wrote, having seen that each follows the one before it.
    fn check_counter(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.output)?;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut count = 0;
        for line in whole.lines() {
            count += 1;
            if line.parse() != Ok(count) {
                return Err(format!("the counter wrote {line} where {count} was due").into());
            }
        }
        Ok(count)
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.output));
    }
}

impl Moved {
    fn text(&self) -> String {
        let (report, parts) = (&self.report, &self.report.downtime);
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1048576.0);
        let rounds = &report.rounds;
        let before: u64 = rounds.iter().map(|round| round.sent_pages).sum();
        format!(
            "  total {:.0} ms, down {:.0} ms (freeze {:.0}, state dump {:.0}, transfer {:.0}, restore {:.0}, resume {:.0})\n  \
             {} pages, {} of them zero; {} sent in {} rounds while it ran; all in place {:.0} ms after it ran there,\n  \
             {} of them fetched because it waited for them (half within {} µs)\n  \
             {} of memory, {} of state, {} of writable layer, {} on the wire\n  \
             {} bytes written to disk; processor time {:.2} s on the source, {:.2} s on the target\n  \
             an outside observer saw it stand still for {:.0} ms",
            report.total_ms,
            report.downtime_ms,
            parts.freeze_ms,
            parts.state_dump_ms,
            parts.transfer_ms,
            parts.restore_ms,
            parts.resume_ms,
            report.pages.total,
            report.pages.zero,
            before,
            rounds.len(),
            report.fill_ms,
            report.faults.network.count,
            report.faults.network.p50_us,
            mib(report.bytes.memory),
            mib(report.bytes.state),
            mib(report.bytes.rootfs),
            mib(report.bytes.wire),
            report.disk_bytes_written,
            report.cpu_s.source,
            report.cpu_s.target,
            self.blackout_ms,
        )
    }

    fn json(&self) -> Value {
        json!({"report": self.report, "observed_blackout_ms": self.blackout_ms})
    }
}

/// Counts as fast as a shell can.
const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo $i; usleep 1000; done";
const RUNTIME: &str = "io.containerd.godwit.v1";
