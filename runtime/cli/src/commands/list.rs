//! `godwit list`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::report::StateReport;
use godwit_container::{Store, Stored};

use crate::commands::{Format, print_json, print_line};
use crate::error::Result;

/// List the containers under the state root
#[derive(Debug, Args)]
pub(crate) struct List {
    /// table or json
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// Print names only
    #[arg(short, long)]
    quiet: bool,
}

impl List {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let stored = store.list()?;
        if self.quiet {
            for one in &stored {
                print_line(one.id())?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let reports: Vec<StateReport> = stored.iter().filter_map(report).collect();
        match self.format {
            Format::Json => print_json(&reports)?,
            Format::Table => print_line(table(&reports).trim_end())?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A container that cannot be read must not hide the others.
fn report(stored: &Stored) -> Option<StateReport> {
    StateReport::of(stored)
        .map(|report| report.with_owner(stored))
        .inspect_err(|error| log::error!("container {}: {error}", stored.id()))
        .ok()
}

fn table(reports: &[StateReport]) -> String {
    let heading = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let row = |report: &StateReport| {
        let (pid, status) = (report.pid.to_string(), report.status.to_string());
        let bundle = report.bundle.display().to_string();
        [report.id.clone(), pid, status, bundle, report.created.clone(), report.owner.clone()]
    };
    let rows: Vec<[String; 6]> = std::iter::once(heading).chain(reports.iter().map(row)).collect();
    let width = |column: usize| {
        let widest = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        (widest + PADDING).max(WIDTH_MIN)
    };
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(widths) {
            text.push_str(&format!("{cell:width$}"));
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

const PADDING: usize = 3;
const WIDTH_MIN: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_is_its_heading() {
        let text = "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n";
        assert_eq!(table(&[]), text);
    }
}
