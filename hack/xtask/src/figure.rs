//! A figure: what was measured, on what, by which command, as JSON, CSV and SVG.
//!
//! The CSV is there from the first row on, so that hours of measuring are not lost to whatever ends them early.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::draw::Drawing;
use crate::spread::Spread;

/// One measurement: column name to value.
pub(crate) type Row = Map<String, Value>;

/// Everything a reader needs to judge a figure and to make it again.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    name: String,
    #[serde(skip)]
    dir: PathBuf,
    machine: BTreeMap<&'static str, String>,
    versions: BTreeMap<String, String>,
    command: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) summary: Map<String, Value>,
}

impl Figure {
    /// Begins a figure in `dir`, and notes the machine and the command line it was asked for with.
    pub(crate) fn new(name: &str, dir: &Path) -> Self {
        Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
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

    /// Adds a measurement: to the CSV, and on the terminal.
    ///
    /// # Errors
    /// If the CSV cannot be written.
    pub(crate) fn add(&mut self, row: Value) -> Result<()> {
        if let Value::Object(row) = row {
            let shown = ["memory_mb", "mode", "images", "content", "rate", "contender", "run", "outcome"];
            let shown = shown.iter().filter_map(|name| row.get(*name)).map(|value| match value {
                Value::String(text) => text.clone(),
                value => value.to_string(),
            });
            let seen = ["downtime_ms", "observed_downtime_ms", "total_ms", "fill_ms", "goodput_mbit_per_s"];
            let seen = seen.into_iter().chain(["pages_written_in_1_s", "pages_written_in_5_s"]);
            let seen = seen.chain(["run_latency_ms", "rss_kib", "alone_pages_per_s", "followed_pages_per_s"]);
            let seen = seen.filter_map(|name| Some(format!("{name} {:.1}", row.get(name)?.as_f64()?)));
            println!("{}", shown.chain(seen).collect::<Vec<_>>().join(", "));
            self.rows.push(row);
        }
        fs::create_dir_all(&self.dir)?;
        Ok(fs::write(self.path("csv"), self.csv())?)
    }

    /// The spread of the column `value` over the rows that have it and all of `wanted`.
    pub(crate) fn spread(&self, wanted: &[(&str, Value)], value: &str) -> Option<Spread> {
        let rows = self.rows.iter();
        let rows = rows.filter(|row| wanted.iter().all(|(name, wanted)| row.get(*name) == Some(wanted)));
        Spread::of(rows.filter_map(|row| row.get(value)?.as_f64()))
    }

    /// Puts `value` into the summary at `path`, making the objects that lead there. What was not measured stays
    /// out.
    pub(crate) fn sum_up<V: Serialize>(&mut self, path: &[&str], value: Option<V>) -> Result<()> {
        let (Some(value), [leading @ .., last]) = (value, path) else { return Ok(()) };
        let mut place = &mut self.summary;
        for name in leading {
            let entry = place.entry(*name).or_insert_with(|| Value::Object(Map::new()));
            place = entry.as_object_mut().ok_or_else(|| format!("{name} is in the summary already"))?;
        }
        place.insert((*last).to_owned(), serde_json::to_value(value)?);
        Ok(())
    }

    /// Writes `DIR/NAME.json` and `.svg`; the CSV is there.
    ///
    /// # Errors
    /// If a file cannot be written, or there is nothing to draw.
    pub(crate) fn write(&self, drawing: &Drawing) -> Result<()> {
        fs::write(self.path("json"), serde_json::to_string_pretty(self)? + "\n")?;
        drawing.write(&self.path("svg"), &self.name)?;
        println!("wrote {}, .csv and .svg", self.path("json").display());
        Ok(())
    }

    /// Writes a further drawing, `DIR/NAME-WHAT.svg`.
    ///
    /// # Errors
    /// As [`Figure::write`].
    pub(crate) fn draw(&self, what: &str, drawing: &Drawing) -> Result<()> {
        drawing.write(&self.dir.join(format!("{}-{what}.svg", self.name)), &format!("{} {what}", self.name))
    }

    fn path(&self, extension: &str) -> PathBuf {
        self.dir.join(format!("{}.{extension}", self.name))
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
    use crate::draw::Bar;

    #[test]
    fn a_figure_is_written_in_three_forms() {
        let dir = std::env::temp_dir().join(format!("godwit-figure-{}", std::process::id()));
        let mut figure = Figure::new("sample", &dir);
        for (run, ms) in [(1, 10.0), (2, 30.0)] {
            figure.add(serde_json::json!({"run": run, "ms": ms, "who": "a \"b\""})).unwrap();
            let early = fs::read_to_string(dir.join("sample.csv")).unwrap();
            assert_eq!(early.lines().count(), 1 + run, "a row is written when it is there");
        }
        let spread = Spread::of([10.0, 30.0]).unwrap();
        let bars = vec![Bar { label: "a".to_owned(), spread }];
        figure.write(&Drawing::Bars { unit: "ms".to_owned(), bars }).unwrap();
        let csv = fs::read_to_string(dir.join("sample.csv")).unwrap();
        let json: Value = serde_json::from_slice(&fs::read(dir.join("sample.json")).unwrap()).unwrap();
        let svg = fs::read_to_string(dir.join("sample.svg")).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert!(csv.contains("\"a \"\"b\"\"\"") && csv.lines().count() == 3, "{csv}");
        assert_eq!(json["rows"][1]["ms"], 30.0);
        assert!(svg.contains("<svg") && svg.contains("rect"), "{svg}");
    }
}
