//! What comes back is what was saved.

use std::process::{Command, Stdio};

use godwit_container::checkpoint::machine;
use godwit_criu::{Program, Session, Setup};
use serde_json::json;

use crate::bed::{Bed, Runtime::Godwit, eventually};

#[test]
fn a_counter_goes_on_under_another_id_and_cgroup_and_takes_every_verb() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        bed.bundle("two", |_| {});
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        one.checkpoint("images", &[]);
        one.reap();
        let last = one.last_tick();
        assert_eq!(one.status(), "stopped");
        bed.ok(Godwit, &["delete", "one"]);
        assert!(bed.cgroups("one").is_empty());

        let two = bed.restore(Godwit, "two", "images");
        assert_eq!(two.tick(), last + 1);
        two.assert_counting();
        assert_eq!(two.status(), "running");
        assert!(!bed.cgroups("two").is_empty() && bed.cgroups("one").is_empty());
        assert_eq!(bed.ok(Godwit, &["exec", "two", "echo", "inside"]), "inside\n");
        bed.ok(Godwit, &["pause", "two"]);
        assert_eq!(two.status(), "paused");
        bed.ok(Godwit, &["resume", "two"]);
        two.assert_counting();
        bed.ok(Godwit, &["kill", "two", "KILL"]);
        two.reap();
        assert_eq!(two.status(), "stopped");
        bed.ok(Godwit, &["delete", "two"]);
    });
}

#[test]
fn a_container_left_running_counts_on_and_can_be_checkpointed_again() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        let one = bed.start(Godwit, "one");
        for images in ["first", "second"] {
            one.checkpoint(images, &["--leave-running"]);
            assert_eq!(one.status(), "running");
            one.assert_counting();
        }
    });
}

#[test]
fn a_paused_container_stays_paused_when_left_and_runs_when_restored() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("one", |_| {});
        bed.bundle("two", |_| {});
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        bed.ok(Godwit, &["pause", "one"]);
        one.checkpoint("first", &["--leave-running"]);
        assert_eq!(one.status(), "paused");
        one.checkpoint("second", &[]);
        one.reap();
        let last = one.last_tick();
        let two = bed.restore(Godwit, "two", "second");
        assert_eq!(two.status(), "running");
        assert_eq!(two.tick(), last + 1);
        two.assert_counting();
    });
}

#[test]
fn a_restored_container_can_be_checkpointed_and_restored_again() {
    Bed::with(&[Godwit], |bed| {
        bed.bundle("c0", |_| {});
        let mut container = bed.start(Godwit, "c0");
        for round in 1..=3 {
            let (images, id) = (format!("images{round}"), format!("c{round}"));
            container.checkpoint(&images, &[]);
            container.reap();
            let last = container.last_tick();
            bed.bundle(&id, |_| {});
            container = bed.restore(Godwit, &id, &images);
            assert_eq!(container.tick(), last + 1);
        }
    });
}

#[test]
fn binds_masks_and_missing_mount_points_are_restored() {
    Bed::with(&[Godwit], |bed| {
        std::fs::create_dir_all(bed.path("data/inner")).unwrap();
        std::fs::create_dir_all(bed.path("cache")).unwrap();
        std::fs::write(bed.path("hosts"), "127.0.0.1 here\n").unwrap();
        let (data, cache, hosts) = (bed.text("data"), bed.text("cache"), bed.text("hosts"));
        let mounts = |spec: &mut serde_json::Value| {
            let list = spec["mounts"].as_array_mut().unwrap();
            let mut bind = |destination: &str, source: &str| {
                list.push(json!({"destination": destination, "type": "bind", "source": source,
                                 "options": ["rbind", "rw"]}));
            };
            bind("/data", &data);
            bind("/data/cache", &cache);
            bind("/etc/hosts", &hosts);
        };
        bed.bundle("one", mounts);
        bed.bundle("two", mounts);
        let one = bed.start(Godwit, "one");
        one.checkpoint("images", &[]);
        one.reap();
        bed.ok(Godwit, &["delete", "one"]);
        // As on a machine that has just unpacked the image.
        let rootfs = bed.path("rootfs");
        for empty in ["data", "etc", "proc", "sys", "dev"] {
            std::fs::remove_dir_all(rootfs.join(empty)).unwrap();
        }
        std::fs::remove_dir(bed.path("data/cache")).unwrap();
        let two = bed.restore(Godwit, "two", "images");
        two.assert_counting();
        assert_eq!(bed.ok(Godwit, &["exec", "two", "cat", "/etc/hosts"]), "127.0.0.1 here\n");
        bed.ok(Godwit, &["exec", "two", "sh", "-c", "echo x > /data/cache/file"]);
        assert!(bed.path("cache/file").exists());
        assert_eq!(bed.ok(Godwit, &["exec", "two", "cat", "/proc/keys"]), "");
        assert_eq!(
            bed.ok(Godwit, &["exec", "two", "sh", "-c", "echo 1 > /proc/sys/kernel/panic || echo no"]),
            "no\n"
        );
    });
}

#[test]
fn a_network_namespace_given_by_path_is_joined_again() {
    Bed::with(&[Godwit], |bed| {
        let holder =
            || Command::new("unshare").args(["-n", "sleep", "1000"]).stdin(Stdio::null()).spawn().unwrap();
        let mut holders = [holder(), holder()];
        let [here, there] = holders.each_ref().map(|holder| format!("/proc/{}/ns/net", holder.id()));
        let inode = |path: &str| std::fs::read_link(path).unwrap();
        eventually("two namespaces", || {
            inode(&here) != inode("/proc/self/ns/net") && inode(&there) != inode("/proc/self/ns/net")
        });
        for (id, path) in [("one", &here), ("two", &there)] {
            bed.bundle(id, |spec| {
                let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
                list.retain(|namespace| namespace["type"] != "network");
                list.push(json!({"type": "network", "path": path}));
            });
        }
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        one.checkpoint("images", &[]);
        one.reap();
        let two = bed.restore(Godwit, "two", "images");
        two.assert_counting();
        assert_eq!(inode(&format!("/proc/{}/ns/net", two.pid)), inode(&there));
        drop((one, two));
        for holder in &mut holders {
            holder.kill().unwrap();
            holder.wait().unwrap();
        }
    });
}

#[test]
fn a_connection_over_loopback_survives_and_needs_a_flag() {
    if let Some(reason) = tcp_trouble() {
        assert!(std::env::var_os("SKIP_IS_FAILURE").is_none(), "{reason}");
        eprintln!("SKIP: {reason}");
        return;
    }
    Bed::with(&[Godwit], |bed| {
        // One process echoes what another sends over 127.0.0.1; the counter's lines take that way.
        let script = "ip link set lo up; nc -l -p 7000 -e cat & sleep 0.5; \
             (i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.02; done) | nc 127.0.0.1 7000";
        for id in ["one", "two"] {
            bed.bundle(id, |spec| {
                spec["process"]["args"] = json!(["sh", "-c", script]);
                let net = json!(["CAP_NET_ADMIN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
                for set in ["bounding", "effective", "permitted"] {
                    spec["process"]["capabilities"][set] = net.clone();
                }
            });
        }
        let one = bed.start(Godwit, "one");
        one.assert_counting();
        let images = bed.text("refused");
        let refused = bed.fails(&["checkpoint", "--image-path", &images, "one"]);
        assert!(refused.contains("tcp-established"), "{refused}");
        one.assert_counting();
        one.checkpoint("images", &["--tcp-established"]);
        one.reap();
        let last = one.last_tick();
        let two = bed.restore(Godwit, "two", "images");
        assert_eq!(two.tick(), last + 1);
        two.assert_counting();
    });
}

fn tcp_trouble() -> Option<String> {
    let version = Session::start(&Program::find().ok()?, Setup::new()).ok()?.version();
    machine::tcp_trouble(version)
}
