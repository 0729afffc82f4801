//! What fails in the phases that native migrations do not have: in a round, and while pages are still to come.
//!
//! The link is shaped, so that each of these phases lasts for seconds. The cases are alone on it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_client::types::v1::Status;
use godwit_integration::case;
use godwit_integration::process::{Daemon, wait_until};
use godwit_integration::suite::{Answer, Case, Container, Job, Outcome, Site, Stage, Trouble, await_that};
use godwit_protocol::worker::Snapshot;
use godwit_protocol::{Mode, Phase};
use nix::sys::signal::Signal;

use super::claim::{PATIENCE, answer, assert_stayed, assert_threads, move_by, move_with, start};
use super::stops::is_held_by_criu;
use super::storm::{Counts, Storm};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(source_worker_killed_in_a_round_leaves_the_source_running_untracked).alone(),
        case!(target_worker_killed_in_a_round_leaves_the_source_running_untracked).alone(),
        case!(interrupt_in_a_round_leaves_the_source_running_untracked).alone(),
        case!(cancel_from_another_terminal_leaves_the_source_running_untracked).alone(),
        case!(program_stopped_in_a_round_is_not_frozen).alone(),
        case!(auto_that_does_not_converge_gives_up_with_numbers).alone(),
        case!(auto_that_does_not_converge_goes_on_as_postcopy_where_allowed).alone(),
        case!(target_worker_killed_while_pages_are_missing_ends_the_container_and_says_so).alone(),
        case!(source_worker_killed_while_pages_are_missing_is_replaced).alone(),
        case!(link_that_breaks_while_pages_are_missing_is_opened_again).alone(),
        case!(link_that_breaks_behind_a_new_agent_is_opened_again).alone(),
        case!(network_that_is_away_while_pages_are_missing_is_awaited).alone().slow(),
        case!(target_worker_killed_while_filling_loses_no_page_unnoticed).alone(),
    ]
}

fn source_worker_killed_in_a_round_leaves_the_source_running_untracked(stage: &Stage) -> Outcome {
    fails_in_a_round(stage, |_, id| {
        kill(&stage.a, &["godwit", "migrate-source", id])?;
        Ok(())
    })
}

fn target_worker_killed_in_a_round_leaves_the_source_running_untracked(stage: &Stage) -> Outcome {
    fails_in_a_round(stage, |_, id| {
        kill(&stage.b, &["godwit", "migrate-target", id])?;
        Ok(())
    })
}

fn interrupt_in_a_round_leaves_the_source_running_untracked(stage: &Stage) -> Outcome {
    fails_in_a_round(stage, |job, _| signal(job.pid(), Signal::SIGINT))
}

fn cancel_from_another_terminal_leaves_the_source_running_untracked(stage: &Stage) -> Outcome {
    fails_in_a_round(stage, |_, id| {
        let status = stage.a.command(&["godwit", "status", id, "--json"])?.ok()?;
        let snapshot: Snapshot = serde_json::from_str(&status)
            .map_err(|_| Trouble::Garbled { what: "a migration's status", text: status })?;
        assert_eq!((snapshot.id.as_str(), snapshot.phase), (id, Phase::CopyingMemory));
        assert!(snapshot.ended.is_none() && snapshot.sent_bytes > 0, "{snapshot:?}");
        stage.a.command(&["godwit", "cancel", id])?.ok()?;
        Ok(())
    })
}

/// Has `disturb` end a migration in its rounds, and claims that the container goes on here, whole and untracked, and
/// moves when nothing disturbs it.
fn fails_in_a_round(stage: &Stage, disturb: impl Fn(&Job, &str) -> Outcome) -> Outcome {
    let (container, before, pid) = big(stage)?;
    let there = Container::adopt(&stage.b, container.id());
    let slow = Shaped::link(stage, SLOW)?;
    let mut job = start(&stage.a, container.id(), &stage.b.host(), Mode::Precopy, &[])?;
    await_phase(&mut job, "it is tracked", || is_tracked(pid))?;
    disturb(&job, container.id())?;
    answer(job)?.failed()?;
    drop(slow);
    await_that("nothing tracks it any more", || !is_tracked(pid))?;
    assert_thawed(&container)?;
    BIG.assert_whole(&container, &before)?;
    assert_stayed(&container, pid, &there)?;
    let before = BIG.counts(&container)?;
    let (moved, _) = move_by(&container, &stage.b, Mode::Precopy)?;
    BIG.assert_whole(&moved, &before)
}

/// Under version 1 of cgroups CRIU would wait for it for ever, and the preflight, which asks as well, was before.
fn program_stopped_in_a_round_is_not_frozen(stage: &Stage) -> Outcome {
    let (container, before, pid) = big(stage)?;
    let there = Container::adopt(&stage.b, container.id());
    let slow = Shaped::link(stage, SLOW)?;
    let mut job = start(&stage.a, container.id(), &stage.b.host(), Mode::Precopy, &[])?;
    await_phase(&mut job, "it is tracked", || is_tracked(pid))?;
    signal(pid, Signal::SIGSTOP)?;
    drop(slow);
    let answer = answer(job)?;
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        signal(there.pid()?, Signal::SIGCONT)?;
        return BIG.assert_whole(&there, &before);
    }
    signal(pid, Signal::SIGCONT)?;
    let cause = answer.failed()?;
    assert!(cause.contains(&format!("process {pid} is stopped")), "{cause}");
    assert_thawed(&container)?;
    BIG.assert_whole(&container, &before)?;
    assert_stayed(&container, pid, &there)
}

/// Kills a worker of `site` while the container is frozen, and claims that it goes on at the source, whole, and thawed.
pub(super) fn fails_in_the_freeze(stage: &Stage, site: &Site, worker: &str) -> Outcome {
    let (container, before, pid) = big(stage)?;
    let there = Container::adopt(&stage.b, container.id());
    let slow = Shaped::link(stage, SLOW)?;
    let mut job = start(&stage.a, container.id(), &stage.b.host(), Mode::Native, &[])?;
    await_phase(&mut job, "it is frozen", || {
        is_held_by_criu(pid)
            || freezer_state(&container).is_ok_and(|state| ["FROZEN", "1"].contains(&state.as_str()))
    })?;
    kill(site, &["godwit", worker, container.id()])?;
    answer(job)?.failed()?;
    drop(slow);
    assert_thawed(&container)?;
    BIG.assert_whole(&container, &before)?;
    assert_stayed(&container, pid, &there)
}

fn auto_that_does_not_converge_gives_up_with_numbers(stage: &Stage) -> Outcome {
    let (container, before, pid) = big(stage)?;
    let there = Container::adopt(&stage.b, container.id());
    let slow = Shaped::link(stage, SLOW)?;
    let flags = ["--timeout", "2", "--downtime-limit", "1"];
    let job = start(&stage.a, container.id(), &stage.b.host(), Mode::Auto, &flags)?;
    let cause = answer(job)?.failed()?;
    drop(slow);
    for word in ["converge", "MB/s", "ms", "--downtime-limit", "--timeout", "--allow-postcopy"] {
        assert!(cause.contains(word), "{word} is not in: {cause}");
    }
    assert!(!is_tracked(pid), "it is tracked still");
    BIG.assert_whole(&container, &before)?;
    assert_stayed(&container, pid, &there)
}

fn auto_that_does_not_converge_goes_on_as_postcopy_where_allowed(stage: &Stage) -> Outcome {
    let (container, before, _) = big(stage)?;
    let slow = Shaped::link(stage, SLOW)?;
    let flags = ["--timeout", "2", "--downtime-limit", "1", "--allow-postcopy"];
    let (moved, report) = move_with(&container, &stage.b, Mode::Auto, &flags)?;
    drop(slow);
    assert!(report.faults.network.count > 0, "nothing was left at the source: {report:?}");
    BIG.assert_whole(&moved, &before)
}

/// Without the pages it misses, a container can neither go on nor go back: it has to be ended, at both ends, and
/// whoever asked is told that it is lost.
///
/// On a busy machine the worker may be found only when the last page has come. Then the container has moved, whole,
/// and another one is disturbed.
fn target_worker_killed_while_pages_are_missing_ends_the_container_and_says_so(stage: &Stage) -> Outcome {
    for _ in 0..ATTEMPTS {
        let (container, before, _) = big(stage)?;
        let there = Container::adopt(&stage.b, container.id());
        let slow = Shaped::link(stage, SLOWER)?;
        let mut job = start(&stage.a, container.id(), &stage.b.host(), Mode::Postcopy, &[])?;
        if await_resumed(&mut job, BIG, &there)? {
            // A worker that is not found has done its work, and the answer says so.
            kill(&stage.b, &["godwit", "migrate-target", container.id()]).ok();
        }
        let answer = Answer::read(job.wait()?)?;
        drop(slow);
        if answer.code == 0 {
            BIG.assert_whole(&there, &before)?;
            continue;
        }
        let fate = answer.text("fate").to_owned();
        assert_eq!(fate, "lost", "{}", answer.text("error.cause"));
        assert!(!answer.text("error.cause").is_empty());
        await_ended(&there, &before)?;
        let here = container.state()?;
        assert!(here != Some(Status::Running), "it runs on the source, and has run on the target");
        return Ok(());
    }
    Err(missing("a migration that still lacks pages"))
}

fn source_worker_killed_while_pages_are_missing_is_replaced(stage: &Stage) -> Outcome {
    is_whole_after_postcopy(stage, |id| {
        // A worker that is not found has done its work.
        Ok(kill(&stage.a, &["godwit", "migrate-source", id]).is_ok())
    })
}

/// Every connection is reset, at one end or the other, some times.
fn link_that_breaks_while_pages_are_missing_is_opened_again(stage: &Stage) -> Outcome {
    is_whole_after_postcopy(stage, |_| {
        for site in [&stage.a, &stage.b, &stage.a] {
            let cut = Rule::of(site, "out", "reject with tcp reset")?;
            std::thread::sleep(Duration::from_millis(300));
            drop(cut);
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(true)
    })
}

/// The agent that gave the worker its link is killed, and the one that comes after it gives the worker another.
fn link_that_breaks_behind_a_new_agent_is_opened_again(stage: &Stage) -> Outcome {
    is_whole_after_postcopy(stage, |_| {
        stage.b.node().stop_agent(Signal::SIGKILL);
        stage.b.node().start_agent::<[&str; 0], _>([])?;
        let cut = Rule::of(&stage.a, "out", "reject with tcp reset")?;
        std::thread::sleep(Duration::from_millis(300));
        drop(cut);
        Ok(true)
    })
}

/// For longer than TCP waits for an answer.
fn network_that_is_away_while_pages_are_missing_is_awaited(stage: &Stage) -> Outcome {
    is_whole_after_postcopy(stage, |_| {
        let away = [Rule::of(&stage.a, "in", "drop")?, Rule::of(&stage.b, "in", "drop")?];
        std::thread::sleep(Duration::from_secs(40));
        drop(away);
        Ok(true)
    })
}

/// Claims that a container which is disturbed while it lacks pages has them all in the end, each once.
///
/// On a busy machine the last page may have come before: then another one is disturbed.
fn is_whole_after_postcopy(stage: &Stage, disturb: impl Fn(&str) -> Result<bool, Trouble>) -> Outcome {
    for _ in 0..ATTEMPTS {
        let (container, before, _) = big(stage)?;
        let there = Container::adopt(&stage.b, container.id());
        let slow = Shaped::link(stage, SLOWER)?;
        let mut job = start(&stage.a, container.id(), &stage.b.host(), Mode::Postcopy, &[])?;
        let disturbed = await_resumed(&mut job, BIG, &there)? && disturb(container.id())?;
        drop(slow);
        let answer = answer(job)?.moved()?;
        BIG.assert_whole(&there, &before)?;
        let twice = answer.number("pages.duplicate");
        assert!(twice.is_none_or(|pages| pages == 0.0), "{twice:?} pages came twice");
        if let Some(faults) = answer.part("faults") {
            assert_threads(&faults, &faults);
        }
        if disturbed {
            return Ok(());
        }
    }
    Err(missing("a migration that still lacks pages"))
}

/// All pages are at the target when it resumes, and only have to be put into place: for how long depends on how
/// many there are. Either that is over when its worker dies, and the container is whole, or it is ended. If the worker
/// dies in the moment after the resume in which it records that, the source goes on from the freeze.
fn target_worker_killed_while_filling_loses_no_page_unnoticed(stage: &Stage) -> Outcome {
    let storm = Storm { pages: 65_536, ..Storm::of("single") };
    let container = storm.run_on(&stage.a)?;
    let (before, pid) = (storm.counts(&container)?, container.pid()?);
    let there = Container::adopt(&stage.b, container.id());
    let mut job = start(&stage.a, container.id(), &stage.b.host(), Mode::Native, &[])?;
    let killed = await_resumed(&mut job, storm, &there)?
        && kill(&stage.b, &["godwit", "migrate-target", container.id()]).is_ok();
    let answer = answer(job)?;
    if answer.code == 0 && there.state()? == Some(Status::Running) {
        return storm.assert_whole(&there, &before);
    }
    assert!(killed, "nothing was killed, and it says {}", answer.text("error.cause"));
    if answer.text("fate") == "running_on_source" {
        storm.assert_whole(&container, &before)?;
        return assert_stayed(&container, pid, &there);
    }
    await_ended(&there, &before)?;
    assert!(container.state()? != Some(Status::Running), "it runs on the source, and has run on the target");
    Ok(())
}

/// Waits until a container goes on at the target: until its counts are no longer what they were when it came. containerd
/// has its task as running from the moment when it is restored, which is before it resumes.
///
/// Tells whether that was seen before the migration was over.
fn await_resumed(job: &mut Job, storm: Storm, there: &Container<'_>) -> Result<bool, Trouble> {
    let mut first = None;
    let mut seen = false;
    let is_settled = wait_until(PATIENCE, || {
        let now = storm.counts(there).ok().map(|counts| counts.steps());
        first = first.or(now);
        seen = now > first;
        seen || !job.is_running()
    });
    if !is_settled {
        let what = "it goes on at the target, or the migration is over".to_owned();
        return Err(Trouble::Late { what, after: PATIENCE });
    }
    Ok(seen)
}

/// Waits until a container has ended, and claims that it never found a page that was not what it had written.
fn await_ended(container: &Container<'_>, before: &Counts) -> Outcome {
    let mut wrong = 0;
    await_that("the container is ended", || {
        if let Ok(now) = BIG.counts(container) {
            wrong = wrong.max(now.bad());
        }
        container.state().is_ok_and(|state| matches!(state, None | Some(Status::Stopped)))
    })?;
    assert_eq!(wrong, 0, "it went on with wrong pages, after {before:?}");
    Ok(())
}

/// Runs a program whose memory takes seconds on a slow link, and which writes faster than that.
fn big(stage: &Stage) -> Result<(Container<'_>, Counts, u32), Trouble> {
    let container = BIG.run_on(&stage.a)?;
    let (counts, pid) = (BIG.counts(&container)?, container.pid()?);
    Ok((container, counts, pid))
}

fn signal(pid: u32, signal: Signal) -> Outcome {
    let process = i32::try_from(pid).ok().and_then(Daemon::of);
    process.ok_or_else(|| missing("the process"))?.signal(signal);
    Ok(())
}

/// Waits without rest until a migration is in a phase; it may not be for long.
fn await_phase(job: &mut Job, what: &str, mut is_so: impl FnMut() -> bool) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if !job.is_running() || Instant::now() > deadline {
            // What it wrote may still be on its way.
            job.await_stdout("}").ok();
            return Err(Trouble::Garbled {
                what: "a phase of a migration",
                text: format!("{what}: never; {}", job.stdout()),
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Tells whether pages of a process are registered with a userfaultfd for writes.
fn is_tracked(pid: u32) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    maps.lines().any(|line| {
        line.strip_prefix("VmFlags:").is_some_and(|flags| flags.split(' ').any(|flag| flag == "uw"))
    })
}

fn assert_thawed(container: &Container<'_>) -> Outcome {
    let state = freezer_state(container)?;
    assert!(["THAWED", "0"].contains(&state.as_str()), "{state}");
    Ok(())
}

fn freezer_state(container: &Container<'_>) -> Result<String, Trouble> {
    let path = container.cgroup_file("freezer/freezer.state", "cgroup.freeze")?;
    let text = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
    Ok(text.trim().to_owned())
}

/// Kills a process of a node (see [`Site::process`]).
fn kill(site: &Site, words: &[&str]) -> Outcome {
    let mut found = None;
    wait_until(Duration::from_secs(2), || {
        found = site.process(words);
        found.is_some()
    });
    found.ok_or_else(|| missing(&words.join(" ")))?.signal(Signal::SIGKILL);
    Ok(())
}

fn missing(what: &str) -> Trouble {
    Trouble::Garbled { what: "a process to be disturbed", text: what.to_owned() }
}

/// The link between the nodes with a rate, taken off on drop.
struct Shaped<'a> {
    stage: &'a Stage,
}

impl<'a> Shaped<'a> {
    fn link(stage: &'a Stage, rate: &str) -> Result<Self, Trouble> {
        let shaped = Self { stage };
        for site in [&stage.a, &stage.b] {
            let words = ["tc", "qdisc", "replace", "dev", LINK, "root", "tbf", "rate", rate];
            site.command(&[&words[..], &["burst", "256kb", "latency", "50ms"]].concat())?.ok()?;
        }
        Ok(shaped)
    }
}

impl Drop for Shaped<'_> {
    fn drop(&mut self) {
        for site in [&self.stage.a, &self.stage.b] {
            // Where that fails, the cases to come are slow, and nothing else.
            drop(site.command(&["tc", "qdisc", "del", "dev", LINK, "root"]));
        }
    }
}

/// A rule for a node's traffic with the other one, until it is dropped.
struct Rule<'a> {
    site: &'a Site,
}

impl<'a> Rule<'a> {
    /// For what comes `in` or goes `out`.
    fn of(site: &'a Site, direction: &str, verdict: &str) -> Result<Self, Trouble> {
        let rule = Self { site };
        let commands = format!(
            "add table inet {TABLE}; \
             add chain inet {TABLE} rules {{ type filter hook {direction}put priority 0; }}; \
             add rule inet {TABLE} rules {}ifname {LINK} meta l4proto tcp {verdict}",
            &direction[..1]
        );
        site.command(&["nft", &commands])?.ok()?;
        Ok(rule)
    }
}

impl Drop for Rule<'_> {
    fn drop(&mut self) {
        // Where that fails, the case does.
        drop(self.site.command(&["nft", "delete", "table", "inet", TABLE]));
    }
}

/// What a node's rules are in.
const TABLE: &str = "godwit_cases";
/// How many migrations are begun until one is disturbed in time.
const ATTEMPTS: u32 = 3;
/// What a node's end of the link is called.
const LINK: &str = "eth0";
const BIG: Storm = Storm { kind: "single", pages: 8192, count: 1, reports: 1 };
/// 32 MiB take almost three seconds.
const SLOW: &str = "100mbit";
/// They take ten: a program that waits for each page it needs comes to its first report long before that.
const SLOWER: &str = "25mbit";
