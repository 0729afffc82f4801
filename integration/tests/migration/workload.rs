//! The self-checking program in a container, and a counter that writes down each of its ticks.

use std::fs;

use godwit_integration::suite::{Container, Outcome, Plan, Trouble, await_that};
use godwit_integration::workload::memory::Findings;
use godwit_integration::workload::program;

/// How the self-checking program runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) processes: u64,
    pub(super) threads: u64,
    /// Of each thread.
    pub(super) pages: u64,
}

impl Shape {
    /// Runs it as the container of `plan`.
    pub(super) fn run(self, plan: Plan<'_>) -> Result<Container<'_>, Trouble> {
        let [processes, threads, pages] =
            [self.processes, self.threads, self.pages].map(|number| number.to_string());
        let container = plan.image("workload").run(&[
            "workload",
            "pages",
            "--processes",
            &processes,
            "--threads",
            &threads,
            "--pages",
            &pages,
        ])?;
        await_that("the program has filled its memory", || findings(&container).is_ok())?;
        Ok(container)
    }

    /// Claims that every page holds what was written to it last, and that writing has gone on past `earlier`.
    pub(super) fn assert_whole(
        self,
        container: &Container<'_>,
        earlier: Findings,
    ) -> Result<Findings, Trouble> {
        let mut now = findings(container)?;
        assert_eq!((now.bad, now.pages), (0, self.processes * self.threads * self.pages));
        await_that("pages are rewritten", || {
            now = findings(container).unwrap_or(now);
            now.rewrites > earlier.rewrites
        })?;
        assert_eq!(now.bad, 0);
        Ok(now)
    }
}

/// Has the program check all of its pages.
pub(super) fn findings(container: &Container<'_>) -> Result<Findings, Trouble> {
    let line = container.exec(&["workload", "ask"])?.ok()?;
    program::parse_line(&line).ok_or(Trouble::Garbled { what: "findings", text: line })
}

/// A shell that appends each number and the time to `/ticks`, in the writable layer, and to `/run/ticks`, in a
/// tmpfs. `date` makes a process for each.
pub(super) const TICKER: [&str; 3] = [
    "sh",
    "-c",
    "i=0; while :; do i=$((i+1)); echo \"$i $(date +%s)\" | tee -a /ticks >>/run/ticks; usleep 5000; done",
];

/// Claims that the ticks in both files are 1, 2, 3 and so on without a gap or a repetition, and that none is missing
/// from one of them; returns how many there are. The container may run meanwhile, and its last line be incomplete.
pub(super) fn ticks(container: &Container<'_>) -> Result<u64, Trouble> {
    let root = format!("/proc/{}/root", container.pid()?);
    let count = |file: &str| {
        let path = format!("{root}/{file}");
        let text = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut count = 0;
        for line in whole.lines() {
            count += 1;
            let number = line.split(' ').next().and_then(|number| number.parse::<u64>().ok());
            assert_eq!(number, Some(count), "in {file}: {line:?}");
        }
        Ok::<u64, Trouble>(count)
    };
    // Each tick is in both before the next begins.
    let (before, tmpfs, after) = (count("ticks")?, count("run/ticks")?, count("ticks")?);
    assert!(
        (before.saturating_sub(1)..=after + 1).contains(&tmpfs),
        "{before} to {after} ticks in the layer, {tmpfs} in the tmpfs"
    );
    Ok(after)
}

/// Waits until a container that runs [`TICKER`] has ticked past `count`, and returns where it is.
pub(super) fn await_ticks_past(container: &Container<'_>, count: u64) -> Result<u64, Trouble> {
    await_that(&format!("{} ticks past {count}", container.id()), || {
        let path = container.pid().map(|pid| format!("/proc/{pid}/root/run/ticks"));
        path.is_ok_and(|path| {
            let lines = fs::read_to_string(path).unwrap_or_default().lines().count();
            lines as u64 > count
        })
    })?;
    ticks(container)
}

/// Claims that commands run in a container that has moved, and that it can be frozen, stopped and deleted.
pub(super) fn assert_usable(container: &Container<'_>) -> Outcome {
    assert_eq!(container.exec(&["echo", "hello"])?.ok()?, "hello\n");
    container.task("pause")?;
    container.task("resume")?;
    assert!(container.task("metrics")?.contains("pids.current"));
    container.stop()?;
    assert_eq!(container.site().rpc.delete(container.id())?, 137);
    Ok(())
}
