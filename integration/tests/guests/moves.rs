//! Containers go to and fro between two kernels, by every mode and with both ways of following what they write.

use godwit_integration::NodeName;
use godwit_integration::guests::{Guest, Guests};
use godwit_integration::suite::pairs::PairCase;
use godwit_integration::suite::{Outcome, Trouble};
use godwit_integration::workload::memory::Findings;
use godwit_integration::workload::program::parse_line;
use godwit_protocol::Mode;
use godwit_protocol::report::Report;

use super::host::{NO_USERFAULTFD, NOTHING, lack, lacks};
use super::{NEWER, OLD, SAME};

pub(super) fn cases() -> Vec<PairCase> {
    macro_rules! on {
        ($($lane:ident: $($name:ident)+;)+) => {
            vec![$($(PairCase { name: stringify!($name), lanes: &[$lane], run: $name }),+),+]
        };
    }
    on! {
        SAME:
            self_checking_program_is_whole_after_every_mode
            self_checking_program_is_whole_after_rounds_by_soft_dirty_bits
            memhog_goes_by_every_mode
            memhog_goes_by_rounds_by_soft_dirty_bits
            redis_keeps_every_key_in_every_mode
            redis_keeps_every_key_in_rounds_by_soft_dirty_bits
            source_worker_killed_while_pages_are_missing_is_replaced;
        NEWER:
            self_checking_program_goes_to_a_newer_kernel_by_every_mode
            memhog_goes_to_a_newer_kernel
            redis_goes_to_a_newer_kernel;
        OLD:
            self_checking_program_is_whole_after_every_mode;
    }
}

fn self_checking_program_is_whole_after_every_mode(guests: &Guests) -> Outcome {
    by_every_mode(guests, checks)
}

fn self_checking_program_is_whole_after_rounds_by_soft_dirty_bits(guests: &Guests) -> Outcome {
    by_soft_dirty_bits(guests, checks)
}

fn memhog_goes_by_every_mode(guests: &Guests) -> Outcome {
    by_every_mode(guests, hogs)
}

fn memhog_goes_by_rounds_by_soft_dirty_bits(guests: &Guests) -> Outcome {
    by_soft_dirty_bits(guests, hogs)
}

fn redis_keeps_every_key_in_every_mode(guests: &Guests) -> Outcome {
    by_every_mode(guests, serves)
}

fn redis_keeps_every_key_in_rounds_by_soft_dirty_bits(guests: &Guests) -> Outcome {
    by_soft_dirty_bits(guests, serves)
}

/// The tasks that CRIU let go when its worker died are still frozen, by a cgroup of version 2, and have the pages.
fn source_worker_killed_while_pages_are_missing_is_replaced(guests: &Guests) -> Outcome {
    with_sources_that_lack(guests, NOTHING)?;
    let (here, there) = (guests.guest(NodeName::A), guests.guest(NodeName::B));
    run_checked(here)?;
    let before = findings(here)?;
    // 16 MiB take five seconds.
    here.sh("tc qdisc replace dev eth0 root tbf rate 25mbit burst 256kb latency 50ms")?;
    let is_filling = format!("godwit status {CHECKED} --json 2>/dev/null | grep -q '\"filling\"'");
    let worker = "$(grep -la '[m]igrate-source' /proc/[0-9]*/cmdline 2>/dev/null | cut -d / -f 3)";
    here.sh(&format!(
        "(for _ in $(seq 3000); do \
           if {is_filling}; then kill -9 {worker} && touch /run/killed; break; fi; sleep 0.1; \
         done) >/dev/null 2>&1 </dev/null &"
    ))?;
    let report = here.migrate(CHECKED, Mode::Postcopy)?;
    here.sh("tc qdisc del dev eth0 root; rm /run/killed")?;
    assert_eq!(report.pages.duplicate, 0, "{report:?}");
    assert_whole(there, before)?;
    there.remove(CHECKED)
}

fn by_every_mode(guests: &Guests, moves: fn(&Guests, &[Mode]) -> Outcome) -> Outcome {
    with_sources_that_lack(guests, NOTHING)?;
    moves(guests, &Mode::ALL)
}

/// With userfaultfd denied to the source's worker, soft-dirty bits are what is left, and the report says so.
fn by_soft_dirty_bits(guests: &Guests, moves: fn(&Guests, &[Mode]) -> Outcome) -> Outcome {
    with_sources_that_lack(guests, NO_USERFAULTFD)?;
    let rounds: Vec<Mode> = Mode::ALL.into_iter().filter(|mode| mode.has_rounds()).collect();
    moves(guests, &rounds)
}

fn with_sources_that_lack(guests: &Guests, flags: &str) -> Outcome {
    NodeName::ALL.into_iter().try_for_each(|name| lack(guests.guest(name), flags))
}

/// Every page holds what was written to it last, and writing has gone on.
fn checks(guests: &Guests, modes: &[Mode]) -> Outcome {
    let mut place = guests.guest(NodeName::A);
    run_checked(place)?;
    let mut before = findings(place)?;
    for (turn, mode) in modes.iter().enumerate() {
        assert_sound(place, &place.migrate(CHECKED, *mode)?, *mode)?;
        place = other(guests, turn);
        before = assert_whole(place, before)?;
    }
    place.remove(CHECKED)
}

/// memhog fills its memory with one byte over and over; it is seen to run by its processor time.
fn hogs(guests: &Guests, modes: &[Mode]) -> Outcome {
    let mut place = guests.guest(NodeName::A);
    let mib: u64 =
        std::env::var("GODWIT_GUESTS_MIB").ok().and_then(|value| value.parse().ok()).unwrap_or(256);
    place.run("hog", "memhog", "", &format!("memhog -r1000000 {mib}m"))?;
    let used = "awk '$1 == \"usage_usec\" { print $2 }' /sys/fs/cgroup/default/hog/cpu.stat";
    place.await_that(&format!(
        "(($(awk '$1 == \"anon\" {{ print $2 }}' /sys/fs/cgroup/default/hog/memory.stat) >= {mib} << 20))"
    ))?;
    for (turn, mode) in modes.iter().enumerate() {
        let report = place.migrate("hog", *mode)?;
        assert_sound(place, &report, *mode)?;
        assert!(report.pages.normal >= mib << 8, "{report:?}");
        place = other(guests, turn);
        let before = place.sh(used)?;
        place.await_that(&format!("(($({used}) > {before} + 100000))"))?;
    }
    place.remove("hog")
}

/// A digest over 20,000 keys is the same on both sides.
fn serves(guests: &Guests, modes: &[Mode]) -> Outcome {
    let mut place = guests.guest(NodeName::A);
    let before = run_redis(place)?;
    for (turn, mode) in modes.iter().enumerate() {
        assert_sound(place, &place.migrate("redis", *mode)?, *mode)?;
        place = other(guests, turn);
        assert_eq!(digest(place)?, before, "after {mode}");
    }
    place.remove("redis")
}

fn self_checking_program_goes_to_a_newer_kernel_by_every_mode(guests: &Guests) -> Outcome {
    let (old, new) = (guests.guest(NodeName::A), guests.guest(NodeName::B));
    for mode in Mode::ALL {
        run_checked(old)?;
        let before = findings(old)?;
        assert_sound(old, &old.migrate(CHECKED, mode)?, mode)?;
        assert_whole(new, before)?;
        new.remove(CHECKED)?;
    }
    Ok(())
}

fn memhog_goes_to_a_newer_kernel(guests: &Guests) -> Outcome {
    [Mode::Native, Mode::Hybrid].into_iter().try_for_each(|mode| hogs(guests, &[mode]))
}

fn redis_goes_to_a_newer_kernel(guests: &Guests) -> Outcome {
    [Mode::Precopy, Mode::Postcopy].into_iter().try_for_each(|mode| serves(guests, &[mode]))
}

/// Returns where a container is after its move number `turn`, of which the first goes to guest b.
fn other(guests: &Guests, turn: usize) -> Guest<'_> {
    guests.guest(if turn.is_multiple_of(2) { NodeName::B } else { NodeName::A })
}

fn run_checked(guest: Guest<'_>) -> Outcome {
    let [processes, threads, pages] = SHAPE;
    let shape = format!("--processes {processes} --threads {threads} --pages {pages}");
    guest.run(CHECKED, "workload", "", &format!("workload pages {shape}"))
}

/// Has the program check all of its pages. It is asked until it answers: it may not be ready yet, or slow.
fn findings(guest: Guest<'_>) -> Result<Findings, Trouble> {
    guest.await_that(&format!("ctr task exec --exec-id ask-$RANDOM {CHECKED} workload ask >/run/answer"))?;
    let line = guest.sh("cat /run/answer")?;
    parse_line(&line).ok_or(Trouble::Garbled { what: "findings", text: line })
}

fn assert_whole(guest: Guest<'_>, earlier: Findings) -> Result<Findings, Trouble> {
    let mut now = findings(guest)?;
    while now.bad == 0 && now.rewrites == earlier.rewrites {
        now = findings(guest)?;
    }
    assert_eq!((now.bad, now.pages), (0, SHAPE.iter().product()));
    Ok(now)
}

/// Runs redis, fills it, and returns the digest over all its keys.
fn run_redis(guest: Guest<'_>) -> Result<String, Trouble> {
    guest.run("redis", "redis", "", "redis-server --save '' --appendonly no --protected-mode no")?;
    guest.await_that("ctr task exec --exec-id ping-$RANDOM redis redis-cli PING | grep -q PONG")?;
    let fill = "for i=1,20000 do redis.call(\"set\", \"key:\"..i, string.rep(i, 50)) end return 1";
    assert_eq!(guest.exec("redis", &format!("redis-cli EVAL '{fill}' 0"))?, "1");
    digest(guest)
}

fn digest(guest: Guest<'_>) -> Result<String, Trouble> {
    let digest =
        "local d=\"\" for i=1,20000 do d=redis.sha1hex(d..redis.call(\"get\", \"key:\"..i)) end return d";
    let text = guest.exec("redis", &format!("redis-cli EVAL '{digest}' 0"))?;
    assert_eq!(text.len(), 40, "{text}");
    Ok(text)
}

/// Claims that a report agrees with its mode, that godwit moved the pages, and that it says what the source could not
/// do better: writes are followed by soft-dirty bits where there is no userfaultfd for it, and CRIU dumps lazily where
/// its scans cannot be filtered.
fn assert_sound(source: Guest<'_>, report: &Report, mode: Mode) -> Outcome {
    assert_common(report, mode);
    assert!(report.streams > 0, "{report:?}");
    assert_eq!(!report.rounds.is_empty(), mode.has_rounds(), "{report:?}");
    let is_old = source.sh("uname -r")?.starts_with("6.1.");
    let halts = mode.has_rounds() && (is_old || lacks(source)? == NO_USERFAULTFD);
    let notes = |word| report.notes.iter().filter(|note| note.contains(word)).count();
    assert_eq!((notes("lazily"), notes("soft-dirty")), (is_old.into(), halts.into()), "{report:?}");
    assert_eq!(report.notes.len(), notes("lazily") + notes("soft-dirty"), "{report:?}");
    Ok(())
}

fn assert_common(report: &Report, mode: Mode) {
    assert_eq!(report.mode, mode, "{report:?}");
    assert!((report.downtime.total_ms() - report.downtime_ms).abs() <= 1.0, "{report:?}");
    assert!(report.downtime_ms > 0.0 && report.downtime_ms <= report.total_ms, "{report:?}");
    assert_eq!((report.pages.duplicate, report.disk_bytes_written), (0, 0), "{report:?}");
}

const CHECKED: &str = "checked";
/// Processes, threads of each, pages of each thread: 16 MiB.
const SHAPE: [u64; 3] = [2, 2, 1024];
