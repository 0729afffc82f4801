//! Hosts that cannot do everything: what was asked for is refused by name, or done otherwise and said so.
//!
//! Which kernel runs here cannot be chosen; what it refuses can. On a bed of the case's own, `godwit` is a script
//! that starts workers and agents under a filter of system calls, as a file in the node's `/run` says; containers
//! are started without.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::suite::{Answer, Case, Container, Outcome, Site, Stage, Trouble};
use godwit_integration::{Bed, BedOptions, Storage, tools};
use godwit_protocol::Mode;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::claim::{answer, assert_stayed, flags_of, start};
use super::failures::fails_in_the_freeze;
use super::storm::Storm;

pub(super) fn cases() -> Vec<Case> {
    vec![case!(hosts_that_lack_something_say_so_and_do_otherwise).alone()]
}

fn hosts_that_lack_something_say_so_and_do_otherwise(stage: &Stage) -> Outcome {
    let lane = stage.lane;
    let dir = programs()?;
    let name = format!("modes-less-{}", lane.to_string().replace(['/', '.'], "-"));
    let bed = Bed::up(BedOptions {
        agent: true,
        storage: Storage::Memory,
        bin_dirs: vec![dir.path().to_path_buf()],
        ..lane.bed(&name)
    })?;
    let stage = Stage::new(lane, bed)?;
    [&stage.a, &stage.b].into_iter().try_for_each(Site::import_workload)?;
    let outcome = [
        source_without_userfaultfd as fn(&Stage) -> Outcome,
        source_without_pagemap_scan,
        source_without_filters_of_system_calls,
        target_without_userfaultfd,
        hosts_that_lack_nothing,
    ]
    .into_iter()
    .try_for_each(|part| part(&stage));
    stage.down()?;
    outcome
}

/// Makes a directory with the script, and the shim beside it, which takes the `godwit` of its own directory.
fn programs() -> Result<TempDir, Trouble> {
    let dir = tempfile::tempdir().map_err(Trouble::io("make", "a directory"))?;
    let built = tools::built()?;
    let script = dir.path().join("godwit");
    let text = WRAPPER.replace("BUILT", &built.display().to_string());
    fs::write(&script, text).map_err(Trouble::io("write", &script))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).map_err(Trouble::io("write", &script))?;
    for name in [SHIM, "containerd-shim-runc-v2"] {
        let copy = dir.path().join(name);
        fs::copy(built.join(SHIM), &copy).map_err(Trouble::io("write", &copy))?;
    }
    Ok(dir)
}

/// It cannot follow what is written: rounds are refused, and `auto` does without.
fn source_without_userfaultfd(stage: &Stage) -> Outcome {
    lack(&stage.a, "--userfaultfd")?;
    for mode in [Mode::Precopy, Mode::Hybrid] {
        let cause = stays(stage, mode)?;
        for word in [mode.to_string().as_str(), "userfaultfd", "native", "postcopy"] {
            assert!(cause.contains(word), "{word} is not in: {cause}");
        }
    }
    let answer = moves(stage, Mode::Auto, &[])?;
    assert_note(&answer, "userfaultfd");
    assert_eq!(answer.number("faults.network.count"), Some(0.0));
    let answer = moves(stage, Mode::Auto, &["--allow-postcopy"])?;
    assert_note(&answer, "userfaultfd");
    assert!(answer.number("faults.network.count").is_some_and(|count| count > 0.0));
    lack(&stage.a, "")
}

/// Neither can it follow what is written, nor keep pages from CRIU: a kernel before 6.7 without soft-dirty bits. With
/// these, which the kernel may have that tests run on, there are rounds.
fn source_without_pagemap_scan(stage: &Stage) -> Outcome {
    lack(&stage.a, "--pagemap-scan")?;
    for mode in [Mode::Native, Mode::Postcopy, Mode::Auto] {
        assert_dumps_lazily(&moves(stage, mode, flags_of(mode))?, "6.7");
    }
    lack(&stage.a, "")
}

/// It can follow what is written, but not keep pages from CRIU: pages travel as ever, in every mode, and what is given
/// up runs on.
fn source_without_filters_of_system_calls(stage: &Stage) -> Outcome {
    lack(&stage.a, "--seccomp-listener")?;
    for mode in Mode::ALL {
        let answer = moves(stage, mode, flags_of(mode))?;
        assert_dumps_lazily(&answer, "filter of system calls");
        assert_eq!(answer.notes().len(), 1, "{:?}", answer.notes());
    }
    fails_in_the_freeze(stage, &stage.a, "migrate-source")?;
    fails_in_the_freeze(stage, &stage.b, "migrate-target")?;
    lack(&stage.a, "")
}

/// It cannot restore with pages still to come: CRIU's images carry them.
fn target_without_userfaultfd(stage: &Stage) -> Outcome {
    lack(&stage.b, "--userfaultfd")?;
    for mode in [Mode::Native, Mode::Postcopy, Mode::Auto] {
        let answer = moves(stage, mode, &[])?;
        assert_note(&answer, "userfaultfd");
        assert_eq!(answer.number("streams"), Some(0.0));
    }
    lack(&stage.b, "")
}

/// That the script itself is in nobody's way.
fn hosts_that_lack_nothing(stage: &Stage) -> Outcome {
    let answer = moves(stage, Mode::Precopy, &[])?;
    assert!(answer.number("streams").is_some_and(|streams| streams > 0.0));
    Ok(())
}

/// Makes workers and the agent of a node lack what `flags` of `workload deny` say.
fn lack(site: &Site, flags: &str) -> Outcome {
    let path = site.node().path("/run/lacks");
    fs::write(&path, flags).map_err(Trouble::io("write", &path))?;
    // CRIU remembers there what the kernel could do the last time.
    drop(fs::remove_file(site.node().path("/run/criu.kdat")));
    site.node().stop_agent(Signal::SIGTERM);
    Ok(site.node().start_agent::<[&str; 0], _>([])?)
}

/// Asks for a move that is refused, claims that nothing has come of it, and returns the reason.
fn stays(stage: &Stage, mode: Mode) -> Result<String, Trouble> {
    let storm = Storm::of("threads");
    let container = storm.run_on(&stage.a)?;
    let (before, pid) = (storm.counts(&container)?, container.pid()?);
    let there = Container::adopt(&stage.b, container.id());
    let cause = answer(start(&stage.a, container.id(), &stage.b.host(), mode, &[])?)?.failed()?;
    assert_stayed(&container, pid, &there)?;
    storm.assert_whole(&container, &before)?;
    Ok(cause)
}

/// Moves a program that has threads, and claims that all of it arrives.
fn moves(stage: &Stage, mode: Mode, flags: &[&str]) -> Result<Answer, Trouble> {
    let storm = Storm::of("threads");
    let container = storm.run_on(&stage.a)?;
    let before = storm.counts(&container)?;
    let moved = Container::adopt(&stage.b, container.id());
    let answer = answer(start(&stage.a, container.id(), &stage.b.host(), mode, flags)?)?.moved()?;
    moved.await_state(Status::Running)?;
    storm.assert_whole(&moved, &before)?;
    Ok(answer)
}

/// Claims that pages travelled outside of CRIU's images, and that CRIU left them out itself.
fn assert_dumps_lazily(answer: &Answer, why: &str) {
    assert_note(answer, "lazily");
    assert_note(answer, why);
    assert!(answer.number("streams").is_some_and(|streams| streams > 0.0));
}

fn assert_note(answer: &Answer, word: &str) {
    let notes = answer.notes();
    assert!(notes.iter().any(|note| note.contains(word)), "{word} is in none of {notes:?}");
}

const SHIM: &str = "containerd-shim-godwit-v1";
const WRAPPER: &str = r#"#!/bin/bash
case " $* " in
    *" migrate-source "* | *" migrate-target "* | *" agent "*) lacks=$(cat /run/lacks 2>/dev/null) ;;
esac
if [[ -n $lacks ]]; then exec BUILT/workload deny $lacks -- BUILT/godwit "$@"; fi
exec BUILT/godwit "$@"
"#;
