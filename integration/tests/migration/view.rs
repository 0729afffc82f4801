//! What a container sees of itself, from mounts to devices: a switchover leaves some of it out of CRIU's images and makes
//! it anew.

use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, Trouble};

pub(super) fn cases() -> Vec<Case> {
    vec![case!(container_sees_the_same_after_moves_to_and_fro)]
}

/// The container has a file system of its own in memory beside those that every container has, and something in it and
/// in `/dev/shm`. An exec with a terminal and one without see all of it on either node.
fn container_sees_the_same_after_moves_to_and_fro(stage: &Stage) -> Outcome {
    let own = "type=tmpfs,src=tmpfs,dst=/own,options=size=1m:mode=1771:nosuid";
    let mut container = stage.a.plan("view").flags(&["--mount", own]).run(&["sleep", "100000"])?;
    container.exec(&["sh", "-c", FILL])?.ok()?;
    let before = container.exec(&["sh", "-c", SHOW])?.ok()?;
    for part in ["/own/link -> file", "/dev/shm/deep/file", "ro", "127.0.0.1", "in memory"] {
        assert!(before.contains(part), "{part} is not in {before}");
    }
    for target in [&stage.b, &stage.a, &stage.b] {
        container = container.move_to(target)?.0;
        let after = container.exec(&["sh", "-c", SHOW])?.ok()?;
        let differing: Vec<_> =
            before.lines().zip(after.lines()).filter(|(before, after)| before != after).collect();
        assert!(differing.is_empty() && before.len() == after.len(), "{differing:#?}");
        // The terminal may echo what it was opened with at any point; behind it ctr may complain that there is nothing
        // left to resize.
        let printed = on_terminal(&container, "tty; pwd; cat /own/file")?.replace("^@", "");
        assert!(printed.contains("/dev/pts/0\n/\nin memory\n"), "{printed}");
    }
    container.exec(&["sh", "-c", "echo written > /own/new && rm /own/new && : > /dev/null"])?.ok()?;
    container.stop()
}

/// Runs a script in a container with a terminal, and returns what it printed.
fn on_terminal(container: &Container<'_>, script: &str) -> Result<String, Trouble> {
    let site = container.site();
    let exec_id = site.id("terminal");
    let words = ["tasks", "exec", "--tty", "--exec-id", &exec_id, container.id(), "sh", "-c", script];
    Ok(site.start_ctr_on_terminal(24, 80, &words)?.wait()?.ok()?.replace('\r', ""))
}

const FILL: &str = "echo in memory > /own/file; chmod 4711 /own/file; ln -s file /own/link; \
    mkdir -m 1700 /dev/shm/deep; echo shared > /dev/shm/deep/file; mkfifo /own/pipe";

/// Mounts without what differs between hosts and moves (numbers, peer groups, where the image's layers are, whose null
/// device masks a file), devices, what is in memory, the loopback device.
const SHOW: &str = r"
    sed -e 's/^[0-9]* [0-9]* [0-9:]* //' -e 's/ \(shared\|master\):[0-9]*//g' -e 's/ - overlay .*/ - overlay/' \
        -e 's/^\/null \([^ ]*\) .*/masked \1/' \
        /proc/self/mountinfo | grep -v ' - cgroup' | sort
    stat -c '%n %F %a %u:%g %t:%T' /dev/* | grep -v /dev/pts
    find /own /dev/shm | sort | while read name; do stat -c '%n %F %a %u:%g %s %Y' $name; done
    ls -l /own/link | sed 's/.* \/own/\/own/'
    cat /own/file /dev/shm/deep/file
    wc -c < /proc/keys
    ip addr show lo | grep -v qlen
    pwd
";
