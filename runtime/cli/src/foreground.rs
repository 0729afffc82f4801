//! A process in the foreground: its terminal on ours, our signals to it, its exit code ours.
//!
//! One thread, one poll over: the process (a pidfd), signals (blocked, read from a signalfd), and with a
//! terminal stdin and the terminal's master. Signals are blocked only after the process was started, so that
//! it does not inherit that.

use std::fs::File;
use std::io::{Read, Write, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use godwit_sys::pidfd::PidFd;
use godwit_sys::{fdpass, process, terminal};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::error::{CliError, Result};

/// A socket that waits for a terminal's master; its directory goes with it.
#[derive(Debug)]
pub(crate) struct Console {
    listener: UnixListener,
    directory: PathBuf,
}

impl Console {
    /// Makes the socket in a new directory under `parent`.
    pub(crate) fn listen(parent: &Path) -> Result<Self> {
        let directory = parent.join(format!(".console-{}", std::process::id()));
        let failed = |source| CliError::Io { what: format!("make {}", directory.display()), source };
        std::fs::create_dir_all(&directory).map_err(failed)?;
        let listener = UnixListener::bind(directory.join(SOCKET)).map_err(failed)?;
        Ok(Self { listener, directory })
    }

    /// Where the socket is.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    /// Takes the master from the process that was just started.
    pub(crate) fn receive(self) -> Result<OwnedFd> {
        let (stream, _) = self.listener.accept().map_err(CliError::io("accept the terminal"))?;
        let mut name = [0; 256];
        let mut received = fdpass::receive(&stream, &mut name)?;
        received.fds.pop().ok_or_else(|| CliError::Usage("the process sent no terminal".to_owned()))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            log::warn!("remove {}: {error}", self.directory.display());
        }
    }
}

/// Waits for our child `pid`, forwarding signals; its exit code, 128 + signal when it was killed.
pub(crate) fn wait(pid: i32, master: Option<OwnedFd>) -> Result<u8> {
    let child = PidFd::open(pid)?;
    let signals = block_signals()?;
    let raw = master.as_ref().and_then(|_| RawMode::enter());
    let mut master = master.map(File::from);
    if let Some(master) = &master {
        resize(master);
    }
    let mut input_open = master.is_some();
    loop {
        let ready = poll_once(&child, &signals, master.as_ref(), input_open)?;
        if ready.signal {
            forward(&signals, &child, master.as_ref())?;
        }
        if ready.input {
            input_open = pump(&mut stdin(), master.as_mut());
        }
        if ready.output && !pump_output(master.as_mut()) {
            master = None;
            input_open = false;
        }
        // The rest of the output is read before the end of the process counts.
        if ready.ended && !ready.output {
            drop(raw);
            let code = process::reap(pid, std::time::Duration::ZERO)?.unwrap_or(0);
            return Ok(u8::try_from(code).unwrap_or(u8::MAX));
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Ready {
    ended: bool,
    signal: bool,
    input: bool,
    output: bool,
}

fn poll_once(child: &PidFd, signals: &SignalFd, master: Option<&File>, input_open: bool) -> Result<Ready> {
    let input = stdin();
    let mut fds =
        vec![PollFd::new(child.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    if let Some(master) = master {
        fds.push(PollFd::new(master.as_fd(), PollFlags::POLLIN));
        if input_open {
            fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
    }
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(CliError::io("poll")(errno.into())),
    }
    let is_ready = |index: usize| {
        let events = fds.get(index).and_then(PollFd::revents);
        events.is_some_and(|events| !events.is_empty())
    };
    Ok(Ready { ended: is_ready(0), signal: is_ready(1), output: is_ready(2), input: is_ready(3) })
}

fn block_signals() -> Result<SignalFd> {
    let mut mask = SigSet::all();
    // Faults of our own are ours, and the child's end is seen by its pidfd.
    for own in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGCHLD] {
        mask.remove(own);
    }
    let failed = |errno: Errno| CliError::io("signalfd")(errno.into());
    mask.thread_block().map_err(failed)?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(failed)
}

fn forward(signals: &SignalFd, child: &PidFd, master: Option<&File>) -> Result<()> {
    while let Some(info) = signals.read_signal().map_err(|errno| CliError::io("signalfd")(errno.into()))? {
        let Ok(signal) = i32::try_from(info.ssi_signo) else { continue };
        match master {
            Some(master) if signal == Signal::SIGWINCH as i32 => resize(master),
            // Ours alone: Go programs signal their threads with it, and it means nothing to others.
            _ if signal == Signal::SIGURG as i32 => {}
            _ => match child.send_signal(signal) {
                Ok(()) | Err(godwit_sys::SysError::NoProcess { .. }) => {}
                Err(error) => log::warn!("forward signal {signal}: {error}"),
            },
        }
    }
    Ok(())
}

fn resize(master: &File) {
    // Fails when stdin is no terminal: the child's then keeps its size.
    drop(terminal::copy_window_size(stdin(), master));
}

/// Copies one piece of stdin to the terminal; false at end of file.
fn pump(from: &mut impl Read, to: Option<&mut File>) -> bool {
    let Some(to) = to else { return false };
    let mut buffer = [0; 4096];
    match from.read(&mut buffer) {
        Ok(0) | Err(_) => {
            // End of file for whoever reads the terminal in line mode.
            drop(to.write_all(&[END_OF_TRANSMISSION]));
            false
        }
        Ok(length) => to.write_all(&buffer[..length]).is_ok(),
    }
}

/// Copies one piece of the terminal to stdout; false once every process has closed the terminal (EIO).
fn pump_output(from: Option<&mut File>) -> bool {
    let Some(from) = from else { return false };
    let mut buffer = [0; 4096];
    match from.read(&mut buffer) {
        Ok(0) | Err(_) => false,
        Ok(length) => {
            let mut out = stdout();
            out.write_all(&buffer[..length]).and_then(|()| out.flush()).is_ok()
        }
    }
}

/// Our terminal without line editing and echo, restored on drop.
struct RawMode {
    before: Termios,
}

impl RawMode {
    /// `None` when stdin is no terminal.
    fn enter() -> Option<Self> {
        let before = tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin(), SetArg::TCSADRAIN, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(errno) = tcsetattr(stdin(), SetArg::TCSADRAIN, &self.before) {
            log::debug!("restore the terminal: {errno}");
        }
    }
}

const SOCKET: &str = "tty.sock";
const END_OF_TRANSMISSION: u8 = 4;
