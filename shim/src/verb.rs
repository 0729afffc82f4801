//! The verbs of an OCI runtime and how they are spelled on its command line.
//!
//! The spelling is that of runc, as containerd's own shim uses it, so the shim works with any runtime that
//! works there.

use std::{ffi::OsString, path::PathBuf};

/// A verb and its operands; the container's id comes last and is not part of it.
#[derive(Debug)]
pub(crate) enum Verb {
    /// Makes the container, up to its init waiting to be started.
    Create(Create),
    /// Lets the init go.
    Start,
    /// Sends a signal to the init, or to all.
    Kill {
        /// Its number.
        signal: u32,
        /// Whether every process of the container gets it.
        all: bool,
    },
    /// Removes what is left of the container.
    Delete {
        /// Whether processes that still run are killed.
        force: bool,
    },
    /// Starts one more process.
    Exec {
        /// File with the process as JSON.
        process: PathBuf,
        /// Where its pid goes.
        pid_file: PathBuf,
        /// Where the master of its terminal goes.
        console: Option<PathBuf>,
    },
    /// Freezes the container.
    Pause,
    /// Thaws it.
    Resume,
    /// Changes its limits.
    Update {
        /// OCI `LinuxResources` as JSON.
        resources: Vec<u8>,
    },
    /// Lists its processes as a JSON array.
    Ps,
    /// Writes an image of it.
    Checkpoint(Checkpoint),
    /// Makes it from an image.
    Restore(Restore),
}

/// Operands of `create`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Create {
    pub(crate) bundle: PathBuf,
    pub(crate) pid_file: PathBuf,
    pub(crate) console: Option<PathBuf>,
    pub(crate) no_pivot: bool,
    pub(crate) no_new_keyring: bool,
}

/// Operands of `checkpoint`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) image: PathBuf,
    pub(crate) work: PathBuf,
    pub(crate) parent: Option<PathBuf>,
    pub(crate) leave_running: bool,
    pub(crate) open_tcp: bool,
    pub(crate) external_unix_sockets: bool,
    pub(crate) terminal: bool,
    pub(crate) file_locks: bool,
    pub(crate) empty_namespaces: Vec<String>,
    pub(crate) cgroups_mode: String,
}

/// Operands of `restore`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Restore {
    pub(crate) image: PathBuf,
    pub(crate) work: PathBuf,
    pub(crate) parent: Option<PathBuf>,
    pub(crate) bundle: PathBuf,
    pub(crate) pid_file: PathBuf,
    pub(crate) console: Option<PathBuf>,
    pub(crate) no_pivot: bool,
}

impl Verb {
    /// Returns the verb as the runtime spells it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Start => "start",
            Self::Kill { .. } => "kill",
            Self::Delete { .. } => "delete",
            Self::Exec { .. } => "exec",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Update { .. } => "update",
            Self::Ps => "ps",
            Self::Checkpoint(_) => "checkpoint",
            Self::Restore(_) => "restore",
        }
    }

    /// Returns the command line from the verb to the container's `id`.
    pub(crate) fn arguments(&self, id: &str) -> Vec<OsString> {
        let mut line = Line(vec![self.name().into()]);
        match self {
            Self::Create(create) => {
                line.with("--bundle", &create.bundle).with("--pid-file", &create.pid_file);
                line.maybe("--console-socket", create.console.as_ref());
                line.when(create.no_pivot, "--no-pivot").when(create.no_new_keyring, "--no-new-keyring");
            }
            Self::Kill { all, .. } => {
                line.when(*all, "--all");
            }
            Self::Delete { force } => {
                line.when(*force, "--force");
            }
            Self::Exec { process, pid_file, console } => {
                line.with("--process", process).maybe("--console-socket", console.as_ref());
                line.when(true, "--detach").with("--pid-file", pid_file);
            }
            Self::Update { .. } => {
                line.with("--resources", "-");
            }
            Self::Ps => {
                line.with("--format", "json");
            }
            Self::Checkpoint(checkpoint) => line.checkpoint(checkpoint),
            Self::Restore(restore) => line.restore(restore),
            Self::Start | Self::Pause | Self::Resume => {}
        }
        line.0.push(id.into());
        if let Self::Kill { signal, .. } = self {
            line.0.push(signal.to_string().into());
        }
        line.0
    }
}

struct Line(Vec<OsString>);

impl Line {
    fn with(&mut self, flag: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.extend([flag.into(), value.into()]);
        self
    }

    fn maybe(&mut self, flag: &str, value: Option<impl Into<OsString>>) -> &mut Self {
        if let Some(value) = value {
            self.with(flag, value);
        }
        self
    }

    fn when(&mut self, on: bool, flag: &str) -> &mut Self {
        if on {
            self.0.push(flag.into());
        }
        self
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.with("--image-path", &checkpoint.image).with("--work-path", &checkpoint.work);
        self.maybe("--parent-path", checkpoint.parent.as_ref());
        self.when(checkpoint.open_tcp, "--tcp-established")
            .when(checkpoint.external_unix_sockets, "--ext-unix-sk")
            .when(checkpoint.terminal, "--shell-job")
            .when(checkpoint.file_locks, "--file-locks");
        if !checkpoint.cgroups_mode.is_empty() {
            self.with("--manage-cgroups-mode", &checkpoint.cgroups_mode);
        }
        for namespace in &checkpoint.empty_namespaces {
            self.with("--empty-ns", namespace);
        }
        self.when(checkpoint.leave_running, "--leave-running");
    }

    fn restore(&mut self, restore: &Restore) {
        self.with("--image-path", &restore.image).with("--work-path", &restore.work);
        self.maybe("--parent-path", restore.parent.as_ref());
        self.when(true, "--detach").with("--pid-file", &restore.pid_file);
        self.maybe("--console-socket", restore.console.as_ref());
        self.when(restore.no_pivot, "--no-pivot");
        // The shim is the subreaper, so that the restored init becomes its child.
        self.when(true, "--no-subreaper").with("--bundle", &restore.bundle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(verb: &Verb) -> String {
        let words = verb.arguments("web");
        words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn verbs_are_spelled_as_runc_spells_them() {
        let create = Create {
            bundle: "/b".into(),
            pid_file: "/b/init.pid".into(),
            console: Some("/c.sock".into()),
            no_pivot: true,
            no_new_keyring: true,
        };
        assert_eq!(
            line(&Verb::Create(create)),
            "create --bundle /b --pid-file /b/init.pid --console-socket /c.sock --no-pivot --no-new-keyring web"
        );
        assert_eq!(line(&Verb::Kill { signal: 9, all: true }), "kill --all web 9");
        assert_eq!(line(&Verb::Delete { force: true }), "delete --force web");
        assert_eq!(line(&Verb::Update { resources: vec![] }), "update --resources - web");
        assert_eq!(line(&Verb::Ps), "ps --format json web");
        let exec = Verb::Exec { process: "/p.json".into(), pid_file: "/e.pid".into(), console: None };
        assert_eq!(line(&exec), "exec --process /p.json --detach --pid-file /e.pid web");
    }

    #[test]
    fn every_checkpoint_option_reaches_the_runtime() {
        let checkpoint = Checkpoint {
            image: "/i".into(),
            work: "/w".into(),
            parent: Some("../p".into()),
            leave_running: true,
            open_tcp: true,
            external_unix_sockets: true,
            terminal: true,
            file_locks: true,
            empty_namespaces: vec!["network".into()],
            cgroups_mode: "soft".into(),
        };
        assert_eq!(
            line(&Verb::Checkpoint(checkpoint)),
            "checkpoint --image-path /i --work-path /w --parent-path ../p --tcp-established --ext-unix-sk \
             --shell-job --file-locks --manage-cgroups-mode soft --empty-ns network --leave-running web"
        );
    }
}
