//! Log records in runc's two formats.
//!
//! With `--log FILE` records go there, and only the final error is repeated on stderr: stderr is the
//! container's during `create`, `exec` and `restore`. Without it they go to stderr. In format `json` a record
//! is one line `{"level":..,"msg":..,"time":..}`, which containerd reads errors from.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::Serialize;

use crate::cli::{Globals, LogFormat};
use crate::error::{CliError, Result};

/// Installs the logger that the global options ask for.
///
/// # Errors
/// When the log file cannot be opened.
pub(crate) fn install(globals: &Globals) -> Result<()> {
    let file = match &globals.log {
        None => None,
        Some(path) => {
            let opened = OpenOptions::new().create(true).append(true).open(path);
            Some(opened.map_err(CliError::io(format!("open log file {}", path.display())))?)
        }
    };
    let level = if globals.debug { LevelFilter::Debug } else { LevelFilter::Info };
    log::set_max_level(level);
    // Fails only when a logger is installed already, which nothing before this does.
    drop(log::set_boxed_logger(Box::new(Logger { file, format: globals.log_format })));
    Ok(())
}

/// Logs the error a verb ends with, and says it on stderr when the log is elsewhere.
pub(crate) fn report(error: &CliError, globals: &Globals) {
    log::error!("{error}");
    if globals.log.is_some() {
        eprintln!("{error}");
    }
}

#[derive(Debug)]
struct Logger {
    file: Option<File>,
    format: LogFormat,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = line(self.format, record.level(), &record.args().to_string(), now);
        // One write per record, so that records of several processes do not mix. A full disk must not fail
        // the verb.
        drop(match &self.file {
            Some(file) => (&mut &*file).write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        });
    }

    fn flush(&self) {}
}

fn line(format: LogFormat, level: Level, message: &str, since_epoch: Duration) -> String {
    #[derive(Serialize)]
    struct Line<'a> {
        level: &'a str,
        msg: &'a str,
        time: &'a str,
    }
    let time = rfc3339(since_epoch);
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    match format {
        LogFormat::Json => {
            let json = serde_json::to_string(&Line { level, msg: message, time: &time });
            json.unwrap_or_default() + "\n"
        }
        LogFormat::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
    }
}

/// UTC to the second, as `2026-01-31T23:59:59Z`.
fn rfc3339(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The Gregorian date of a day counted from 1970-01-01.
///
/// Years are counted from 1 March, so that the leap day is a year's last and months have a fixed pattern.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_TO_EPOCH: u64 = 719_468; // from 0000-03-01
    let days = days + DAYS_TO_EPOCH;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_what_date_prints() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_102_444_800, "2100-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_json_record_is_the_line_containerd_reads() {
        let text = line(LogFormat::Json, Level::Error, "a \"b\"\nc", Duration::ZERO);
        let expected = r#"{"level":"error","msg":"a \"b\"\nc","time":"1970-01-01T00:00:00Z"}"#;
        assert_eq!(text, format!("{expected}\n"));
        let text = line(LogFormat::Text, Level::Warn, "a b", Duration::ZERO);
        assert_eq!(text, "time=\"1970-01-01T00:00:00Z\" level=warning msg=\"a b\"\n");
    }
}
