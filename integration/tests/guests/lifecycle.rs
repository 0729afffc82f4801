//! A container's life where cgroups are of version 2 alone.

use godwit_integration::NodeName;
use godwit_integration::guests::Guests;
use godwit_integration::suite::Outcome;
use godwit_integration::suite::pairs::PairCase;

use super::{NEWER, SAME};

pub(super) fn cases() -> Vec<PairCase> {
    macro_rules! on_both {
        ($($name:ident)+) => { vec![$(PairCase { name: stringify!($name), lanes: &[SAME, NEWER], run: $name }),+] };
    }
    on_both! {
        container_lives_in_one_cgroup_and_takes_it_along
        pause_freezes_and_resume_thaws
        limits_are_set_and_changed
        devices_are_kept_out
        running_out_of_memory_is_told
    }
}

fn container_lives_in_one_cgroup_and_takes_it_along(guests: &Guests) -> Outcome {
    let guest = guests.guest(NodeName::A);
    guest.run("life", "busybox", "", "sleep 1000")?;
    assert_eq!(guest.sh("awk '$3 ~ /^cgroup/ { print $3 }' /proc/mounts")?, "cgroup2");
    assert_eq!(guest.sh(&format!("cat {}/cgroup", init_of("life")))?, "0::/default/life");
    assert_eq!(guest.exec("life", "cat /proc/self/cgroup")?, "0::/default/life");
    assert_eq!(guest.state("life")?, "RUNNING");
    guest.remove("life")?;
    assert_eq!(guest.sh("ls /sys/fs/cgroup/default | grep -x life || true")?, "");
    Ok(())
}

fn pause_freezes_and_resume_thaws(guests: &Guests) -> Outcome {
    let guest = guests.guest(NodeName::A);
    let frozen = "grep frozen /sys/fs/cgroup/default/paused/cgroup.events";
    guest.run("paused", "busybox", "", "sh -c 'while :; do echo >>/run/ticks; usleep 10000; done'")?;
    guest.sh("ctr task pause paused")?;
    assert_eq!((guest.state("paused")?, guest.sh(frozen)?), ("PAUSED".to_owned(), "frozen 1".to_owned()));
    guest.sh("ctr task resume paused")?;
    assert_eq!((guest.state("paused")?, guest.sh(frozen)?), ("RUNNING".to_owned(), "frozen 0".to_owned()));
    let ticks = format!("{}/root/run/ticks", init_of("paused"));
    let before = guest.sh(&format!("wc -l <{ticks}"))?;
    guest.await_that(&format!("(($(wc -l <{ticks}) > {before}))"))?;
    guest.remove("paused")
}

fn limits_are_set_and_changed(guests: &Guests) -> Outcome {
    let guest = guests.guest(NodeName::A);
    guest.run("limits", "busybox", "--memory-limit 67108864", "sleep 1000")?;
    let limits = "cd /sys/fs/cgroup/default/limits; echo $(cat memory.max pids.max cpu.max)";
    assert_eq!(guest.sh(limits)?, "67108864 max max 100000");
    guest.sh("godwit --root /run/containerd/godwit/default \
        update --memory 50331648 --pids-limit 50 --cpu-quota 50000 --cpu-period 100000 limits")?;
    assert_eq!(guest.sh(limits)?, "50331648 50 50000 100000");
    let metrics = guest.sh("ctr task metrics --format json limits")?;
    let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap_or_default();
    assert_eq!(metrics["memory"]["usage_limit"], 50_331_648, "{metrics}");
    assert_eq!(
        (&metrics["pids"]["limit"], &metrics["pids"]["current"]),
        (&50.into(), &1.into()),
        "{metrics}"
    );
    assert!(metrics["memory"]["usage"].as_u64() > Some(0), "{metrics}");
    assert!(metrics["cpu"]["usage_usec"].as_u64() > Some(0), "{metrics}");
    guest.remove("limits")
}

/// Device rules are a program of the kernel there, and an update must not take them away.
fn devices_are_kept_out(guests: &Guests) -> Outcome {
    let guest = guests.guest(NodeName::A);
    guest.run("devices", "busybox", "", "sleep 1000")?;
    let denied = "sh -c 'mknod /tmp/disk b 254 0; head -c 1 /tmp/disk 2>&1; rm /tmp/disk; head -c 1 /dev/zero | wc -c'";
    let assert_denied = || {
        let text = guest.exec("devices", denied)?;
        assert!(text.contains("Operation not permitted") && text.ends_with('1'), "{text}");
        Outcome::Ok(())
    };
    assert_denied()?;
    guest.sh("godwit --root /run/containerd/godwit/default update --pids-limit 50 devices")?;
    assert_denied()?;
    guest.remove("devices")
}

fn running_out_of_memory_is_told(guests: &Guests) -> Outcome {
    let guest = guests.guest(NodeName::A);
    guest.sh("ctr events >/run/events 2>&1 </dev/null & echo $! >/run/events.pid")?;
    guest.run(
        "greedy",
        "busybox",
        "--memory-limit 33554432",
        "dd if=/dev/zero of=/dev/null bs=60M count=1",
    )?;
    guest.await_that("ctr task ls | grep -q '^greedy .*STOPPED'")?;
    guest.await_that("grep -q '/tasks/oom.*greedy' /run/events")?;
    assert!(guest.sh("grep /tasks/exit /run/events")?.contains(r#""exit_status":137"#));
    guest.sh("kill $(cat /run/events.pid)")?;
    guest.try_sh("ctr task rm greedy")?;
    guest.sh("ctr container rm greedy").map(drop)
}

/// Returns the directory of a container's first process, as the guest's shell finds it.
fn init_of(id: &str) -> String {
    format!("/proc/$(cat /run/containerd/io.containerd.runtime.v2.task/default/{id}/init.pid)")
}
