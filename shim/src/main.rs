//! `containerd-shim-godwit-v1`: the process that stands between containerd and a container.
//!
//! ```text
//! containerd ──start──► bootstrap ──spawns──► serve: Task v2, v3 and Migrate (ttrpc) ──► container actors
//!            ──delete─► delete                                                              │
//!            ──-info──► info                              OCI runtime, one process per verb ◄┤
//!                                                         migration worker ◄─────────────────┘
//! ```
//! The shim keeps what must survive containerd's restart: the container's stdio, its exit status, and a
//! migration in progress. It knows nothing of images, snapshots or the network; it does no migration itself.
#![forbid(unsafe_code)]

mod bootstrap;
mod bundle;
mod cgroup;
mod container;
mod delete;
mod error;
mod events;
mod info;
mod options;
mod reaper;
mod runtime;
mod serve;
mod service;
mod stdio;
mod verb;
mod worker;

use std::{env, ffi::OsString, io::Write, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let flags = match containerd_shim::parse(&arguments) {
        Ok(flags) => flags,
        Err(error) => return fail(&error),
    };
    if flags.version {
        let version = concat!("containerd-shim-godwit-v1 ", env!("CARGO_PKG_VERSION"), "\n");
        return std::io::stdout()
            .write_all(version.as_bytes())
            .map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let done = match flags.action.as_str() {
        _ if flags.info => info::info(),
        "start" => bootstrap::start(&flags),
        "delete" => delete::delete(&flags),
        "" if !flags.socket.is_empty() => serve::serve(&flags),
        _ => return fail(&"expected an action, start or delete; this program is run by containerd"),
    };
    done.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

/// containerd shows what a failed action printed.
fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    // There is nobody left to tell.
    writeln!(std::io::stderr(), "containerd-shim-godwit-v1: {error}").ok();
    ExitCode::FAILURE
}
