//! A container of a case: described, run, used, and removed whatever becomes of the case.

use std::fs;
use std::path::PathBuf;

use containerd_client::tonic::Code;
use containerd_client::types::v1::{Process, Status};

use super::job::{Done, Job};
use super::lane::Runtime;
use super::site::Site;
use super::trouble::{Outcome, Trouble, await_that};

/// A container to be run.
#[derive(Debug)]
pub struct Plan<'a> {
    site: &'a Site,
    id: String,
    image: String,
    runtime: &'static str,
    flags: Vec<String>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(site: &'a Site, id: String) -> Self {
        Self { site, id, image: BUSYBOX.to_owned(), runtime: site.lane.runtime.name(), flags: Vec::new() }
    }

    /// Returns the id that the container will have.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Chooses an image of the catalogue by name.
    #[must_use]
    pub fn image(self, name: &str) -> Self {
        Self { image: format!("localhost/{name}:latest"), ..self }
    }

    /// Chooses another runtime than the lane's.
    #[must_use]
    pub fn runtime(self, runtime: Runtime) -> Self {
        Self { runtime: runtime.name(), ..self }
    }

    /// Adds flags of `ctr run`.
    #[must_use]
    pub fn flags<S: AsRef<str>>(mut self, flags: &[S]) -> Self {
        self.flags.extend(flags.iter().map(|flag| flag.as_ref().to_owned()));
        self
    }

    /// Runs it detached; returns when it has started.
    ///
    /// # Errors
    /// [`Trouble::Command`] when ctr reports a failure.
    pub fn run(self, command: &[&str]) -> Result<Container<'a>, Trouble> {
        let args = self.words(&["run", "--detach"], command);
        // Made before the command runs, so that what a failed one leaves goes as well.
        let container = Container { site: self.site, id: self.id };
        self.site.ctr(&as_strs(&args))?;
        Ok(container)
    }

    /// Starts ctr with it in the foreground.
    ///
    /// # Errors
    /// [`Trouble::Io`] when ctr cannot be started.
    pub fn foreground(self, command: &[&str]) -> Result<(Container<'a>, Job), Trouble> {
        let args = self.words(&["run"], command);
        let job = self.site.start_ctr(&as_strs(&args))?;
        Ok((Container { site: self.site, id: self.id }, job))
    }

    /// Starts ctr with it in the foreground, on a terminal of `rows` by `columns`.
    ///
    /// # Errors
    /// [`Trouble::Io`] when ctr cannot be started.
    pub fn on_terminal(
        self,
        rows: u16,
        columns: u16,
        command: &[&str],
    ) -> Result<(Container<'a>, Job), Trouble> {
        let args = self.words(&["run", "--tty"], command);
        let job = self.site.start_ctr_on_terminal(rows, columns, &as_strs(&args))?;
        Ok((Container { site: self.site, id: self.id }, job))
    }

    /// Runs it in the foreground to its end and removes it (`ctr run --rm`).
    ///
    /// # Errors
    /// [`Trouble::Late`] when it does not end.
    pub fn run_to_end(self, command: &[&str]) -> Result<Done, Trouble> {
        let args = self.words(&["run", "--rm"], command);
        let container = Container { site: self.site, id: self.id };
        let done = self.site.try_ctr(&as_strs(&args));
        drop(container);
        done
    }

    /// Makes the container without a task (`ctr containers create`).
    ///
    /// # Errors
    /// [`Trouble::Command`] when ctr reports a failure.
    pub fn create(self, command: &[&str]) -> Result<Container<'a>, Trouble> {
        let args = self.words(&["containers", "create"], command);
        let container = Container { site: self.site, id: self.id };
        self.site.ctr(&as_strs(&args))?;
        Ok(container)
    }

    fn words(&self, verb: &[&str], command: &[&str]) -> Vec<String> {
        let mut words: Vec<String> = verb.iter().map(|word| (*word).to_owned()).collect();
        words.extend(["--runtime".to_owned(), self.runtime.to_owned()]);
        words.extend(self.flags.iter().cloned());
        words.extend([self.image.clone(), self.id.clone()]);
        words.extend(command.iter().map(|word| (*word).to_owned()));
        words
    }
}

/// A container of a case. Dropping it kills its task and removes it, if they are there.
#[derive(Debug)]
pub struct Container<'a> {
    site: &'a Site,
    id: String,
}

impl<'a> Container<'a> {
    /// Takes charge of the container `id`, whether it exists yet or not.
    #[must_use]
    pub fn adopt(site: &'a Site, id: &str) -> Self {
        Self { site, id: id.to_owned() }
    }

    /// Returns its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the node that it is on.
    #[must_use]
    pub fn site(&self) -> &'a Site {
        self.site
    }

    /// Returns the state of its task, or `None` when it has no task. containerd is asked about this one alone:
    /// `ctr tasks list` asks every shim, and waits for each.
    ///
    /// # Errors
    /// containerd's.
    pub fn state(&self) -> Result<Option<Status>, Trouble> {
        Ok(self.process()?.map(|process| process.status()))
    }

    /// Returns the process id of its init on the machine.
    ///
    /// # Errors
    /// [`Trouble::Garbled`] when it has no task.
    pub fn pid(&self) -> Result<u32, Trouble> {
        let garbled = || Trouble::Garbled { what: "the task of", text: self.id.clone() };
        self.process()?.map(|process| process.pid).filter(|pid| *pid != 0).ok_or_else(garbled)
    }

    /// Waits until its task is in `state`.
    ///
    /// # Errors
    /// [`Trouble::Late`] when that does not come to pass.
    pub fn await_state(&self, state: Status) -> Outcome {
        await_that(&format!("{} is {state:?}", self.id), || self.state().is_ok_and(|now| now == Some(state)))
    }

    /// Returns whether containerd has a record of it.
    ///
    /// # Errors
    /// When ctr fails.
    pub fn is_recorded(&self) -> Result<bool, Trouble> {
        Ok(self.site.ctr(&["containers", "list", "--quiet"])?.lines().any(|line| line == self.id))
    }

    /// Runs a command in it (`ctr tasks exec`), whatever its status.
    ///
    /// # Errors
    /// [`Trouble::Late`] when it does not end.
    pub fn exec(&self, command: &[&str]) -> Result<Done, Trouble> {
        self.start_exec(&[], command)?.wait()
    }

    /// Starts a command in it, with flags of `ctr tasks exec`.
    ///
    /// # Errors
    /// [`Trouble::Io`] when ctr cannot be started.
    pub fn start_exec(&self, flags: &[&str], command: &[&str]) -> Result<Job, Trouble> {
        let exec_id = self.site.id("exec");
        let mut args = vec!["tasks", "exec", "--exec-id", &exec_id];
        args.extend(flags);
        args.push(&self.id);
        args.extend(command);
        self.site.start_ctr(&args)
    }

    /// Sends a signal to its init.
    ///
    /// # Errors
    /// When ctr fails.
    pub fn kill(&self, signal: &str) -> Outcome {
        self.site.ctr(&["tasks", "kill", "--signal", signal, &self.id]).map(drop)
    }

    /// Kills its init and waits until its task is seen to have stopped.
    ///
    /// # Errors
    /// When ctr fails or the task goes on.
    pub fn stop(&self) -> Outcome {
        self.kill("SIGKILL")?;
        self.await_state(Status::Stopped)
    }

    /// Runs `ctr tasks VERB ID`.
    ///
    /// # Errors
    /// When ctr fails.
    pub fn task(&self, verb: &str) -> Result<String, Trouble> {
        self.site.ctr(&["tasks", verb, &self.id])
    }

    /// Returns the file of a cgroup controller that holds for it, on either cgroup layout: `v1` is
    /// `CONTROLLER/FILE`, `v2` the file's name in the unified hierarchy.
    ///
    /// # Errors
    /// When it has no task, or the file cannot be found.
    pub fn cgroup_file(&self, v1: &str, v2: &str) -> Result<PathBuf, Trouble> {
        let path = PathBuf::from(format!("/proc/{}/cgroup", self.pid()?));
        let table = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
        let (controller, file) = v1.split_once('/').unwrap_or((v1, ""));
        let mounted = PathBuf::from("/sys/fs/cgroup").join(controller);
        // Lines of cgroups(7): HIERARCHY:CONTROLLERS:PATH.
        let of = |wanted: &str| {
            table.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let controllers = parts.next()?;
                let path = parts.next()?.trim_start_matches('/').to_owned();
                controllers.split(',').any(|one| one == wanted).then_some(path)
            })
        };
        let found = match of(controller).filter(|_| mounted.exists()) {
            Some(path) => mounted.join(path).join(file),
            None => PathBuf::from("/sys/fs/cgroup").join(of("").unwrap_or_default()).join(v2),
        };
        Ok(found)
    }

    fn process(&self) -> Result<Option<Process>, Trouble> {
        match self.site.rpc.state(&self.id, "") {
            Ok(process) => Ok(Some(process)),
            Err(refusal) if refusal.code == Code::NotFound => Ok(None),
            Err(refusal) => Err(refusal.into()),
        }
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // What is not there any more cannot be removed, and that is what a case may well end with. What can
        // not be removed although it is there is found by the footprint at the end of the lane.
        drop(self.site.try_ctr(&["tasks", "delete", "--force", &self.id]));
        drop(self.site.try_ctr(&["containers", "delete", &self.id]));
    }
}

fn as_strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

const BUSYBOX: &str = "localhost/busybox:latest";
