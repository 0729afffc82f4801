//! Makes sure that a container runs again after a migration that failed.
//!
//! ```text
//! worker died ─► its CRIU lets go ─► thaw, until the kernel says so ─► RunningOnSource
//!                   │ not in time       │ not in time
//!                   └───────────────────┴─► Unknown, with the way to mend it; goes on trying, then RunningOnSource
//! ```
//! CRIU is never killed here: in the middle of a dump it has code of its own running in the container's tasks. It
//! sees its worker's end as a closed socket and undoes by itself what it has done; only then is it time to thaw.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use godwit_protocol::Fate;
use godwit_sys::{
    SysError,
    freezer::{Freezer, FreezerState},
};
use tokio::time::{Instant, sleep, timeout};

use super::{Container, Phase, migration::badly};
use crate::{
    cgroup::Cgroup,
    verb::Verb,
    worker::{Failed, Lineage},
};

/// How long the client is kept waiting for CRIU to let go of the container once its worker has died.
const LET_GO_LIMIT: Duration = Duration::from_secs(30);
/// How long the kernel is asked to thaw before the client is told that it does not.
const THAW_LIMIT: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 5000 });
const POLL: Duration = Duration::from_millis(20);
const TRY_AGAIN: Duration = Duration::from_millis(500);

impl Container {
    /// Waits until nothing that a dead worker has started holds the container; on failure tells who does, and how to
    /// mend that.
    pub(super) async fn wait_until_let_go(&self, lineage: &mut Lineage) -> Result<(), String> {
        if timeout(LET_GO_LIMIT, lineage.gone()).await.is_ok() {
            return Ok(());
        }
        let who = match tracer(self.pid()) {
            Some(pid) => format!("criu (process {pid})"),
            None => "what it has started".to_owned(),
        };
        Err(format!(
            "{who} has not ended within {} s and may hold the container; the container is thawed when it ends{}",
            LET_GO_LIMIT.as_secs(),
            self.by_hand(),
        ))
    }

    /// Returns `failure`, having made sure that the container is not frozen where it says that it runs here; else
    /// with what is in the way.
    pub(super) async fn make_sure_it_runs(&self, mut failure: Failed) -> Failed {
        // A dry run leaves a paused container alone, and so does its failure.
        let meant_to_run = !matches!(self.lock().phase, Phase::Paused | Phase::Pausing);
        if failure.known.fate != Fate::RunningOnSource || !meant_to_run {
            return failure;
        }
        if let Err(why) = self.thaw_for_sure().await {
            failure.known.fate = Fate::Unknown;
            failure.known.cause = format!("{}; {why}", failure.known.cause);
        }
        failure
    }

    /// Thaws whatever way a dead worker had frozen the container.
    pub(super) async fn resume_after_death(&self) {
        if let Err(error) = self.run(Verb::Resume).await {
            log::debug!("{}: nothing for the runtime to resume: {error}", self.id);
        }
    }

    /// Goes on trying after `failure`, which left the container frozen, until it runs or has ended.
    pub(super) async fn mend(self: Arc<Self>, mut failure: Failed, lineage: Option<Lineage>) {
        if let Some(mut lineage) = lineage {
            lineage.gone().await;
            self.resume_after_death().await;
        }
        while let Err(why) = self.thaw_for_sure().await {
            log::error!("{}: {why}", self.id);
            sleep(TRY_AGAIN).await;
        }
        failure.known.fate = self.fate_on_source();
        self.conclude(badly(&failure));
    }

    /// Tells what became of a container that never left.
    pub(super) fn fate_on_source(&self) -> Fate {
        if self.lock().init_ended { Fate::Lost } else { Fate::RunningOnSource }
    }

    /// Asks the kernel until it says that the container is not frozen. One that has ended is not.
    async fn thaw_for_sure(&self) -> Result<(), String> {
        let Some(directory) = self.freezer_directory() else { return Ok(()) };
        let deadline = Instant::now() + THAW_LIMIT;
        loop {
            let thawed = thaw(&directory);
            if matches!(thawed, Ok(true)) || self.lock().init_ended {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let why = thawed.err().map_or_else(String::new, |error| format!(": {error}"));
                return Err(format!("the container is still frozen{why}{}", self.by_hand()));
            }
            sleep(POLL).await;
        }
    }

    fn freezer_directory(&self) -> Option<PathBuf> {
        match &self.lock().cgroup {
            Some(Cgroup::V1(found)) => found.get("freezer").cloned(),
            Some(Cgroup::V2(directory)) => Some(directory.clone()),
            None => None,
        }
    }

    /// Tells a person how to thaw, as the end of a sentence.
    fn by_hand(&self) -> String {
        let Some(directory) = self.freezer_directory() else { return String::new() };
        let (text, file) = match &self.lock().cgroup {
            Some(Cgroup::V2(_)) => ("0", "cgroup.freeze"),
            _ => ("THAWED", "freezer.state"),
        };
        format!("; by hand: echo {text} >{}", directory.join(file).display())
    }
}

/// Thaws; tells whether that has come about already.
fn thaw(directory: &Path) -> Result<bool, SysError> {
    let freezer = Freezer::open(directory)?;
    if freezer.state()? == FreezerState::Thawed {
        return Ok(true);
    }
    freezer.thaw()?;
    Ok(freezer.state()? == FreezerState::Thawed)
}

/// Returns the process that traces `pid`, if one does.
fn tracer(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
    tracer.trim().parse().ok().filter(|pid| *pid > 0)
}
