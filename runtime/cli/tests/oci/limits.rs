//! update, events and what the cgroup says.

use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::bed::Bed;

mod tests {
    crate::against_both!(
        limits_are_updated,
        usage_is_printed_as_one_line_of_json,
        the_oom_killer_can_be_switched_off,
        only_devices_of_the_spec_can_be_used,
    );
}

/// What version 1 shows for no limit at all: the largest multiple of a page.
const UNLIMITED: &str = "9223372036854771712";
const MEMORY_LIMIT: [&str; 2] = ["memory.limit_in_bytes", "memory.max"];

fn limits_are_updated(bed: &Bed) {
    bed.configure(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": 67_108_864}));
    let _container = bed.start("web");
    assert_eq!(bed.cgroup_file(MEMORY_LIMIT), "67108864");
    bed.ok(&["update", "--memory", "134217728", "--pids-limit", "77", "web"]);
    assert_eq!(bed.cgroup_file(MEMORY_LIMIT), "134217728");
    assert_eq!(bed.cgroup_file(["pids.max"; 2]), "77");
    let mut child =
        bed.command().args(["update", "--resources", "-", "web"]).stdin(Stdio::piped()).spawn().unwrap();
    let resources =
        json!({"memory": {"limit": 268_435_456}, "cpu": {"shares": 0, "quota": 50_000, "period": 100_000}});
    child.stdin.take().unwrap().write_all(resources.to_string().as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(bed.cgroup_file(MEMORY_LIMIT), "268435456");
    assert_eq!(bed.cgroup_file(["pids.max"; 2]), "77");
    let quota = bed.cgroup_file(["cpu.cfs_quota_us", "cpu.max"]);
    assert!(quota == "50000" || quota == "50000 100000", "{quota}");
    for (text, bytes) in [("96m", "100663296"), ("100MiB", "104857600"), ("-1", UNLIMITED)] {
        let swap = if text == "-1" { &["--memory-swap", "-1"][..] } else { &[] };
        bed.ok(&[&["update", "--memory", text], swap, &["web"]].concat());
        let now = bed.cgroup_file(MEMORY_LIMIT);
        assert!(now == bytes || (text == "-1" && now == "max"), "{text}: {now}");
    }
    assert_eq!(bed.fails(&["update", "--memory", "1", "absent"]), "container does not exist");
}

fn usage_is_printed_as_one_line_of_json(bed: &Bed) {
    bed.configure(|spec| {
        spec["linux"]["resources"] = json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 50}});
    });
    let _container = bed.start("web");
    let output = bed.ok(&["events", "--stats", "web"]);
    assert_eq!(output.lines().count(), 1);
    let event: Value = serde_json::from_str(&output).unwrap();
    assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!("web")));
    let data = &event["data"];
    assert_eq!(data["memory"]["usage"]["limit"], 67_108_864);
    assert!(data["memory"]["usage"]["usage"].as_u64().unwrap() > 0);
    assert!(data["memory"]["raw"].as_object().unwrap().len() > 10);
    assert_eq!(data["pids"], json!({"current": 1, "limit": 50}));
    let total = data["cpu"]["usage"]["total"].as_u64().unwrap();
    assert!((1_000_000..60_000_000_000).contains(&total), "{total} ns");
    for section in ["blkio", "hugetlb", "intel_rdt"] {
        assert!(data[section].is_object(), "{section}");
    }
}

fn the_oom_killer_can_be_switched_off(bed: &Bed) {
    if bed.is_unified() {
        eprintln!("SKIP: cgroup version 2 has no such switch");
        return;
    }
    bed.configure(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 67_108_864, "disableOOMKiller": true});
    });
    let _container = bed.start("web");
    assert!(bed.cgroup_file(["memory.oom_control"; 2]).contains("oom_kill_disable 1"));
    bed.ok(&["update", "--memory", "134217728", "web"]);
    assert!(bed.cgroup_file(["memory.oom_control"; 2]).contains("oom_kill_disable 1"));
}

/// /dev/loop-control (10:237) may be made, and opened only where a rule says so.
fn only_devices_of_the_spec_can_be_used(bed: &Bed) {
    for (allowed, code) in [(false, 1), (true, 0)] {
        bed.configure(|spec| {
            let capabilities = spec["process"]["capabilities"].as_object_mut().unwrap();
            for set in capabilities.values_mut() {
                set.as_array_mut().unwrap().push(json!("CAP_MKNOD"));
            }
            let rule = json!({"allow": true, "type": "c", "major": 10, "minor": 237, "access": "r"});
            if allowed {
                spec["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
            }
        });
        let _container = bed.start("web");
        let script = "mknod /dev/x c 10 237 && test -c /dev/x && echo > /dev/null && exec < /dev/x";
        let output = bed.run(&["exec", "web", "sh", "-c", script]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(allowed || text.contains("Operation not permitted"), "{text}");
    }
}
