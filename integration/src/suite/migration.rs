//! Asking for migrations, and what must be true of both nodes afterwards.

use containerd_client::tonic::Code;
use containerd_client::types::v1::Status;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::container::Container;
use super::job::{Done, Job};
use super::lane::Lane;
use super::site::Site;
use super::trouble::{Outcome, Trouble, await_that};

/// What `godwit migrate --json` printed.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The exit status.
    pub code: i32,
    object: Value,
}

impl Answer {
    /// Reads the answer of a command that has ended.
    ///
    /// # Errors
    /// [`Trouble::Command`] when it did not print one JSON object and nothing else.
    pub fn read(done: Done) -> Result<Self, Trouble> {
        match (done.code, serde_json::from_str::<Value>(&done.stdout)) {
            (Some(code), Ok(object)) if object.is_object() => Ok(Self { code, object }),
            _ => Err(done.into_trouble()),
        }
    }

    /// Returns it if the container has moved.
    ///
    /// # Errors
    /// [`Trouble::Garbled`] with the answer if it has not.
    pub fn moved(self) -> Result<Self, Trouble> {
        if self.code == 0 && self.text("outcome") == "migrated" && self.text("fate") == "running_on_target" {
            return Ok(self);
        }
        Err(Trouble::Garbled { what: "a migration that went well", text: self.object.to_string() })
    }

    /// Returns it if nothing was found in the way, which is what a dry run is for.
    ///
    /// # Errors
    /// [`Trouble::Garbled`] with the answer if something was.
    pub fn checked(self) -> Result<Self, Trouble> {
        if self.code == 0 && self.text("outcome") == "checked" && self.text("fate") == "running_on_source" {
            return Ok(self);
        }
        Err(Trouble::Garbled { what: "a check that found nothing", text: self.object.to_string() })
    }

    /// Returns the reason of a failure that left the container running on the source.
    ///
    /// # Errors
    /// [`Trouble::Garbled`] with the answer for any other end.
    pub fn failed(self) -> Result<String, Trouble> {
        let cause = self.text("error.cause").to_owned();
        if matches!(self.code, 1 | 4) && self.text("fate") == "running_on_source" && !cause.is_empty() {
            return Ok(cause);
        }
        let text = format!("status {}: {}", self.code, self.object);
        Err(Trouble::Garbled {
            what: "a failure that names its cause and leaves the container running",
            text,
        })
    }

    /// Returns the text at a path such as `error.cause`; empty where there is none.
    #[must_use]
    pub fn text(&self, path: &str) -> &str {
        self.at(path).and_then(Value::as_str).unwrap_or_default()
    }

    /// Returns the number at a path such as `downtime.freeze_ms`, or `None` where there is none.
    #[must_use]
    pub fn number(&self, path: &str) -> Option<f64> {
        self.at(path).and_then(Value::as_f64)
    }

    /// Returns what is at a path such as `faults`, or `None` where there is nothing of that kind.
    #[must_use]
    pub fn part<T: DeserializeOwned>(&self, path: &str) -> Option<T> {
        serde_json::from_value(self.at(path)?.clone()).ok()
    }

    /// Returns what was done otherwise than asked.
    #[must_use]
    pub fn notes(&self) -> Vec<&str> {
        self.at("notes").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
    }

    fn at(&self, path: &str) -> Option<&Value> {
        path.split('.').try_fold(&self.object, |value, key| value.get(key))
    }
}

/// Tells whether a thing of a footprint is the record of what an agent decided about a migration. It stays for
/// days on purpose, in memory and some bytes long: a source that lost its way may still ask.
#[must_use]
pub fn is_record_of_a_decision(_: Lane, thing: &str) -> bool {
    thing.starts_with("file /run/godwit/migrations/")
        && [".fate", ".worker"].iter().any(|end| thing.ends_with(end))
}

impl Site {
    /// Starts the migration of a container to `target`, with flags of `godwit migrate`.
    ///
    /// # Errors
    /// [`Trouble::Io`] when it cannot be started.
    pub fn start_migration(&self, id: &str, target: &str, flags: &[&str]) -> Result<Job, Trouble> {
        let mut argv = vec!["godwit", "migrate", id, "--to", target, "--mode", "native", "--json"];
        argv.extend(flags);
        Job::start(self.node().command(argv))
    }

    /// Migrates a container to `target`, with flags of `godwit migrate`, and returns the answer whatever it is.
    ///
    /// # Errors
    /// [`Trouble::Late`] when it does not end, [`Trouble::Command`] when it prints no answer.
    pub fn migrate(&self, id: &str, target: &str, flags: &[&str]) -> Result<Answer, Trouble> {
        Answer::read(self.start_migration(id, target, flags)?.wait()?)
    }

    /// Returns the name by which the other node knows this one.
    #[must_use]
    pub fn host(&self) -> String {
        format!("node-{}", self.node().name())
    }
}

impl<'a> Container<'a> {
    /// Moves it to another node, and claims that it runs there and that nothing of it is left here.
    ///
    /// # Errors
    /// When it did not move, or something is left.
    pub fn move_to(&self, target: &'a Site) -> Result<(Self, Answer), Trouble> {
        // Taken charge of first: a failed migration may leave something on the target.
        let moved = Self::adopt(target, self.id());
        let answer = self.site().migrate(self.id(), &target.host(), &[])?.moved()?;
        moved.await_state(Status::Running)?;
        self.await_gone()?;
        Ok((moved, answer))
    }

    /// Claims that its task runs.
    ///
    /// # Errors
    /// When containerd does not say so.
    pub fn assert_runs(&self) -> Outcome {
        match self.state()? {
            Some(Status::Running) => Ok(()),
            state => {
                let text = format!("{} on node {} is {state:?}", self.id(), self.site().node().name());
                Err(Trouble::Garbled { what: "a running container", text })
            }
        }
    }

    /// Waits until its node has no task, record and snapshot of its name.
    ///
    /// # Errors
    /// [`Trouble::Late`] when something stays.
    pub fn await_gone(&self) -> Outcome {
        let site = self.site();
        let what = format!("nothing of {} is on node {}", self.id(), site.node().name());
        await_that(&what, || {
            let snapshots = site.ctr(&["snapshots", "list"]).unwrap_or_else(|_| self.id().to_owned());
            self.state().is_ok_and(|state| state.is_none())
                && site.rpc.record(self.id()).is_err_and(|refusal| refusal.code == Code::NotFound)
                && !snapshots.split_whitespace().any(|word| word == self.id())
        })
    }
}
