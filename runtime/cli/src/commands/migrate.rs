//! `godwit migrate`: a client of containerd's checkpoint call and of the shim's progress service.
//!
//! ```text
//! look at the container ──► Tasks.Checkpoint(godwit://…) in a thread
//!                           Migrate.Status, again and again ──► progress      Ctrl-C ──► Migrate.Cancel
//!                           both have ended ──► the shim's word counts ──► report or failure, exit code
//! ```

mod outcome;
mod progress;
mod shim;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use godwit_node::client::DEFAULT_ADDRESS;
use godwit_node::source::TaskState;
use godwit_node::{NodeError, Source};
use godwit_protocol::request::{Images, Limits, RequestError};
use godwit_protocol::worker::Ended;
use godwit_protocol::{Fate, MigrationId, MigrationRequest, Mode, Phase, Side};
use nix::sys::signal::{SigSet, Signal};

use crate::error::{CliError, Result};

use outcome::{Outcome, Stopped};
use progress::Progress;

pub(super) use progress::line;
pub(super) use shim::Shim;

/// Move a running container to another host
///
/// The container goes on running while image and files are copied, is frozen while its memory is, and then runs
/// on the target under the same name; its task, container and snapshot here are removed. If anything fails
/// before the target has it, it goes on here.
///
///     godwit agent --listen 10.0.0.2              on the target
///     godwit migrate web --to 10.0.0.2 --dry-run  is anything in the way?
///     godwit migrate web --to 10.0.0.2            move it
///
/// The container must run under godwit's shim (ctr run --runtime io.containerd.godwit.v1 …).
///
/// Exit codes:
///   0  the container runs on the target (with --dry-run: it could)
///   1  failed; the container runs here as before
///   2  the command line makes no sense
///   3  look at the message: the container is lost, or it is not known which host has it
///   4  refused before anything was moved: something is in the way, on this host or the target
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Migrate {
    /// Name of the container
    id: String,
    /// The target: a name or address, and a port if its agent's is not 7450
    #[arg(long, value_name = "HOST[:PORT]", value_parser = MigrationRequest::to_target)]
    to: MigrationRequest,
    /// When memory travels: native (while it is frozen), precopy (before, in rounds), postcopy (after it runs on
    /// the target), hybrid (rounds, then the rest after), or auto (rounds while they help)
    #[arg(long, value_name = "MODE", default_value_t = Mode::Auto)]
    mode: Mode,
    #[command(flatten)]
    tuning: Tuning,
    /// containerd's namespace [default: $CONTAINERD_NAMESPACE or "default"]
    #[arg(long, short, value_name = "NAME")]
    namespace: Option<String>,
    /// containerd's socket [default: $CONTAINERD_ADDRESS or /run/containerd/containerd.sock]
    #[arg(long, short, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Keep the stopped container and its snapshot here
    #[arg(long)]
    keep: bool,
    /// Only check whether it could be moved; nothing is changed on either host
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object on stdout: what came of it
    #[arg(long)]
    json: bool,
    /// Show no progress
    #[arg(long, short)]
    quiet: bool,
}

/// How a migration may spend what it has.
#[derive(Debug, Args)]
#[command(next_help_heading = "Memory")]
struct Tuning {
    /// Where images and pages are on their way: cache (memory), or disk
    #[arg(long, value_name = "WHERE", default_value_t = Images::default())]
    images: Images,
    /// Longest downtime that rounds aim at, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = Limits::default().downtime_limit_ms, value_parser = value_parser!(u32).range(1..=3_600_000))]
    downtime_limit: u32,
    /// With auto: leave pages to travel after it runs on the target when rounds do not help. If the link is lost
    /// then, the container waits for it
    #[arg(long)]
    allow_postcopy: bool,
    /// After so many seconds of rounds, switch over or give up
    #[arg(long, value_name = "S", default_value_t = Limits::default().timeout_s, value_parser = value_parser!(u32).range(1..=86_400))]
    timeout: u32,
    /// Most rounds
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_rounds, value_parser = value_parser!(u32).range(1..=1000))]
    max_rounds: u32,
    /// Leave pages that were written in so many rounds running to the switchover (0: none)
    #[arg(long, value_name = "N", default_value_t = Limits::default().hot_threshold, value_parser = value_parser!(u32).range(..=1000))]
    hot_threshold: u32,
    /// Connections that carry pages [default: one fewer than processors, 1 to 4]
    #[arg(long, value_name = "N", value_parser = value_parser!(u8).range(1..=64))]
    streams: Option<u8>,
}

impl Tuning {
    fn limits(&self) -> Limits {
        Limits {
            downtime_limit_ms: self.downtime_limit,
            timeout_s: self.timeout,
            max_rounds: self.max_rounds,
            hot_threshold: self.hot_threshold,
            streams: self.streams,
            allow_postcopy: self.allow_postcopy,
        }
    }
}

impl Migrate {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let migration = new_migration_id()?;
        let request = MigrationRequest {
            mode: self.mode,
            images: self.tuning.images,
            limits: self.tuning.limits(),
            migration: Some(migration.clone()),
            keep: self.keep,
            dry_run: self.dry_run,
            ..self.to.clone()
        };
        let outcome = self.migrate(&request, &migration).unwrap_or_else(Outcome::Stopped);
        outcome.print(&self.id, &request, &migration, self.json)?;
        Ok(ExitCode::from(outcome.exit_code()))
    }

    fn migrate(&self, request: &MigrationRequest, migration: &MigrationId) -> Result<Outcome, Stopped> {
        let address = self.address_of_containerd();
        let namespace = namespace_or_default(self.namespace.as_deref());
        let source =
            Source::open(&address, &namespace, &self.id).map_err(|error| Stopped::untouched(&error))?;
        let address_file = godwit_api::address_file(&namespace, &self.id);
        let shim = check(&source, &self.id, &address_file)?;
        let interrupted = catch_interrupts().map_err(|error| Stopped::before(error.to_string()))?;

        let asked = ask(&address, &namespace, &self.id, request);
        let progress = Progress::new(self.quiet, self.json);
        let (answer, ended) = follow(&shim, &asked, &interrupted, migration, progress);
        let outcome = match (ended, answer) {
            (Some(Ended::Well { report }), _) => Outcome::Moved(report),
            (Some(Ended::Badly { failure }), _) => {
                Outcome::Failed { failure, cancelled: interrupted.load(Ordering::Relaxed) }
            }
            (None, answer) => self.without_the_shims_word(&source, answer),
        };
        if matches!(outcome, Outcome::Moved(_)) && !self.dry_run {
            await_clean_up(&source, self.keep);
        }
        Ok(outcome)
    }

    /// The shim cannot be asked any more: what containerd said has to do.
    fn without_the_shims_word(&self, source: &Source, answer: Result<(), NodeError>) -> Outcome {
        let state = source.look().map(|(_, state)| state);
        let (fate, cause) = match (answer, state) {
            (Err(error), Ok(TaskState::Running)) => (Some(Fate::RunningOnSource), error.to_string()),
            (Err(error), _) => (Some(Fate::Unknown), error.to_string()),
            (Ok(()), _) if self.dry_run => {
                (Some(Fate::RunningOnSource), "the shim's report is lost: try again".to_owned())
            }
            (Ok(()), _) => (
                Some(Fate::RunningOnTarget),
                "the container has moved, but the shim's report of it is lost".to_owned(),
            ),
        };
        Outcome::Stopped(Stopped {
            fate,
            side: Side::Source,
            phase: Phase::Connecting,
            cause,
            refused: false,
        })
    }

    fn address_of_containerd(&self) -> PathBuf {
        let of_environment = || std::env::var_os("CONTAINERD_ADDRESS").filter(|value| !value.is_empty());
        self.address
            .clone()
            .or_else(|| of_environment().map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from(DEFAULT_ADDRESS))
    }
}

/// Returns containerd's namespace: what was given, or what the environment or containerd's clients take.
pub(super) fn namespace_or_default(given: Option<&str>) -> String {
    let of_environment = || std::env::var("CONTAINERD_NAMESPACE").ok().filter(|value| !value.is_empty());
    given.map(str::to_owned).or_else(of_environment).unwrap_or_else(|| "default".to_owned())
}

/// Finds everything that is in the way without asking the shim, and the shim.
fn check(source: &Source, id: &str, address_file: &Path) -> Result<Shim, Stopped> {
    let (runtime, state) = source.look().map_err(|error| Stopped::untouched(&error))?;
    match state {
        TaskState::Running => {}
        TaskState::Paused => {
            return Err(Stopped::refused(
                Some(Fate::RunningOnSource),
                format!("container `{id}` is paused: resume it first (`ctr tasks resume {id}`)"),
            ));
        }
        TaskState::NotRunning => {
            return Err(Stopped::refused(
                None,
                format!("container `{id}` does not run: only a running container can be moved alive"),
            ));
        }
    }
    Shim::of(address_file).map_err(|cause| {
        Stopped::refused(
            Some(Fate::RunningOnSource),
            format!(
                "container `{id}` is not run by godwit's shim ({cause}); its runtime is `{runtime}`: create it \
                 with `--runtime io.containerd.godwit.v1`, or install godwit's shim in that one's place"
            ),
        )
    })
}

/// Asks containerd for the migration in a thread of its own: the call lasts as long as the migration.
fn ask(
    address: &Path,
    namespace: &str,
    id: &str,
    request: &MigrationRequest,
) -> Receiver<Result<(), NodeError>> {
    let (sender, asked) = mpsc::channel();
    let (address, namespace, id, request) =
        (address.to_owned(), namespace.to_owned(), id.to_owned(), request.clone());
    thread::spawn(move || {
        let answer =
            Source::open(&address, &namespace, &id).and_then(|source| source.request_migration(&request));
        drop(sender.send(answer));
    });
    asked
}

/// Shows progress until the migration has ended; returns containerd's answer, and the shim's word on the end if
/// it could be had.
fn follow(
    shim: &Shim,
    asked: &Receiver<Result<(), NodeError>>,
    interrupted: &AtomicBool,
    migration: &MigrationId,
    mut progress: Progress,
) -> (Result<(), NodeError>, Option<Ended>) {
    let mut cancelled = false;
    loop {
        let answer = asked.recv_timeout(STATUS_INTERVAL);
        if interrupted.load(Ordering::Relaxed) && !cancelled {
            cancelled = true;
            progress.say("cancelling; the container goes on here unless it has moved already");
            if let Err(error) = shim.cancel() {
                log::debug!("cannot cancel: {error}");
            }
        }
        let snapshot = shim.status().ok().flatten().filter(|snapshot| snapshot.migration == *migration);
        if let Some(snapshot) = &snapshot {
            progress.show(snapshot);
        }
        let ended = snapshot.and_then(|snapshot| snapshot.ended);
        match answer {
            Ok(answer) => return (answer, ended),
            // containerd may keep its answer back while it stores an empty checkpoint; the shim's word is enough.
            Err(_) if ended.is_some() => return (Ok(()), ended),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let lost = NodeError::Silent { what: "migrate the container", limit_s: 0 };
                return (Err(lost), ended);
            }
        }
    }
}

/// Waits until the source has been cleaned up, which the shim begins once its report was fetched.
fn await_clean_up(source: &Source, keep: bool) {
    let deadline = Instant::now() + CLEAN_UP_MAX;
    while Instant::now() < deadline {
        if source.is_gone(keep).unwrap_or(false) {
            return;
        }
        thread::sleep(CLEAN_UP_POLL);
    }
    log::warn!("the container has moved, but containerd still has it here: `ctr containers ls`");
}

/// Keeps Ctrl-C and SIGTERM from ending this process; the flag says that one came.
fn catch_interrupts() -> Result<Arc<AtomicBool>, nix::Error> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    let flag = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&flag);
    thread::spawn(move || {
        while signals.wait().is_ok() {
            raised.store(true, Ordering::Relaxed);
        }
    });
    Ok(flag)
}

fn new_migration_id() -> Result<MigrationId> {
    const UUID: &str = "/proc/sys/kernel/random/uuid";
    let uuid = fs::read_to_string(UUID).map_err(CliError::io(UUID))?;
    uuid.trim().to_owned().try_into().map_err(|error: RequestError| CliError::Usage(error.to_string()))
}

/// Ten figures a second are as many as anybody reads.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

const CLEAN_UP_MAX: Duration = Duration::from_secs(15);

const CLEAN_UP_POLL: Duration = Duration::from_millis(20);
