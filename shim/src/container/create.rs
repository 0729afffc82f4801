//! How a container comes to be: mounts, stdio, the runtime's `create`.
//!
//! For a container that is to be restored, from an image or from another host, only the first step is done:
//! there is no process before Start, and its pid is 0 until then.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use containerd_shim_protos::{api::Mount, events::task};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::{Container, Phase, Process, Settings, Shared, State, restore::Image};
use crate::{
    bundle::{self, Record, Spec},
    cgroup::{Cgroup, OomWatch},
    error::{Result, ShimError},
    options::CreateOptions,
    reaper::Exit,
    runtime::{Call, Program, Runtime, VerbStdio},
    stdio::{Address, Prepared},
    verb::{Create, Verb},
};

/// A Create as containerd asks for it.
#[derive(Debug, Default)]
pub(crate) struct CreateRequest {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) address: Address,
    /// A directory to restore from, `godwit-incoming://…`, or empty.
    pub(crate) checkpoint: String,
    pub(crate) parent_checkpoint: String,
    pub(crate) options: CreateOptions,
}

impl Container {
    /// Makes the container with the runtime its options name.
    ///
    /// # Errors
    /// Those of each step; whatever was mounted is unmounted again.
    pub(crate) async fn create(request: CreateRequest, shared: Shared) -> Result<Arc<Self>> {
        let record = Record::new(&request.options, &shared.namespace);
        let target = record.target(&request.bundle, &request.id);
        record.write(&request.bundle)?;
        let runtime = Program { target, reaper: Arc::clone(&shared.reaper) };
        Self::create_with(request, shared, Arc::new(runtime)).await
    }

    /// As [`Self::create`], with any runtime.
    pub(super) async fn create_with(
        mut request: CreateRequest,
        shared: Shared,
        runtime: Arc<dyn Runtime>,
    ) -> Result<Arc<Self>> {
        let spec = Spec::read(&request.bundle)?;
        let mounts = std::mem::take(&mut request.mounts);
        let rootfs = (!mounts.is_empty()).then(|| request.bundle.join("rootfs"));
        if let Some(rootfs) = &rootfs
            && let Err(error) = mount(&mounts, rootfs).await
        {
            unmount(rootfs).await;
            return Err(error);
        }
        let announced = request.announce(&mounts);
        let created = Self::make(request, &spec, rootfs.clone(), shared, runtime).await;
        let (container, pid) = match created {
            Ok(created) => created,
            Err(error) => {
                if let Some(rootfs) = &rootfs {
                    unmount(rootfs).await;
                }
                return Err(error);
            }
        };
        container.leave_address();
        container.shared.events.publish(&task::TaskCreate { pid: pid.unsigned_abs(), ..announced });
        Ok(container)
    }

    /// Makes the container inside its mounted root; returns its pid, 0 if it is to be restored.
    async fn make(
        request: CreateRequest,
        spec: &Spec,
        rootfs: Option<PathBuf>,
        shared: Shared,
        runtime: Arc<dyn Runtime>,
    ) -> Result<(Arc<Self>, i32)> {
        let settings = request.settings(spec, rootfs, &shared.namespace);
        let image = Image::of(&request)?;
        let phase = image.map_or(Phase::Created, Phase::Restorable);
        let restorable = phase != Phase::Created;
        let (mailbox, requests) = mpsc::unbounded_channel();
        let init = Process::new(request.address, Vec::new());
        let container = Arc::new(Self {
            id: request.id,
            bundle: request.bundle,
            shared,
            runtime,
            settings,
            mailbox,
            exec_ended: Notify::new(),
            restoring: Arc::default(),
            whole: watch::Sender::new(true),
            state: Mutex::new(State::new(phase, init)),
        });
        let pid = if restorable { 0 } else { container.create_init().await? };
        tokio::spawn(Arc::clone(&container).serve(requests));
        Ok((container, pid))
    }

    async fn create_init(self: &Arc<Self>) -> Result<i32> {
        let address = self.lock().init.address.clone();
        let mut prepared = Prepared::new(&address, &self.owner(&self.id)).await?;
        let pid_file = bundle::init_pid_file(&self.bundle);
        let verb = Verb::Create(Create {
            bundle: self.bundle.clone(),
            pid_file: pid_file.clone(),
            console: prepared.console(),
            no_pivot: self.settings.no_pivot,
            no_new_keyring: self.settings.no_new_keyring,
        });
        let stdio = prepared.take_theirs().map_or(VerbStdio::Captured, VerbStdio::Container);
        let window = self.shared.reaper.window();
        self.run(Call { verb, stdio, group: None }).await?;
        let streams = prepared.connect().await?;
        let pid = bundle::read_pid(&pid_file)?;
        self.adopt_init(pid, streams, window.claim(pid));
        Ok(pid)
    }

    /// Takes the init, which exists now, into the state and watches over it.
    pub(super) fn adopt_init(
        self: &Arc<Self>,
        pid: i32,
        streams: crate::stdio::Streams,
        ended: oneshot::Receiver<Exit>,
    ) {
        let cgroup = Cgroup::of(pid).inspect_err(|error| log::warn!("{}: {error}", self.id)).ok();
        let oom = cgroup.as_ref().and_then(|cgroup| self.watch_memory(cgroup));
        {
            let mut state = self.lock();
            state.init.pid = pid;
            state.init.streams = Some(streams);
            state.cgroup = cgroup;
            state.oom = oom;
        }
        self.watch_init(ended);
    }

    fn watch_memory(&self, cgroup: &Cgroup) -> Option<OomWatch> {
        let (events, id) = (self.shared.events.clone(), self.id.clone());
        let report = move || {
            events.publish(&task::TaskOOM { container_id: id.clone(), ..task::TaskOOM::default() });
        };
        OomWatch::start(cgroup, report)
            .inspect_err(|error| log::warn!("{}: failed to watch for memory running out: {error}", self.id))
            .ok()
    }

    /// Tells clients of the migration service where this shim is.
    fn leave_address(&self) {
        let path = self.shared.addresses.join(&self.id);
        let write = || {
            if let Some(parent) = path.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
            }
            fs::write(&path, &self.shared.socket)
        };
        // The container works without; only progress and cancellation of its migrations do not.
        if let Err(error) = write() {
            log::warn!("failed to write {}: {error}", path.display());
        }
    }
}

impl CreateRequest {
    fn announce(&self, mounts: &[Mount]) -> task::TaskCreate {
        let io = task::TaskIO {
            stdin: self.address.stdin.clone(),
            stdout: self.address.stdout.clone(),
            stderr: self.address.stderr.clone(),
            terminal: self.address.terminal,
            ..task::TaskIO::default()
        };
        task::TaskCreate {
            container_id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            rootfs: mounts.to_vec(),
            io: Some(io).into(),
            checkpoint: self.checkpoint.clone(),
            ..task::TaskCreate::default()
        }
    }

    fn settings(&self, spec: &Spec, rootfs: Option<PathBuf>, namespace: &str) -> Settings {
        let options = &self.options;
        let work = match options.criu_work_path.as_str() {
            "" => self.bundle.join("work"),
            path => path.into(),
        };
        Settings {
            rootfs,
            io_uid: options.io_uid,
            io_gid: options.io_gid,
            no_pivot: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            work,
            own_pids: spec.has_own_pids(),
            record: Record::new(options, namespace),
        }
    }
}

async fn mount(mounts: &[Mount], rootfs: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(rootfs)
        .map_err(ShimError::io(format!("make {}", rootfs.display())))?;
    for mount in mounts {
        // A mount may have a place below the root; it is containerd's own word, made from the image's config.
        let target = rootfs.join(mount.target.trim_start_matches('/'));
        containerd_shim::util::mount_rootfs(mount, &target)
            .await
            .map_err(|source| ShimError::Library { action: "mount the root filesystem", source })?;
    }
    Ok(())
}

/// Unmounts everything at and below `rootfs`; what cannot be is left to containerd, which tries again.
pub(crate) async fn unmount(rootfs: &Path) {
    let path = rootfs.display().to_string();
    let unmounted =
        tokio::task::spawn_blocking(move || containerd_shim::mount::umount_recursive(Some(&path), 0)).await;
    match unmounted {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::warn!("failed to unmount {}: {error}", rootfs.display()),
        Err(error) => log::error!("unmounting {} ended early: {error}", rootfs.display()),
    }
}
