//! Servers that people run: redis with data, python, nginx.

use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, Trouble, await_that};
use sha2::{Digest, Sha256};

use super::workload::assert_usable;

pub(super) fn cases() -> Vec<Case> {
    vec![case!(redis_keeps_every_key), case!(python_computes_on_without_a_slip), case!(nginx_goes_on_serving)]
}

/// Fills redis with 20,000 keys, and compares a digest over all of them before and after.
fn redis_keeps_every_key(stage: &Stage) -> Outcome {
    let fill = "for i=1,20000 do redis.call('set', 'key:'..i, string.rep(i, 50)) end return 1";
    let digest = "local d='' for i=1,20000 do d=redis.sha1hex(d..redis.call('get', 'key:'..i)) end return d";
    let container = stage.a.plan("redis").image("redis").run(&REDIS)?;
    await_that("redis answers", || cli(&container, &["PING"]).is_ok_and(|text| text == "PONG"))?;
    cli(&container, &["EVAL", fill, "0"])?;
    let before = cli(&container, &["EVAL", digest, "0"])?;
    assert_eq!(before.len(), 40, "{before}");
    let (moved, _) = container.move_to(&stage.b)?;
    assert_eq!(cli(&moved, &["EVAL", digest, "0"])?, before);
    assert_eq!(cli(&moved, &["DBSIZE"])?, "20000");
    assert_eq!(cli(&moved, &["SET", "new", "value"])?, "OK");
    assert_usable(&moved)
}

/// Python hashes a hash again and again and writes down how often and what came of it; a single lost or doubled
/// step, or a damaged object, shows in all that follows.
fn python_computes_on_without_a_slip(stage: &Stage) -> Outcome {
    let container = stage.a.plan("python").image("python3").run(&["python3", "-c", PYTHON])?;
    let early = await_steps_past(&container, 1000)?;
    let (moved, _) = container.move_to(&stage.b)?;
    let late = await_steps_past(&moved, early + 1000)?;
    assert!(late > early);
    assert_usable(&moved)
}

fn nginx_goes_on_serving(stage: &Stage) -> Outcome {
    let command = ["/usr/sbin/nginx", "-g", "daemon off;"];
    let container = stage.a.plan("nginx").image("nginx").run(&command)?;
    await_that("nginx serves", || page(&container).is_ok_and(|text| text == "godwit\n"))?;
    let (moved, _) = container.move_to(&stage.b)?;
    assert_eq!(page(&moved)?, "godwit\n");
    // The master still leads its workers: told to, it makes new ones.
    let before = stage.b.rpc.pids(moved.id())?;
    assert_eq!(before.len(), 3);
    moved.kill("SIGHUP")?;
    await_that("the workers are new ones", || {
        stage
            .b
            .rpc
            .pids(moved.id())
            .is_ok_and(|now| now.len() == 3 && now.iter().filter(|pid| before.contains(pid)).count() == 1)
    })?;
    assert_eq!(page(&moved)?, "godwit\n");
    assert_usable(&moved)
}

fn cli(container: &Container<'_>, args: &[&str]) -> Result<String, Trouble> {
    Ok(container.exec(&[&["redis-cli"], args].concat())?.ok()?.trim().to_owned())
}

fn page(container: &Container<'_>) -> Result<String, Trouble> {
    container.exec(&["wget", "-q", "-O", "-", "http://127.0.0.1/"])?.ok()
}

/// Waits until Python has taken more than `past` steps, and claims that their result is right.
fn await_steps_past(container: &Container<'_>, past: u64) -> Result<u64, Trouble> {
    let path = format!("/proc/{}/root/run/steps", container.pid()?);
    let mut found = None;
    await_that(&format!("{} takes more than {past} steps", container.id()), || {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        found = text.split_once(' ').and_then(|(steps, digest)| {
            Some((steps.parse::<u64>().ok().filter(|steps| *steps > past)?, digest.trim().to_owned()))
        });
        found.is_some()
    })?;
    let (steps, digest) = found.unwrap_or_default();
    let expected = (0..steps).fold(Vec::new(), |state, _| Sha256::digest(&state).to_vec());
    assert_eq!(digest, expected.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    Ok(steps)
}

const REDIS: [&str; 7] = ["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no"];
const PYTHON: &str = "
import hashlib, os, time
state, steps = b'', 0
while True:
    for _ in range(100):
        state, steps = hashlib.sha256(state).digest(), steps + 1
    with open('/run/steps.next', 'w') as file:
        file.write(f'{steps} {state.hex()}')
    os.rename('/run/steps.next', '/run/steps')
    time.sleep(0.002)
";
