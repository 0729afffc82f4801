//! Servers under load, moved in every mode: nobody who uses them sees an error.
//!
//! Server and clients are in one container, so that both ends of every connection move, and no address has to.

use std::fs;

use godwit_integration::process::wait_until;
use godwit_integration::suite::{Case, Container, Outcome, Stage, Trouble, skip};
use godwit_integration::{BedError, case};
use godwit_protocol::Mode;
use sha2::{Digest, Sha256};

use super::claim::{PATIENCE, move_by};
use super::storm::Storm;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(redis_under_load_goes_on_by_precopy_and_postcopy),
        case!(redis_under_load_goes_on_by_every_mode).slow(),
        case!(nginx_under_load_loses_no_request_by_hybrid_and_auto),
        case!(nginx_under_load_loses_no_request_by_every_mode).slow(),
        case!(python_computes_on_by_postcopy_and_precopy),
        case!(python_computes_on_by_every_mode).slow(),
        case!(postgresql_under_pgbench_goes_on).slow(),
    ]
}

fn redis_under_load_goes_on_by_precopy_and_postcopy(stage: &Stage) -> Outcome {
    redis_goes_on(stage, &[Mode::Precopy, Mode::Postcopy])
}

fn redis_under_load_goes_on_by_every_mode(stage: &Stage) -> Outcome {
    redis_goes_on(stage, &Mode::ALL)
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

fn nginx_under_load_loses_no_request_by_every_mode(stage: &Stage) -> Outcome {
    nginx_loses_no_request(stage, &Mode::ALL)
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

fn python_computes_on_by_postcopy_and_precopy(stage: &Stage) -> Outcome {
    python_computes_on(stage, &[Mode::Postcopy, Mode::Precopy])
}

fn python_computes_on_by_every_mode(stage: &Stage) -> Outcome {
    python_computes_on(stage, &Mode::ALL)
}

/// Python hashes a hash again and again and writes down how often and what came of it; a single lost or doubled
/// step, or a damaged object, shows in all that follows.
fn python_computes_on(stage: &Stage, modes: &[Mode]) -> Outcome {
    let mut place = stage.a.plan("python").image("python3").run(&["python3", "-c", PYTHON])?;
    let mut steps = await_steps(&place, 1000)?;
    for (turn, mode) in modes.iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let (moved, _) = move_by(&place, target, *mode)?;
        steps = await_steps(&moved, steps + 1000)?;
        place = moved;
    }
    Ok(())
}

/// Waits until Python has taken more than `past` steps, and claims that their result is right and that it found its
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

/// pgbench has four clients change three tables and a history together: their sums are equal at every moment, unless
/// something was lost. PostgreSQL refuses to run as root, and CRIU needs CAP_SYS_RESOURCE to dump the processes of
/// another user.
fn postgresql_under_pgbench_goes_on(stage: &Stage) -> Outcome {
    let status = fs::read_to_string("/proc/self/status").map_err(Trouble::io("read", "/proc/self/status"))?;
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    if mask >> CAP_SYS_RESOURCE & 1 == 0 {
        return skip("processes of other users cannot be dumped without CAP_SYS_RESOURCE");
    }
    for site in [&stage.a, &stage.b] {
        match site.import(&["postgres"]) {
            Err(Trouble::Bed(BedError::Missing { tool, hint })) => return skip(format!("no {tool}: {hint}")),
            imported => imported?,
        }
    }
    let mut place = stage.a.plan("postgres").image("postgres").run(&["sh", "-c", POSTGRES])?;
    let mut transactions = await_transactions(&place, 0)?;
    for (turn, mode) in Mode::ALL.into_iter().enumerate() {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let (moved, _) = move_by(&place, target, mode)?;
        transactions = await_transactions(&moved, transactions + 100)?;
        place = moved;
    }
    Ok(())
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

const CAP_SYS_RESOURCE: u32 = 24;
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
const REDIS: &str = "\
redis-server --save '' --appendonly no --protected-mode no >/dev/null &
until redis-cli PING 2>/dev/null | grep -q PONG; do sleep 0.1; done
for test in set get; do
    { redis-benchmark -q -c 5 -n 2000000000 -r 10000 -t $test >/run/$test 2>&1; mv /run/$test /run/failed; } &
done
wait
";
const PYTHON: &str = "
import hashlib, os, time
kept = {number: str(number) * 20 for number in range(50000)}
state, steps = b'', 0
while True:
    for _ in range(100):
        state, steps = hashlib.sha256(state).digest(), steps + 1
    if any(kept[number] != str(number) * 20 for number in range(steps % 50000, 50000, 997)):
        state = b'lost'
    with open('/run/steps.next', 'w') as file:
        file.write(f'{steps} {state.hex()}')
    os.rename('/run/steps.next', '/run/steps')
    time.sleep(0.002)
";
