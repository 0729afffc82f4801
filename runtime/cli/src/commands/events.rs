//! `godwit events`.

use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;
use godwit_container::stats::{Event, Stats, oom_kills};
use godwit_container::{ContainerError, Store, Stored};

use crate::commands::print_json;
use crate::error::{CliError, Result};

/// Print a container's resource usage and out-of-memory kills, one JSON object a line, until it ends
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Name of the container
    id: String,
    /// Print the usage once and return
    #[arg(long)]
    stats: bool,
    /// Time between two usage records, such as 500ms, 5s or 1m
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_interval)]
    interval: Duration,
}

impl Events {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let stored = store.open(&self.id)?;
        if self.stats {
            print_stats(&stored)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut kills = oom_kills(&stored)?;
        let mut due = Instant::now() + self.interval;
        while stored.pid().is_some() {
            sleep(POLL_INTERVAL.min(self.interval));
            let now = oom_kills(&stored).unwrap_or(kills);
            for _ in kills..now {
                print_json(&Event { kind: "oom", id: stored.id(), data: None })?;
            }
            kills = now;
            if Instant::now() >= due {
                due += self.interval;
                match print_stats(&stored) {
                    // It ended in between.
                    Err(CliError::Container(ContainerError::NotRunning { .. })) => break,
                    other => other?,
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_stats(stored: &Stored) -> Result<()> {
    let data = Some(Stats::of(stored)?);
    print_json(&Event { kind: "stats", id: stored.id(), data })
}

/// A number with one of Go's units, as callers of runc write it.
fn parse_interval(text: &str) -> std::result::Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "not a number with a unit, such as 5s".to_owned())?;
    let interval = match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        "h" => Duration::from_secs(number.saturating_mul(3600)),
        _ => return Err("the unit is none of ms, s, m and h".to_owned()),
    };
    if interval.is_zero() { Err("it must not be zero".to_owned()) } else { Ok(interval) }
}

/// How often the out-of-memory counter is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_parsed_with_their_unit() {
        assert_eq!(parse_interval("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_interval("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "5", "s", "0s", "5 s", "99999999999999999999s"] {
            assert!(parse_interval(text).is_err_and(|reason| !reason.is_empty()), "{text:?}");
        }
    }
}
