//! A container with a terminal gets a new one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use godwit_sys::fdpass;
use serde_json::json;

use crate::bed::{Bed, Container, Runtime::Godwit};

#[test]
fn a_shell_on_a_terminal_answers_after_the_restore() {
    Bed::with(&[Godwit], |bed| {
        for id in ["one", "two"] {
            bed.bundle(id, |spec| {
                spec["process"]["terminal"] = json!(true);
                spec["process"]["args"] = json!(["sh"]);
            });
        }
        let listener = UnixListener::bind(bed.path("console")).unwrap();
        let (console, pid_one) = (bed.text("console"), bed.text("one.pid"));
        let bundle = bed.text("one");
        bed.ok(
            Godwit,
            &["create", "--bundle", &bundle, "--pid-file", &pid_one, "--console-socket", &console, "one"],
        );
        let mut terminal = receive(&listener);
        bed.ok(Godwit, &["start", "one"]);
        let one = Container::new(bed, Godwit, "one", None);
        say(&mut terminal, "kept=yes; echo ready$((40+2))\n", "ready42");
        one.checkpoint("images", &[]);
        one.reap();
        drop(terminal);

        let (bundle, pid_two) = (bed.text("two"), bed.text("two.pid"));
        let (images, work) = (bed.text("images"), bed.text("work"));
        let restore = [
            "restore",
            "--bundle",
            &bundle,
            "--image-path",
            &images,
            "--work-path",
            &work,
            "--detach",
            "--pid-file",
            &pid_two,
        ];
        let refused = bed.fails(&[&restore[..], &["two"]].concat());
        assert!(refused.contains("--console-socket"), "{refused}");
        bed.ok(Godwit, &[&restore[..], &["--console-socket", &console, "two"]].concat());
        let two = Container::new(bed, Godwit, "two", None);
        let mut terminal = receive(&listener);
        say(&mut terminal, "echo still $kept\n", "still yes");
        assert_eq!(two.status(), "running");
    });
}

fn receive(listener: &UnixListener) -> File {
    let (stream, _) = listener.accept().unwrap();
    let mut name = [0; 64];
    fdpass::receive(&stream, &mut name).unwrap().fds.pop().unwrap().into()
}

/// Types `line` and reads until the terminal shows `answer`.
fn say(terminal: &mut File, line: &str, answer: &str) {
    terminal.write_all(line.as_bytes()).unwrap();
    let mut seen = String::new();
    let mut buffer = [0; 256];
    while !seen.contains(answer) {
        let length = terminal.read(&mut buffer).unwrap();
        assert!(length > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
}
