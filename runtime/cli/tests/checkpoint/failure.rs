//! A failed checkpoint leaves the container as it was, a failed restore leaves nothing.

use std::fs;
use std::io::{Read, pipe};
use std::process::Stdio;

use crate::bed::{Bed, Container, Runtime::Godwit, eventually};

/// A container whose output is a file of the host, which CRIU has no way to name.
pub(crate) fn start_with_host_file<'a>(bed: &'a Bed, id: &str) -> Container<'a> {
    let output = fs::File::create(bed.path("output")).unwrap();
    let mut command = bed.command(Godwit);
    command.arg("create").arg("--bundle").arg(bed.path(id)).arg("--pid-file");
    command.arg(bed.path(&format!("{id}.pid"))).arg(id).stdout(output).stderr(Stdio::null());
    assert!(command.status().unwrap().success());
    bed.ok(Godwit, &["start", id]);
    Container::new(bed, Godwit, id, None)
}

fn assert_output_grows(bed: &Bed) {
    let length = || fs::metadata(bed.path("output")).unwrap().len();
    let before = length();
    eventually("the counter counts on", || length() > before);
}

#[test]
fn a_refused_dump_leaves_the_container_running_or_paused_and_says_why() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = start_with_host_file(bed, "one");
        assert_output_grows(bed);
        let (images, work) = (bed.text("images"), bed.text("work"));
        let args = ["checkpoint", "--image-path", &images, "--work-path", &work, "one"];
        let message = bed.fails(&args);
        assert!(message.contains("criu dump: failed") && message.contains("Error ("), "{message}");
        assert!(message.contains(&bed.text("work/dump.log")), "{message}");
        assert_eq!(one.status(), "running");
        assert_output_grows(bed);
        bed.ok(Godwit, &["pause", "one"]);
        bed.fails(&args);
        assert_eq!(one.status(), "paused");
        bed.ok(Godwit, &["resume", "one"]);
        assert_output_grows(bed);
    });
}

#[test]
fn options_that_cannot_work_are_refused_before_anything_happens() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        let images = bed.text("images");
        let checkpoint = |options: &[&str]| {
            bed.fails(&[&["checkpoint", "--image-path", &images], options, &["one"]].concat())
        };
        fs::write(bed.path("file"), "").unwrap();
        let file = bed.text("file");
        assert!(checkpoint(&["--work-path", &file]).contains(&file));
        assert!(checkpoint(&["--parent-path", "/absolute"]).contains("must be relative"));
        assert!(checkpoint(&["--parent-path", "../none"]).contains("../none"));
        assert!(checkpoint(&["--manage-cgroups-mode", "odd"]).contains("odd"));
        assert!(checkpoint(&["--empty-ns", "mount"]).contains("mount"));
        assert!(bed.fails(&["checkpoint", "none"]).contains("container does not exist"));
        one.assert_counting();
        bed.bundle("two", |_| {});
        let bundle = bed.text("two");
        let restore = |images: &str, id: &str| {
            bed.fails(&["restore", "--bundle", &bundle, "--image-path", images, "--detach", id])
        };
        assert!(restore(&images, "two").contains("holds no checkpoint"));
        one.checkpoint("good", &["--leave-running"]);
        assert!(restore(&bed.text("good"), "one").contains("already exists"));
        one.assert_counting();
    });
}

#[test]
fn a_created_and_a_stopped_container_cannot_be_checkpointed() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        bed.ok(Godwit, &["kill", "one", "KILL"]);
        one.reap();
        let images = bed.text("images");
        let message = bed.fails(&["checkpoint", "--image-path", &images, "one"]);
        assert!(message.contains("cannot be checkpointed in stopped state"), "{message}");
    });
}

#[test]
fn a_restore_from_damaged_images_leaves_nothing() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        bed.bundle("two", |_| {});
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        one.checkpoint("images", &[]);
        one.reap();
        let whole = fs::read(bed.path("images/core-1.img")).unwrap();
        let pages = fs::read(bed.path("images/pages-1.img")).unwrap();
        let damages: [(&str, &[u8], &str); 3] = [
            ("core-1.img", &whole[..whole.len() / 2], "criu restore"),
            ("core-1.img", b"", "criu restore"),
            // CRIU would never end.
            ("pages-1.img", &pages[..4096], "bytes are there"),
        ];
        for (name, bytes, cause) in damages {
            fs::write(bed.path("images").join(name), bytes).unwrap();
            let (mut reader, writer) = pipe().unwrap();
            let (images, work) = (bed.text("images"), bed.text("work"));
            let options = ["--image-path", &images, "--work-path", &work, "--detach"];
            assert!(!bed.launch_status(Godwit, "two", "restore", &options, writer));
            let mut message = String::new();
            // Ends only when every process that could write to it is gone.
            reader.read_to_string(&mut message).unwrap();
            assert!(message.contains(cause), "{name}: {message}");
            assert!(!bed.path("root/two").exists() && bed.cgroups("two").is_empty(), "{name}");
            fs::write(bed.path("images/core-1.img"), &whole).unwrap();
        }
        fs::write(bed.path("images/pages-1.img"), &pages).unwrap();
        bed.restore(Godwit, "two", "images").assert_counting();
    });
}
