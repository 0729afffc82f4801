//! What every failed migration must leave behind: a running container, and nothing else.

use godwit_integration::suite::{Answer, Container, Outcome, Stage, Trouble, await_that};

/// A container that counts where it can be read from outside.
pub(super) const COUNTER: [&str; 3] = [
    "sh",
    "-c",
    "i=0; while :; do i=$((i+1)); echo $i >/tmp/next; mv /tmp/next /tmp/count; usleep 1000; done",
];

/// Claims that an answer is a failure that left the container running, and that its text has all of `words` in it.
pub(super) fn assert_says(answer: Answer, words: &[&str]) -> Outcome {
    let cause = answer.failed()?;
    for word in words {
        assert!(cause.contains(word), "{word:?} is not in: {cause}");
    }
    Ok(())
}

/// Claims that a container runs on node a, with the process that it had, and that node b has nothing of it.
pub(super) fn assert_untouched(stage: &Stage, container: &Container<'_>, pid: u32) -> Outcome {
    container.assert_runs()?;
    assert_eq!(container.pid()?, pid);
    container.exec(&["true"])?.ok()?;
    Container::adopt(&stage.b, container.id()).await_gone()
}

/// As [`assert_untouched`] for a container that runs [`COUNTER`], which must go on counting.
pub(super) fn assert_counts_on(stage: &Stage, container: &Container<'_>, pid: u32) -> Outcome {
    assert_untouched(stage, container, pid)?;
    let before = count(container)?;
    await_that("it counts", || count(container).is_ok_and(|now| now > before))
}

/// Runs [`COUNTER`], and returns the container with the process id that it has.
pub(super) fn counter<'a>(stage: &'a Stage, stem: &str) -> Result<(Container<'a>, u32), Trouble> {
    let container = stage.a.plan(stem).run(&COUNTER)?;
    await_that("it counts", || count(&container).is_ok())?;
    let pid = container.pid()?;
    Ok((container, pid))
}

fn count(container: &Container<'_>) -> Result<u64, Trouble> {
    let path = format!("/proc/{}/root/tmp/count", container.pid()?);
    let text = std::fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
    text.trim().parse().map_err(|_| Trouble::Garbled { what: "a count", text })
}
