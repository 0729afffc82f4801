//! The verbs that take a container or an exec from one state to the next.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim_protos::events::task;

use super::{Container, Ended, Phase, Process, create::unmount, restore::Image};
use crate::{
    bundle::{self, read_pid},
    error::{Result, ShimError},
    runtime::{Call, VerbStdio},
    stdio::{Address, Prepared},
    verb::Verb,
};

/// Statuses of processes that never ran.
const NEVER_RAN: u32 = 255;

impl Container {
    /// Starts the init (empty name) or an exec; returns its pid.
    pub(super) async fn start(self: &Arc<Self>, exec_id: &str) -> Result<i32> {
        if !exec_id.is_empty() {
            return self.start_exec(exec_id).await;
        }
        let image = {
            let mut state = self.lock();
            match state.phase.clone() {
                Phase::Created => {
                    state.starting = true;
                    None
                }
                Phase::Restorable(image) => {
                    state.starting = true;
                    Some(image)
                }
                phase => {
                    return Err(ShimError::WrongState {
                        verb: "start",
                        state: phase.name(),
                        what: "process",
                    });
                }
            }
        };
        let started = match image {
            None => self.run(Verb::Start).await.map(drop),
            Some(image) => self.restore(image).await,
        };
        let (pid, deferred) = {
            let mut state = self.lock();
            state.starting = false;
            if started.is_ok() {
                state.phase = Phase::Running;
            }
            (state.init.pid, state.deferred_exit.take())
        };
        if started.is_ok() {
            self.shared.events.publish(&task::TaskStart {
                container_id: self.id.clone(),
                pid: pid.unsigned_abs(),
                ..task::TaskStart::default()
            });
        }
        if let Some(exit) = deferred {
            self.init_ended(exit).await;
        }
        started.map(|()| pid)
    }

    /// Adds a process, to be started later.
    pub(crate) fn add_exec(&self, exec_id: &str, address: Address, spec: Vec<u8>) -> Result<()> {
        let mut state = self.lock();
        self.not_migrating(&state, "exec in")?;
        // The name becomes part of file names.
        if exec_id.is_empty() || exec_id.contains('/') {
            let reason = "expected a name without '/'";
            return Err(ShimError::RefusedOption { name: "exec_id".to_owned(), reason });
        }
        if state.execs.contains_key(exec_id) {
            return Err(ShimError::ExecExists { exec_id: exec_id.to_owned() });
        }
        if !matches!(state.phase, Phase::Created | Phase::Running) {
            return Err(ShimError::WrongState {
                verb: "exec in",
                state: state.phase.name(),
                what: "container",
            });
        }
        state.execs.insert(exec_id.to_owned(), Process::new(address, spec));
        drop(state);
        self.shared.events.publish(&task::TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..task::TaskExecAdded::default()
        });
        Ok(())
    }

    async fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<i32> {
        let (address, spec) = {
            let mut state = self.lock();
            self.not_migrating(&state, "exec in")?;
            let init_ended = state.init_ended;
            let process = state.process_mut(exec_id)?;
            if init_ended {
                return Err(ShimError::InitEnded { id: self.id.clone() });
            }
            if process.pid != 0 || process.has_ended() {
                let now = if process.has_ended() { "stopped" } else { "running" };
                return Err(ShimError::WrongState { verb: "start", state: now, what: "process" });
            }
            let found = (process.address.clone(), process.spec.clone());
            state.running_execs += 1;
            found
        };
        let started = self.run_exec(exec_id, &address, &spec).await;
        if started.is_err() {
            let mut state = self.lock();
            state.running_execs -= 1;
            if let Ok(process) = state.process(exec_id) {
                // Whoever waits for it is told.
                process.end(NEVER_RAN, None);
            }
            drop(state);
            self.exec_ended.notify_waiters();
        }
        started
    }

    async fn run_exec(self: &Arc<Self>, exec_id: &str, address: &Address, spec: &[u8]) -> Result<i32> {
        let process_file = self.bundle.join(format!("{exec_id}.json"));
        let pid_file = self.bundle.join(format!("{exec_id}.pid"));
        fs::write(&process_file, process_json(spec, address.terminal)?)
            .map_err(ShimError::io(format!("write {}", process_file.display())))?;
        let mut prepared = Prepared::new(address, &self.owner(exec_id)).await?;
        let verb = Verb::Exec {
            process: process_file.clone(),
            pid_file: pid_file.clone(),
            console: prepared.console(),
        };
        let stdio = prepared.take_theirs().map_or(VerbStdio::Captured, VerbStdio::Container);
        let window = self.shared.reaper.window();
        let ran = self.run(Call { verb, stdio, group: None }).await;
        fs::remove_file(&process_file).ok();
        ran?;
        let streams = prepared.connect().await?;
        let pid = read_pid(&pid_file)?;
        if let Ok(process) = self.lock().process_mut(exec_id) {
            process.pid = pid;
            process.streams = Some(streams);
        }
        self.shared.events.publish(&task::TaskExecStarted {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            pid: pid.unsigned_abs(),
            ..task::TaskExecStarted::default()
        });
        self.watch_exec(exec_id.to_owned(), window.claim(pid));
        Ok(pid)
    }

    /// Deletes the container (empty name) or an exec; returns its pid and end.
    pub(super) async fn delete(&self, exec_id: &str) -> Result<(i32, Option<Ended>)> {
        // An init that was never started lives, and holds its ends of the streams, until the runtime has deleted it.
        let (streams, lives) = {
            let mut state = self.lock();
            let running = match exec_id {
                "" => !matches!(state.phase, Phase::Created | Phase::Restorable(_) | Phase::Stopped),
                _ => {
                    let process = state.process(exec_id)?;
                    process.pid != 0 && !process.has_ended()
                }
            };
            if running {
                let now = if exec_id.is_empty() { state.phase.name() } else { "running" };
                return Err(ShimError::WrongState { verb: "delete", state: now, what: "process" });
            }
            let lives = exec_id.is_empty() && state.phase == Phase::Created && !state.init_ended;
            (state.process_mut(exec_id)?.streams.take_if(|_| !lives), lives)
        };
        if let Some(streams) = streams {
            streams.shutdown().await;
        }
        if exec_id.is_empty() {
            let deleted = self.delete_container().await?;
            let streams = self.lock().init.streams.take_if(|_| lives);
            if let Some(streams) = streams {
                streams.shutdown().await;
            }
            return Ok(deleted);
        }
        fs::remove_file(self.bundle.join(format!("{exec_id}.pid"))).ok();
        let process = self.lock().execs.remove(exec_id);
        let process = process.ok_or_else(|| ShimError::NoProcess { exec_id: exec_id.to_owned() })?;
        let ended = *process.ended.borrow();
        Ok((process.pid, ended))
    }

    async fn delete_container(&self) -> Result<(i32, Option<Ended>)> {
        self.lose_companion().await;
        match self.run(Verb::Delete { force: false }).await {
            // A checkpoint that ends the container deletes it, and one that was never restored never was.
            Err(ShimError::Runtime { message, .. }) if message.contains("does not exist") => {}
            deleted => drop(deleted?),
        }
        if let Some(rootfs) = &self.settings.rootfs {
            unmount(rootfs).await;
        }
        let (pid, ended, phase) = {
            let mut state = self.lock();
            state.oom = None;
            let ended = *state.init.ended.borrow();
            (state.init.pid, ended, state.phase.clone())
        };
        if let Phase::Restorable(image) = phase {
            image.remove_if_unpacked();
        }
        fs::remove_file(self.shared.addresses.join(&self.id)).ok();
        self.shared.events.publish(&task::TaskDelete {
            container_id: self.id.clone(),
            pid: pid.unsigned_abs(),
            exit_status: ended.map_or(0, |ended| ended.status),
            exited_at: ended.and_then(|ended| ended.at).map(Into::into).into(),
            ..task::TaskDelete::default()
        });
        Ok((pid, ended))
    }

    /// Freezes the container.
    pub(super) async fn pause(&self) -> Result<()> {
        {
            let mut state = self.lock();
            self.not_migrating(&state, "pause")?;
            match state.phase {
                Phase::Running => state.phase = Phase::Pausing,
                Phase::Created | Phase::Restorable(_) => {
                    return Err(ShimError::WrongState { verb: "pause", state: "created", what: "task" });
                }
                _ => {
                    let now = state.phase.name();
                    return Err(ShimError::WrongState { verb: "pause", state: now, what: "container" });
                }
            }
        }
        let paused = self.run(Verb::Pause).await;
        {
            let mut state = self.lock();
            // It may have ended meanwhile.
            if state.phase == Phase::Pausing {
                state.phase = if paused.is_ok() { Phase::Paused } else { Phase::Running };
            }
        }
        paused?;
        self.shared
            .events
            .publish(&task::TaskPaused { container_id: self.id.clone(), ..task::TaskPaused::default() });
        Ok(())
    }

    /// Thaws the container, unless a migration has done so already.
    pub(super) async fn resume(&self) -> Result<()> {
        let owed = {
            let mut state = self.lock();
            self.not_migrating(&state, "resume")?;
            std::mem::take(&mut state.resume_owed)
        };
        if owed {
            self.release_migration();
            return Ok(());
        }
        let now = self.lock().phase.clone();
        match now {
            Phase::Paused => self.thaw().await,
            Phase::Created | Phase::Restorable(_) => {
                Err(ShimError::WrongState { verb: "resume", state: "created", what: "task" })
            }
            phase => Err(ShimError::WrongState { verb: "resume", state: phase.name(), what: "process" }),
        }
    }

    pub(super) async fn thaw(&self) -> Result<()> {
        self.run(Verb::Resume).await?;
        {
            let mut state = self.lock();
            if state.phase == Phase::Paused {
                state.phase = Phase::Running;
            }
        }
        self.shared
            .events
            .publish(&task::TaskResumed { container_id: self.id.clone(), ..task::TaskResumed::default() });
        Ok(())
    }

    /// Changes the container's limits.
    pub(super) async fn update(&self, resources: Vec<u8>) -> Result<()> {
        {
            let state = self.lock();
            self.not_migrating(&state, "update")?;
            if state.phase == Phase::Stopped {
                return Err(ShimError::WrongState { verb: "update", state: "stopped", what: "container" });
            }
        }
        self.run(Verb::Update { resources }).await.map(drop)
    }

    /// Makes the container from an image or from what a source sends.
    async fn restore(self: &Arc<Self>, image: Image) -> Result<()> {
        let address = self.lock().init.address.clone();
        let prepared = Prepared::new(&address, &self.owner(&self.id)).await?;
        let pid_file = bundle::init_pid_file(&self.bundle);
        // A pid left by a try that failed must not be taken for this one's.
        fs::remove_file(&pid_file).ok();
        let restored = match &image {
            Image::Directory { path, parent } => {
                self.restore_from(path, parent.as_ref(), prepared, &pid_file).await
            }
            Image::Incoming(socket) => self.receive(socket, prepared, &pid_file).await,
        };
        if let Err(error) = restored {
            // Half a container may be left by a runtime that was killed; usually there is nothing.
            if let Err(left) = self.run(Verb::Delete { force: true }).await {
                log::debug!("{}: nothing deleted after a failed restore: {left}", self.id);
            }
            return Err(error);
        }
        image.remove_if_unpacked();
        Ok(())
    }

    async fn restore_from(
        self: &Arc<Self>,
        path: &Path,
        parent: Option<&PathBuf>,
        mut prepared: Prepared,
        pid_file: &Path,
    ) -> Result<()> {
        let stdio = prepared.take_theirs().map_or(VerbStdio::Captured, VerbStdio::Container);
        let window = self.shared.reaper.window();
        let verb = self.restore_verb(path, parent, pid_file, prepared.console())?;
        self.run(Call { verb, stdio, group: Some(Arc::clone(&self.restoring)) }).await?;
        let streams = prepared.connect().await?;
        let pid = read_pid(pid_file)?;
        self.adopt_init(pid, streams, window.claim(pid));
        Ok(())
    }
}

/// Returns the OCI process to be run, its terminal being what the request says.
fn process_json(spec: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let bad = |source| ShimError::BadJson { what: "the process to run", source };
    let mut process: serde_json::Value = serde_json::from_slice(spec).map_err(bad)?;
    if let Some(process) = process.as_object_mut() {
        process.insert("terminal".to_owned(), terminal.into());
    }
    serde_json::to_vec(&process).map_err(bad)
}
