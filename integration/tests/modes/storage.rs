//! Images and pages through storage instead of memory: the baseline that the cache is measured against.

use std::fs;
use std::path::Path;

use godwit_integration::case;
use godwit_integration::suite::{Answer, Case, Container, Outcome, Stage, Trouble};
use godwit_protocol::Mode;
use godwit_protocol::wire::pages::PAGE_BYTES;

use super::claim::{PATIENCE, start};
use super::storm::Storm;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(every_page_arrives_through_storage_by_native),
        case!(every_page_arrives_through_storage_by_precopy),
        case!(every_page_arrives_through_storage_by_postcopy),
    ]
}

fn every_page_arrives_through_storage_by_native(stage: &Stage) -> Outcome {
    // Once on each side: all pages are in CRIU's images.
    arrives(stage, Mode::Native, 2)
}

fn every_page_arrives_through_storage_by_precopy(stage: &Stage) -> Outcome {
    // Once, where they wait for their tasks.
    arrives(stage, Mode::Precopy, 1)
}

fn every_page_arrives_through_storage_by_postcopy(stage: &Stage) -> Outcome {
    // Once, although their tasks are there when most of them come.
    arrives(stage, Mode::Postcopy, 1)
}

/// Moves a program, and claims that its pages were written to storage so many times and that nothing is left of them.
fn arrives(stage: &Stage, mode: Mode, times: u64) -> Outcome {
    let storm = Storm { pages: 8192, ..Storm::of("single") };
    let container = storm.run_on(&stage.a)?;
    let before = storm.counts(&container)?;
    let moved = Container::adopt(&stage.b, container.id());
    let job = start(&stage.a, container.id(), &stage.b.host(), mode, &["--images", "disk"])?;
    let answer = Answer::read(job.wait_for(PATIENCE)?)?.moved()?;
    let written = answer.number("disk_bytes_written").unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "some megabytes")]
    let least = (times * storm.pages * PAGE_BYTES) as f64;
    assert!(written >= least, "{written} bytes were written to disk, and {least} are the least");
    storm.assert_whole(&moved, &before)?;
    container.await_gone()?;
    assert_nothing_is_left(Path::new("/var/lib/godwit/images"))
}

/// A directory is named by the process that made it; others may be moving containers at the same time.
fn assert_nothing_is_left(storage: &Path) -> Outcome {
    for entry in fs::read_dir(storage).map_err(Trouble::io("read", storage))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.split('-').next().unwrap_or_default();
        assert!(Path::new("/proc").join(owner).exists(), "{name} is left in {}", storage.display());
    }
    Ok(())
}
