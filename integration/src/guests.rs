//! Two virtual machines with stock kernels, a containerd and an agent each: `hack/guests`, from tests.
//!
//! What is done in a guest is done by commands of its shell. Guests are emulated and take about ten times as long as
//! the machine, hence limits of their own. They go when the pair is dropped; after a test that was killed,
//! `hack/guests sweep` knows them by its process id in their name.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use godwit_protocol::Mode;
use godwit_protocol::report::Report;

use crate::image::Image;
use crate::node::NodeName;
use crate::process::run;
use crate::suite::{Answer, Done, Job, Outcome, Trouble};
use crate::tools;

/// A pair of guests that is up.
#[derive(Debug)]
pub struct Guests {
    name: String,
}

impl Guests {
    /// Brings a pair up with kernels of the given release lines.
    ///
    /// # Errors
    /// [`Trouble::Bed`] when it does not come up, with the end of a guest's console.
    pub fn up(kernels: [&str; 2]) -> Result<Self, Trouble> {
        // Made first, so that what is left of a failed start goes as well.
        let guests = Self { name: format!("test-{}", std::process::id()) };
        let mut command = guests.script();
        command
            .arg("up")
            .args(kernels)
            .env("GODWIT_BIN", tools::built()?)
            .env("GODWIT_CACHE", tools::cache());
        run(&mut command)?;
        Ok(guests)
    }

    /// Returns one of the two.
    #[must_use]
    pub fn guest(&self, name: NodeName) -> Guest<'_> {
        Guest { guests: self, name }
    }

    /// Removes every container: those of a case that failed.
    ///
    /// # Errors
    /// [`Trouble::Command`] when one stays.
    pub fn clear(&self) -> Outcome {
        let remove =
            "for id in $(ctr container ls -q); do ctr task rm --force $id; ctr container rm $id; done";
        NodeName::ALL.into_iter().try_for_each(|name| self.guest(name).sh(remove).map(drop))
    }

    /// Takes the pair down.
    ///
    /// # Errors
    /// [`Trouble::Bed`] when something of it stays.
    pub fn down(self) -> Outcome {
        let outcome = run(self.script().arg("down")).map(drop);
        std::mem::forget(self);
        Ok(outcome?)
    }

    fn script(&self) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../hack/guests"));
        command.args(["--name", &self.name]).env("GODWIT_CACHE", tools::cache());
        command
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        if let Err(error) = run(self.script().arg("down")) {
            eprintln!("failed to take the guests down: {error}");
        }
    }
}

/// One guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    guests: &'a Guests,
    name: NodeName,
}

impl Guest<'_> {
    /// Runs commands in a shell of the guest to their end, whatever that is.
    ///
    /// # Errors
    /// [`Trouble::Late`] when they do not end within [`PATIENCE`].
    pub fn try_sh(self, commands: &str) -> Result<Done, Trouble> {
        let mut command = self.guests.script();
        command.args(["sh", self.name.as_str(), commands]);
        Job::start(command)?.wait_for(PATIENCE)
    }

    /// Runs commands to their end, which must be a good one, and returns what they wrote to standard output, without
    /// space around it.
    ///
    /// # Errors
    /// [`Trouble::Command`] when they fail, [`Trouble::Late`] when they hang.
    pub fn sh(self, commands: &str) -> Result<String, Trouble> {
        Ok(self.try_sh(commands)?.ok()?.trim().to_owned())
    }

    /// Waits until a condition of the guest's shell holds.
    ///
    /// # Errors
    /// [`Trouble::Late`] when it does not hold within [`PATIENCE`].
    pub fn await_that(self, condition: &str) -> Outcome {
        let seconds = PATIENCE.as_secs() / 2;
        let wait = format!(
            "end=$((SECONDS + {seconds})); until {condition}; do ((SECONDS < end)) || exit 1; sleep 0.2; done"
        );
        let done = self.try_sh(&wait)?;
        if done.code == Some(0) {
            return Ok(());
        }
        let what = format!("`{condition}` holds on guest {}; it wrote {:?}", self.name, done.stderr.trim());
        Err(Trouble::Late { what, after: PATIENCE / 2 })
    }

    /// Copies a file of the machine into the guest.
    ///
    /// # Errors
    /// [`Trouble::Bed`] when it cannot be copied.
    pub fn put(self, file: &Path, path: &str) -> Outcome {
        run(self.guests.script().args(["put", self.name.as_str()]).arg(file).arg(path))?;
        Ok(())
    }

    /// Builds an image and imports it into the guest's containerd.
    ///
    /// # Errors
    /// When it cannot be built or imported.
    pub fn import(self, image: &Image) -> Outcome {
        let archive: PathBuf = image.build()?;
        self.put(&archive, "/tmp/image.tar")?;
        self.sh("ctr image import /tmp/image.tar && rm /tmp/image.tar").map(drop)
    }

    /// Runs a container of an image of the catalogue, detached.
    ///
    /// # Errors
    /// As [`Guest::sh`].
    pub fn run(self, id: &str, image: &str, flags: &str, command: &str) -> Outcome {
        let runtime = "--runtime io.containerd.godwit.v1 --null-io";
        self.sh(&format!("ctr run -d {runtime} {flags} localhost/{image}:latest {id} {command}")).map(drop)
    }

    /// Runs a command in a container and returns what it wrote.
    ///
    /// # Errors
    /// As [`Guest::sh`].
    pub fn exec(self, id: &str, command: &str) -> Result<String, Trouble> {
        self.sh(&format!("ctr task exec --exec-id exec-$$-$RANDOM {id} {command}"))
    }

    /// Returns the state of a container's task, as ctr names it; empty when there is none.
    ///
    /// # Errors
    /// As [`Guest::sh`].
    pub fn state(self, id: &str) -> Result<String, Trouble> {
        self.sh(&format!("ctr task ls | awk '$1 == \"{id}\" {{ print $3 }}'"))
    }

    /// Kills a container and removes all of it.
    ///
    /// # Errors
    /// As [`Guest::sh`].
    pub fn remove(self, id: &str) -> Outcome {
        self.sh(&format!("ctr task kill --signal SIGKILL {id}"))?;
        self.await_that(&format!("ctr task ls | grep -q '^{id} .*STOPPED'"))?;
        // Its status is that of the task, killed.
        self.try_sh(&format!("ctr task rm {id}"))?;
        self.sh(&format!("ctr container rm {id}")).map(drop)
    }

    /// Moves a container to the other guest, claims that it runs there and that nothing is left here, and returns
    /// what `godwit migrate` reported.
    ///
    /// # Errors
    /// When it does not come to that.
    pub fn migrate(self, id: &str, mode: Mode) -> Result<Report, Trouble> {
        // A guest is slow: `auto` is not to give up for that, and rounds that lead nowhere are not to take minutes.
        let limit = if mode == Mode::Auto { "--downtime-limit 600000" } else { "" };
        let rounds = if mode.has_rounds() { "--max-rounds 2" } else { "" };
        let there = Guest { guests: self.guests, name: self.name.other() };
        let to = format!("node-{}", there.name);
        let done = self.try_sh(&format!(
            "godwit migrate {id} --to {to} --mode {mode} --json --quiet {limit} {rounds}"
        ))?;
        let text = done.stdout.clone();
        Answer::read(done)?.moved()?;
        let report = serde_json::from_str(&text).map_err(|_| Trouble::Garbled { what: "a report", text })?;
        assert_eq!(there.state(id)?, "RUNNING");
        assert_eq!(self.sh(&format!("ctr container ls -q | grep -x {id} || true"))?, "");
        assert_eq!(self.sh(&format!("ls -d /sys/fs/cgroup/default/{id} 2>/dev/null || true"))?, "");
        Ok(report)
    }
}

/// How long anything may take in a guest, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(1200);
