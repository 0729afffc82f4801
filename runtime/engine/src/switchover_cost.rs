//! What a switchover costs on this host beside the pages: freeze, dump of the state, restore and resume.
//!
//! The last move's figure is the best guess for the next one. It is kept in a file that goes with the next boot; a
//! file that cannot be read or written only makes the guess a worse one.

use std::fs;
use std::path::Path;
use std::time::Duration;

use godwit_protocol::report::DowntimeParts;

/// What is assumed before the first move.
pub const ASSUMED: Duration = Duration::from_millis(200);

/// Returns what the last move's switchover cost.
#[must_use]
pub fn last(path: &Path) -> Duration {
    let text = fs::read_to_string(path).unwrap_or_default();
    // A minute is no cost of a switchover, and no file of ours says so.
    let known = text.trim().parse().ok().map(Duration::from_micros).filter(|cost| *cost < LONGEST);
    known.unwrap_or(ASSUMED)
}

/// Notes what a move's switchover cost.
pub fn note(path: &Path, downtime: &DowntimeParts) {
    let cost_ms = downtime.total_ms() - downtime.transfer_ms;
    let Ok(cost) = Duration::try_from_secs_f64(cost_ms / 1e3) else { return };
    let directory = path.parent().unwrap_or_else(|| Path::new("/"));
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(path, cost.as_micros().to_string()));
    if let Err(error) = written {
        log::debug!("{}: {error}", path.display());
    }
}

const LONGEST: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_move_is_remembered_and_nonsense_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/cost");
        assert_eq!(last(&path), ASSUMED);
        let downtime =
            DowntimeParts { freeze_ms: 1.0, restore_ms: 40.5, transfer_ms: 700.0, ..Default::default() };
        note(&path, &downtime);
        assert_eq!(last(&path), Duration::from_micros(41_500));
        for text in ["", "fast", "-1", "99999999999"] {
            fs::write(&path, text).unwrap();
            assert_eq!(last(&path), ASSUMED, "{text}");
        }
    }
}
