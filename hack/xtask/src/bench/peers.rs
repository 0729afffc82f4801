//! godwit in each of its modes against what a user would do instead, with the same workload on the same nodes.

use godwit_protocol::Mode;
use serde_json::{Value, json};

use super::by_hand::{Seen, Way, by_ctr, by_runc};
use super::stage::{Load, Stage, Written, merged};
use super::{Arguments, note_versions};
use crate::Result;
use crate::draw::{Bar, Drawing};
use crate::figure::Figure;
use crate::spread::Spread;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let mut plan: Vec<(Load, u32)> = vec![(Load::Idle, MEMORY_MB)];
    if arguments.full {
        plan.extend([(Load::Rewriting, MEMORY_MB), (Load::Rate(1000), MEMORY_MB), (Load::Idle, 100)]);
    }
    let runs = arguments.runs(1, 5);
    let mut figure = Figure::new("peers", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    let stage = Stage::up("peers", arguments.containerd, None)?;
    for run in 1..=runs {
        for &(load, memory_mb) in &plan {
            for contender in CONTENDERS {
                measure(&mut figure, &stage, contender, load, memory_mb, run)?;
            }
        }
    }
    stage.down()?;
    let bars = sum_up(&mut figure, &plan)?;
    figure.write(&Drawing::Bars { unit: "observed downtime in ms".to_owned(), bars })
}

/// Runs the figure that compares native mode alone.
pub(super) fn run_native(arguments: &Arguments) -> Result<()> {
    let runs = arguments.runs(1, 5);
    let sizes: &[u32] = if arguments.full { &[100, 512, 1024] } else { &[1024] };
    let mut figure = Figure::new("native", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    let stage = Stage::up("native", arguments.containerd, None)?;
    let contenders = [Contender::Ctr, Contender::Godwit(Mode::Native)];
    for run in 1..=runs {
        for &memory_mb in sizes {
            for contender in contenders {
                measure(&mut figure, &stage, contender, Load::Rewriting, memory_mb, run)?;
            }
        }
    }
    stage.down()?;
    let mut bars = Vec::new();
    for &memory_mb in sizes {
        let [theirs, ours] =
            contenders.map(|contender| spread(&figure, contender, Load::Rewriting, memory_mb));
        let ratio = theirs.zip(ours).map(|(theirs, ours)| theirs.median / ours.median);
        let size = if memory_mb == MEMORY_MB { "1gb".to_owned() } else { format!("{memory_mb}mb") };
        figure.sum_up(&[&format!("downtime_ctr_over_godwit_{size}")], ratio)?;
        for (contender, spread) in contenders.into_iter().zip([theirs, ours]) {
            figure.sum_up(&["downtime_ms", contender.name(), &size], spread)?;
            let label = format!("{}, {memory_mb} MB", contender.name());
            bars.extend(spread.map(|spread| Bar { label, spread }));
        }
    }
    figure.write(&Drawing::Bars { unit: "observed downtime in ms".to_owned(), bars })
}

/// Runs the figure that shows a program which writes pages at random without rest, after a move by which pages come
/// when it runs already.
pub(super) fn run_access(arguments: &Arguments) -> Result<()> {
    let runs = arguments.runs(3, 10);
    let mut figure = Figure::new("access", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    let stage = Stage::up("access", arguments.containerd, None)?;
    for run in 1..=runs {
        for contender in RANDOM_ACCESS {
            measure(&mut figure, &stage, contender, Load::Busy, MEMORY_MB, run)?;
        }
    }
    stage.down()?;
    let mut bars = Vec::new();
    for column in Written::COLUMNS.into_iter().chain(["fill_ms", "observed_downtime_ms"]) {
        let seen =
            RANDOM_ACCESS.map(|contender| figure.spread(&wanted(contender, Load::Busy, MEMORY_MB), column));
        for (contender, seen) in RANDOM_ACCESS.into_iter().zip(seen) {
            figure.sum_up(&[column, contender.name()], seen)?;
            if column == Written::COLUMNS[1] {
                bars.extend(seen.map(|spread| Bar { label: contender.name().to_owned(), spread }));
            }
        }
        let [ours, theirs] = seen;
        let ratio = ours.zip(theirs).map(|(ours, theirs)| ours.median / theirs.median.max(1.0));
        figure.sum_up(&[column, "postcopy_over_runc_lazy"], ratio)?;
    }
    figure.write(&Drawing::Bars { unit: "pages written in the first 5 s".to_owned(), bars })
}

fn measure(
    figure: &mut Figure,
    stage: &Stage,
    contender: Contender,
    load: Load,
    memory_mb: u32,
    run: u32,
) -> Result<()> {
    let row =
        json!({"memory_mb": memory_mb, "content": load.name(), "contender": contender.name(), "run": run});
    figure.add(merged(row, contender.measure(stage, load, memory_mb)?))?;
    Ok(())
}

/// Puts the medians, and the ratios of peers to godwit, into the summary: at the top those of an idle memhog of
/// 1 GB, the others by content and size.
fn sum_up(figure: &mut Figure, plan: &[(Load, u32)]) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for &(load, memory_mb) in plan {
        let is_main = (load, memory_mb) == (Load::Idle, MEMORY_MB);
        let place = format!("{}, {memory_mb} MB", load.name());
        for contender in CONTENDERS.into_iter().rev() {
            let seen = spread(figure, contender, load, memory_mb);
            figure.sum_up(&["observed_downtime_ms", &place, contender.name()], seen)?;
            let wanted = wanted(contender, load, memory_mb);
            let filled = figure.spread(&wanted, "fill_ms");
            figure.sum_up(&["fill_ms", &place, contender.name()], filled)?;
            let label = format!("{}, {place}", contender.name());
            bars.extend(seen.map(|spread| Bar { label, spread }));
        }
        for (peer, name) in [
            (Contender::Ctr, "downtime_ctr_over_godwit_1gb"),
            (Contender::Runc(Way::Lazy), "downtime_runc_lazy_over_godwit_1gb"),
            (Contender::Runc(Way::Copy), "downtime_runc_copy_over_godwit_1gb"),
        ] {
            for mode in MODES {
                let pair = [peer, Contender::Godwit(mode)].map(|each| spread(figure, each, load, memory_mb));
                let [Some(theirs), Some(ours)] = pair else { continue };
                let ratio = Some(theirs.median / ours.median);
                if is_main {
                    figure.sum_up(&[name, mode.name()], ratio)?;
                } else {
                    figure.sum_up(&["others", &place, name, mode.name()], ratio)?;
                }
            }
        }
    }
    Ok(bars)
}

fn wanted(contender: Contender, load: Load, memory_mb: u32) -> [(&'static str, Value); 4] {
    [
        ("contender", json!(contender.name())),
        ("content", json!(load.name())),
        ("memory_mb", json!(memory_mb)),
        ("outcome", json!("migrated")),
    ]
}

/// The downtime seen from outside, which is measured in the same way for all.
fn spread(figure: &Figure, contender: Contender, load: Load, memory_mb: u32) -> Option<Spread> {
    figure.spread(&wanted(contender, load, memory_mb), "observed_downtime_ms")
}

/// Who moves the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    Ctr,
    Runc(Way),
    Godwit(Mode),
}

impl Contender {
    const fn name(self) -> &'static str {
        match self {
            Self::Ctr => "ctr checkpoint and restore, containerd-shim-runc-v2",
            Self::Runc(Way::Copy) => "runc checkpoint, copy, restore",
            Self::Runc(Way::Lazy) => "runc and criu lazy-pages",
            Self::Godwit(mode) => mode.name(),
        }
    }

    /// Measures one move; one that fails is a row as well.
    fn measure(self, stage: &Stage, load: Load, memory_mb: u32) -> Result<Value> {
        let seen = match self {
            Self::Ctr => by_ctr(stage, load, memory_mb),
            Self::Runc(way) => by_runc(stage, way, load, memory_mb),
            Self::Godwit(mode) => {
                let options = ["--mode", mode.name(), "--timeout", "30"];
                return Ok(stage.measure(load, memory_mb, &options)?.columns());
            }
        };
        Ok(match seen {
            Ok(Seen { downtime_ms, total_ms, fill_ms, written }) => merged(
                json!({"outcome": "migrated", "observed_downtime_ms": downtime_ms, "total_ms": total_ms,
                    "fill_ms": fill_ms}),
                Written::columns(written),
            ),
            Err(error) => {
                let error = error.to_string();
                json!({"outcome": format!("failed: {}", error.lines().last().unwrap_or_default())})
            }
        })
    }
}

const CONTENDERS: [Contender; 7] = [
    Contender::Ctr,
    Contender::Runc(Way::Copy),
    Contender::Runc(Way::Lazy),
    Contender::Godwit(Mode::Native),
    Contender::Godwit(Mode::Precopy),
    Contender::Godwit(Mode::Postcopy),
    Contender::Godwit(Mode::Hybrid),
];
/// Who is measured with a program that writes pages at random without rest.
const RANDOM_ACCESS: [Contender; 2] = [Contender::Godwit(Mode::Postcopy), Contender::Runc(Way::Lazy)];
const MODES: [Mode; 4] = [Mode::Native, Mode::Precopy, Mode::Postcopy, Mode::Hybrid];
const MEMORY_MB: u32 = 1024;
