//! The downtime of a looping memhog by native migration, against the route that ctr offers: checkpoint, export,
//! copy, import, restore. All of it on tmpfs, on a bed of its own for each run, seen from outside.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use godwit_integration::image::catalog::by_name;
use godwit_integration::process::wait_until;
use godwit_integration::{Bed, BedOptions, Storage, Version};
use godwit_protocol::Report;
use serde_json::json;

use super::{Arguments, GODWIT, RUNC, note_versions};
use crate::Result;
use crate::figure::{Bar, Figure};
use crate::observer::Observer;
use crate::spread::Spread;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let (runs, sizes): (_, &[u32]) = if arguments.full { (5, &[100, 512, 1024]) } else { (1, &[1024]) };
    let mut figure = Figure::new("native");
    note_versions(&mut figure, arguments.containerd)?;
    let mut bars = Vec::new();
    for &memory_mb in sizes {
        let (mut ctr, mut godwit) = (Vec::new(), Vec::new());
        for run in 1..=runs {
            for contender in [Contender::Ctr, Contender::Godwit] {
                let measured = contender.measure(arguments.containerd, memory_mb)?;
                println!(
                    "{memory_mb} MB, run {run} of {runs}, {contender:?}: down {:.0} ms",
                    measured.downtime_ms
                );
                let row = json!({
                    "memory_mb": memory_mb, "run": run, "contender": contender.name(),
                    "downtime_ms": measured.downtime_ms, "total_ms": measured.total_ms,
                    "reported_downtime_ms": measured.report.as_ref().map(|report| report.downtime_ms),
                    "reported_parts": measured.report.as_ref().map(|report| json!(report.downtime).to_string()),
                });
                figure.rows.push(row.as_object().cloned().unwrap_or_default());
                match contender {
                    Contender::Ctr => ctr.push(measured.downtime_ms),
                    Contender::Godwit => godwit.push(measured.downtime_ms),
                }
            }
        }
        let ratios = ctr.iter().zip(&godwit).map(|(theirs, ours)| theirs / ours);
        let ratio = Spread::of(ratios).ok_or("no run was measured")?;
        let size = if memory_mb == 1024 { "1gb".to_owned() } else { format!("{memory_mb}mb") };
        println!("{memory_mb} MB: ctr / godwit = {:.1} ({:.1}..{:.1})", ratio.median, ratio.min, ratio.max);
        figure.summary.insert(format!("downtime_ctr_over_godwit_{size}"), json!(ratio.median));
        figure.summary.insert(format!("downtime_ctr_over_godwit_{size}_spread"), json!(ratio));
        for (contender, values) in [(Contender::Ctr, &ctr), (Contender::Godwit, &godwit)] {
            let spread = Spread::of(values.iter().copied()).ok_or("no run was measured")?;
            bars.push(Bar { label: format!("{}, {memory_mb} MB", contender.name()), spread });
        }
    }
    figure.write(&arguments.out, "downtime in ms", &bars)
}

#[derive(Debug, Clone, Copy)]
enum Contender {
    Ctr,
    Godwit,
}

#[derive(Debug)]
struct Measured {
    /// From the last output on the source to the first on the target.
    downtime_ms: f64,
    /// From the first command to the first output on the target.
    total_ms: f64,
    report: Option<Report>,
}

impl Contender {
    const fn name(self) -> &'static str {
        match self {
            Self::Ctr => "ctr checkpoint/restore over containerd-shim-runc-v2",
            Self::Godwit => "godwit migrate --mode native",
        }
    }

    fn measure(self, version: Version, memory_mb: u32) -> Result<Measured> {
        let options = BedOptions {
            storage: Storage::Memory,
            agent: matches!(self, Self::Godwit),
            ..BedOptions::for_test("bench-native")
        };
        let bed = Bed::up(options.containerd(version))?;
        let image = by_name("memhog")?;
        bed.import(&image.build()?)?;
        let output = Output::new(bed.options().name.as_str());
        let runtime = match self {
            Self::Ctr => RUNC,
            Self::Godwit => GODWIT,
        };
        let (size, log) = (format!("{memory_mb}m"), format!("file://{}", output.0.display()));
        let words = ["run", "--detach", "--runtime", runtime, "--log-uri", &log, &image.reference(), "hog"];
        let words = words.into_iter().chain(["memhog", "-r1000000", &size]);
        bed.a().ctr(words)?;
        output.wait_for_passes(3)?;
        let measured = match self {
            Self::Ctr => by_ctr(&bed, &output),
            Self::Godwit => by_godwit(&bed, &output),
        };
        bed.down()?;
        measured
    }
}

fn by_godwit(bed: &Bed, output: &Output) -> Result<Measured> {
    let observer = Observer::watch(&output.0);
    let target = bed.b().address().to_string();
    let begin = Instant::now();
    let text = bed.a().exec(["godwit", "migrate", "hog", "--to", &target, "--mode", "native", "--json"])?;
    let total_ms = ms(begin.elapsed());
    let report: Report = serde_json::from_str(&text)?;
    output.wait_for_passes(1)?;
    let gap = observer.finish().into_iter().next().ok_or("the observer saw no downtime")?;
    Ok(Measured { downtime_ms: ms(gap.length), total_ms, report: Some(report) })
}

/// The route ctr offers. The source cannot be stopped by its checkpoint, so it runs on until it is killed, and
/// what it did since is undone: the downtime runs from the pause of the checkpoint.
fn by_ctr(bed: &Bed, output: &Output) -> Result<Measured> {
    let (a, b) = (bed.a(), bed.b());
    let observer = Observer::watch(&output.0);
    let begin = Instant::now();
    a.ctr(["container", "checkpoint", "--rw", "--image", "--task", "hog", "localhost/hog:moved"])?;
    a.ctr(["task", "kill", "--signal", "SIGKILL", "hog"])?;
    let pause = observer.finish().into_iter().next().ok_or("the checkpoint paused nothing")?;
    a.ctr(["image", "export", "--skip-manifest-json", ARCHIVE, "localhost/hog:moved"])?;
    copy(bed)?;
    b.ctr(["image", "import", "--no-unpack", ARCHIVE])?;
    let words = ["container", "restore", "--live", "--rw", "hog", "localhost/hog:moved"];
    let mut restore = b.ctr_command(words).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let first = restore.stdout.take().map(|mut stdout| stdout.read_exact(&mut [0])).transpose();
    let total = begin.elapsed();
    restore.kill()?;
    restore.wait()?;
    first?.ok_or("ctr restore has no output")?;
    Ok(Measured { downtime_ms: ms(total.saturating_sub(pause.start)), total_ms: ms(total), report: None })
}

/// Copies the archive over the link, as scp would but without its cipher.
fn copy(bed: &Bed) -> Result<()> {
    let (port, sink) = ("7451", format!("OPEN:{ARCHIVE},creat,trunc"));
    let listen = format!("TCP-LISTEN:{port},reuseaddr");
    let mut receive = bed.b().command(["socat", "-u", "-b", "1048576", &listen, &sink]).spawn()?;
    let connect = format!("TCP:{}:{port},retry=100,interval=0.01", bed.b().address());
    bed.a().exec(["socat", "-u", "-b", "1048576", &format!("OPEN:{ARCHIVE}"), &connect])?;
    if receive.wait()?.success() { Ok(()) } else { Err("failed to copy the archive".into()) }
}

/// The file that the memhog writes a dot to for every 10 MB it has filled, in memory.
#[derive(Debug)]
struct Output(PathBuf);

impl Output {
    fn new(name: &str) -> Self {
        Self(Path::new("/dev/shm").join(format!("{name}.out")))
    }

    /// Waits until the memhog has filled its memory `passes` more times.
    fn wait_for_passes(&self, passes: usize) -> Result<()> {
        let lines = || fs::read(&self.0).map_or(0, |text| text.iter().filter(|&&byte| byte == b'\n').count());
        let begin = lines();
        if wait_until(Duration::from_secs(120), || lines() >= begin + passes) {
            return Ok(());
        }
        Err("the memhog does not loop".into())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Where the checkpoint's archive lies on both nodes: in the node's own tmpfs.
const ARCHIVE: &str = "/run/hog.tar";
