//! libcontainer's trace: kept for error messages, never shown to a container.
//!
//! libcontainer reports through `tracing`, also from the forked process that becomes the container's init,
//! whose stdout and stderr already are the container's. So nothing is ever printed: errors go to a file in
//! memory that all the processes of a verb share, where [`first_error`] finds the innermost one; in the
//! verb's own process every event also goes to the `log` crate at level debug.

use std::fmt::{Debug, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

static ERRORS: OnceLock<File> = OnceLock::new();

/// Starts to keep libcontainer's trace. Call once, before the first verb, while there is one thread.
pub fn install() {
    let Ok(file) = godwit_sys::memfd::create(c"godwit-trace") else { return };
    if ERRORS.set(file).is_ok() {
        // Fails only when another subscriber is installed, which then has the events.
        drop(tracing::subscriber::set_global_default(Recorder { owner: std::process::id() }));
    }
}

/// The first error reported since [`install`]: the innermost, as each layer reports after the one below.
///
/// Some layers say no more than "syscall" where a later one has the error number: that is added.
pub(crate) fn first_error() -> Option<String> {
    let file = ERRORS.get()?;
    let mut buffer = [0; ERRORS_BYTES_MAX];
    let length = file.read_at(&mut buffer, 0).ok()?;
    cause_in(&String::from_utf8_lossy(&buffer[..length]))
}

fn cause_in(text: &str) -> Option<String> {
    let line = text.lines().next()?.trim();
    let errno = text.split_once("Nix(").and_then(|(_, rest)| rest.split_once(')')).map(|(name, _)| name);
    match errno {
        _ if line.is_empty() => None,
        Some(errno) if !line.contains(errno) => Some(format!("{line}: {errno}")),
        _ => Some(line.to_owned()),
    }
}

#[derive(Debug)]
struct Recorder {
    /// The process of the verb: only it writes to the log.
    owner: u32,
}

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && (*metadata.level() == Level::ERROR || log::max_level() >= log::Level::Debug)
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = line.into_text();
        if let Some(mut file) = ERRORS.get().filter(|_| *event.metadata().level() == Level::ERROR) {
            // Nobody is left to tell when even the error file fails.
            drop(writeln!(file, "{}", text.replace('\n', " ")));
        }
        if std::process::id() == self.owner {
            log::debug!(target: "libcontainer", "{text}");
        }
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// An event as `message: field=value, ..`.
#[derive(Debug, Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn into_text(mut self) -> String {
        if !self.fields.is_empty() {
            self.message.push_str(": ");
            self.message.push_str(&self.fields);
        }
        self.message
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let target = if field.name() == "message" { &mut self.message } else { &mut self.fields };
        let separator = if target.is_empty() { "" } else { ", " };
        // Writing to a String cannot fail.
        let written = if field.name() == "message" {
            write!(target, "{value:?}")
        } else {
            write!(target, "{separator}{}={value:?}", field.name())
        };
        debug_assert!(written.is_ok());
    }
}

const ERRORS_BYTES_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_error_gets_its_number() {
        let text = "failed to mount x: syscall\nfailed to prepare rootfs: err=Mount(Syscall(Nix(ENODEV)))\n";
        assert_eq!(cause_in(text).unwrap(), "failed to mount x: syscall: ENODEV");
        assert_eq!(cause_in("failed: err=Nix(EPERM)\n").unwrap(), "failed: err=Nix(EPERM)");
        assert_eq!(cause_in(""), None);
    }
}
