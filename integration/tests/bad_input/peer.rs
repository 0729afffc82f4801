//! Targets that are not there, or not what they should be, and sources that are not what they should be.

use godwit_integration::case;
use godwit_integration::node::{AGENT, AGENT_PORT};
use godwit_integration::suite::{Case, Outcome, Stage};
use godwit_integration::tools;

use super::claim::{assert_counts_on, assert_says, counter};
use super::guard::{AgentAway, FalseAgent};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(port_on_which_nothing_listens_is_named),
        case!(host_that_does_not_exist_is_named),
        case!(host_that_does_not_answer_is_named),
        case!(peer_that_hangs_up_is_no_agent),
        case!(peer_that_says_nothing_is_given_up),
        case!(web_server_is_no_agent),
        case!(agent_of_another_version_is_to_be_replaced),
        case!(peer_that_garbles_is_given_up),
        case!(agent_survives_whatever_it_is_sent),
        case!(host_without_an_agent_is_told_to_run_one).alone(),
    ]
}

fn port_on_which_nothing_listens_is_named(stage: &Stage) -> Outcome {
    fails_to(stage, "no-port", "node-b:9", &[":9", "godwit agent"])
}

fn host_that_does_not_exist_is_named(stage: &Stage) -> Outcome {
    fails_to(stage, "no-host", "no-such-host.invalid", &["no-such-host.invalid"])
}

/// An address of the link's network that nobody has.
fn host_that_does_not_answer_is_named(stage: &Stage) -> Outcome {
    fails_to(stage, "no-answer", "10.77.0.99", &["10.77.0.99"])
}

fn peer_that_hangs_up_is_no_agent(stage: &Stage) -> Outcome {
    fails_to_peer(stage, "hangs-up", 7901, &[":7901"])
}

fn peer_that_says_nothing_is_given_up(stage: &Stage) -> Outcome {
    fails_to_peer(stage, "silent", 7902, &[":7902"])
}

fn web_server_is_no_agent(stage: &Stage) -> Outcome {
    fails_to_peer(stage, "web", 7903, &[":7903", "godwit"])
}

fn agent_of_another_version_is_to_be_replaced(stage: &Stage) -> Outcome {
    fails_to_peer(stage, "future", 7904, &["version", "65280", "install"])
}

fn peer_that_garbles_is_given_up(stage: &Stage) -> Outcome {
    fails_to_peer(stage, "garbles", 7905, &[":7905"])
}

/// Hundreds of connections, each malformed in another way. Afterwards the agent is the same process and does
/// what it is for.
fn agent_survives_whatever_it_is_sent(stage: &Stage) -> Outcome {
    let agent = stage.b.node().daemon(AGENT);
    let workload = tools::built()?.join("workload");
    let target = format!("node-b:{AGENT_PORT}");
    for seed in ["1", "2"] {
        let argv = [&*workload.to_string_lossy(), "pester", &target, "--seed", seed, "--count", "200"]
            .map(str::to_owned);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        stage.a.command(&argv)?.ok()?;
    }
    assert_eq!(stage.b.node().daemon(AGENT), agent);
    let (container, pid) = counter(stage, "pestered")?;
    stage.a.migrate(container.id(), "node-b", &["--dry-run"])?.checked()?;
    assert_counts_on(stage, &container, pid)
}

fn host_without_an_agent_is_told_to_run_one(stage: &Stage) -> Outcome {
    let _away = AgentAway::on_b(stage);
    fails_to(stage, "no-agent", "node-b", &[":7450", "godwit agent"])
}

fn fails_to_peer(stage: &Stage, manner: &'static str, port: u16, words: &[&str]) -> Outcome {
    let _peer = FalseAgent::start(stage, manner, port)?;
    fails_to(stage, manner, &format!("node-b:{port}"), words)
}

/// Claims that a migration to `target` fails with a cause that has `words` in it, and changes nothing.
fn fails_to(stage: &Stage, stem: &str, target: &str, words: &[&str]) -> Outcome {
    let (container, pid) = counter(stage, stem)?;
    assert_says(stage.a.migrate(container.id(), target, &[])?, words)?;
    assert_counts_on(stage, &container, pid)
}
