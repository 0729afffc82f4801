//! What in a running container cannot be checkpointed, found before anything is stopped.
//!
//! CRIU finds the same things, but only while the container stands still, one at a time, and in words that
//! name its source files. The list is a snapshot: a process may open something right afterwards, and the dump
//! then fails as it would have without this.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use godwit_criu::Version;
use nix::unistd::{Gid, Uid};
use serde::Serialize;

use super::error::Result;
use super::{machine, mountinfo};
use crate::cgroup;
use crate::state::Stored;

/// One thing that stands in the way, and what to do about it (its text).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Blocker {
    /// A descriptor whose state the kernel shows to nobody.
    KernelObject {
        /// The process, as the host counts.
        pid: i32,
        /// Its descriptor.
        fd: i32,
        /// The kernel's name for the object, for example `[io_uring]`.
        what: String,
    },
    /// An SCTP socket.
    Sctp {
        /// The process.
        pid: i32,
        /// Its descriptor.
        fd: i32,
    },
    /// An IP socket, with a CRIU that is too old for the kernel.
    IpSocket {
        /// The process.
        pid: i32,
        /// Its descriptor.
        fd: i32,
        /// Why, and what to do.
        reason: String,
    },
    /// An open file that is not among the container's mounts.
    HostFile {
        /// The process.
        pid: i32,
        /// Its descriptor.
        fd: i32,
        /// The file on the host.
        path: PathBuf,
    },
    /// A terminal of the host.
    HostTerminal {
        /// The process.
        pid: i32,
        /// Its descriptor.
        fd: i32,
        /// The terminal.
        path: PathBuf,
    },
    /// A process whose limits CRIU may not read.
    OtherUser {
        /// The process.
        pid: i32,
        /// Its user.
        uid: u32,
    },
    /// A process in a PID or user namespace that is not the container's.
    NestedNamespace {
        /// The process.
        pid: i32,
        /// `pid` or `user`.
        namespace: &'static str,
    },
    /// A process that is stopped, where cgroups are of version 1: CRIU waits for it for ever once it is frozen.
    Stopped {
        /// The process.
        pid: i32,
    },
    /// A process that entered by `exec`: it is not part of init's tree and ends with it.
    Visitor {
        /// The process.
        pid: i32,
        /// Its name.
        name: String,
    },
}

impl Blocker {
    /// Whether a checkpoint would fail; otherwise something is only left behind.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Self::Visitor { .. })
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KernelObject { pid, fd, what } => write!(
                out,
                "process {pid} holds {what} (descriptor {fd}), which cannot be saved; configure the program to \
                 do without, or stop it"
            ),
            Self::Sctp { pid, fd } => write!(
                out,
                "process {pid} has an SCTP socket (descriptor {fd}), which cannot be saved; close it or use TCP"
            ),
            Self::IpSocket { pid, fd, reason } => {
                write!(out, "process {pid} has an IP socket (descriptor {fd}): {reason}")
            }
            Self::HostFile { pid, fd, path } => write!(
                out,
                "process {pid} has {} of the host open (descriptor {fd}), outside the container's mounts; give \
                 the container a pipe or a terminal instead of a file, or bind mount the file",
                path.display()
            ),
            Self::HostTerminal { pid, fd, path } => write!(
                out,
                "process {pid} is on terminal {} of the host (descriptor {fd}); run the container detached or \
                 with a terminal of its own",
                path.display()
            ),
            Self::OtherUser { pid, uid } => write!(
                out,
                "process {pid} belongs to user {uid} and CAP_SYS_RESOURCE is missing here, so its limits cannot \
                 be read; run the container in a user namespace, or godwit with that capability"
            ),
            Self::NestedNamespace { pid, namespace } => write!(
                out,
                "process {pid} is in a {namespace} namespace inside the container's, which cannot be saved; \
                 stop what made it (a container in the container, a sandbox)"
            ),
            Self::Stopped { pid } => write!(
                out,
                "process {pid} is stopped, and criu waits for ever for such a process under the freezer of cgroup \
                 version 1; let it go on (kill -CONT {pid}) or end it first"
            ),
            Self::Visitor { pid, name } => {
                write!(out, "process {pid} ({name}) came by exec and would not come along; let it end first")
            }
        }
    }
}

/// Everything about the container that stands in the way of a checkpoint with this version of CRIU.
///
/// # Errors
/// When the container's cgroup or its init cannot be looked at; a process that ends meanwhile is no error.
pub fn blockers(stored: &Stored, criu: Version) -> Result<Vec<Blocker>> {
    let Some(init) = stored.pid() else { return Ok(Vec::new()) };
    let pids = cgroup::processes(stored)?;
    let family = descendants(init, &pids);
    let context = Context {
        init,
        limits_hidden: !machine::has_sys_resource(),
        ip_trouble: machine::tcp_trouble(criu),
        own_user_namespace: namespace("self", "user"),
        sockets: RefCell::default(),
    };
    let mut found = stopped(&pids)?;
    for pid in pids {
        if family.contains(&pid) {
            context.look_at(pid, &mut found);
        } else {
            // One without a name has ended since it was listed; its parent may be in the family all the same.
            let name = name(pid);
            if !name.is_empty() {
                found.push(Blocker::Visitor { pid, name });
            }
        }
    }
    Ok(found)
}

/// Those of a container's processes that CRIU would wait for for ever, because they are stopped. Who freezes asks again:
/// what was found before the memory was copied is old.
///
/// # Errors
/// When the version of cgroups cannot be told.
pub fn stopped(pids: &[i32]) -> Result<Vec<Blocker>> {
    let hangs = !cgroup::is_unified()?;
    let stopped = pids.iter().filter(|pid| hangs && is_stopped(**pid));
    Ok(stopped.map(|pid| Blocker::Stopped { pid: *pid }).collect())
}

struct Context {
    init: i32,
    limits_hidden: bool,
    ip_trouble: Option<String>,
    own_user_namespace: Option<PathBuf>,
    /// By network namespace: a busy server's table of connections takes a second to read.
    sockets: RefCell<HashMap<Option<PathBuf>, Rc<Sockets>>>,
}

impl Context {
    fn look_at(&self, pid: i32, found: &mut Vec<Blocker>) {
        let init = self.init.to_string();
        let process = pid.to_string();
        for kind in ["pid", "user"] {
            let own = namespace(&process, kind);
            if own.is_some() && own != namespace(&init, kind) {
                found.push(Blocker::NestedNamespace { pid, namespace: kind });
            }
        }
        if self.limits_hidden
            && namespace(&process, "user") == self.own_user_namespace
            && let Some(uid) = foreign_user(pid)
        {
            found.push(Blocker::OtherUser { pid, uid });
        }
        self.look_at_files(pid, found);
    }

    fn look_at_files(&self, pid: i32, found: &mut Vec<Blocker>) {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
        let mounts: HashSet<u64> =
            mountinfo::read(&pid.to_string()).unwrap_or_default().iter().map(|mount| mount.id).collect();
        if mounts.is_empty() {
            // It has ended meanwhile, and its files are nobody's.
            return;
        }
        let sockets = self.sockets_of(pid);
        for entry in entries.filter_map(std::result::Result::ok) {
            let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let text = target.to_string_lossy();
            if let Some(what) = text.strip_prefix("anon_inode:") {
                if !KNOWN_OBJECTS.contains(&what) {
                    found.push(Blocker::KernelObject { pid, fd, what: what.to_owned() });
                }
            } else if let Some(inode) = text.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'))
            {
                if sockets.sctp.contains(inode) {
                    found.push(Blocker::Sctp { pid, fd });
                } else if let Some(reason) = self.ip_trouble.as_ref().filter(|_| sockets.ip.contains(inode)) {
                    found.push(Blocker::IpSocket { pid, fd, reason: reason.clone() });
                }
            } else if target.is_absolute()
                && !UNMOUNTED.iter().any(|name| text.starts_with(name))
                && mount_id(pid, fd).is_some_and(|id| !mounts.contains(&id))
            {
                let path = target.clone();
                found.push(if is_terminal(&target) {
                    Blocker::HostTerminal { pid, fd, path }
                } else {
                    Blocker::HostFile { pid, fd, path }
                });
            }
        }
    }

    fn sockets_of(&self, pid: i32) -> Rc<Sockets> {
        let mut known = self.sockets.borrow_mut();
        let found = known.entry(namespace(&pid.to_string(), "net"));
        Rc::clone(found.or_insert_with(|| Rc::new(Sockets::of(pid, self.ip_trouble.is_some()))))
    }
}

/// Whether a signal or a tracer holds the process.
fn is_stopped(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_some_and(|state| state.trim_start().starts_with(['T', 't']))
}

/// Inodes of the sockets in a process's network namespace, as text.
#[derive(Debug, Default)]
struct Sockets {
    sctp: HashSet<String>,
    ip: HashSet<String>,
}

impl Sockets {
    /// Lists them; those of IP only if they matter.
    fn of(pid: i32, ip_matters: bool) -> Self {
        let column = |names: &[&str], index: usize| {
            let mut inodes = HashSet::new();
            for name in names {
                let text = fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
                let fields = text.lines().skip(1).map(|line| line.split_whitespace().nth(index));
                inodes.extend(fields.flatten().map(str::to_owned));
            }
            inodes
        };
        // Columns by the kernel's net/sctp/proc.c and net/ipv4/{tcp,udp,raw}.c.
        let mut sctp = column(&["sctp/eps"], 7);
        sctp.extend(column(&["sctp/assocs"], 10));
        let ip: &[&str] = if ip_matters { &IP_TABLES } else { &[] };
        Self { sctp, ip: column(ip, 9) }
    }
}

/// Those of `pids` whose ancestors lead to `init`, and `init`.
fn descendants(init: i32, pids: &[i32]) -> HashSet<i32> {
    let mut family = HashSet::from([init]);
    // Pids wrap, so a child may come before its parent: repeat until nothing is added.
    loop {
        let before = family.len();
        for pid in pids {
            if status_field(*pid, "PPid:").first().is_some_and(|parent| family.contains(parent)) {
                family.insert(*pid);
            }
        }
        if family.len() == before {
            return family;
        }
    }
}

/// The user of a process whose users or groups are not all ours: then the kernel hides its limits.
fn foreign_user(pid: i32) -> Option<u32> {
    let own_uid = i64::from(Uid::effective().as_raw());
    let own_gid = i64::from(Gid::effective().as_raw());
    let uids = status_field(pid, "Uid:");
    let gids = status_field(pid, "Gid:");
    // Real, effective and saved; the fourth is the file system's.
    let differs = |ids: &[i32], own: i64| ids.iter().take(3).any(|id| i64::from(*id) != own);
    let foreign = differs(&uids, own_uid) || differs(&gids, own_gid);
    uids.first().filter(|_| foreign).and_then(|uid| u32::try_from(*uid).ok())
}

fn status_field(pid: i32, field: &str) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

fn name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn namespace(pid: &str, kind: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

fn mount_id(pid: i32, fd: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok())
}

fn is_terminal(path: &Path) -> bool {
    path.starts_with("/dev/pts") || path.to_string_lossy().starts_with("/dev/tty")
}

/// The tables of IP sockets below `/proc/PID/net`.
const IP_TABLES: [&str; 8] = ["tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6", "icmp"];
/// What CRIU saves (its `criu/files-ext.c` and the modules that register with it).
const KNOWN_OBJECTS: [&str; 9] = [
    "[eventfd]",
    "[eventpoll]",
    "[fanotify]",
    "[pidfd]",
    "[signalfd]",
    "[timerfd]",
    "bpf-map",
    "inotify",
    "[inotify]",
];
/// Files on mounts of the kernel's own: shared memory, which CRIU saves.
const UNMOUNTED: [&str; 5] = ["/memfd:", "/dev/zero", "/SYSV", "/anon_hugepage", "/dev/shm/"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_says_what_to_do() {
        let blockers = [
            Blocker::KernelObject { pid: 7, fd: 3, what: "[io_uring]".to_owned() },
            Blocker::HostFile { pid: 7, fd: 1, path: "/var/log/x".into() },
            Blocker::OtherUser { pid: 7, uid: 33 },
            Blocker::Visitor { pid: 7, name: "sh".to_owned() },
        ];
        let texts = blockers.each_ref().map(ToString::to_string);
        assert!(texts[0].contains("[io_uring]") && texts[0].contains("configure"));
        assert!(texts[1].contains("/var/log/x") && texts[1].contains("pipe"));
        assert!(texts[2].contains("user namespace"));
        assert_eq!(blockers.each_ref().map(Blocker::is_fatal), [true, true, true, false]);
    }

    #[test]
    fn a_child_is_of_the_family_and_a_stranger_is_not() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(descendants(own, &[pid, 1]), HashSet::from([own, pid]));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn own_files_of_this_process_are_told_apart() {
        let own = i32::try_from(std::process::id()).unwrap();
        let context = Context {
            init: own,
            limits_hidden: false,
            ip_trouble: Some("old".to_owned()),
            own_user_namespace: None,
            sockets: RefCell::default(),
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut found = Vec::new();
        context.look_at_files(own, &mut found);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
        assert!(found.contains(&Blocker::IpSocket { pid: own, fd, reason: "old".to_owned() }), "{found:?}");
    }
}
