//! What a dump or restore request carries.
//!
//! CRIU takes directories and descriptors by number in two different tables: `images_dir_fd` and `work_dir_fd`
//! are looked up through `/proc` in the process that holds our end of the socket, `inherit_fd` is a number in
//! CRIU itself ([`crate::Setup::inherit_fd`]). [`Options`] owns the first kind, so that they stay open as long
//! as the request.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use crate::failure::{CriuError, Result};
use crate::rpc;

/// How cgroups and their properties are treated (`--manage-cgroups`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupsMode {
    /// Do not touch cgroups.
    Ignore,
    /// Restore tasks into existing cgroups, no properties.
    None,
    /// Restore properties only of cgroups that exist.
    Props,
    /// Restore properties only of cgroups that CRIU creates.
    Soft,
    /// Restore every cgroup and property.
    Full,
    /// As full, and fail if a cgroup exists.
    Strict,
}

/// How connections are kept silent while their owner is stopped (`--network-lock`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkLock {
    /// iptables rules.
    Iptables,
    /// nftables rules.
    Nftables,
    /// Not at all.
    Skip,
}

/// Options of one request.
///
/// Setters do what their name says in CRIU's `rpc.proto`; those not obvious are explained.
#[derive(Debug)]
pub struct Options {
    message: rpc::Criu_opts,
    log_path: PathBuf,
    directories: [File; 2],
}

impl Options {
    /// Opens the directory for images and the one for everything else (logs, sockets, scratch mounts).
    ///
    /// Both have to exist. With a private mount namespace, this has to be called inside it.
    ///
    /// # Errors
    /// [`CriuError::Directory`].
    pub fn new(images: &Path, work: &Path, log_name: &str) -> Result<Self> {
        let open = |path: &Path| {
            let wrong = |source| CriuError::Directory { path: path.to_owned(), source };
            let file = File::open(path).map_err(wrong)?;
            if file.metadata().map_err(wrong)?.is_dir() {
                Ok(file)
            } else {
                Err(wrong(std::io::ErrorKind::NotADirectory.into()))
            }
        };
        let directories = [open(images)?, open(work)?];
        let message = rpc::Criu_opts {
            images_dir_fd: Some(directories[0].as_raw_fd()),
            work_dir_fd: Some(directories[1].as_raw_fd()),
            log_file: Some(log_name.to_owned()),
            log_level: Some(LOG_LEVEL),
            notify_scripts: Some(true),
            ..Default::default()
        };
        Ok(Self { message, log_path: work.join(log_name), directories })
    }

    /// Lets CRIU log errors and warnings only. It makes a system call for every line, some two thousand for a small
    /// container, and some for each mapping.
    #[must_use]
    pub fn terse_log(mut self, on: bool) -> Self {
        self.message.log_level = Some(if on { LOG_LEVEL_TERSE } else { LOG_LEVEL });
        self
    }

    /// Where CRIU will write its log.
    pub fn log_path(&self) -> &Path {
        &self.log_path
    }

    /// Host pid of the tree's root.
    #[must_use]
    pub fn pid(mut self, pid: i32) -> Self {
        self.message.pid = Some(pid);
        self
    }

    /// Root of the mount tree; on restore it has to be a mount point.
    #[must_use]
    pub fn root(mut self, root: &str) -> Self {
        self.message.root = Some(root.to_owned());
        self
    }

    /// Lets the tasks run on after the dump.
    #[must_use]
    pub fn leave_running(mut self, on: bool) -> Self {
        self.message.leave_running = Some(on);
        self
    }

    /// A mount that comes from outside: on dump `key` is its mount point and `value` the name to remember it
    /// by, on restore `key` is that name and `value` what to bind there.
    #[must_use]
    pub fn external_mount(mut self, key: &str, value: &str) -> Self {
        self.message.ext_mnt.push(rpc::Ext_mount_map {
            key: Some(key.to_owned()),
            val: Some(value.to_owned()),
            ..Default::default()
        });
        self
    }

    /// A resource from outside, for example `net[INODE]:extRootNetNS`.
    #[must_use]
    pub fn external(mut self, text: String) -> Self {
        self.message.external.push(text);
        self
    }

    /// Gives CRIU's descriptor `number` to whatever was dumped under `key`.
    #[must_use]
    pub fn inherit_fd(mut self, key: &str, number: RawFd) -> Self {
        self.message.inherit_fd.push(rpc::Inherit_fd {
            key: Some(key.to_owned()),
            fd: Some(number),
            ..Default::default()
        });
        self
    }

    /// Joins the namespace at `path` instead of making one; `kind` as in `/proc/PID/ns`.
    #[must_use]
    pub fn join_namespace(mut self, kind: &str, path: &str) -> Self {
        self.message.join_ns.push(rpc::Join_namespace {
            ns: Some(kind.to_owned()),
            ns_file: Some(path.to_owned()),
            ..Default::default()
        });
        self
    }

    /// Restores the cgroups of `controller` below `path`; an empty controller means the unified hierarchy.
    #[must_use]
    pub fn cgroup_root(mut self, controller: &str, path: &str) -> Self {
        self.message.cg_root.push(rpc::Cgroup_root {
            ctrl: Some(controller.to_owned()),
            path: Some(path.to_owned()),
            ..Default::default()
        });
        self
    }

    /// How to treat cgroups.
    #[must_use]
    pub fn cgroups_mode(mut self, mode: CgroupsMode) -> Self {
        let mode = match mode {
            CgroupsMode::Ignore => rpc::Criu_cg_mode::IGNORE,
            CgroupsMode::None => rpc::Criu_cg_mode::CG_NONE,
            CgroupsMode::Props => rpc::Criu_cg_mode::PROPS,
            CgroupsMode::Soft => rpc::Criu_cg_mode::SOFT,
            CgroupsMode::Full => rpc::Criu_cg_mode::FULL,
            CgroupsMode::Strict => rpc::Criu_cg_mode::STRICT,
        };
        self.message.manage_cgroups = Some(true);
        self.message.manage_cgroups_mode = Some(mode.into());
        self
    }

    /// Directory of the freezer to stop the tasks with. Without it, a cgroup that is frozen already makes the
    /// dump fail after 10 s.
    #[must_use]
    pub fn freeze_cgroup(mut self, directory: &str) -> Self {
        self.message.freeze_cgroup = Some(directory.to_owned());
        self
    }

    /// Dumps or restores established TCP connections instead of refusing them.
    #[must_use]
    pub fn tcp_established(mut self, on: bool) -> Self {
        self.message.tcp_established = Some(on);
        self
    }

    /// Leaves out connections that are just being accepted.
    #[must_use]
    pub fn tcp_skip_in_flight(mut self, on: bool) -> Self {
        self.message.tcp_skip_in_flight = Some(on);
        self
    }

    /// Restores established TCP connections as closed ones.
    #[must_use]
    pub fn tcp_close(mut self, on: bool) -> Self {
        self.message.tcp_close = Some(on);
        self
    }

    /// Accepts unix sockets whose other end is outside.
    #[must_use]
    pub fn external_unix_sockets(mut self, on: bool) -> Self {
        self.message.ext_unix_sk = Some(on);
        self
    }

    /// Accepts a session and terminal that come from outside.
    #[must_use]
    pub fn shell_job(mut self, on: bool) -> Self {
        self.message.shell_job = Some(on);
        self
    }

    /// Dumps and restores file locks; no one outside may hold one on the same file.
    #[must_use]
    pub fn file_locks(mut self, on: bool) -> Self {
        self.message.file_locks = Some(on);
        self
    }

    /// Gives unlinked files a temporary name in their directory.
    #[must_use]
    pub fn link_remap(mut self, on: bool) -> Self {
        self.message.link_remap = Some(on);
        self
    }

    /// Uses any path to a device with the right numbers.
    #[must_use]
    pub fn evasive_devices(mut self, on: bool) -> Self {
        self.message.evasive_devices = Some(on);
        self
    }

    /// Namespaces (bits of clone(2), only the network's is known) whose content is not dumped or restored.
    #[must_use]
    pub fn empty_namespaces(mut self, bits: u32) -> Self {
        self.message.empty_ns = Some(bits);
        self
    }

    /// Hands over the master of a pseudo terminal whose owner was outside.
    #[must_use]
    pub fn orphan_pts_master(mut self, on: bool) -> Self {
        self.message.orphan_pts_master = Some(on);
        self
    }

    /// Makes the restored root a child of CRIU's parent.
    #[must_use]
    pub fn restore_sibling(mut self, on: bool) -> Self {
        self.message.rst_sibling = Some(on);
        self
    }

    /// Replaces the LSM profile of the images, as `apparmor:NAME` or `selinux:LABEL`.
    #[must_use]
    pub fn lsm_profile(mut self, profile: &str) -> Self {
        self.message.lsm_profile = Some(profile.to_owned());
        self
    }

    /// Replaces the SELinux context of mounts.
    #[must_use]
    pub fn lsm_mount_context(mut self, context: &str) -> Self {
        self.message.lsm_mount_context = Some(context.to_owned());
        self
    }

    /// How to lock the network.
    #[must_use]
    pub fn network_lock(mut self, method: NetworkLock) -> Self {
        let method = match method {
            NetworkLock::Iptables => rpc::Criu_network_lock_method::IPTABLES,
            NetworkLock::Nftables => rpc::Criu_network_lock_method::NFTABLES,
            NetworkLock::Skip => rpc::Criu_network_lock_method::SKIP,
        };
        self.message.network_lock = Some(method.into());
        self
    }

    /// A file of CRIU's long options, read last and stronger than anything here.
    #[must_use]
    pub fn config_file(mut self, path: &str) -> Self {
        self.message.config_file = Some(path.to_owned());
        self
    }

    /// Earlier images, relative to the image directory, that hold unchanged pages.
    #[must_use]
    pub fn parent_images(mut self, path: &str) -> Self {
        self.message.parent_img = Some(path.to_owned());
        self
    }

    /// Switches the kernel's soft-dirty tracking on, for a later dump with this one as parent.
    #[must_use]
    pub fn track_memory(mut self, on: bool) -> Self {
        self.message.track_mem = Some(on);
        self
    }

    /// Punches pages out of parent images that this dump holds anew.
    #[must_use]
    pub fn auto_dedup(mut self, on: bool) -> Self {
        self.message.auto_dedup = Some(on);
        self
    }

    /// Restores memory to be fetched on demand, or dumps it so: the pages stay out of the images. For a dump see
    /// [`Setup::without_page_server`](crate::Setup::without_page_server).
    #[must_use]
    pub fn lazy_pages(mut self, on: bool) -> Self {
        self.message.lazy_pages = Some(on);
        self
    }

    /// Sends pages to a page server instead of writing them.
    #[must_use]
    pub fn page_server(mut self, address: &str, port: u16) -> Self {
        self.message.ps = protobuf::MessageField::some(rpc::Criu_page_server_info {
            address: Some(address.to_owned()),
            port: Some(port.into()),
            ..Default::default()
        });
        self
    }

    /// Largest unlinked file that is put into the images, in bytes.
    #[must_use]
    pub fn ghost_limit_bytes(mut self, limit: u32) -> Self {
        self.message.ghost_limit = Some(limit);
        self
    }

    /// How long the tasks may take to stop, in seconds.
    #[must_use]
    pub fn timeout_s(mut self, seconds: u32) -> Self {
        self.message.timeout = Some(seconds);
        self
    }

    /// The message itself.
    pub fn message(&self) -> &rpc::Criu_opts {
        &self.message
    }

    pub(crate) fn into_parts(self) -> (rpc::Criu_opts, PathBuf, [File; 2]) {
        (self.message, self.log_path, self.directories)
    }
}

/// Debug output: a failure must be explainable from the log of the attempt that failed.
const LOG_LEVEL: i32 = 4;
/// Errors, which failures are explained with ([`crate::log_tail`]), and warnings.
const LOG_LEVEL_TERSE: i32 = 2;
