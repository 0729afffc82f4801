//! The programs that check their memory (`workload storm`), run and read.

use std::fs;
use std::path::PathBuf;

use godwit_integration::process::wait_until;
use godwit_integration::suite::{Container, Outcome, Plan, Site, Trouble};
use godwit_integration::workload::storm::{REPORTS, parse};

use super::claim::PATIENCE;

/// A program, and how large it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storm {
    pub(super) kind: &'static str,
    /// Pages of each writer.
    pub(super) pages: u64,
    /// Writers, or mappings.
    pub(super) count: u64,
    /// Lines that are written.
    pub(super) reports: usize,
}

impl Storm {
    /// Returns the program of a kind, in the size in which it is usually run.
    pub(super) fn of(kind: &'static str) -> Self {
        let (pages, count, reports) = match kind {
            "threads" => (256, 16, 16),
            "processes" => (256, 16, 16),
            "forks" => (1024, 1, 1),
            "maps" => (0, 64, 1),
            "moves" => (128, 16, 1),
            "shared" => (1024, 1, 2),
            "vmas" => (0, 5000, 1),
            "sparse" => (32_768, 1, 1),
            "stacks" => (128, 8, 8),
            "beat" => (512, 1, 1),
            _ => (4096, 1, 1),
        };
        Self { kind, pages, count, reports }
    }

    /// Runs it as the container of `plan`, and returns when every writer has checked all of its pages once.
    pub(super) fn run(self, plan: Plan<'_>) -> Result<Container<'_>, Trouble> {
        let [pages, count] = [self.pages, self.count].map(|number| number.to_string());
        let command = ["workload", "storm", self.kind, "--pages", &pages, "--count", &count];
        let container = plan.image("workload").run(&command)?;
        self.await_passes(&container, &Counts::default(), 1)?;
        Ok(container)
    }

    /// Runs it on a node under a name of its own.
    pub(super) fn run_on(self, site: &Site) -> Result<Container<'_>, Trouble> {
        self.run(site.plan(self.kind))
    }

    /// Waits until every writer has checked all of its pages `passes` times more than at `earlier`, and claims
    /// that nothing was wrong and no count has gone back.
    pub(super) fn await_passes(
        self,
        container: &Container<'_>,
        earlier: &Counts,
        passes: u64,
    ) -> Result<Counts, Trouble> {
        let mut last = None;
        let reached = wait_until(PATIENCE, || {
            last = self.counts(container).ok();
            last.as_ref().is_some_and(|now| {
                now.bad() > earlier.bad() || now.is_back_behind(earlier) || now.is_past(earlier, passes)
            })
        });
        let Some(now) = last.filter(|_| reached) else {
            let what = format!("{} checks its memory {passes} times after {earlier:?}", container.id());
            return Err(Trouble::Late { what, after: PATIENCE });
        };
        assert_eq!(now.bad(), 0, "of {earlier:?} became {now:?}");
        assert!(!now.is_back_behind(earlier), "of {earlier:?} became {now:?}");
        Ok(now)
    }

    /// Claims that the container is whole: it goes on, and every page is checked at least once from now on.
    pub(super) fn assert_whole(self, container: &Container<'_>, earlier: &Counts) -> Outcome {
        self.await_passes(container, earlier, 2).map(drop)
    }

    /// Reads what its writers have found so far.
    pub(super) fn counts(self, container: &Container<'_>) -> Result<Counts, Trouble> {
        let dir = PathBuf::from(format!("/proc/{}/root{REPORTS}", container.pid()?));
        let read = |writer: usize| {
            let path = dir.join(writer.to_string());
            let text = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
            parse(&text).ok_or(Trouble::Garbled { what: "a report", text })
        };
        Ok(Counts((0..self.reports).map(read).collect::<Result<_, _>>()?))
    }
}

/// What the writers have found: for each its pages, errors, steps, passes and longest pause in microseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts(Vec<[u64; 5]>);

impl Counts {
    /// All errors.
    pub(super) fn bad(&self) -> u64 {
        self.0.iter().map(|[_, bad, ..]| bad).sum()
    }

    /// Pages of all writers.
    pub(super) fn pages(&self) -> u64 {
        self.0.iter().map(|[pages, ..]| pages).sum()
    }

    /// Changes by all writers.
    pub(super) fn steps(&self) -> u64 {
        self.0.iter().map(|[_, _, steps, ..]| steps).sum()
    }

    fn is_past(&self, earlier: &Self, passes: u64) -> bool {
        self.with(earlier).all(|([.., now, _], [.., before, _])| *now >= before + passes)
    }

    fn is_back_behind(&self, earlier: &Self) -> bool {
        self.with(earlier).any(|([_, _, steps, passes, _], before)| *steps < before[2] || *passes < before[3])
    }

    fn with<'a>(&'a self, earlier: &'a Self) -> impl Iterator<Item = (&'a [u64; 5], [u64; 5])> {
        let before = earlier.0.iter().copied().chain(std::iter::repeat([0; 5]));
        self.0.iter().zip(before)
    }
}
