//! `godwit ps`.

use std::process::{Command, ExitCode};

use clap::Args;
use godwit_container::{Store, cgroup};

use crate::commands::{Format, print_json};
use crate::error::{CliError, Result};

/// List the processes of a container
///
/// The table is what ps prints, cut down to the container's processes: options for ps may follow the name.
#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Name of the container
    id: String,
    /// table, or json for the bare process ids
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// Options for ps
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PS-OPTION",
        default_value = "-ef"
    )]
    options: Vec<String>,
}

impl Ps {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let pids = cgroup::processes(&store.open(&self.id)?)?;
        match self.format {
            Format::Json => print_json(&pids)?,
            Format::Table => {
                let output =
                    Command::new("ps").args(&self.options).output().map_err(CliError::io("run ps"))?;
                if !output.status.success() {
                    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                    return Err(CliError::Usage(format!("ps: {text}")));
                }
                for line in filter(&String::from_utf8_lossy(&output.stdout), &pids)? {
                    println!("{line}");
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The heading and the lines of `table` whose column PID is in `pids`.
fn filter<'a>(table: &'a str, pids: &[i32]) -> Result<Vec<&'a str>> {
    let mut lines = table.lines();
    let heading = lines.next().unwrap_or_default();
    let column = heading
        .split_ascii_whitespace()
        .position(|name| name == "PID")
        .ok_or_else(|| CliError::Usage("couldn't find PID field in ps output".to_owned()))?;
    let wanted = |line: &&str| {
        let pid = line.split_ascii_whitespace().nth(column).and_then(|text| text.parse::<i32>().ok());
        pid.is_some_and(|pid| pids.contains(&pid))
    };
    Ok(std::iter::once(heading).chain(lines.filter(wanted)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_chosen_by_the_pid_column() {
        let table = "UID  PID PPID CMD\nroot   7    1 a 8\nroot   8    7 b\n";
        assert_eq!(filter(table, &[8]).unwrap(), ["UID  PID PPID CMD", "root   8    7 b"]);
        assert!(matches!(filter("UID CMD\n", &[8]), Err(CliError::Usage(_))));
    }
}
