//! `restore`: a container out of a directory of CRIU images.
//!
//! CRIU makes the processes, namespaces and mounts; what it gets from outside is prepared here, in the order
//! in which the parts need each other:
//! ```text
//! private mount namespace                                                     (gone with this process)
//!   CRIU started, with the pipes and namespaces it may use
//!     images awaited ([`restore_when`])
//!       state directory claimed (and the cgroup's path written, so that `delete --force` can always clean up)
//!         root file system bound, mount points made
//!           cgroup made, CRIU moved into it: what it forks is in it from the first instruction
//!             request -> setup-namespaces: loopback, hooks -> terminal -> post-restore: pid known, state written
//!               -> decide -> tasks run
//! ```
//! The restored init is a sibling of CRIU, so a child of this process and, when that ends, of the nearest
//! subreaper (containerd's shim). libcontainer's verbs and ours then take the container as any other.
//!
//! # Holding a restore
//! [`restore`] asks `decide` at one of two points ([`Hold`]). At `post-restore` the tasks are complete and
//! stopped and the network is still locked; a refusal makes CRIU kill them. At `pre-resume` less is left to
//! fail (credentials are set, every task waits at its last instruction), but the network is unlocked, and CRIU
//! would let the tasks run whatever the answer: they are killed here. So with established TCP connections it
//! has to be the first, and otherwise it should be the second. Source: CRIU's `criu/cr-restore.c`.
//!
//! A failed restore leaves nothing: CRIU's process group is killed, then whatever is in the cgroup, then the
//! cgroup and the state go.

mod cgroups;
mod mount_points;
mod ready;

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_criu::{Notification, Options, Program, Request, Script, page_images};
use godwit_sys::freezer::FreezerState;
use godwit_sys::mount::Mounted;
use godwit_sys::pidfd::PidFd;
use godwit_sys::{fdpass, mountns, netns, process};
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::hooks::run_hooks;
use libcontainer::oci_spec::runtime::{Hook, LinuxNamespaceType, Spec};
use nix::mount::{MntFlags, umount2};

use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::external::{self, EMPTY_NAMESPACES};
use crate::checkpoint::shortcuts::Shortcuts;
use crate::checkpoint::{CgroupsMode, Decision, descriptors, make_directory, path_text, scratch};
use crate::error::{ContainerError, causes};
use crate::state::{Store, Stored, read_json};
use crate::{cgroup, create, lifecycle};
use ready::{Ready, Way};

/// Where a restore is held while `decide` is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Tasks restored and stopped, network locked. Refusing leaves no trace in any connection.
    PostRestore,
    /// Tasks at their last instruction before they run, network unlocked. Nearly nothing can fail any more.
    PreResume,
}

/// What `restore` takes beside the id.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "these are the flags of the command line")]
pub struct RestoreOptions {
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// Directory of the images.
    pub image_path: PathBuf,
    /// Directory for logs and scratch files; the image directory without it.
    pub work_path: Option<PathBuf>,
    /// Where to write init's process id.
    pub pid_file: Option<PathBuf>,
    /// Unix socket that receives the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// Let systemd manage the cgroup.
    pub systemd_cgroup: bool,
    /// Restore established TCP connections as closed ones.
    pub tcp_close: bool,
    /// Take the caller's session and terminal for those that came from outside.
    pub shell_job: bool,
    /// Punch restored pages out of the images.
    pub auto_dedup: bool,
    /// How cgroups are restored.
    pub cgroups_mode: CgroupsMode,
    /// LSM profile in the place of the images', as `apparmor:NAME` or `selinux:LABEL`.
    pub lsm_profile: Option<String>,
    /// SELinux context of mounts in the place of the images'.
    pub lsm_mount_context: Option<String>,
    /// Where to ask `decide`.
    pub hold: Hold,
    /// Let CRIU log only errors and warnings, which is faster.
    pub terse_log: bool,
    /// Leave memory that can be restored lazily to the server of page faults that listens at
    /// `lazy-pages.socket` in the directory for logs. All of such memory: none of it may be in the images alone.
    pub lazy_pages: bool,
}

impl RestoreOptions {
    /// The command line's defaults.
    pub fn new(bundle: impl Into<PathBuf>, image_path: impl Into<PathBuf>) -> Self {
        Self {
            bundle: bundle.into(),
            image_path: image_path.into(),
            work_path: None,
            pid_file: None,
            console_socket: None,
            systemd_cgroup: false,
            tcp_close: false,
            shell_job: false,
            auto_dedup: false,
            cgroups_mode: CgroupsMode::Soft,
            lsm_profile: None,
            lsm_mount_context: None,
            hold: Hold::PreResume,
            terse_log: false,
            lazy_pages: false,
        }
    }
}

/// Restores the container `id`; its standard descriptors become those of this process.
///
/// `decide` gets init's pid while the restored tasks are held; [`Decision::Rollback`] kills them.
///
/// What the images hold (established connections, file locks, sockets to outside) is restored without asking
/// again: the question was answered at the checkpoint.
///
/// # Errors
/// [`ContainerError::AlreadyExists`], what is wrong with bundle or images, what CRIU says, and
/// [`CheckpointError::Abandoned`] after a rollback. Nothing is left behind.
pub fn restore(
    store: &Store,
    id: &str,
    options: &RestoreOptions,
    decide: impl FnOnce(i32) -> Decision,
) -> Result<Stored> {
    let place = Place::new(store, id, options)?;
    let plan = Plan::new(place, options.hold)?;
    let way = Way::of(&plan.shortcuts);
    in_private(|outer| {
        let ready = Ready::start(&Program::find()?, &plan.place.spec, options.shell_job, way)?;
        plan.carry_out(store, outer, ready, decide)
    })
}

/// As [`restore`], of images that are still to come: prepares what can be, then calls `begin`, which returns when they
/// are there, and says where to ask `decide`; or nothing, if they will not come.
///
/// # Errors
/// As [`restore`], and [`CheckpointError::Abandoned`] if there are no images.
pub fn restore_when(
    store: &Store,
    id: &str,
    options: &RestoreOptions,
    begin: impl FnOnce() -> io::Result<Option<Hold>>,
    decide: impl FnOnce(i32) -> Decision,
) -> Result<Stored> {
    let place = Place::new(store, id, options)?;
    in_private(|outer| {
        let program = Program::find()?;
        let ready = Ready::start(&program, &place.spec, options.shell_job, Way::expected(&place.spec))?;
        let hold = begin().map_err(CheckpointError::file(&place.options.image_path))?;
        let plan = Plan::new(place, hold.ok_or(CheckpointError::Abandoned)?)?;
        let way = Way::of(&plan.shortcuts);
        let ready = ready.in_way(&program, &plan.place.spec, options.shell_job, way)?;
        plan.carry_out(store, outer, ready, decide)
    })
}

/// Mounts made for CRIU, and those it makes, must not outlive it in the host's namespace.
fn in_private<T>(action: impl FnOnce(&File) -> Result<T>) -> Result<T> {
    let outer = mountns::leave_for_private()?;
    let answer = action(&outer);
    mountns::enter(&outer)?;
    answer
}

/// What is known before there are images.
#[derive(Debug)]
struct Place {
    id: String,
    directory: PathBuf,
    bundle: PathBuf,
    rootfs: PathBuf,
    spec: Spec,
    work_path: PathBuf,
    options: RestoreOptions,
}

/// Everything that is known before anything is changed.
#[derive(Debug)]
struct Plan {
    place: Place,
    hold: Hold,
    descriptors: Vec<String>,
    shortcuts: Shortcuts,
}

impl Place {
    fn new(store: &Store, id: &str, options: &RestoreOptions) -> Result<Self> {
        let directory = store.directory(id)?;
        let bundle = fs::canonicalize(&options.bundle).map_err(CheckpointError::file(&options.bundle))?;
        let spec: Spec = read_json(&bundle.join("config.json"))?;
        let rootfs = create::rootfs(&spec, &bundle)?;
        let mut options = options.clone();
        // The way back from the mount namespace changes the working directory.
        let absolute = |path: &Path| std::path::absolute(path).map_err(CheckpointError::file(path));
        options.image_path = absolute(&options.image_path)?;
        options.pid_file = options.pid_file.as_deref().map(absolute).transpose()?;
        options.console_socket = options.console_socket.as_deref().map(absolute).transpose()?;
        let work_path = absolute(options.work_path.as_deref().unwrap_or(&options.image_path))?;
        Ok(Self { id: id.to_owned(), directory, bundle, rootfs, spec, work_path, options })
    }
}

impl Plan {
    fn new(place: Place, hold: Hold) -> Result<Self> {
        let images = &place.options.image_path;
        let descriptors = descriptors::read(images)?;
        page_images::check_complete(images)?;
        let shortcuts = Shortcuts::read(images)?;
        Ok(Self { place, hold, descriptors, shortcuts })
    }

    fn carry_out(
        &self,
        store: &Store,
        outer: &File,
        ready: Ready,
        decide: impl FnOnce(i32) -> Decision,
    ) -> Result<Stored> {
        self.claim(store)?;
        let answer = self.attempt(store, outer, ready, decide);
        if answer.is_err() {
            // Where hooks run that see the container end.
            mountns::run_in(outer, || self.undo(store))?;
        }
        answer
    }

    /// Takes the id, and writes what a forced `delete` needs to find the cgroup.
    fn claim(&self, store: &Store) -> Result<()> {
        fs::create_dir_all(store.root()).map_err(ContainerError::file(store.root()))?;
        match DirBuilder::new().create(&self.place.directory) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(ContainerError::AlreadyExists { id: self.place.id.clone() }.into());
            }
            other => other.map_err(ContainerError::file(&self.place.directory))?,
        }
        YoukiConfig::from_spec(&self.place.spec, &self.place.id)
            .and_then(|config| config.save(&self.place.directory))
            .map_err(|error| {
                let source = io::Error::other(causes(&error));
                self.undo(store);
                ContainerError::File { path: self.place.directory.clone(), source }.into()
            })
    }

    fn attempt(
        &self,
        store: &Store,
        outer: &File,
        ready: Ready,
        decide: impl FnOnce(i32) -> Decision,
    ) -> Result<Stored> {
        make_directory(&self.place.work_path)?;
        let root = Root::bind(&self.place.rootfs, &self.place.directory)?;
        mount_points::prepare(&self.place.spec, &self.place.rootfs)?;
        let mut container = self.container()?;
        let inherited = ready.inherited(&self.descriptors)?;
        let mut session = ready.session;
        scratch::cover(&self.used())?;
        let outside = self.make_tmpfs()?;
        let cgroups = cgroups::join(&self.place.spec, &container, &self.place.directory, session.pid())?;
        let request = self.request(root.path(), inherited, &cgroups, &outside)?;
        session.send(Request::Restore(request))?;
        let mut conversation = Conversation {
            plan: self,
            store,
            outer,
            container: &mut container,
            criu: session.pid(),
            stored: None,
            decide: Some(decide),
            abandoned: false,
        };
        let ended = session.run(|notification| conversation.on(notification).map_err(Into::into));
        let (stored, abandoned) = (conversation.stored, conversation.abandoned);
        if let Err(error) = ended {
            drop(session);
            reap(stored.as_ref());
            return Err(if abandoned { CheckpointError::Abandoned } else { error.into() });
        }
        if let Err(error) = session.finish() {
            // The container runs: CRIU's way out does not matter any more.
            log::warn!("{error}");
        }
        let stored = stored.ok_or_else(|| CheckpointError::NoCheckpoint {
            path: self.place.options.image_path.clone(),
            reason: "criu restored nothing".to_owned(),
        })?;
        thaw(&stored)?;
        if let Some(pid) = stored.pid() {
            create::write_pid(self.place.options.pid_file.as_deref(), pid)?;
        }
        Ok(stored)
    }

    /// Returns the paths that are to be reached while CRIU works.
    fn used(&self) -> Vec<&Path> {
        let options = &self.place.options;
        let mut used: Vec<&Path> =
            vec![&self.place.bundle, &self.place.rootfs, &self.place.work_path, &options.image_path];
        used.extend(options.pid_file.as_deref());
        used.extend(options.console_socket.as_deref());
        let mounts = self.place.spec.mounts().iter().flatten();
        used.extend(mounts.filter_map(|mount| mount.source().as_deref()));
        used
    }

    fn container(&self) -> Result<Container> {
        let mut container = Container::new(
            &self.place.id,
            ContainerStatus::Creating,
            None,
            &self.place.bundle,
            &self.place.directory,
        )
        .map_err(|error| ContainerError::Process { detail: causes(&error) })?;
        container.set_systemd(self.place.options.systemd_cgroup);
        container.set_annotations(self.place.spec.annotations().clone());
        Ok(container)
    }

    /// Makes the file systems in memory that CRIU did not dump.
    fn make_tmpfs(&self) -> Result<Outside> {
        let mut outside = Outside { directories: Vec::new(), mounts: Vec::new() };
        for (index, tmpfs) in self.shortcuts.tmpfs.iter().enumerate() {
            let path = self.place.directory.join(format!("tmpfs-{index}"));
            fs::create_dir(&path).map_err(CheckpointError::file(&path))?;
            outside.directories.push(path.clone());
            tmpfs.make(&path)?;
            outside.mounts.push((tmpfs.key.clone(), path_text(&path)?.to_owned()));
        }
        Ok(outside)
    }

    fn request(
        &self,
        root: &Path,
        inherited: Vec<(String, i32)>,
        cgroups: &cgroups::Joined,
        tmpfs: &Outside,
    ) -> Result<Options> {
        let options = &self.place.options;
        let mut criu = Options::new(&options.image_path, &self.place.work_path, LOG_NAME)?
            .root(path_text(root)?)
            .restore_sibling(true)
            .evasive_devices(true)
            .orphan_pts_master(true)
            .empty_namespaces(if self.shortcuts.network { 0 } else { EMPTY_NAMESPACES })
            .tcp_established(true)
            .tcp_close(options.tcp_close)
            .external_unix_sockets(true)
            .file_locks(true)
            .shell_job(options.shell_job)
            .auto_dedup(options.auto_dedup)
            .lazy_pages(options.lazy_pages)
            .terse_log(options.terse_log)
            .cgroups_mode(options.cgroups_mode);
        for (key, number) in inherited {
            criu = criu.inherit_fd(&key, number);
        }
        for (kind, path) in external::namespaces(&self.place.spec) {
            let Some(path) = path.filter(|_| external::external_key(kind).is_none()) else { continue };
            if kind == LinuxNamespaceType::Cgroup {
                return Err(CheckpointError::Namespace {
                    kind: "cgroup",
                    path: path.to_owned(),
                    reason: "criu cannot join a cgroup namespace".to_owned(),
                });
            }
            criu = criu.join_namespace(external::namespace_name(kind), path_text(path)?);
        }
        for (key, source) in external::restored_mounts(&self.place.spec, &self.place.rootfs)? {
            criu = criu.external_mount(&key, &source);
        }
        for (key, source) in &cgroups.mounts {
            criu = criu.external_mount(key, source);
        }
        for (key, source) in &tmpfs.mounts {
            criu = criu.external_mount(key, source);
        }
        for (controller, path) in &cgroups.roots {
            criu = criu.cgroup_root(controller, path);
        }
        if let Some(profile) = &options.lsm_profile {
            criu = criu.lsm_profile(profile);
        }
        if let Some(context) = &options.lsm_mount_context {
            criu = criu.lsm_mount_context(context);
        }
        if let Some(file) = external::config_file(&self.place.spec) {
            criu = criu.config_file(&file);
        }
        Ok(criu)
    }

    fn undo(&self, store: &Store) {
        if let Err(error) = lifecycle::delete(store, &self.place.id, true) {
            log::warn!("clean up after failed restore of {}: {error}", self.place.id);
        }
    }
}

/// Our part in CRIU's notifications.
struct Conversation<'a, D> {
    plan: &'a Plan,
    store: &'a Store,
    outer: &'a File,
    container: &'a mut Container,
    criu: Option<i32>,
    stored: Option<Stored>,
    decide: Option<D>,
    abandoned: bool,
}

impl<D: FnOnce(i32) -> Decision> Conversation<'_, D> {
    fn on(&mut self, notification: Notification) -> Result<()> {
        match (notification.script, notification.pid) {
            (Script::SetupNamespaces, Some(pid)) => self.set_up(pid),
            (Script::OrphanPtsMaster, _) => self.hand_over_terminal(notification.fd),
            (Script::PostRestore, Some(pid)) => {
                let container = self.container.clone();
                let rootfs = self.plan.place.rootfs.clone();
                let label = ContainerStatus::Running;
                self.stored = Some(Stored::record_process(self.store, container, pid, rootfs, label)?);
                self.ask(Hold::PostRestore)
            }
            (Script::PreResume, _) => self.ask(Hold::PreResume),
            _ => Ok(()),
        }
    }

    fn ask(&mut self, point: Hold) -> Result<()> {
        if self.plan.hold != point {
            return Ok(());
        }
        let (Some(decide), Some(pid)) = (self.decide.take(), self.container_pid()) else { return Ok(()) };
        if decide(pid) == Decision::Commit {
            return Ok(());
        }
        self.abandoned = true;
        if point == Hold::PreResume
            && let Some(stored) = &self.stored
        {
            // CRIU takes no refusal here, it will be killed. A killed task never runs another instruction of
            // its own when its tracer lets go of it.
            kill_all(stored, pid, self.criu)?;
        }
        Err(CheckpointError::Abandoned)
    }

    fn container_pid(&self) -> Option<i32> {
        self.stored.as_ref().and_then(Stored::pid)
    }

    /// The namespaces of the restored init exist, nothing runs in them yet.
    fn set_up(&mut self, pid: i32) -> Result<()> {
        if create::has_new_network(&self.plan.place.spec) {
            netns::bring_loopback_up(pid)?;
        }
        let Some(hooks) = self.plan.place.spec.hooks() else { return Ok(()) };
        let mut state = self.container.state.clone();
        state.pid = Some(pid);
        state.status = ContainerStatus::Created;
        let prestart = hooks.prestart().as_ref();
        let lists: [(&'static str, Option<&Vec<Hook>>); 2] =
            [("prestart", prestart), ("createRuntime", hooks.create_runtime().as_ref())];
        for (point, list) in lists {
            if list.is_none_or(Vec::is_empty) {
                continue;
            }
            // Hooks belong to the host: what they mount has to be seen there.
            mountns::run_in(self.outer, || run_hooks(list, Some(&state), None, None, None))?
                .map_err(|error| ContainerError::Hook { point, detail: causes(&error) })?;
        }
        Ok(())
    }

    fn hand_over_terminal(&self, master: Option<OwnedFd>) -> Result<()> {
        let path = self.plan.place.options.console_socket.clone().unwrap_or_default();
        let failed = |reason: String| CheckpointError::Console { path: path.clone(), reason };
        if path.as_os_str().is_empty() {
            return Err(failed("the container has a terminal, so --console-socket is needed".to_owned()));
        }
        let master = master.ok_or_else(|| failed("criu sent no terminal".to_owned()))?;
        let socket = UnixStream::connect(&path).map_err(|error| failed(error.to_string()))?;
        fdpass::send(&socket, TERMINAL_NAME, &[master.as_fd()]).map_err(|error| failed(error.to_string()))?;
        Ok(())
    }
}

/// The root file system on a mount of its own, as CRIU demands: a mount point whose parent is not mounted over.
#[derive(Debug)]
struct Root {
    // Before the directory: it cannot be removed while something is mounted on it.
    mounted: Option<Mounted>,
    path: PathBuf,
}

impl Root {
    fn bind(rootfs: &Path, directory: &Path) -> Result<Self> {
        let path = directory.join("criu-root");
        fs::create_dir(&path).map_err(CheckpointError::file(&path))?;
        let mounted = Mounted::bind(rootfs, &path)?;
        Ok(Self { mounted: Some(mounted), path })
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        drop(self.mounted.take());
        // Never recursively: should the unmount have failed, that would empty the root file system.
        if let Err(error) = fs::remove_dir(&self.path) {
            log::warn!("remove {}: {error}", self.path.display());
        }
    }
}

/// File systems that CRIU binds to their places. The mounts go with the private mount namespace, their directories
/// here.
#[derive(Debug)]
struct Outside {
    directories: Vec<PathBuf>,
    /// Key and path.
    mounts: Vec<(String, String)>,
}

impl Drop for Outside {
    fn drop(&mut self) {
        for path in &self.directories {
            umount2(path, MntFlags::MNT_DETACH).ok();
            // Never recursively, as with the root.
            if let Err(error) = fs::remove_dir(path) {
                log::warn!("remove {}: {error}", path.display());
            }
        }
    }
}

/// Kills a restored tree that is held at its last instruction, but not CRIU, which is in the same cgroup: a
/// task that CRIU let go of before it is killed would run.
fn kill_all(stored: &Stored, init: i32, criu: Option<i32>) -> Result<()> {
    // Init first: should anything below fail, a PID namespace has taken the others along.
    PidFd::open(init)?.send_signal(SIGKILL)?;
    for pid in cgroup::processes(stored)?.into_iter().filter(|pid| Some(*pid) != criu) {
        if let Ok(process) = PidFd::open(pid) {
            process.send_signal(SIGKILL).ok();
        }
    }
    Ok(())
}

/// A container that was paused when it was dumped comes back frozen, but a restored one is to run.
fn thaw(stored: &Stored) -> Result<()> {
    let freezer = cgroup::freezer(stored)?;
    if freezer.state()? != FreezerState::Thawed {
        freezer.thaw()?;
    }
    Ok(())
}

/// A restored init that was killed is our zombie.
fn reap(stored: Option<&Stored>) {
    if let Some(pid) = stored.and_then(|stored| stored.record().pid)
        && !matches!(process::reap(pid, REAP_LIMIT), Ok(Some(_)))
    {
        log::warn!("restored init {pid} has not ended");
    }
}

/// As runc names it.
pub const LOG_NAME: &str = "restore.log";
/// Receivers take the bytes beside a descriptor for its name.
const TERMINAL_NAME: &[u8] = b"orphan-pts-master";
const REAP_LIMIT: Duration = Duration::from_secs(5);
const SIGKILL: i32 = 9;
