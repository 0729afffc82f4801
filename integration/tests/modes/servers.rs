//! Servers under load, moved in every mode: nobody who uses them sees an error.
//!
//! Server and clients are in one container, so that both ends of every connection move, and no address has to.

use std::fs;

use godwit_integration::process::wait_until;
use godwit_integration::suite::{Case, Container, Lane, Outcome, Stage, Trouble, await_that, skip};
use godwit_integration::{Version, case};
use godwit_protocol::Mode;
use sha2::{Digest, Sha256};

use super::claim::{PATIENCE, move_by};
use super::memory::ten_times;
use super::setting::Setting;
use super::storm::Storm;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(redis_under_load_goes_on_by_precopy_and_postcopy),
        case!(redis_under_load_goes_to_and_fro_ten_times).slow(),
        case!(nginx_under_load_loses_no_request_by_hybrid_and_auto),
        case!(nginx_under_load_goes_to_and_fro_ten_times).slow(),
        case!(nginx_under_wrk_loses_no_request_by_precopy_and_postcopy).alone(),
        case!(nginx_under_wrk_goes_to_and_fro_ten_times).alone().slow(),
        case!(python_computes_on_by_postcopy_and_precopy),
        case!(python_goes_to_and_fro_ten_times).slow(),
        case!(node_computes_on_by_precopy_and_hybrid),
        case!(node_goes_to_and_fro_ten_times).slow(),
        case!(postgresql_under_pgbench_goes_on_with_all_pages_in_the_freeze).alone().on(keeps_snapshots),
        case!(postgresql_under_pgbench_goes_on_by_precopy_and_postcopy).alone().on(keeps_snapshots),
        case!(postgresql_under_pgbench_goes_to_and_fro_ten_times).alone().slow().on(keeps_snapshots),
    ]
}

fn redis_under_load_goes_on_by_precopy_and_postcopy(stage: &Stage) -> Outcome {
    redis_goes_on(stage, &[Mode::Precopy, Mode::Postcopy])
}

fn redis_under_load_goes_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    redis_goes_on(stage, &ten_times())
}

/// redis-benchmark sets and gets over connections that it keeps for ever; it ends with the first error. Keys that it
/// does not touch are compared before and afterwards.
fn redis_goes_on(stage: &Stage, modes: &[Mode]) -> Outcome {
    let fill = "for i=1,20000 do redis.call('set', 'kept:'..i, string.rep(i, 50)) end return 1";
    let digest = "local d='' for i=1,20000 do d=redis.sha1hex(d..redis.call('get', 'kept:'..i)) end return d";
    let mut place = stage.a.plan("redis").image("redis").run(&["sh", "-c", REDIS])?;
    await_commands(&place, 0)?;
    redis(&place, &["EVAL", fill, "0"])?;
    let before = redis(&place, &["EVAL", digest, "0"])?;
    assert_eq!(before.len(), 40, "{before}");
    for (turn, mode) in modes.iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        // What it counted before the move is the least that it may say afterwards.
        let commands = await_commands(&place, 0)?;
        let (moved, _) = move_by(&place, target, *mode)?;
        await_commands(&moved, commands + 10_000)?;
        assert_eq!(redis(&moved, &["EVAL", digest, "0"])?, before, "after {mode}");
        place = moved;
    }
    Ok(())
}

fn redis(container: &Container<'_>, args: &[&str]) -> Result<String, Trouble> {
    Ok(container.exec(&[&["redis-cli"], args].concat())?.ok()?.trim().to_owned())
}

/// Waits until redis has run more than `past` commands, and claims that no client has met an error.
fn await_commands(container: &Container<'_>, past: u64) -> Result<u64, Trouble> {
    let failure = format!("/proc/{}/root/run/failed", container.pid()?);
    let commands = || {
        let text = redis(container, &["INFO", "stats"]).ok()?;
        text.lines()
            .find_map(|line| line.strip_prefix("total_commands_processed:")?.trim().parse::<u64>().ok())
    };
    let mut last = 0;
    let done = wait_until(PATIENCE, || {
        last = commands().unwrap_or(last);
        last > past || fs::exists(&failure).unwrap_or_default()
    });
    if let Ok(text) = fs::read_to_string(&failure) {
        return Err(Trouble::Garbled { what: "a load without errors", text });
    }
    if !done {
        let what = format!("redis in {} runs more than {past} commands", container.id());
        return Err(Trouble::Late { what, after: PATIENCE });
    }
    Ok(last)
}

fn nginx_under_load_loses_no_request_by_hybrid_and_auto(stage: &Stage) -> Outcome {
    nginx_loses_no_request(stage, &[Mode::Hybrid, Mode::Auto])
}

fn nginx_under_load_goes_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    nginx_loses_no_request(stage, &ten_times())
}

/// Connections are kept for the whole of the test: one that breaks counts as an error.
fn nginx_loses_no_request(stage: &Stage, modes: &[Mode]) -> Outcome {
    let client = Storm { kind: "visit", pages: 0, count: 4, reports: 4 };
    let script = "/usr/sbin/nginx -g 'daemon off;' & exec workload visit 127.0.0.1:80 godwit --connections 4";
    let mut place = stage.a.plan("nginx").image("visited").run(&["sh", "-c", script])?;
    let mut counts = client.await_passes(&place, &Default::default(), 1)?;
    for (turn, mode) in modes.iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let (moved, _) = move_by(&place, target, *mode)?;
        counts = client.await_passes(&moved, &counts, 2)?;
        place = moved;
    }
    Ok(())
}

fn nginx_under_wrk_loses_no_request_by_precopy_and_postcopy(stage: &Stage) -> Outcome {
    wrk_loses_no_request(stage, &[Mode::Precopy, Mode::Postcopy])
}

fn nginx_under_wrk_goes_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    wrk_loses_no_request(stage, &ten_times())
}

/// One wrk keeps its connections, the other makes one for each request, so that at most moments some wait to be
/// accepted. Each counts every failed connect, read and write and every answer but a good one.
///
/// A move interrupts the sleep in which wrk waits for its end (as CRIU restores any such sleep): it then says what it saw,
/// and another takes its place. So each move is reported on, and the next one is under load as well.
fn wrk_loses_no_request(stage: &Stage, modes: &[Mode]) -> Outcome {
    let mut place = stage.a.plan("wrk").image("visited").run(&["sh", "-c", WRK])?;
    await_requests(&place, 2000)?;
    for (turn, mode) in modes.iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let requests = await_requests(&place, 0)?;
        let (moved, _) = move_by(&place, target, *mode)?;
        for load in ["kept", "fresh"] {
            assert_clean(&moved, load, turn + 1)?;
        }
        await_requests(&moved, requests + 2000)?;
        place = moved;
    }
    Ok(())
}

/// Waits until a load has been reported on for the `count`th time, and claims that none of them has met an error.
fn assert_clean(container: &Container<'_>, load: &str, count: usize) -> Outcome {
    let path = format!("/proc/{}/root/run/{load}", container.pid()?);
    let mut said = String::new();
    let what = format!("wrk reports {count} times on connections that are {load}");
    await_that(&what, || {
        said = fs::read_to_string(&path).unwrap_or_default();
        said.matches("Transfer/sec:").count() >= count
    })?;
    let is_clean = ["errors", "Non-2xx", "unable"].iter().all(|word| !said.contains(word));
    assert!(is_clean, "{load}: {said}");
    Ok(())
}

/// Waits until nginx has answered more than `past` requests.
fn await_requests(container: &Container<'_>, past: u64) -> Result<u64, Trouble> {
    let requests = || {
        let text = container.exec(&["wget", "-q", "-O", "-", "http://127.0.0.1/status"]).ok()?.stdout;
        // The line below `server accepts handled requests`.
        let line = text.lines().skip_while(|line| !line.starts_with("server ")).nth(1)?;
        line.split_whitespace().nth(2)?.parse::<u64>().ok()
    };
    let mut last = 0;
    let done = wait_until(PATIENCE, || {
        last = requests().unwrap_or(last);
        last > past
    });
    if !done {
        let what = format!("nginx in {} answers more than {past} requests, and not {last}", container.id());
        return Err(Trouble::Late { what, after: PATIENCE });
    }
    Ok(last)
}

fn python_computes_on_by_postcopy_and_precopy(stage: &Stage) -> Outcome {
    computes_on(stage, "python3", PYTHON, &[Mode::Postcopy, Mode::Precopy])
}

fn python_goes_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    computes_on(stage, "python3", PYTHON, &ten_times())
}

fn node_computes_on_by_precopy_and_hybrid(stage: &Stage) -> Outcome {
    computes_on(stage, "node", NODE, &[Mode::Precopy, Mode::Hybrid])
}

fn node_goes_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    computes_on(stage, "node", NODE, &ten_times())
}

/// A program hashes a hash again and again and writes down how often and what came of it; a single lost or doubled
/// step, or a damaged object, shows in all that follows.
fn computes_on(stage: &Stage, language: &str, program: &str, modes: &[Mode]) -> Outcome {
    let flag = if language == "node" { "-e" } else { "-c" };
    let mut place = stage.a.plan(language).image(language).run(&[language, flag, program])?;
    let mut steps = await_steps(&place, 1000)?;
    for (turn, mode) in modes.iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let (moved, _) = move_by(&place, target, *mode)?;
        steps = await_steps(&moved, steps + 1000)?;
        place = moved;
    }
    Ok(())
}

/// Waits until the program has taken more than `past` steps, and claims that their result is right and that it found its
/// objects whole.
fn await_steps(container: &Container<'_>, past: u64) -> Result<u64, Trouble> {
    let path = format!("/proc/{}/root/run/steps", container.pid()?);
    let mut found = None;
    wait_until(PATIENCE, || {
        let text = fs::read_to_string(&path).unwrap_or_default();
        found = text.split_once(' ').and_then(|(steps, digest)| {
            Some((steps.parse::<u64>().ok().filter(|steps| *steps > past)?, digest.trim().to_owned()))
        });
        found.is_some()
    });
    let Some((steps, digest)) = found else {
        let what = format!("{} takes more than {past} steps", container.id());
        return Err(Trouble::Late { what, after: PATIENCE });
    };
    let expected = (0..steps).fold(Vec::new(), |state, _| Sha256::digest(&state).to_vec());
    assert_eq!(digest, expected.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    Ok(steps)
}

fn postgresql_under_pgbench_goes_on_with_all_pages_in_the_freeze(stage: &Stage) -> Outcome {
    let place = postgres(stage)?;
    let transactions = await_transactions(&place, 0)?;
    let (moved, report) = move_by(&place, &stage.b, Mode::Precopy)?;
    if report.streams == 0 {
        let notes = report.notes.join("; ");
        assert!(notes.contains("vm.unprivileged_userfaultfd"), "{notes}");
    }
    await_transactions(&moved, transactions + 100)?;
    Ok(())
}

fn postgresql_under_pgbench_goes_on_by_precopy_and_postcopy(stage: &Stage) -> Outcome {
    postgres_goes_on(stage, &[Mode::Precopy, Mode::Postcopy])
}

fn postgresql_under_pgbench_goes_to_and_fro_ten_times(stage: &Stage) -> Outcome {
    postgres_goes_on(stage, &ten_times())
}

fn postgres_goes_on(stage: &Stage, modes: &[Mode]) -> Outcome {
    let allowed = match Setting::at_least("vm.unprivileged_userfaultfd", 1) {
        Ok(allowed) => allowed,
        Err(why) => return skip(format!("tasks of a user namespace may not have a userfaultfd: {why}")),
    };
    let mut place = postgres(stage)?;
    let mut transactions = await_transactions(&place, 0)?;
    for (turn, mode) in modes.iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let (moved, report) = move_by(&place, target, *mode)?;
        assert!(report.streams > 0, "its pages travelled in criu's images: {:?}", report.notes);
        transactions = await_transactions(&moved, transactions + 100)?;
        place = moved;
    }
    drop(allowed);
    Ok(())
}

/// Whether ctr's `--remap-labels` leaves a snapshot as it is. That of containerd 2 has it mounted with mapped ids, which
/// the shim cannot do yet.
fn keeps_snapshots(lane: Lane) -> bool {
    lane.containerd < Version::V2_1
}

/// PostgreSQL, and pgbench with four clients that change three tables and a history together: their sums are equal at
/// every moment, unless something was lost. PostgreSQL refuses to run as root, and without CAP_SYS_RESOURCE CRIU dumps
/// the processes of another user only in a user namespace. It maps everybody to himself: the image's files are used as they
/// are (`--remap-labels` keeps ctr from making a copy with other owners).
fn postgres(stage: &Stage) -> Result<Container<'_>, Trouble> {
    let maps = ["--uidmap", "0:0:65536", "--gidmap", "0:0:65536", "--remap-labels"];
    stage.a.plan("postgres").image("postgres").flags(&maps).run(&["sh", "-c", POSTGRES])
}

/// Waits until pgbench has made more than `past` transactions, and claims that none has failed and that all sums agree.
fn await_transactions(container: &Container<'_>, past: u64) -> Result<u64, Trouble> {
    let failure = format!("/proc/{}/root/run/failed", container.pid()?);
    let sums = || {
        let done = container.exec(&["sh", "-c", SUMS]).ok()?;
        let numbers =
            done.stdout.trim().split('|').map(str::parse::<i64>).collect::<Result<Vec<_>, _>>().ok()?;
        <[i64; 5]>::try_from(numbers).ok()
    };
    let mut last = None;
    wait_until(PATIENCE, || {
        last = sums().or(last);
        fs::exists(&failure).unwrap_or_default()
            || last.is_some_and(|[count, ..]| u64::try_from(count).is_ok_and(|count| count > past))
    });
    if let Ok(text) = fs::read_to_string(&failure) {
        return Err(Trouble::Garbled { what: "a load without errors", text });
    }
    match last {
        Some([count, accounts, branches, tellers, history])
            if u64::try_from(count).is_ok_and(|count| count > past) =>
        {
            assert_eq!([accounts, branches, tellers], [history; 3], "the tables do not agree");
            Ok(u64::try_from(count).unwrap_or_default())
        }
        seen => {
            let what = format!("pgbench in {} makes more than {past} transactions; {seen:?}", container.id());
            Err(Trouble::Late { what, after: PATIENCE })
        }
    }
}

const POSTGRES: &str = "\
set -- /usr/lib/postgresql/*/bin
bin=$1
mkdir /pg && chown www-data /pg
su -s /bin/sh www-data -c \"$bin/initdb -D /pg/data -A trust --no-locale >/pg/initdb && \
    exec $bin/postgres -D /pg/data -k /pg -c listen_addresses= -c fsync=off >/pg/log 2>&1\" &
until $bin/psql -h /pg -U www-data -d postgres -c 'select 1' >/dev/null 2>&1; do sleep 0.2; done
$bin/pgbench -i -q -h /pg -U www-data postgres >/pg/filled 2>&1
$bin/pgbench -n -h /pg -U www-data -c 4 -T 1000000 postgres >/run/pgbench 2>&1
mv /run/pgbench /run/failed
sleep 1000000
";
const SUMS: &str = "\
/usr/lib/postgresql/*/bin/psql -h /pg -U www-data -d postgres -Atc 'select (select count(*) from pgbench_history), \
(select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), \
(select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history)'";
const WRK: &str = "\
/usr/sbin/nginx -g 'daemon off;' &
until wget -q -O - http://127.0.0.1/ >/dev/null; do usleep 50000; done
load() {
    name=$1
    shift
    while :; do
        wrk -t 1 -c 8 -d 1000000s --timeout 1000s \"$@\" http://127.0.0.1:80/ >/run/$name.now 2>&1
        cat /run/$name.now >>/run/$name
    done
}
load kept &
load fresh -H 'Connection: close' &
wait
";
const REDIS: &str = "\
redis-server --save '' --appendonly no --protected-mode no >/dev/null &
until redis-cli PING 2>/dev/null | grep -q PONG; do sleep 0.1; done
for test in set get; do
    { redis-benchmark -q -c 5 -n 2000000000 -r 10000 -t $test >/run/$test 2>&1; mv /run/$test /run/failed; } &
done
wait
";
/// Beside its objects it has a page that it might execute, and writes all the time, in front of all code: there CRIU puts the
/// system calls that it has a process make.
const PYTHON: &str = "
import ctypes, hashlib, mmap, os, time
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
libc = ctypes.CDLL(None)
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
code = (ctypes.c_char * 4096).from_address(libc.mmap(0x200000, 4096, 7, private | 0x100000, -1, 0))
with open('/proc/self/maps') as maps:
    first = next(line for line in maps if line.split()[1][2] == 'x')
assert first.split()[1:5] == ['rwxp', '00000000', '00:00', '0'], first
kept = {number: str(number) * 20 for number in range(50000)}
state, steps = b'', 0
while True:
    for _ in range(100):
        state, steps = hashlib.sha256(state).digest(), steps + 1
    if any(kept[number] != str(number) * 20 for number in range(steps % 50000, 50000, 997)):
        state = b'lost'
    if steps > 100 and code.raw != code_before:
        state = b'overwritten'
    code_before = hashlib.sha256(state).digest() * 128
    code.raw = code_before
    with open('/run/steps.next', 'w') as file:
        file.write(f'{steps} {state.hex()}')
    os.rename('/run/steps.next', '/run/steps')
    time.sleep(0.002)
";
const NODE: &str = "
const { createHash } = require('crypto'), fs = require('fs');
const kept = new Map();
for (let number = 0; number < 50000; number++) kept.set(number, String(number).repeat(20));
let state = Buffer.alloc(0), steps = 0;
const work = () => {
    for (let step = 0; step < 100; step++, steps++) state = createHash('sha256').update(state).digest();
    for (let number = steps % 50000; number < 50000; number += 997) {
        if (kept.get(number) !== String(number).repeat(20)) state = Buffer.from('lost');
        kept.set(number, String(number).repeat(20));
    }
    fs.writeFileSync('/run/steps.next', `${steps} ${state.toString('hex')}`);
    fs.renameSync('/run/steps.next', '/run/steps');
    setTimeout(work, 2);
};
work();
";
