//! Downtime against the size of the memory, and against how fast it is written, with its parts.

use godwit_protocol::Mode;
use serde_json::json;

use super::stage::{Load, Stage, merged};
use super::{Arguments, note_versions};
use crate::Result;
use crate::draw::Drawing;
use crate::figure::Figure;
use crate::spread::Spread;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let runs = arguments.runs(1, 5);
    let (sizes, rates): (&[u32], &[u32]) = if arguments.full {
        (&[100, 512, 1024, 2048, 3096], &[1000, 5000, 10_000, 20_000, 50_000, 100_000])
    } else {
        (&[100, 1024, 3096], &[10_000])
    };
    let mut loads = vec![(Load::Empty, 0)];
    loads.extend(sizes.iter().map(|size| (Load::Idle, *size)));
    loads.extend(rates.iter().map(|rate| (Load::Rate(*rate), RATE_MB)));

    let mut figure = Figure::new("scaling", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    let stage = Stage::up("scaling", arguments.containerd, None)?;
    for run in 1..=runs {
        for (load, memory_mb) in &loads {
            for mode in modes(arguments.full, *load) {
                let moved = stage.measure(*load, *memory_mb, &["--mode", mode.name(), "--timeout", "30"])?;
                let rate = if let Load::Rate(rate) = load { *rate } else { 0 };
                let row = json!({
                    "memory_mb": memory_mb, "mode": mode.name(), "content": load.name(), "run": run,
                    "written_pages_per_s": rate,
                });
                figure.add(merged(row, moved.columns()))?;
            }
        }
    }
    stage.down()?;
    sum_up(&mut figure)?;
    let stacks = stacks(&figure, &loads);
    figure.write(&Drawing::Stacks {
        unit: "downtime in ms".to_owned(),
        parts: PARTS.map(|(_, name)| name).to_vec(),
        stacks,
    })
}

/// An empty container has nothing by which modes could differ, and native is there to compare with.
fn modes(full: bool, load: Load) -> Vec<Mode> {
    match load {
        Load::Empty => vec![Mode::Native],
        Load::Rate(_) if !full => MODES[1..].to_vec(),
        _ => MODES.to_vec(),
    }
}

fn downtime(figure: &Figure, mode: Mode, load: Load, memory_mb: u32, column: &str) -> Option<Spread> {
    let wanted = [
        ("mode", json!(mode.name())),
        ("content", json!(load.name())),
        ("memory_mb", json!(memory_mb)),
        ("outcome", json!("migrated")),
    ];
    figure.spread(&wanted, column)
}

fn sum_up(figure: &mut Figure) -> Result<()> {
    let empty = downtime(figure, Mode::Native, Load::Empty, 0, "downtime_ms");
    figure.sum_up(&["downtime_ms_of_an_empty_container"], empty)?;
    for mode in MODES {
        for (column, name) in [("downtime_ms", "downtime"), ("observed_downtime_ms", "observed_downtime")] {
            let of = |memory_mb| downtime(figure, mode, Load::Idle, memory_mb, column);
            let (small, middle, large) = (of(100), of(1024), of(3096));
            let ratio = large.zip(small).map(|(large, small)| large.median / small.median);
            figure.sum_up(&[&format!("{name}_3096_over_100"), mode.name()], ratio)?;
            figure.sum_up(&[&format!("{name}_ms_1gb"), mode.name()], middle)?;
            if column == "downtime_ms" {
                let more = middle.zip(empty).map(|(middle, empty)| middle.median - empty.median);
                figure.sum_up(&["downtime_ms_1gb_over_empty", mode.name()], more)?;
            }
        }
    }
    Ok(())
}

fn stacks(figure: &Figure, loads: &[(Load, u32)]) -> Vec<(String, Vec<f64>)> {
    let mut stacks = Vec::new();
    for mode in MODES.into_iter().rev() {
        for (load, memory_mb) in loads.iter().rev() {
            let parts: Option<Vec<f64>> = PARTS
                .iter()
                .map(|(column, _)| Some(downtime(figure, mode, *load, *memory_mb, column)?.median))
                .collect();
            let label = format!("{mode}, {memory_mb} MB, {}", load.name());
            stacks.extend(parts.map(|parts| (label, parts)));
        }
    }
    stacks
}

const MODES: [Mode; 4] = [Mode::Native, Mode::Precopy, Mode::Postcopy, Mode::Hybrid];
/// Memory of the loads that are written at a rate, in MB.
const RATE_MB: u32 = 1024;
/// Columns and names of the parts of a downtime, in their order.
const PARTS: [(&str, &str); 5] = [
    ("freeze_ms", "freeze"),
    ("state_dump_ms", "state dump"),
    ("transfer_ms", "transfer"),
    ("restore_ms", "restore"),
    ("resume_ms", "resume"),
];
