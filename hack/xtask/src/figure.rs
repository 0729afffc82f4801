//! A figure: what was measured, on what, by which command, as JSON, CSV and SVG.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use plotters::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::spread::Spread;

/// One measurement: column name to value.
pub(crate) type Row = Map<String, Value>;

/// Everything a reader needs to judge a figure and to make it again.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    name: String,
    machine: BTreeMap<&'static str, String>,
    versions: BTreeMap<String, String>,
    command: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) summary: Map<String, Value>,
}

/// A bar of the drawing: its label and its spread.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) spread: Spread,
}

impl Figure {
    /// Begins a figure and notes the machine and the command line it was asked for with.
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            machine: machine(),
            versions: BTreeMap::new(),
            command: format!("hack/{}", std::env::args().skip(1).collect::<Vec<_>>().join(" ")),
            rows: Vec::new(),
            summary: Map::new(),
        }
    }

    /// Notes what `program` answers to `--version`, under `name`.
    pub(crate) fn note_version(&mut self, name: &str, program: &Path) {
        let output = Command::new(program).arg("--version").output();
        let text = output.map_or_else(
            |error| format!("{}: {error}", program.display()),
            |output| String::from_utf8_lossy(&output.stdout).lines().collect::<Vec<_>>().join(", "),
        );
        self.versions.insert(name.to_owned(), text);
    }

    /// Writes `DIR/NAME.json`, `.csv` and `.svg`; the drawing shows `bars` on a logarithmic axis in `unit`.
    ///
    /// # Errors
    /// If a file cannot be written, or there is nothing to draw.
    pub(crate) fn write(&self, dir: &Path, unit: &str, bars: &[Bar]) -> Result<()> {
        fs::create_dir_all(dir)?;
        let path = |extension: &str| dir.join(format!("{}.{extension}", self.name));
        fs::write(path("json"), serde_json::to_string_pretty(self)? + "\n")?;
        fs::write(path("csv"), self.csv())?;
        draw(&path("svg"), &self.name, unit, bars)?;
        println!("wrote {}, .csv and .svg", path("json").display());
        Ok(())
    }

    fn csv(&self) -> String {
        let mut columns: Vec<&String> = Vec::new();
        for key in self.rows.iter().flat_map(Map::keys) {
            if !columns.contains(&key) {
                columns.push(key);
            }
        }
        let cell = |value: Option<&Value>| match value {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => format!("\"{}\"", text.replace('"', "\"\"")),
            Some(value) => value.to_string(),
        };
        let mut text = columns.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(",") + "\n";
        for row in &self.rows {
            let cells: Vec<String> = columns.iter().map(|name| cell(row.get(name.as_str()))).collect();
            text += &(cells.join(",") + "\n");
        }
        text
    }
}

fn draw(path: &Path, title: &str, unit: &str, bars: &[Bar]) -> Result<()> {
    let least = bars.iter().map(|bar| bar.spread.min).fold(f64::INFINITY, f64::min);
    let most = bars.iter().map(|bar| bar.spread.max).fold(0.0, f64::max);
    if bars.is_empty() || least <= 0.0 {
        return Err(format!("figure {title} has nothing to draw: no bar, or one at or below zero").into());
    }
    let area = SVGBackend::new(path, (760, 120 + 60 * u32::try_from(bars.len())?)).into_drawing_area();
    area.fill(&WHITE)?;
    let floor = least / 2.0;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{title} ({unit}, median with least and greatest)"), ("sans-serif", 18))
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(240)
        .build_cartesian_2d((floor..most * 1.5).log_scale(), 0..i32::try_from(bars.len())?)?;
    let label = |row: &i32| {
        usize::try_from(*row)
            .ok()
            .and_then(|row| bars.get(row))
            .map_or(String::new(), |bar| bar.label.clone())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(bars.len())
        .y_label_formatter(&label)
        .x_desc(unit)
        .draw()?;
    for (row, bar) in (0..).zip(bars) {
        let Spread { median, min, max, .. } = bar.spread;
        let color = Palette99::pick(usize::try_from(row)?).mix(0.8);
        let mut rectangle = Rectangle::new([(floor, row), (median, row + 1)], color.filled());
        rectangle.set_margin(8, 8, 0, 0);
        chart.draw_series([rectangle])?;
        let mut whisker = Rectangle::new([(min, row), (max, row + 1)], BLACK.mix(0.35).filled());
        whisker.set_margin(24, 24, 0, 0);
        chart.draw_series([whisker])?;
    }
    area.present()?;
    Ok(())
}

fn machine() -> BTreeMap<&'static str, String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(key)?.split_once(':').map(|(_, value)| value.trim().to_owned())
            })
            .unwrap_or_else(|| "unknown".to_owned())
    };
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let cgroup = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { "v2" } else { "v1" };
    BTreeMap::from([
        ("cpu", field(&read("/proc/cpuinfo"), "model name")),
        ("cpus", cpus.to_string()),
        ("memory", field(&read("/proc/meminfo"), "MemTotal")),
        ("kernel", read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("cgroup", cgroup.to_owned()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_written_in_three_forms() {
        let dir = std::env::temp_dir().join(format!("godwit-figure-{}", std::process::id()));
        let mut figure = Figure::new("sample");
        for (run, ms) in [(1, 10.0), (2, 30.0)] {
            let row = serde_json::json!({"run": run, "ms": ms, "who": "a \"b\""});
            figure.rows.push(row.as_object().cloned().unwrap());
        }
        let spread = Spread::of([10.0, 30.0]).unwrap();
        figure.write(&dir, "ms", &[Bar { label: "a".to_owned(), spread }]).unwrap();
        let csv = fs::read_to_string(dir.join("sample.csv")).unwrap();
        let json: Value = serde_json::from_slice(&fs::read(dir.join("sample.json")).unwrap()).unwrap();
        let svg = fs::read_to_string(dir.join("sample.svg")).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert!(csv.contains("\"a \"\"b\"\"\"") && csv.lines().count() == 3, "{csv}");
        assert_eq!(json["rows"][1]["ms"], 30.0);
        assert!(svg.contains("<svg") && svg.contains("rect"), "{svg}");
    }
}
