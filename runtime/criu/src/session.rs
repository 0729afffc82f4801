//! The process and the conversation with it.
//!
//! ```text
//! start -> Idle --send--> Busy --next_message--> Notification --answer--> Busy
//!                              \--next_message--> Response --finish--> (process reaped)
//! drop in any state: socket closed, time to roll back, then the whole process group is killed and reaped
//! ```
//! CRIU reads its options and probes the kernel only after the request, which takes some 50 ms the first time.
//! So a dump that must be quick is sent early and held at [`Script::PreDump`], where nothing of the tasks has
//! been touched: what follows the answer is the dump alone.
//!
//! Closing the socket is how a dump is abandoned: CRIU takes the missing answer for a refusal and lets the
//! tasks run. That is also what happens when this process is killed.
//!
//! No thread is used and every call blocks.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use godwit_sys::pidfd::PidFd;
use godwit_sys::spawn::SpawnExt;
use godwit_sys::{SysError, fdpass, process};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protobuf::{EnumOrUnknown, Message as _, MessageField};

use crate::failure::{CriuError, HookError, Phase, Result};
use crate::log_tail::LogTail;
use crate::notification::{Notification, Script};
use crate::options::Options;
use crate::program::{Program, Version};
use crate::rpc::{Criu_features, Criu_req, Criu_req_type, Criu_resp};

/// What a new CRIU process gets from us.
#[derive(Default)]
pub struct Setup {
    fds: Vec<OwnedFd>,
    stdin: Option<OwnedFd>,
    directory: Option<PathBuf>,
    adjust: Option<Adjust>,
    without_breakpoints: bool,
    without_page_server: bool,
}

/// See [`Setup::adjust`].
type Adjust = Box<dyn FnOnce(&mut Command) -> std::result::Result<(), HookError>>;

impl std::fmt::Debug for Setup {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { fds, stdin, directory, adjust: _, without_breakpoints, without_page_server } = self;
        let mut text = formatter.debug_struct("Setup");
        text.field("fds", fds)
            .field("stdin", stdin)
            .field("directory", directory)
            .field("without_breakpoints", without_breakpoints)
            .field("without_page_server", without_page_server)
            .finish_non_exhaustive()
    }
}

impl Setup {
    /// A process that inherits nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets CRIU inherit `fd`, under the number that is returned, for [`Options::inherit_fd`].
    pub fn inherit_fd(&mut self, fd: OwnedFd) -> RawFd {
        use std::os::fd::AsRawFd;
        let number = fd.as_raw_fd();
        self.fds.push(fd);
        number
    }

    /// The terminal of a shell job; without it, CRIU's standard input is `/dev/null`.
    pub fn stdin(&mut self, fd: OwnedFd) {
        self.stdin = Some(fd);
    }

    /// Has `adjust` change the command before it is spawned: a filter on its system calls, for instance.
    pub fn adjust(
        &mut self,
        adjust: impl FnOnce(&mut Command) -> std::result::Result<(), HookError> + 'static,
    ) {
        self.adjust = Some(Box::new(adjust));
    }

    /// Has CRIU follow a task's system calls to where it shall stop, instead of setting a breakpoint of the processor
    /// there: the kernel takes some 10 ms for each of those. It is what CRIU does where there are none.
    pub fn without_breakpoints(&mut self) {
        self.without_breakpoints = true;
    }

    /// Spares a lazy dump ([`Options::lazy_pages`]) its page server: who asks for such a dump has the pages by another
    /// way. CRIU would listen for a client, also after a dump that was refused, and let go of the tasks only when one
    /// came and left. It takes a connection in the place of that server, and gets one that has ended.
    pub fn without_page_server(&mut self) {
        self.without_page_server = true;
    }

    /// Where CRIU leaves what it writes to no directory of its request (core dumps).
    pub fn directory(&mut self, path: &Path) {
        self.directory = Some(path.to_owned());
    }
}

/// One thing to ask of CRIU.
#[derive(Debug)]
pub enum Request {
    /// Dump a tree.
    Dump(Options),
    /// Dump a tree's memory and let it run on.
    PreDump(Options),
    /// Restore a tree.
    Restore(Options),
}

/// What CRIU sent.
#[derive(Debug)]
pub enum Message {
    /// A question, to be answered by [`Session::answer`].
    Notification(Notification),
    /// The successful end of the request.
    Response(Response),
}

/// The successful end of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// Host pid of the restored root.
    pub pid: Option<i32>,
}

/// What the kernel and CRIU can do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Soft-dirty tracking, which pre-dump needs.
    pub memory_tracking: bool,
    /// Restore with memory fetched on demand.
    pub lazy_pages: bool,
    /// Pre-dump that is safe against reused pids.
    pub pidfd_store: bool,
}

/// A running CRIU.
#[derive(Debug)]
pub struct Session {
    // Taken when the conversation is over; closing it tells CRIU so.
    socket: Option<OwnedFd>,
    pid: Option<i32>,
    version: Version,
    phase: Phase,
    last: Option<String>,
    log: Option<PathBuf>,
    // CRIU opens them through /proc/PID/fd of this process.
    directories: Vec<File>,
}

impl Session {
    /// Starts CRIU in a process group of its own and asks for its version.
    ///
    /// # Errors
    /// [`CriuError::Spawn`], [`CriuError::TooOld`], [`CriuError::Ended`], [`CriuError::Hook`] for what
    /// [`Setup::adjust`] failed with.
    pub fn start(program: &Program, setup: Setup) -> Result<Self> {
        let socket = |source| CriuError::Socket { phase: Phase::Start, source };
        let (ours, theirs) = fdpass::seqpacket_pair().map_err(socket)?;
        let spawn = |source| CriuError::Spawn { path: program.path().to_owned(), source };
        let mut command = Command::new(program.path());
        if setup.without_page_server {
            // Not over the wire: in a request for a lazy dump CRIU ignores all that is said of a page server.
            let number = command.inherit_fd(ended_connection().map_err(spawn)?);
            command.args(["--ps-socket", &number.to_string()]);
        }
        let number = command.inherit_fd(theirs);
        command
            .args(["swrk", &number.to_string()])
            .stdin(setup.stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        for fd in setup.fds {
            command.inherit_fd(fd);
        }
        if let Some(directory) = setup.directory {
            command.current_dir(directory);
        }
        if setup.without_breakpoints {
            // Of the switches for CRIU's own tests, one of those that only choose another way.
            command.env("CRIU_FAULT", FAULT_NO_BREAKPOINTS);
        }
        if let Some(adjust) = setup.adjust {
            let script = "spawn".to_owned();
            adjust(&mut command).map_err(|source| CriuError::Hook { phase: Phase::Start, script, source })?;
        }
        let child = command.spawn().map_err(spawn)?;
        // The command owns CRIU's end of the socket: while it lives here, CRIU's end would go unnoticed.
        drop(command);
        let mut session = Self::over(ours);
        session.pid = i32::try_from(child.id()).ok();
        session.ask_version()?;
        if session.version < Version::MINIMUM {
            return Err(CriuError::TooOld { path: program.path().to_owned(), version: session.version });
        }
        Ok(session)
    }

    /// A conversation over `socket` with something that is no child of ours, and whose version is not asked.
    pub fn over(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            pid: None,
            version: Version::MINIMUM,
            phase: Phase::Start,
            last: None,
            log: None,
            directories: Vec::new(),
        }
    }

    /// Pid of the CRIU process.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// What CRIU says it is.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Asks what can be done here; the session can be used on.
    ///
    /// CRIU probes the kernel for that, which takes 20 to 60 ms, and where `/run` is in memory leaves what it found in
    /// `/run/criu.kdat`: later requests, of other processes as well, are spared it until the next boot.
    ///
    /// # Errors
    /// [`CriuError::Failed`] when CRIU cannot tell, and the errors of the socket.
    pub fn features(&mut self) -> Result<Features> {
        self.phase = Phase::Features;
        let wanted = Criu_features {
            mem_track: Some(true),
            lazy_pages: Some(true),
            pidfd_store: Some(true),
            ..Default::default()
        };
        self.write(&Criu_req {
            type_: kind(Criu_req_type::FEATURE_CHECK),
            keep_open: Some(true),
            features: MessageField::some(wanted),
            ..Default::default()
        })?;
        let (answer, _) = self.read()?;
        if !answer.success() {
            return Err(self.failed(&answer));
        }
        let found = answer.features.unwrap_or_default();
        Ok(Features {
            memory_tracking: found.mem_track(),
            lazy_pages: found.lazy_pages(),
            pidfd_store: found.pidfd_store(),
        })
    }

    /// Sends the request. A session serves one.
    ///
    /// # Errors
    /// [`CriuError::Socket`].
    pub fn send(&mut self, request: Request) -> Result<()> {
        let (phase, request_kind, options) = match request {
            Request::Dump(options) => (Phase::Dump, Criu_req_type::DUMP, options),
            Request::PreDump(options) => (Phase::PreDump, Criu_req_type::SINGLE_PRE_DUMP, options),
            Request::Restore(options) => (Phase::Restore, Criu_req_type::RESTORE, options),
        };
        let (opts, log, directories) = options.into_parts();
        self.phase = phase;
        self.log = Some(log);
        self.directories.extend(directories);
        log::debug!("criu {phase} request: {opts}");
        self.write(&Criu_req {
            type_: kind(request_kind),
            opts: MessageField::some(opts),
            ..Default::default()
        })
    }

    /// Waits for CRIU's next message.
    ///
    /// # Errors
    /// [`CriuError::Failed`] when CRIU reports failure, [`CriuError::Ended`] when it is gone. By then the tasks
    /// of a failed dump run again and those of a failed restore are dead, but for [`Script::PreResume`].
    pub fn next_message(&mut self) -> Result<Message> {
        let (message, fd) = self.read()?;
        if !message.success() {
            return Err(self.failed(&message));
        }
        match message.type_() {
            Criu_req_type::NOTIFY => {
                let notify = message.notify.into_option().unwrap_or_default();
                let script = Script::from_name(notify.script());
                self.last = Some(script.name().to_owned());
                log::debug!("criu {}: {}", self.phase, script.name());
                Ok(Message::Notification(Notification { script, pid: notify.pid, fd }))
            }
            Criu_req_type::DUMP | Criu_req_type::SINGLE_PRE_DUMP | Criu_req_type::RESTORE => {
                Ok(Message::Response(Response { pid: message.restore.pid }))
            }
            other => Err(CriuError::Protocol { phase: self.phase, detail: format!("{other:?}") }),
        }
    }

    /// Lets CRIU go on after a notification, or makes it give up.
    ///
    /// # Errors
    /// [`CriuError::Ended`], [`CriuError::Socket`].
    pub fn answer(&mut self, accept: bool) -> Result<()> {
        self.write(&Criu_req {
            type_: kind(Criu_req_type::NOTIFY),
            notify_success: Some(accept),
            ..Default::default()
        })
    }

    /// Carries a request that has been sent through to its end, asking `on_notification` at each point.
    ///
    /// # Errors
    /// [`CriuError::Hook`] when the closure failed: CRIU was refused and has rolled back, or at
    /// [`Script::PreResume`], where the closure has to kill the tasks, it was killed. Otherwise as
    /// [`Session::next_message`].
    pub fn run(
        &mut self,
        mut on_notification: impl FnMut(Notification) -> std::result::Result<(), HookError>,
    ) -> Result<Response> {
        loop {
            match self.next_message()? {
                Message::Response(response) => return Ok(response),
                Message::Notification(notification) => {
                    let script = notification.script.clone();
                    let Err(source) = on_notification(notification) else {
                        self.answer(true)?;
                        continue;
                    };
                    let phase = self.phase;
                    let failure = CriuError::Hook { phase, script: script.name().to_owned(), source };
                    if script == Script::PreResume {
                        self.kill();
                    } else {
                        self.await_refusal();
                    }
                    return Err(failure);
                }
            }
        }
    }

    /// Refuses, and waits until CRIU has released or killed the tasks; its answer adds nothing to the cause.
    fn await_refusal(&mut self) {
        while self.answer(false).is_ok() {
            if !matches!(self.next_message(), Ok(Message::Notification(_))) {
                break;
            }
        }
    }

    /// Kills CRIU with its helpers, which lets go of tasks it still holds: they run on unless they are dead.
    ///
    /// At [`Script::PreResume`] there is no other way to abandon a restore. CRIU takes no refusal there, and
    /// when it finds the tasks dead it waits for the first of them, which in a PID namespace waits for the
    /// others, which wait for CRIU to notice their end.
    fn kill(&mut self) {
        self.socket = None;
        let Some(pid) = self.pid.take() else { return };
        if let Err(error) = process::kill_group(pid) {
            log::warn!("failed to kill criu {pid}: {error}");
        }
        process::reap(pid, FINISH_LIMIT).ok();
    }

    /// Ends the session after a response and waits for the process.
    ///
    /// # Errors
    /// [`CriuError::Ended`] when the process failed after all.
    pub fn finish(mut self) -> Result<()> {
        self.socket = None;
        let Some(pid) = self.pid.take() else { return Ok(()) };
        let reaped = process::reap(pid, FINISH_LIMIT);
        match reaped.map_err(|source| CriuError::Socket { phase: self.phase, source })? {
            Some(0) => Ok(()),
            // Without a request, the closed socket is a failure to CRIU.
            Some(_) if matches!(self.phase, Phase::Start | Phase::Features) => Ok(()),
            Some(_) => Err(self.ended()),
            None => {
                // Only this process: after a restore its group may hold tasks that were restored into it.
                log::warn!("criu {pid} does not end, killing it");
                self.pid = Some(pid);
                if let Ok(process) = PidFd::open(pid) {
                    process.send_signal(SIGKILL).ok();
                }
                process::reap(pid, FINISH_LIMIT).ok();
                self.pid = None;
                Ok(())
            }
        }
    }

    fn ask_version(&mut self) -> Result<()> {
        self.write(&Criu_req {
            type_: kind(Criu_req_type::VERSION),
            keep_open: Some(true),
            ..Default::default()
        })?;
        let (answer, _) = self.read()?;
        let Some(version) = answer.version.into_option() else {
            return Err(CriuError::Protocol { phase: self.phase, detail: "no version".to_owned() });
        };
        let number = |field: i32| u32::try_from(field).unwrap_or(0);
        self.version = Version {
            major: number(version.major_number()),
            minor: number(version.minor_number()),
            sublevel: number(version.sublevel()),
        };
        Ok(())
    }

    fn write(&self, message: &Criu_req) -> Result<()> {
        let phase = self.phase;
        let bytes = message
            .write_to_bytes()
            .map_err(|error| CriuError::Protocol { phase, detail: error.to_string() })?;
        let Some(socket) = &self.socket else { return Err(self.ended()) };
        match fdpass::send(socket, &bytes, &[]) {
            Ok(_) => Ok(()),
            Err(SysError::Closed) => Err(self.ended()),
            Err(source) => Err(CriuError::Socket { phase, source }),
        }
    }

    fn read(&self) -> Result<(Criu_resp, Option<OwnedFd>)> {
        let phase = self.phase;
        let Some(socket) = &self.socket else { return Err(self.ended()) };
        if self.died_silently(socket) {
            return Err(self.ended());
        }
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        match fdpass::receive(socket, &mut buffer) {
            Ok(received) => {
                let message = Criu_resp::parse_from_bytes(&buffer[..received.length_bytes])
                    .map_err(|error| CriuError::Protocol { phase, detail: error.to_string() })?;
                Ok((message, received.fds.into_iter().next()))
            }
            Err(SysError::Closed) => Err(self.ended()),
            Err(source) => Err(CriuError::Socket { phase, source }),
        }
    }

    /// Waits until CRIU has said something or is dead, and tells whether it died without a word.
    ///
    /// The end of the socket would not tell: a helper that CRIU forked, to try out the kernel for one, has the
    /// other end as well, and outlives a CRIU that was killed.
    fn died_silently(&self, socket: &OwnedFd) -> bool {
        let Some(criu) = self.pid.and_then(|pid| PidFd::open(pid).ok()) else { return false };
        let wanted = PollFlags::POLLIN;
        let mut polled = [PollFd::new(socket.as_fd(), wanted), PollFd::new(criu.as_fd(), wanted)];
        while matches!(poll(&mut polled, PollTimeout::NONE), Err(Errno::EINTR)) {}
        let [has_spoken, is_dead] = polled.map(|fd| fd.any().unwrap_or(false));
        // What it said before it died is still there to be read.
        is_dead && !has_spoken
    }

    fn failed(&self, message: &Criu_resp) -> CriuError {
        CriuError::Failed {
            phase: self.phase,
            cr_errno: message.cr_errno(),
            after: self.last.clone(),
            log: self.log_tail(),
        }
    }

    fn ended(&self) -> CriuError {
        CriuError::Ended { phase: self.phase, after: self.last.clone(), log: self.log_tail() }
    }

    fn log_tail(&self) -> LogTail {
        self.log.as_deref().map_or_else(LogTail::default, LogTail::read)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.socket = None;
        let Some(pid) = self.pid.take() else { return };
        let ended = matches!(process::reap(pid, ROLLBACK_LIMIT), Ok(Some(_)));
        // Also when the leader has ended: helpers it forked (criu's cgroup daemon) may be left, and they
        // ignore SIGTERM.
        if let Err(error) = process::kill_group(pid) {
            log::warn!("failed to kill what criu {pid} left behind: {error}");
        }
        if !ended {
            log::warn!("criu {pid} did not roll back within {} s", ROLLBACK_LIMIT.as_secs());
            process::reap(pid, FINISH_LIMIT).ok();
        }
    }
}

/// Returns a connection whose other end is closed.
fn ended_connection() -> std::io::Result<OwnedFd> {
    let (connection, _) = UnixStream::pair()?;
    Ok(connection.into())
}

fn kind(request: Criu_req_type) -> Option<EnumOrUnknown<Criu_req_type>> {
    Some(EnumOrUnknown::new(request))
}

/// `FI_NO_BREAKPOINTS` in CRIU's `criu/include/fault-injection.h`.
const FAULT_NO_BREAKPOINTS: &str = "130";
/// CRIU's own limit for a message is 1 MiB on its side; its answers are a few hundred bytes.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Time for CRIU to take its hands off the tasks once nobody talks to it any more.
const ROLLBACK_LIMIT: Duration = Duration::from_secs(10);
/// Time for CRIU to exit after its response.
const FINISH_LIMIT: Duration = Duration::from_secs(10);
const SIGKILL: i32 = 9;

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
