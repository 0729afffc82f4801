//! How much of a link godwit fills with pages, against iperf3 on the same link with as many streams.
//!
//! godwit's goodput is that of the first round of pre-copy: bytes of page contents by the time from the scan until
//! the target has acknowledged the last of them. The content is random, so that every page travels.

use std::process::Stdio;
use std::time::Duration;

use godwit_integration::process::wait_until;
use serde_json::{Value, json};

use super::stage::{Load, Stage, merged};
use super::{Arguments, PAGE_BITS, note_versions};
use crate::Result;
use crate::draw::{Bar, Drawing};
use crate::figure::Figure;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let runs = arguments.runs(1, 5);
    let streams: &[u8] = if arguments.full { &[1, 2, 4, 8] } else { &[1, 2, 4] };
    let mut figure = Figure::new("link", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    figure.note_version("iperf3", "iperf3".as_ref());
    for (rate, name, memory_mb) in [(Some("1gbit"), "shaped", 512), (None, "unshaped", 1024)] {
        let stage = Stage::up("link", arguments.containerd, rate)?;
        for run in 1..=runs {
            for &count in streams {
                let row = |contender: &str| {
                    json!({"rate": rate.unwrap_or(name), "link": name, "streams": count, "run": run,
                        "contender": contender})
                };
                figure.add(merged(row(IPERF), by_iperf(&stage, count)?))?;
                figure.add(merged(row(GODWIT), by_godwit(&stage, count, memory_mb)?))?;
            }
        }
        stage.down()?;
    }
    let bars = sum_up(&mut figure, streams)?;
    figure.write(&Drawing::Bars { unit: "Mbit/s".to_owned(), bars })
}

fn by_godwit(stage: &Stage, streams: u8, memory_mb: u32) -> Result<Value> {
    let count = streams.to_string();
    let moved = stage.measure(
        Load::Random,
        memory_mb,
        &["--mode", "precopy", "--streams", &count, "--timeout", "60"],
    )?;
    let goodput = moved.report.as_ref().ok().and_then(|report| {
        let first = report.rounds.first()?;
        let bits = first.sent_pages as f64 * PAGE_BITS;
        (first.duration_ms > 0.0).then(|| bits / first.duration_ms / 1e3)
    });
    let own = json!({"memory_mb": memory_mb, "goodput_mbit_per_s": goodput});
    Ok(merged(moved.columns(), own))
}

fn by_iperf(stage: &Stage, streams: u8) -> Result<Value> {
    let (a, b) = (stage.bed.a(), stage.bed.b());
    let mut server = b.command(["iperf3", "--server", "--one-off", "--version4"]);
    let mut server = server.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let listens = wait_until(Duration::from_secs(10), || b.listens(IPERF_PORT));
    let target = b.address().to_string();
    let count = streams.to_string();
    let measured = if listens {
        a.exec(["iperf3", "--client", &target, "--parallel", &count, "--time", "3", "--json"])
    } else {
        server.kill()?;
        return Err("iperf3 does not listen".into());
    };
    server.wait()?;
    let answer: Value = serde_json::from_str(&measured?)?;
    let bits = answer.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    let bits = bits.ok_or("iperf3 says nothing of what was received")?;
    Ok(json!({"goodput_mbit_per_s": bits / 1e6, "outcome": "measured"}))
}

/// Summary: with each number of streams, and of each contender's best number of streams.
fn sum_up(figure: &mut Figure, streams: &[u8]) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for link in ["unshaped", "shaped"] {
        let of = |figure: &Figure, contender: &str, count: u8| {
            let wanted = [("link", json!(link)), ("contender", json!(contender)), ("streams", json!(count))];
            figure.spread(&wanted, "goodput_mbit_per_s")
        };
        let mut best = [0.0_f64; 2];
        for &count in streams {
            let pair = [GODWIT, IPERF].map(|contender| of(figure, contender, count));
            for ((spread, best), contender) in pair.iter().zip(&mut best).zip([GODWIT, IPERF]) {
                figure.sum_up(&["goodput_mbit_per_s", link, contender, &count.to_string()], *spread)?;
                if let Some(spread) = spread {
                    *best = best.max(spread.median);
                    let label = format!("{contender}, {link}, {count} streams");
                    bars.push(Bar { label, spread: *spread });
                }
            }
            if let [Some(ours), Some(theirs)] = pair {
                let path = ["goodput_over_iperf3_by_streams", link, &count.to_string()];
                figure.sum_up(&path, Some(ours.median / theirs.median))?;
            }
        }
        let [ours, theirs] = best;
        figure.sum_up(&["goodput_over_iperf3", link], (theirs > 0.0 && ours > 0.0).then(|| ours / theirs))?;
    }
    Ok(bars)
}

const GODWIT: &str = "godwit";
const IPERF: &str = "iperf3";
const IPERF_PORT: u16 = 5201;
