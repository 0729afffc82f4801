//! Trees made at random, copied, changed, copied again, and compared; and peers that try to get out.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use godwit_protocol::rootfs::{Entry, Layer, Meta, Node, Pass};
use proptest::prelude::*;
use rustix::fs::XattrFlags;

use super::*;

/// Something a container does to its files.
#[derive(Debug, Clone)]
enum Deed {
    Mkdir(String),
    Write(String, u32),
    Append(String),
    Sparse(String),
    Symlink(String, String),
    Link(String, String),
    Fifo(String),
    Remove(String),
    Rename(String, String),
    Chmod(String, u32),
    Xattr(String),
}

fn do_deed(root: &Path, deed: &Deed) {
    let at = |path: &String| root.join(path);
    // Opening a pipe would wait for its other end.
    let pipe = |path: &String| at(path).metadata().is_ok_and(|found| found.file_type().is_fifo());
    // What cannot be done is not done: the trees need not know each other.
    match deed {
        Deed::Write(path, _) | Deed::Append(path) | Deed::Sparse(path) if pipe(path) => {}
        Deed::Mkdir(path) => drop(fs::create_dir_all(at(path))),
        Deed::Write(path, seed) => {
            let content: Vec<u8> = (0..seed % 70_000).map(|at| (at ^ seed).to_le_bytes()[0]).collect();
            drop(fs::write(at(path), content));
        }
        Deed::Append(path) => drop(fs::OpenOptions::new().append(true).open(at(path)).map(|mut file| {
            io::Write::write_all(&mut file, b"more").unwrap();
        })),
        Deed::Sparse(path) => drop(fs::File::create(at(path)).map(|file| {
            file.write_all_at(b"middle", 1 << 20).unwrap();
            file.set_len(3 << 20).unwrap();
        })),
        Deed::Symlink(path, to) => drop(symlink(to, at(path))),
        Deed::Link(from, to) => drop(fs::hard_link(at(from), at(to))),
        Deed::Fifo(path) => {
            let mode = rustix::fs::Mode::from_raw_mode(0o640);
            rustix::fs::mknodat(rustix::fs::CWD, at(path), rustix::fs::FileType::Fifo, mode, 0).ok();
        }
        Deed::Remove(path) => match at(path).symlink_metadata() {
            Ok(found) if found.is_dir() => drop(fs::remove_dir_all(at(path))),
            _ => drop(fs::remove_file(at(path))),
        },
        Deed::Rename(from, to) => drop(fs::rename(at(from), at(to))),
        Deed::Chmod(path, mode) => {
            let regular = at(path).symlink_metadata().is_ok_and(|found| !found.is_symlink());
            if regular {
                // The owner can always get in: removal is not what is tested.
                drop(fs::set_permissions(at(path), fs::Permissions::from_mode(0o700 | mode)));
            }
        }
        Deed::Xattr(path) => {
            rustix::fs::lsetxattr(at(path), "user.note", b"kept", XattrFlags::empty()).ok();
        }
    }
}

fn a_path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof!["a", "b", "a-", "c"], 1..4).prop_map(|names| names.join("/"))
}

fn a_deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        3 => a_path().prop_map(Deed::Mkdir),
        4 => (a_path(), any::<u32>()).prop_map(|(path, seed)| Deed::Write(path, seed)),
        1 => a_path().prop_map(Deed::Append),
        1 => a_path().prop_map(Deed::Sparse),
        1 => (a_path(), a_path()).prop_map(|(path, to)| Deed::Symlink(path, to)),
        2 => (a_path(), a_path()).prop_map(|(from, to)| Deed::Link(from, to)),
        1 => a_path().prop_map(Deed::Fifo),
        2 => a_path().prop_map(Deed::Remove),
        2 => (a_path(), a_path()).prop_map(|(from, to)| Deed::Rename(from, to)),
        1 => (a_path(), 0..0o100u32).prop_map(|(path, mode)| Deed::Chmod(path, mode)),
        1 => a_path().prop_map(Deed::Xattr),
    ]
}

/// Everything that a container can see of a tree, one line a path.
fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut first_names = std::collections::HashMap::new();
    describe_below(root, root, &mut lines, &mut first_names);
    lines
}

fn describe_below(
    root: &Path,
    directory: &Path,
    lines: &mut Vec<String>,
    first_names: &mut std::collections::HashMap<u64, String>,
) {
    let mut entries: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let found = path.symlink_metadata().unwrap();
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let content = if found.is_file() {
            format!("{:08x}", crc(&fs::read(&path).unwrap()))
        } else if found.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else {
            String::new()
        };
        let size = if found.is_dir() { 0 } else { found.len() };
        let first = if found.nlink() > 1 && !found.is_dir() {
            first_names.entry(found.ino()).or_insert_with(|| name.clone()).clone()
        } else {
            String::new()
        };
        let note = rustix::fs::lgetxattr(&path, "user.note", vec![0; 16].as_mut_slice()).is_ok();
        let (mode, uid, time) = (found.mode(), found.uid(), (found.mtime(), found.mtime_nsec()));
        lines.push(format!("{name} {mode:o} {uid} {size} {time:?} {content} {first} {note}"));
        if found.is_dir() {
            describe_below(root, &path, lines, first_names);
        }
    }
}

fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum: u32, byte| sum.rotate_left(5) ^ u32::from(*byte))
}

fn copy(copier: &mut Copier, pass: Pass, applier: &mut Applier) {
    copier.copy(pass, &BTreeSet::new(), applier).unwrap();
    applier.end().unwrap();
}

proptest! {
    // Few cases: each waits until the file system's clock has moved on.
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_arrives_whole_and_its_changes_arrive_after_it(
        before in proptest::collection::vec(a_deed(), 0..30),
        elsewhere in proptest::collection::vec(a_deed(), 0..10),
        after in proptest::collection::vec(a_deed(), 0..12),
        settle in any::<bool>(),
    ) {
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        before.iter().for_each(|deed| do_deed(source.path(), deed));
        elsewhere.iter().for_each(|deed| do_deed(target.path(), deed));
        if settle {
            sleep(Duration::from_millis(60));
        }
        let mut copier = Copier::open(&LayerRoot { path: source.path().to_owned(), layer: Layer::Whole }).unwrap();
        let mut applier = Applier::open(target.path()).unwrap();
        copy(&mut copier, Pass::Live, &mut applier);
        prop_assert_eq!(describe(source.path()), describe(target.path()));
        after.iter().for_each(|deed| do_deed(source.path(), deed));
        copy(&mut copier, Pass::Final, &mut applier);
        prop_assert_eq!(describe(source.path()), describe(target.path()));
    }
}

/// Counts what a pass sends.
#[derive(Debug, Default)]
struct Counter {
    entries: Vec<String>,
    bytes: usize,
}

impl Sink for Counter {
    fn begin(&mut self, _pass: Pass, _layer: Layer) -> Result<(), RootfsError> {
        *self = Self::default();
        Ok(())
    }

    fn entry(&mut self, entry: Entry<'_>) -> Result<(), RootfsError> {
        self.entries.push(String::from_utf8_lossy(entry.path).into_owned());
        Ok(())
    }

    fn data(&mut self, _offset: u64, bytes: &[u8]) -> Result<(), RootfsError> {
        self.bytes += bytes.len();
        Ok(())
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), RootfsError> {
        self.entries.push(format!("-{}", String::from_utf8_lossy(path)));
        Ok(())
    }
}

#[test]
fn the_final_pass_sends_what_changed_and_what_is_forced_and_nothing_else() {
    let source = tempfile::tempdir().unwrap();
    let at = |name: &str| source.path().join(name);
    fs::create_dir(at("d")).unwrap();
    for name in ["d/big", "d/small", "mapped", "other-name-of-nothing"] {
        fs::write(at(name), vec![1; 100_000]).unwrap();
    }
    fs::hard_link(at("mapped"), at("mapped-too")).unwrap();
    sleep(Duration::from_millis(60));
    let mut copier =
        Copier::open(&LayerRoot { path: source.path().to_owned(), layer: Layer::Whole }).unwrap();
    let mut counter = Counter::default();
    copier.copy(Pass::Live, &BTreeSet::new(), &mut counter).unwrap();
    assert_eq!(counter.bytes, 400_000);
    copier.copy(Pass::Final, &BTreeSet::new(), &mut counter).unwrap();
    assert_eq!((counter.entries.len(), counter.bytes), (0, 0));
    fs::write(at("d/small"), b"x").unwrap();
    fs::remove_file(at("other-name-of-nothing")).unwrap();
    let forced = BTreeSet::from([b"mapped-too".to_vec()]);
    copier.copy(Pass::Final, &forced, &mut counter).unwrap();
    assert_eq!(counter.entries, ["", "d/small", "mapped", "mapped-too", "-other-name-of-nothing"]);
    assert_eq!(counter.bytes, 100_001);
}

#[test]
fn holes_stay_holes() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    do_deed(source.path(), &Deed::Sparse("s".to_owned()));
    let mut copier =
        Copier::open(&LayerRoot { path: source.path().to_owned(), layer: Layer::Whole }).unwrap();
    copy(&mut copier, Pass::Live, &mut Applier::open(target.path()).unwrap());
    let found = target.path().join("s").metadata().unwrap();
    assert_eq!(found.len(), 3 << 20);
    assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
}

/// A root with `link -> outside`, and the outside, which must not change.
fn trap() -> (tempfile::TempDir, Applier) {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("outside")).unwrap();
    fs::write(directory.path().join("outside/precious"), b"gold").unwrap();
    fs::create_dir(directory.path().join("root")).unwrap();
    symlink("../outside", directory.path().join("root/link")).unwrap();
    symlink(directory.path().join("outside"), directory.path().join("root/absolute")).unwrap();
    symlink("../outside/precious", directory.path().join("root/file")).unwrap();
    let applier = Applier::open(&directory.path().join("root")).unwrap();
    (directory, applier)
}

#[test]
fn nothing_that_is_applied_gets_out_of_the_root() {
    let meta = Meta { mode: 0o777, ..Meta::default() };
    let entry = |path: &'static str, node| Entry { path: path.as_bytes(), node, meta, xattrs: vec![] };
    let file = Node::File { size: 4 };
    let attempts = [
        entry("link/new", file),
        entry("link/precious", file),
        entry("absolute/precious", file),
        entry("link/precious", Node::Directory { clear: true }),
        entry("link/d", Node::Directory { clear: true }),
        entry("link/s", Node::Symlink { to: b"x" }),
        entry("stolen", Node::Hardlink { to: b"link/precious" }),
        entry("link/stolen", Node::Hardlink { to: b"file" }),
        // These replace the link itself, which is in the root.
        entry("file", file),
        entry("link", Node::Directory { clear: true }),
        entry("absolute", file),
    ];
    for attempt in attempts {
        let (directory, mut applier) = trap();
        let path = attempt.path;
        if applier.entry(attempt).is_ok() {
            drop(applier.data(0, b"evil"));
        }
        drop(applier.end());
        let outside = directory.path().join("outside");
        assert_eq!(fs::read(outside.join("precious")).unwrap(), b"gold", "{path:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{path:?}");
        assert_eq!(outside.join("precious").metadata().unwrap().nlink(), 1, "{path:?}");
        assert_ne!(outside.metadata().unwrap().mode() & 0o777, 0o777, "{path:?}");
    }
    for path in ["link/precious", "absolute/precious", "link", "absolute"] {
        let (directory, mut applier) = trap();
        drop(applier.remove(path.as_bytes()));
        drop(applier.end());
        assert!(directory.path().join("outside/precious").exists(), "{path}");
    }
}

#[test]
fn content_that_does_not_fit_its_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut applier = Applier::open(directory.path()).unwrap();
    applier.data(0, b"x").unwrap_err();
    let entry = Entry { path: b"f", node: Node::File { size: 4 }, meta: Meta::default(), xattrs: vec![] };
    applier.entry(entry).unwrap();
    applier.data(2, b"xy").unwrap();
    applier.data(0, b"x").unwrap_err();
    applier.data(4, b"x").unwrap_err();
    applier.data(u64::MAX, b"x").unwrap_err();
}

/// Mounts an overlay of `lower` in a mount namespace of this thread; `None` where that is not allowed.
fn overlay(directory: &Path, lower: &Path) -> Option<PathBuf> {
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| directory.join(name));
    for path in [&upper, &work, &merged] {
        fs::create_dir(path).unwrap();
    }
    let text = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let options =
        [&b"index=off,lowerdir="[..], &text(lower), b",upperdir=", &text(&upper), b",workdir=", &text(&work)]
            .concat();
    let flags = nix::mount::MsFlags::empty();
    let options = std::ffi::OsStr::from_bytes(&options);
    nix::mount::mount(Some("overlay"), &merged, Some("overlay"), flags, Some(options))
        .inspect_err(|errno| println!("SKIP no overlay here: {errno}"))
        .ok()?;
    Some(merged)
}

/// Goal: a layer that was made on one overlay looks the same through another one over the same image.
/// Method: random deeds through a mounted overlay, two passes, and a comparison of what both mounts show.
#[test]
fn an_overlays_layer_arrives_on_another_overlay() {
    if !nix::unistd::geteuid().is_root() || godwit_sys::mountns::enter_private().is_err() {
        println!("SKIP needs root");
        return;
    }
    let mut runner =
        proptest::test_runner::TestRunner::new(ProptestConfig { cases: 24, ..ProptestConfig::default() });
    let deeds = |count| proptest::collection::vec(a_deed(), 0..count);
    let strategy = (deeds(20), deeds(20), deeds(12), any::<bool>());
    let outcome = runner.run(&strategy, |(image, before, after, settle)| {
        // Overlays do not stack on every file system; a tmpfs of our own carries one.
        let base = tempfile::tempdir().unwrap();
        let _tmpfs = godwit_sys::mount::Mounted::tmpfs(base.path(), 256 << 20).unwrap();
        let [lower, source, target] = ["lower", "source", "target"].map(|name| base.path().join(name));
        for path in [&lower, &source, &target] {
            fs::create_dir(path).unwrap();
        }
        image.iter().for_each(|deed| do_deed(&lower, deed));
        let (Some(from), Some(to)) = (overlay(&source, &lower), overlay(&target, &lower)) else {
            return Ok(());
        };
        let unmount = |path: &Path| nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        before.iter().for_each(|deed| do_deed(&from, deed));
        if settle {
            sleep(Duration::from_millis(60));
        }
        let root = LayerRoot::of(&from).unwrap();
        assert_eq!(root, LayerRoot { path: source.join("upper"), layer: Layer::Delta });
        let mut copier = Copier::open(&root).unwrap();
        let mut applier = Applier::open(&to).unwrap();
        copy(&mut copier, Pass::Live, &mut applier);
        let live = (describe(&from), describe(&to));
        after.iter().for_each(|deed| do_deed(&from, deed));
        copy(&mut copier, Pass::Final, &mut applier);
        let last = (describe(&from), describe(&to));
        unmount(&from);
        unmount(&to);
        prop_assert_eq!(live.0, live.1);
        prop_assert_eq!(last.0, last.1);
        Ok(())
    });
    outcome.unwrap();
}
