//! What moves with the memory: the record, files, streams, limits; and what does not move.

use std::fs;

use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, Trouble, await_that};
use serde_json::Value;

use super::workload::{TICKER, assert_usable, await_ticks_past};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(record_arrives_as_it_was),
        case!(written_layer_arrives_with_deletions_links_modes_and_attributes),
        case!(image_that_the_target_lacks_comes_along),
        case!(limits_hold_on_the_target),
        case!(log_file_is_written_on_the_target),
        case!(attach_works_on_the_target),
        case!(user_namespace_moves_or_is_refused_by_name),
        case!(exec_that_runs_moves_along_or_is_refused_by_name),
    ]
}

fn record_arrives_as_it_was(stage: &Stage) -> Outcome {
    let flags = ["--label", "colour=green", "--env", "SHAPE=round", "--annotation", "note=kept"];
    let container = stage.a.plan("record").flags(&flags).run(&TICKER)?;
    let before = stage.a.rpc.record(container.id())?;
    let (moved, _) = container.move_to(&stage.b)?;
    let after = stage.b.rpc.record(moved.id())?;
    assert_eq!(after.labels, before.labels);
    assert_eq!((&after.image, &after.snapshotter), (&before.image, &before.snapshotter));
    assert_eq!(after.runtime.map(|runtime| runtime.name), before.runtime.map(|runtime| runtime.name));
    let spec = |spec: Option<prost_types::Any>| {
        serde_json::from_slice::<Value>(&spec.unwrap_or_default().value).unwrap_or_default()
    };
    let (before, after) = (spec(before.spec), spec(after.spec));
    for part in ["process", "mounts", "annotations", "root", "hostname"] {
        assert_eq!(after[part], before[part], "{part}");
    }
    assert_usable(&moved)
}

/// The layer gets whatever an overlay can hold: a file deleted from the image, a directory replaced, hard and
/// symbolic links, a sparse file, modes, an owner, and an extended attribute.
fn written_layer_arrives_with_deletions_links_modes_and_attributes(stage: &Stage) -> Outcome {
    // Busybox is static there: it does not need the libraries that the image has beside it.
    let container = stage.a.plan("layer").image("workload").run(&["sleep", "100000"])?;
    container.exec(&["sh", "-c", WRITE_LAYER])?.ok()?;
    let before = container.exec(&["sh", "-c", SHOW_LAYER])?.ok()?;
    let (moved, _) = container.move_to(&stage.b)?;
    let after = moved.exec(&["sh", "-c", SHOW_LAYER])?.ok()?;
    let differing: Vec<_> =
        before.lines().zip(after.lines()).filter(|(before, after)| before != after).collect();
    assert!(differing.is_empty() && before.len() == after.len(), "{differing:#?}");
    let sparse = fs::metadata(format!("/proc/{}/root/data/sparse", moved.pid()?));
    let sparse = sparse.map_err(Trouble::io("look at", "/data/sparse"))?;
    assert_eq!(sparse.len(), (64 << 20) + 3);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&sparse);
    assert!(blocks < 2048, "the sparse file takes {blocks} blocks");
    assert_usable(&moved)
}

fn image_that_the_target_lacks_comes_along(stage: &Stage) -> Outcome {
    let (here, there) = (&stage.a, &stage.b);
    let image = "localhost/only-here:latest";
    here.ctr(&["images", "tag", "localhost/busybox:latest", image])?;
    let container = here.plan("image").image("only-here").run(&TICKER)?;
    let moved = container.move_to(there).map(|(moved, _)| moved);
    let listed = there.ctr(&["images", "list", "--quiet"])?.lines().any(|name| name == image);
    let used = moved.and_then(|moved| {
        await_ticks_past(&moved, 1)?;
        assert_usable(&moved)
    });
    drop(container);
    here.ctr(&["images", "remove", "--sync", image])?;
    there.try_ctr(&["images", "remove", "--sync", image])?;
    used?;
    assert!(listed, "the target has no image of this name");
    Ok(())
}

fn limits_hold_on_the_target(stage: &Stage) -> Outcome {
    let flags = ["--memory-limit", "67108864", "--cpus", "0.5"];
    let container = stage.a.plan("limits").flags(&flags).run(&TICKER)?;
    await_ticks_past(&container, 5)?;
    let (moved, _) = container.move_to(&stage.b)?;
    let read = |file: std::path::PathBuf| fs::read_to_string(&file).map_err(Trouble::io("read", &file));
    let limit = read(moved.cgroup_file("memory/memory.limit_in_bytes", "memory.max")?)?;
    assert_eq!(limit.trim(), "67108864");
    let quota = read(moved.cgroup_file("cpu/cpu.cfs_quota_us", "cpu.max")?)?;
    assert_eq!(quota.split_whitespace().next(), Some("50000"));
    assert_usable(&moved)
}

fn log_file_is_written_on_the_target(stage: &Stage) -> Outcome {
    let (inside, here) = stage.a.scratch("log")?;
    let there = stage.b.node().path(&inside);
    fs::create_dir_all(&there).map_err(Trouble::io("make", &there))?;
    let uri = format!("file://{inside}/log");
    let script = "i=0; while :; do i=$((i+1)); echo $i; usleep 5000; done";
    let container = stage.a.plan("log").flags(&["--log-uri", &uri]).run(&["sh", "-c", script])?;
    let numbers = |dir: &std::path::Path| {
        let text = fs::read_to_string(dir.join("log")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse::<u64>().ok()).collect::<Vec<_>>()
    };
    await_that("it logs", || numbers(&here).len() > 10)?;
    let (moved, _) = container.move_to(&stage.b)?;
    await_that("it logs on the target", || numbers(&there).len() > 10)?;
    moved.stop()?;
    let all: Vec<u64> = [numbers(&here), numbers(&there)].concat();
    let expected: Vec<u64> = (1..=all.len() as u64).collect();
    assert_eq!(all, expected, "both logs together have every line once");
    Ok(())
}

fn attach_works_on_the_target(stage: &Stage) -> Outcome {
    let script = "while read word; do echo got $word; done; sleep 100000";
    let container = stage.a.plan("attach").run(&["sh", "-c", script])?;
    let (moved, _) = container.move_to(&stage.b)?;
    let mut job = stage.b.start_ctr(&["tasks", "attach", moved.id()])?;
    job.write("hello\n")?;
    job.await_stdout("got hello\n")?;
    moved.kill("SIGKILL")?;
    job.wait()?.with_code(137)?;
    Ok(())
}

/// `ctr run --uidmap` copies the image's files into a snapshot of their own with other owners, which no image
/// unpacks to: it is honest to refuse that.
fn user_namespace_moves_or_is_refused_by_name(stage: &Stage) -> Outcome {
    let maps = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
    let container = stage.a.plan("userns").flags(&maps).run(&TICKER)?;
    let before = await_ticks_past(&container, 5)?;
    let moved = Container::adopt(&stage.b, container.id());
    let answer = stage.a.migrate(container.id(), "node-b", &[])?;
    if answer.code == 0 {
        await_ticks_past(&moved, before)?;
        assert_eq!(moved.exec(&["id", "-u"])?.ok()?, "0\n");
        return assert_usable(&moved);
    }
    let cause = answer.failed()?;
    assert!(cause.contains("user namespace"), "{cause}");
    await_ticks_past(&container, before)?;
    moved.await_gone()
}

/// A process that was added by exec is no descendant of init. It must not get lost on the way.
fn exec_that_runs_moves_along_or_is_refused_by_name(stage: &Stage) -> Outcome {
    let container = stage.a.plan("exec-moves").run(&["sleep", "100000"])?;
    let script = "i=0; while :; do i=$((i+1)); echo $i >/run/extra; usleep 5000; done";
    let exec = container.start_exec(&[], &["sh", "-c", script])?;
    let count = |container: &Container<'_>| {
        let path = format!("/proc/{}/root/run/extra", container.pid().unwrap_or_default());
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or_default()
    };
    await_that("it counts", || count(&container) > 5)?;
    let answer = stage.a.migrate(container.id(), &stage.b.host(), &[])?;
    let moved = Container::adopt(&stage.b, container.id());
    if answer.code == 0 {
        let before = count(&moved);
        await_that("it goes on counting", || count(&moved) > before)?;
        exec.wait()?;
        return assert_usable(&moved);
    }
    // To refuse is honest as well, if it is said why and nothing is disturbed.
    let cause = answer.failed()?;
    assert!(cause.contains("exec"), "{cause}");
    container.assert_runs()?;
    exec.kill();
    Ok(())
}

const WRITE_LAYER: &str = "set -e
rm /etc/group
rm -r /usr/lib && mkdir /usr/lib && echo new >/usr/lib/file
mkdir -p /data/deep/dir
echo one >/data/one && ln /data/one /data/same && ln -s one /data/link
chmod 4711 /data/one
echo two >/data/two && chown 33:44 /data/two && chmod 600 /data/two
dd if=/dev/zero of=/data/sparse bs=1 count=3 seek=67108864 2>/dev/null
mkfifo /data/fifo
echo dot >/data/.hidden
touch -d '2001-02-03 04:05:06' /data/old
";
// Not the link counts of directories, which tell how an overlay has put them together.
const SHOW_LAYER: &str = "cd / && find data usr/lib etc | sort | xargs stat -c '%n %F %a %u:%g' && \
    find data usr/lib etc -type f | sort | xargs stat -c '%n %h %s' && stat -c '%Y' data/old && \
    readlink data/link && cat data/one data/two usr/lib/file data/.hidden && sha256sum data/sparse && \
    test ! -e etc/group";
