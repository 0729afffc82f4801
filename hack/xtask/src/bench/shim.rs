//! How long `ctr run --rm` takes and how much memory a shim keeps, against containerd-shim-runc-v2 with runc.

use std::fs;
use std::time::Instant;

use godwit_integration::image::Image;
use godwit_integration::{Bed, BedOptions, Node, Storage};
use serde_json::json;

use super::{Arguments, GODWIT, RUNC, note_versions};
use crate::Result;
use crate::draw::{Bar, Drawing};
use crate::figure::Figure;
use crate::spread::Spread;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let pairs = arguments.runs(10, 50);
    let mut figure = Figure::new("shim", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    let options = BedOptions { storage: Storage::Memory, ..BedOptions::for_test("bench-shim") };
    let bed = Bed::up(options.containerd(arguments.containerd))?;
    let image = Image::busybox()?;
    bed.import(&image.build()?)?;
    let (node, reference) = (bed.a(), image.reference());

    let mut latency = [Vec::new(), Vec::new()];
    let mut rss = [Vec::new(), Vec::new()];
    // The pair before the first warms the page cache and is not counted.
    for pair in 0..=pairs {
        for (contender, runtime) in [RUNC, GODWIT].into_iter().enumerate() {
            let ms = run_latency_ms(node, runtime, &reference)?;
            let kib = rss_kib(node, runtime, &reference)?;
            if pair == 0 {
                continue;
            }
            latency[contender].push(ms);
            rss[contender].push(kib);
            figure.add(json!({"contender": runtime, "run": pair, "run_latency_ms": ms, "rss_kib": kib}))?;
        }
    }
    bed.down()?;

    let mut bars = Vec::new();
    for (name, unit, [runc, godwit]) in [("run_latency", "ms", &latency), ("rss", "KiB", &rss)] {
        let ratios = godwit.iter().zip(runc).map(|(ours, theirs)| ours / theirs);
        let ratio = Spread::of(ratios).ok_or("no run was measured")?;
        figure.summary.insert(format!("{name}_ratio"), json!(ratio.median));
        figure.summary.insert(format!("{name}_ratio_spread"), json!(ratio));
        for (contender, values) in [("runc", runc), ("godwit", godwit)] {
            let spread = Spread::of(values.iter().copied()).ok_or("no run was measured")?;
            figure.summary.insert(format!("{name}_{contender}"), json!(spread));
            bars.push(Bar { label: format!("{contender}: {name} ({unit})"), spread });
        }
        println!("{name}: godwit / runc = {:.2} ({:.2}..{:.2})", ratio.median, ratio.min, ratio.max);
    }
    figure.write(&Drawing::Bars { unit: "ms or KiB".to_owned(), bars })
}

fn run_latency_ms(node: &Node, runtime: &str, image: &str) -> Result<f64> {
    let begin = Instant::now();
    node.ctr(["run", "--rm", "--runtime", runtime, image, "bench", "true"])?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// Resident memory of the shim of one sleeping container, in KiB.
fn rss_kib(node: &Node, runtime: &str, image: &str) -> Result<f64> {
    node.ctr(["run", "--detach", "--runtime", runtime, image, "bench-rss", "sleep", "1000"])?;
    let kib = shim_rss_kib(node);
    node.ctr(["task", "rm", "--force", "bench-rss"])?;
    node.ctr(["container", "rm", "bench-rss"])?;
    kib.ok_or_else(|| format!("no shim of {runtime} runs").into())
}

fn shim_rss_kib(node: &Node) -> Option<f64> {
    node.cgroups().processes().into_iter().find_map(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        if !name.starts_with("containerd-shim") {
            return None;
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        rss.trim().strip_suffix(" kB")?.parse().ok()
    })
}
