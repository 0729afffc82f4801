//! The figure of the paper that this project implements: total time and downtime against memory, by mode, with
//! images on disk and in memory.
//!
//! No compression, no deltas and no deduplication take part: memhog's memory is one byte over and over, and random
//! and mixed content are measured beside it.

use godwit_protocol::Mode;
use godwit_protocol::request::Images;
use serde_json::{Value, json};

use super::stage::{Load, Moved, Stage, merged};
use super::{Arguments, note_versions};
use crate::Result;
use crate::draw::Drawing;
use crate::figure::Figure;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let runs = arguments.runs(1, 5);
    let mut figure = Figure::new("figure", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    for rate in [None, Some("1gbit")] {
        let stage = Stage::up("figure", arguments.containerd, rate)?;
        for run in 1..=runs {
            for (load, memory_mb) in plan(arguments.full, rate.is_some()) {
                for (mode, images) in contenders(arguments.full || rate.is_none()) {
                    let options = ["--mode", mode.name(), "--images", images.name(), "--timeout", "60"];
                    let moved = stage.measure(load, memory_mb, &options)?;
                    let row = json!({
                        "memory_mb": memory_mb, "mode": mode.name(), "images": images.name(), "content": load.name(),
                        "rate": rate.unwrap_or(UNSHAPED), "run": run,
                    });
                    figure.add(merged(row, columns(&moved, images, memory_mb)))?;
                }
            }
        }
        stage.down()?;
    }
    for (column, unit) in COLUMNS {
        let lines = sum_up(&mut figure, column)?;
        let drawing =
            Drawing::Lines { across: "memory in MB".to_owned(), up: format!("{unit} in ms"), series: lines };
        figure.draw(column, &drawing)?;
        if column == "downtime_ms" {
            figure.write(&drawing)?;
        }
    }
    Ok(())
}

/// Loads and sizes, in MB: the paper's, and at one size what the paper's workload says nothing about.
fn plan(full: bool, shaped: bool) -> Vec<(Load, u32)> {
    let sizes: &[u32] = match (full, shaped) {
        (true, _) => &[100, 512, 1024, 2048, 3096],
        (false, false) => &[100, 1024],
        (false, true) => &[512],
    };
    let mut plan: Vec<_> = sizes.iter().map(|size| (Load::Idle, *size)).collect();
    if full {
        // At 1 Gbit/s a round of 1 GB takes 9 s, and rewriting takes some of them.
        let size = if shaped { 512 } else { 1024 };
        plan.extend([Load::Rewriting, Load::Random, Load::Mixed].map(|load| (load, size)));
    }
    plan
}

fn contenders(with_disk: bool) -> Vec<(Mode, Images)> {
    let modes = [Mode::Native, Mode::Precopy, Mode::Postcopy];
    let images = if with_disk { vec![Images::Disk, Images::Cache] } else { vec![Images::Cache] };
    modes.into_iter().flat_map(|mode| images.iter().map(move |images| (mode, *images))).collect()
}

/// The move's columns; one that was asked to go by way of the disk and did not counts as not done. Of a page that
/// comes again, what came before may never get to the disk, so it is the memory that counts and not what was sent.
fn columns(moved: &Moved, images: Images, memory_mb: u32) -> Value {
    let columns = moved.columns();
    match &moved.report {
        Ok(report) if images == Images::Disk && report.disk_bytes_written < u64::from(memory_mb) << 20 => {
            merged(
                columns,
                json!({"outcome": "not done: the images were asked for on disk and stayed in memory"}),
            )
        }
        _ => columns,
    }
}

type Lines = Vec<(String, Vec<(f64, crate::spread::Spread)>)>;

/// Puts the medians of a column into the summary, and returns the lines of the idle memhog on an unshaped link.
fn sum_up(figure: &mut Figure, column: &'static str) -> Result<Lines> {
    let mut lines = Lines::new();
    for rate in [UNSHAPED, "1gbit"] {
        for (mode, images) in contenders(true) {
            let mut points = Vec::new();
            for (load, memory_mb) in plan(true, rate != UNSHAPED) {
                let wanted = [
                    ("memory_mb", json!(memory_mb)),
                    ("mode", json!(mode.name())),
                    ("images", json!(images.name())),
                    ("content", json!(load.name())),
                    ("rate", json!(rate)),
                    ("outcome", json!("migrated")),
                ];
                let spread = figure.spread(&wanted, column);
                if load == Load::Idle {
                    points.extend(spread.map(|spread| (f64::from(memory_mb), spread)));
                }
                let size = format!("{memory_mb}mb");
                figure.sum_up(&[column, rate, &load.name(), mode.name(), images.name(), &size], spread)?;
            }
            if rate == UNSHAPED && !points.is_empty() {
                lines.push((format!("{mode}, {images}"), points));
            }
        }
    }
    Ok(lines)
}

/// How the link is called when no rate is set.
const UNSHAPED: &str = "unshaped";
const COLUMNS: [(&str, &str); 2] = [("total_ms", "total time"), ("downtime_ms", "downtime")];
