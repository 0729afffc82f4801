//! What the containers of this suite do, and what is asked of them afterwards.

use std::fs;

use godwit_integration::suite::{Container, Outcome, Site, Trouble, await_that};

/// A shell that counts up in its memory and writes the count into the writable layer after each step.
pub(super) const COUNTER: [&str; 3] = [
    "sh",
    "-c",
    "i=0; while :; do i=$((i+1)); echo $i >/tmp/next; mv /tmp/next /tmp/count; usleep 1000; done",
];

/// A program of the image `workload` that holds a file lock.
pub(super) const LOCK: [&str; 3] = ["workload", "lock", "/run/lock"];

/// Waits until a container that runs [`LOCK`] has its lock.
pub(super) fn await_lock(container: &Container<'_>) -> Outcome {
    let pid = container.pid()?.to_string();
    await_that("the file is locked", || {
        // Columns of proc_locks(5): number, kind, mode, type, process.
        let table = fs::read_to_string("/proc/locks").unwrap_or_default();
        table.lines().any(|line| line.split_whitespace().nth(4) == Some(&pid))
    })
}

/// Returns the count of a container that runs [`COUNTER`].
pub(super) fn count(container: &Container<'_>) -> Result<u64, Trouble> {
    let path = format!("/proc/{}/root/tmp/count", container.pid()?);
    let text = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
    text.trim().parse().map_err(|_| Trouble::Garbled { what: "a count", text })
}

/// Waits until a container that runs [`COUNTER`] has counted past `count`, and returns where it is.
pub(super) fn await_count_past(container: &Container<'_>, past: u64) -> Result<u64, Trouble> {
    await_that(&format!("{} counts past {past}", container.id()), || {
        count(container).is_ok_and(|now| now > past)
    })?;
    count(container)
}

/// Removes the images of a node whose names have a word in them, when dropped: checkpoints are images.
#[derive(Debug)]
pub(super) struct Images<'a> {
    site: &'a Site,
    word: String,
}

impl<'a> Images<'a> {
    pub(super) fn named_after(site: &'a Site, word: &str) -> Self {
        Self { site, word: word.to_owned() }
    }

    pub(super) fn list(&self) -> Result<Vec<String>, Trouble> {
        let list = self.site.ctr(&["images", "list", "--quiet"])?;
        Ok(list.lines().filter(|name| name.contains(&self.word)).map(str::to_owned).collect())
    }
}

impl Drop for Images<'_> {
    fn drop(&mut self) {
        for name in self.list().unwrap_or_default() {
            drop(self.site.try_ctr(&["images", "remove", "--sync", &name]));
        }
    }
}

/// Claims that a container is whole and obedient: commands run in it, and it can be frozen, stopped and deleted.
pub(super) fn assert_usable(container: &Container<'_>) -> Outcome {
    assert_eq!(container.exec(&["echo", "hello"])?.ok()?, "hello\n");
    container.task("pause")?;
    container.task("resume")?;
    container.stop()?;
    assert_eq!(container.site().rpc.delete(container.id())?, 137);
    Ok(())
}
