//! What a node's containerd says about its containers.

use std::sync::Mutex;

use serde_json::Value;

use super::job::Job;
use super::trouble::{LIMIT, Outcome, Trouble, await_that};
use crate::node::Node;
use crate::process::wait_until;

/// An event, as `ctr events` prints it.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its topic, such as `/tasks/start`.
    pub topic: String,
    /// Its content.
    pub content: Value,
}

impl Event {
    /// Returns the container that it is about.
    #[must_use]
    pub fn container(&self) -> &str {
        let field = |name: &str| self.content.get(name).and_then(Value::as_str);
        field("container_id").or_else(|| field("id")).unwrap_or_default()
    }

    /// Returns a number of its content; 0 where it has none, because containerd leaves zeroes out.
    #[must_use]
    pub fn number(&self, name: &str) -> u64 {
        self.content.get(name).and_then(Value::as_u64).unwrap_or_default()
    }
}

/// All events of a node since [`EventLog::follow`].
#[derive(Debug)]
pub struct EventLog {
    job: Mutex<Job>,
}

impl EventLog {
    /// Begins to listen; returns when events are seen to come.
    ///
    /// # Errors
    /// [`Trouble::Late`] when none come.
    pub fn follow(node: &Node) -> Result<Self, Trouble> {
        let job = Job::start(node.ctr_command(["events"]))?;
        // The subscription is made at some time after ctr has started, and nothing says when: provoke events
        // until one arrives.
        let mut count = 0;
        let heard = wait_until(LIMIT, || {
            count += 1;
            let label = format!("godwit.test/count={count}");
            drop(node.ctr(["namespaces", "label", "default", &label]));
            job.stdout().contains("/namespaces/update")
        });
        if heard {
            return Ok(Self { job: Mutex::new(job) });
        }
        Err(Trouble::Late { what: "ctr events prints an event".to_owned(), after: LIMIT })
    }

    /// Returns the events about a container's tasks so far, in order.
    #[must_use]
    pub fn of(&self, id: &str) -> Vec<Event> {
        let text = self.job.lock().map(|job| job.stdout()).unwrap_or_default();
        let events = text.lines().filter_map(parse);
        events.filter(|event| event.topic.starts_with("/tasks/") && event.container() == id).collect()
    }

    /// Returns the topics of [`EventLog::of`] without their common beginning.
    #[must_use]
    pub fn topics(&self, id: &str) -> Vec<String> {
        self.of(id).iter().map(|event| event.topic.trim_start_matches("/tasks/").to_owned()).collect()
    }

    /// Waits until a container's events are exactly `topics`, in this order.
    ///
    /// # Errors
    /// [`Trouble::Late`] when they are not.
    pub fn await_topics(&self, id: &str, topics: &[&str]) -> Outcome {
        let mut seen = Vec::new();
        let what = format!("the events of {id} are {topics:?}");
        await_that(&what, || {
            seen = self.topics(id);
            seen.len() >= topics.len()
        })
        .or_else(|_| self.disagree(&what, id))?;
        if seen == topics { Ok(()) } else { self.disagree(&what, id) }
    }

    /// Waits for the first event of a topic about a container.
    ///
    /// # Errors
    /// [`Trouble::Late`] when there is none.
    pub fn await_one(&self, id: &str, topic: &str) -> Result<Event, Trouble> {
        let mut found = None;
        let full = format!("/tasks/{topic}");
        await_that(&format!("{id} has an event {topic}"), || {
            found = self.of(id).into_iter().find(|event| event.topic == full);
            found.is_some()
        })?;
        found.ok_or(Trouble::Garbled { what: "event", text: full })
    }

    fn disagree(&self, what: &str, id: &str) -> Outcome {
        Err(Trouble::Garbled { what: "events", text: format!("{what}, but they are {:?}", self.topics(id)) })
    }
}

/// Reads a line `DATE TIME ZONE ZONE NAMESPACE TOPIC CONTENT`.
fn parse(line: &str) -> Option<Event> {
    let start = line.find(" /")?;
    let (topic, content) = line[start + 1..].split_once(' ')?;
    Some(Event { topic: topic.to_owned(), content: serde_json::from_str(content).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_of_ctr_is_read() {
        let line = "2026-01-02 18:36:39.383314484 +0000 UTC default /tasks/exit \
                    {\"container_id\":\"web\",\"id\":\"web\",\"pid\":21382,\"exit_status\":137}";
        let event = parse(line).unwrap();
        assert_eq!((event.topic.as_str(), event.container()), ("/tasks/exit", "web"));
        assert_eq!((event.number("exit_status"), event.number("absent")), (137, 0));
    }
}
