//! The command line of a test binary, as far as `cargo test` and cargo-nextest use it.
//!
//! To them a test is a *lane* (see [`super`]): its cases share a bed, so one process has to run them all.
//! `--list` names lanes, and `--exact LANE` runs one. Without `--exact`, a filter is matched against
//! `SUITE::LANE::CASE`, so that a single case can be run by hand.

/// Which tests of a suite are meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Which {
    /// Those of an ordinary run.
    #[default]
    Ordinary,
    /// Those of a full run that are not in an ordinary one.
    Ignored,
    /// All of them.
    All,
}

/// What a command line asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Arguments {
    /// Name the tests instead of running them.
    pub list: bool,
    /// Filters are whole names of lanes.
    pub exact: bool,
    /// Which tests.
    pub which: Which,
    /// How many lanes run side by side; 0 where it is not said.
    pub threads: usize,
    /// What a name must contain, all of it.
    pub filters: Vec<String>,
    /// What a name must not contain.
    pub skips: Vec<String>,
}

impl Arguments {
    /// Reads a command line without the program's name. Options that only change what output looks like are
    /// passed over.
    pub(super) fn parse(args: impl IntoIterator<Item = String>) -> Self {
        let mut parsed = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--list" => parsed.list = true,
                "--exact" => parsed.exact = true,
                "--ignored" => parsed.which = Which::Ignored,
                "--include-ignored" => parsed.which = Which::All,
                "--test-threads" => {
                    parsed.threads = args.next().and_then(|value| value.parse().ok()).unwrap_or_default();
                }
                "--skip" => parsed.skips.extend(args.next()),
                "--format" | "--color" | "--logfile" => drop(args.next()),
                option if option.starts_with('-') => {}
                _ => parsed.filters.push(arg),
            }
        }
        parsed
    }

    /// Tells whether a case is asked for.
    pub(super) fn wants(&self, suite: &str, lane: &str, case: &str) -> bool {
        if self.exact {
            return self.filters.iter().any(|filter| filter == lane);
        }
        let name = format!("{suite}::{lane}::{case}");
        self.filters.iter().all(|filter| name.contains(filter))
            && !self.skips.iter().any(|skip| name.contains(skip))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Arguments {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn values_of_options_are_no_filters() {
        let args = parse("--test-threads 2 --format terse --nocapture --include-ignored exec");
        assert_eq!((args.threads, args.which), (2, Which::All));
        assert_eq!(args.filters, ["exec"]);
    }

    #[test]
    fn exact_names_a_lane_and_filters_narrow_down() {
        assert!(parse("1.6/godwit --exact").wants("lifecycle", "1.6/godwit", "anything"));
        assert!(!parse("1.6/godwit --exact").wants("lifecycle", "1.6/godwit-2", "anything"));
        assert!(parse("1.6 exec").wants("lifecycle", "1.6/godwit", "exec_returns"));
        assert!(!parse("1.7 exec").wants("lifecycle", "1.6/godwit", "exec_returns"));
        assert!(!parse("--skip exec").wants("lifecycle", "1.6/godwit", "exec_returns"));
    }
}
