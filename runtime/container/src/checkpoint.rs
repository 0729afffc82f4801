//! `checkpoint`: a running or paused container into a directory of CRIU images.
//!
//! ```text
//! Dump::prepare --> (CRIU has probed the kernel, no task touched) --> Dump::run(decide)
//!                                                                       |
//!        tasks stopped, images written, `decide` called -- Commit --> tasks killed (or left running)
//!                                                       \- Rollback -> tasks run on
//! ```
//! The two steps let a migration pay for starting CRIU before it freezes anything; [`checkpoint`] is both in
//! one. The directory's layout is runc's: CRIU's images and `descriptors.json`, which names what standard
//! input, output and error were. A checkpoint of runc restores here, and the reverse.
//!
//! A failed or refused dump leaves the container as it was: CRIU releases the tasks, and a container that was
//! paused stays paused. A process that ends during a dump (a crash, SIGKILL) has the same effect, because CRIU
//! takes the closed socket for a refusal.

pub mod descriptors;
pub mod error;
pub(crate) mod external;
pub mod hiding;
pub mod in_flight;
pub mod machine;
pub(crate) mod mountinfo;
pub(crate) mod paths;
pub mod preflight;
pub(crate) mod scratch;
pub(crate) mod shortcuts;
pub(crate) mod tmpfs;
pub mod told;

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

pub use godwit_criu::CgroupsMode;
use godwit_criu::{CriuError, Message, Options, Program, Request, Script, Session};
use godwit_memory::ahead::Ahead;
use godwit_memory::hide::Hidden;
use godwit_sys::netns;
use libcontainer::container::ContainerStatus;

use crate::cgroup;
use crate::state::{Status, Stored};
pub use error::{CheckpointError, Result};
pub use hiding::Hiding;
use shortcuts::Shortcuts;
pub use told::Told;

/// What `checkpoint` takes beside the container.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "these are the flags of the command line")]
pub struct CheckpointOptions {
    /// Directory for the images; made if it does not exist.
    pub image_path: PathBuf,
    /// Directory for logs and scratch files; the image directory without it.
    pub work_path: Option<PathBuf>,
    /// Images of an earlier pre-dump, relative to `image_path`.
    pub parent_path: Option<PathBuf>,
    /// Dump memory only, and let the container run on.
    pub pre_dump: bool,
    /// Let the container run on after the dump.
    pub leave_running: bool,
    /// Dump established TCP connections instead of refusing them.
    pub tcp_established: bool,
    /// Leave out connections that are just being accepted.
    pub tcp_skip_in_flight: bool,
    /// Accept unix sockets whose other end is outside.
    pub external_unix_sockets: bool,
    /// Accept a session and terminal that come from outside.
    pub shell_job: bool,
    /// Dump file locks.
    pub file_locks: bool,
    /// Link unlinked files back into their directories.
    pub link_remap: bool,
    /// Punch pages out of parent images that this dump holds anew.
    pub auto_dedup: bool,
    /// How cgroups are dumped.
    pub cgroups_mode: CgroupsMode,
    /// Let CRIU log only errors and warnings, which is faster.
    pub terse_log: bool,
    /// Leave out what a restore by godwit can do without, which is faster. No other runtime restores the images.
    pub shortcuts: bool,
    /// Memory that CRIU shall not see: all that it restores lazily. It may be filled until [`Dump::run`] is called;
    /// where CRIU cannot be kept from seeing it, CRIU dumps lazily, which leaves out the same ([`Dump::hiding`]).
    pub hidden: Option<Hidden>,
    /// What was read of the mappings while the container ran, for CRIU to be told. It may be read until [`Dump::run`] is
    /// called, whose `decide` is to make sure that it still holds ([`Told::confirm`]).
    pub ahead: Option<Ahead>,
}

impl CheckpointOptions {
    /// The command line's defaults.
    pub fn new(image_path: impl Into<PathBuf>) -> Self {
        Self {
            image_path: image_path.into(),
            work_path: None,
            parent_path: None,
            pre_dump: false,
            leave_running: false,
            tcp_established: false,
            tcp_skip_in_flight: false,
            external_unix_sockets: false,
            shell_job: false,
            file_locks: false,
            link_remap: false,
            auto_dedup: false,
            cgroups_mode: CgroupsMode::Soft,
            terse_log: false,
            shortcuts: false,
            hidden: None,
            ahead: None,
        }
    }

    /// Makes the paths independent of the working directory, which starting CRIU changes.
    fn absolute(&self) -> Result<Self> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(CheckpointError::file(path));
        Ok(Self {
            image_path: absolute(&self.image_path)?,
            work_path: self.work_path.as_deref().map(absolute).transpose()?,
            ..self.clone()
        })
    }

    fn work_path(&self) -> &Path {
        self.work_path.as_deref().unwrap_or(&self.image_path)
    }
}

/// The answer to "everything is ready, shall it happen?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Go on: the dumped tasks end here, the restored ones begin.
    Commit,
    /// Undo: the dumped tasks run on, the restored ones are killed.
    Rollback,
}

/// How a dump ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The images are complete; the tasks are gone unless they were to be left running.
    Committed,
    /// The tasks run as before.
    RolledBack,
}

/// A CRIU that is ready to dump one container.
#[derive(Debug)]
pub struct Dump {
    // Before the filter's supervisor: CRIU's questions are answered until it has ended.
    session: Session,
    filter: hiding::Filter,
    shortcuts: Shortcuts,
    told: Told,
    pid: i32,
    program: Program,
    stored: Stored,
    options: CheckpointOptions,
}

impl Dump {
    /// Starts CRIU, gives it the request and waits until it is about to touch the tasks.
    ///
    /// The container may run on meanwhile, or be frozen between here and [`Dump::run`]. Dropping the value
    /// ends CRIU without a trace in the container.
    ///
    /// # Errors
    /// What is wrong with the container's status, the options, the directories or CRIU itself.
    pub fn prepare(program: &Program, stored: &Stored, options: &CheckpointOptions) -> Result<Self> {
        let status = stored.status()?;
        let (Status::Running | Status::Paused, Some(pid)) = (status, stored.pid()) else {
            return Err(CheckpointError::Status { status });
        };
        let options = &options.absolute()?;
        make_directory(&options.image_path)?;
        make_directory(options.work_path())?;
        check_parent(options)?;
        let shortcuts =
            if options.shortcuts { Shortcuts::find(&stored.spec()?, pid) } else { Shortcuts::default() };
        let used = [options.image_path.as_path(), options.work_path(), stored.rootfs()];
        let (mut session, filter) = hiding::start(options.hidden.as_ref(), |mut setup| {
            if !shortcuts.is_empty() {
                setup.without_breakpoints();
            }
            let start = || scratch::start(program, setup, &used);
            if shortcuts.network { netns::run_in_that_of(pid, start)? } else { start() }
        })?;
        if (options.pre_dump || options.parent_path.is_some()) && !session.features()?.memory_tracking {
            let option = if options.pre_dump { "pre-dump" } else { "parent-path" };
            return Err(CheckpointError::TrackingUnsupported { option });
        }
        let lazily = matches!(filter.hiding(), Hiding::Lazy(_));
        let request = request(stored, pid, options, &shortcuts, lazily)?;
        if !options.pre_dump {
            descriptors::write(&options.image_path, &descriptors::of_process(pid)?)?;
        }
        session.send(request)?;
        match session.next_message()? {
            Message::Notification(notification) if notification.script == Script::PreDump => {
                let told = match session.pid().filter(|_| options.ahead.is_some()) {
                    Some(criu) => Told::prepare(criu, stored)?,
                    None => Told::default(),
                };
                let (program, stored) = (program.clone(), stored.clone());
                Ok(Self { session, filter, shortcuts, told, pid, program, stored, options: options.clone() })
            }
            other => Err(CriuError::Protocol {
                phase: godwit_criu::Phase::Dump,
                detail: format!("{other:?} before pre-dump"),
            }
            .into()),
        }
    }

    /// Pid of the CRIU process.
    pub fn criu_pid(&self) -> Option<i32> {
        self.session.pid()
    }

    /// How the memory of [`CheckpointOptions::hidden`] is kept out of the images.
    pub fn hiding(&self) -> &Hiding {
        self.filter.hiding()
    }

    /// Dumps. `decide` is called while the tasks are stopped and the images are complete, with what CRIU was told of
    /// the tasks.
    ///
    /// # Errors
    /// What CRIU says. The tasks then run as before.
    pub fn run(self, decide: impl FnOnce(&Told) -> Decision) -> Result<Outcome> {
        if self.shortcuts.seal(self.pid, &self.options.image_path)? {
            return self.go_on(decide);
        }
        log::info!("the container has changed since its dump was prepared: criu is started again");
        let Self { session, filter, program, stored, options, .. } = self;
        drop(session);
        drop(filter);
        let options = CheckpointOptions { shortcuts: false, ..options };
        Self::prepare(&program, &stored, &options)?.go_on(decide)
    }

    fn go_on(mut self, decide: impl FnOnce(&Told) -> Decision) -> Result<Outcome> {
        if let Some(ahead) = &self.options.ahead {
            self.told.write(ahead)?;
        }
        let mut decide = Some(decide);
        self.session.answer(true)?;
        loop {
            match self.session.next_message()? {
                Message::Response(_) => break,
                Message::Notification(notification) => {
                    let decision = match decide.take_if(|_| notification.script == Script::PostDump) {
                        Some(decide) => decide(&self.told),
                        None => Decision::Commit,
                    };
                    self.session.answer(decision == Decision::Commit)?;
                    if decision == Decision::Rollback {
                        return self.await_rollback();
                    }
                }
            }
        }
        self.session.finish()?;
        self.filter.stop();
        Ok(Outcome::Committed)
    }

    /// CRIU reports a refused dump as a failed one, once it has released the tasks.
    fn await_rollback(mut self) -> Result<Outcome> {
        loop {
            match self.session.next_message() {
                Ok(Message::Notification(_)) => self.session.answer(true)?,
                Ok(Message::Response(_)) | Err(CriuError::Failed { .. }) => return Ok(Outcome::RolledBack),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Checkpoints a container; unless it is left running it has stopped afterwards and waits for `delete`.
///
/// # Errors
/// As [`Dump::prepare`] and [`Dump::run`]; the container is then as it was.
pub fn checkpoint(stored: &mut Stored, options: &CheckpointOptions) -> Result<()> {
    let program = Program::find()?;
    Dump::prepare(&program, stored, options)?.run(|_| Decision::Commit)?;
    if !options.leave_running && !options.pre_dump {
        stored.set_label(ContainerStatus::Stopped)?;
    }
    Ok(())
}

fn request(
    stored: &Stored,
    pid: i32,
    options: &CheckpointOptions,
    shortcuts: &Shortcuts,
    lazily: bool,
) -> Result<Request> {
    let spec = stored.spec()?;
    let rootfs = path_text(stored.rootfs())?;
    let mut criu = Options::new(&options.image_path, options.work_path(), LOG_NAME)?
        .pid(pid)
        .root(rootfs)
        .leave_running(options.leave_running)
        .tcp_established(options.tcp_established)
        .tcp_skip_in_flight(options.tcp_skip_in_flight)
        .external_unix_sockets(options.external_unix_sockets)
        .shell_job(options.shell_job)
        .file_locks(options.file_locks)
        .link_remap(options.link_remap)
        .auto_dedup(options.auto_dedup)
        .lazy_pages(lazily)
        .terse_log(options.terse_log)
        .cgroups_mode(options.cgroups_mode)
        .empty_namespaces(if shortcuts.network { 0 } else { external::EMPTY_NAMESPACES })
        .orphan_pts_master(true);
    if let Some(parent) = &options.parent_path {
        criu = criu.parent_images(path_text(parent)?).track_memory(true);
    }
    if options.pre_dump {
        criu = criu.track_memory(true);
    }
    if let Some(file) = external::config_file(&spec) {
        criu = criu.config_file(&file);
    }
    for text in external::dumped_namespaces(&spec)? {
        criu = criu.external(text);
    }
    let freezer = cgroup::freezer(stored)?;
    criu = criu.freeze_cgroup(path_text(freezer.directory())?);
    if options.pre_dump {
        return Ok(Request::PreDump(criu));
    }
    for (key, value) in external::dumped_mounts(&spec, stored.rootfs(), pid)? {
        criu = criu.external_mount(&key, &value);
    }
    for tmpfs in &shortcuts.tmpfs {
        criu = criu.external_mount(path_text(&tmpfs.point)?, &tmpfs.key);
    }
    Ok(Request::Dump(criu))
}

/// Makes a directory only root can look into; one that exists is taken as it is.
pub(crate) fn make_directory(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(source) if source.kind() != ErrorKind::AlreadyExists => {
            Err(CheckpointError::Directory { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn check_parent(options: &CheckpointOptions) -> Result<()> {
    let Some(parent) = &options.parent_path else { return Ok(()) };
    if parent.is_absolute() {
        return Err(CheckpointError::ParentPath {
            path: parent.clone(),
            reason: "must be relative to the image path".to_owned(),
        });
    }
    match options.image_path.join(parent).metadata() {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => {
            Err(CheckpointError::ParentPath { path: parent.clone(), reason: "is not a directory".to_owned() })
        }
        Err(error) => Err(CheckpointError::ParentPath { path: parent.clone(), reason: error.to_string() }),
    }
}

/// CRIU's messages hold text, so a path that is none cannot be given to it.
pub(crate) fn path_text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| CheckpointError::NotText { path: path.to_owned() })
}

/// As runc names it.
pub const LOG_NAME: &str = "dump.log";
