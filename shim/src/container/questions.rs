//! What is answered at once, whatever the actor is doing.

use std::sync::atomic::Ordering;

use containerd_shim_protos::{api, shim::oci::ProcessDetails};
use godwit_sys::{SysError, pidfd::PidFd};
use protobuf::{Message, well_known_types::any::Any};
use tokio::sync::watch;

use super::{Container, Ended, Phase, Process, State, restore::Image};
use crate::{
    bundle,
    error::{Result, ShimError},
    runtime::Call,
    stdio::Address,
    verb::Verb,
};

/// What State tells of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessView {
    pub(crate) pid: i32,
    pub(crate) status: &'static str,
    pub(crate) address: Address,
    pub(crate) ended: Option<Ended>,
}

impl Container {
    /// Tells how the init (empty name) or an exec is.
    pub(crate) fn view(&self, exec_id: &str) -> Result<ProcessView> {
        let state = self.lock();
        let process = state.process(exec_id)?;
        let ended = *process.ended.borrow();
        let status = match (exec_id.is_empty(), &state.phase) {
            (true, phase) => phase.name(),
            // A frozen container is frozen with everything in it.
            (false, Phase::Paused | Phase::Pausing) => state.phase.name(),
            (false, _) if ended.is_some() => "stopped",
            (false, _) if process.pid != 0 => "running",
            (false, _) => "created",
        };
        if exec_id.is_empty()
            && let Some(pid) = self.restored_pid(&state)
        {
            let address = process.address.clone();
            return Ok(ProcessView { pid, status: Phase::Running.name(), address, ended });
        }
        Ok(ProcessView { pid: process.pid, status, address: process.address.clone(), ended })
    }

    /// Returns the pid of a container that came from another host and runs, though its worker's word of that was not
    /// read yet: the migration's client may have been told by the source.
    fn restored_pid(&self, state: &State) -> Option<i32> {
        let arriving = matches!(state.phase, Phase::Restorable(Image::Incoming(_))) && state.starting;
        arriving.then(|| bundle::read_pid(&bundle::init_pid_file(&self.bundle)).ok()).flatten()
    }

    /// Returns the pid of the init, 0 before there is one.
    pub(crate) fn pid(&self) -> i32 {
        self.lock().init.pid
    }

    /// Returns what changes when the init (empty name) or an exec ends.
    pub(crate) fn end_of(&self, exec_id: &str) -> Result<watch::Receiver<Option<Ended>>> {
        Ok(self.lock().process(exec_id)?.ended.subscribe())
    }

    /// Lists the container's processes; execs are named.
    pub(crate) async fn processes(&self) -> Result<Vec<api::ProcessInfo>> {
        let cgroup = self.lock().cgroup.clone();
        let pids = match cgroup {
            Some(cgroup) => cgroup.processes(),
            None => {
                let printed = self.run(Verb::Ps).await?;
                serde_json::from_slice(&printed).map_err(|source| ShimError::BadJson {
                    what: "the runtime's list of processes",
                    source,
                })?
            }
        };
        let state = self.lock();
        Ok(pids.into_iter().map(|pid| process_info(&state, pid)).collect())
    }

    /// Returns what the container has used.
    pub(crate) fn stats(&self) -> Result<Any> {
        let cgroup = self.lock().cgroup.clone().ok_or(ShimError::Unstarted)?;
        cgroup.metrics()
    }

    /// Tells a terminal its new size.
    pub(crate) fn resize(&self, exec_id: &str, columns: u16, rows: u16) -> Result<()> {
        let state = self.lock();
        let process = state.process(exec_id)?;
        if !exec_id.is_empty() && process.has_ended() {
            return Err(ShimError::WrongState { verb: "resize", state: "stopped", what: "container" });
        }
        process.streams.as_ref().map_or(Ok(()), |streams| streams.resize(columns, rows))
    }

    /// Closes a process's input.
    pub(crate) fn close_input(&self, exec_id: &str) -> Result<()> {
        if let Some(streams) = &self.lock().process(exec_id)?.streams {
            streams.close_input();
        }
        Ok(())
    }

    /// Signals the init (empty name), everything in the container (`all`), or an exec.
    pub(crate) async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let pid = {
            let state = self.lock();
            let process = state.process(exec_id)?;
            if !exec_id.is_empty() && process.pid == 0 {
                return Err(ShimError::NotCreated);
            }
            if process.has_ended() {
                return Err(ShimError::Finished);
            }
            let direct = !exec_id.is_empty() || self.reaches_directly(&state, all);
            (direct && process.pid != 0).then_some(process.pid)
        };
        if let Some(pid) = pid {
            return send_signal(pid, signal);
        }
        if self.stop_restoring(signal)? {
            return Ok(());
        }
        if self.lock().init.pid == 0 {
            return Err(ShimError::Unstarted);
        }
        self.runtime.run(Verb::Kill { signal, all }.into()).await.map(drop).map_err(kill_error)
    }

    /// Tells whether the kernel alone does what the runtime would: a signal to a frozen container must thaw
    /// it, and the end of an init without a pid namespace must take the others along.
    fn reaches_directly(&self, state: &State, all: bool) -> bool {
        !all && self.settings.own_pids && !matches!(state.phase, Phase::Paused | Phase::Pausing)
    }

    /// Ends a restore that is under way, if the signal is one that would end the container.
    fn stop_restoring(&self, signal: u32) -> Result<bool> {
        let group = self.restoring.load(Ordering::Acquire);
        if group == 0 || ![9, 15].contains(&signal) {
            return Ok(false);
        }
        godwit_sys::process::kill_group(group)
            .map_err(std::io::Error::other)
            .map_err(ShimError::io("stop the restore"))?;
        Ok(true)
    }

    /// Runs a verb beside whatever the actor is doing.
    pub(super) async fn run(&self, call: impl Into<Call>) -> Result<Vec<u8>> {
        self.runtime.run(call.into()).await
    }
}

fn process_info(state: &State, pid: u32) -> api::ProcessInfo {
    let mut info = api::ProcessInfo { pid, ..api::ProcessInfo::default() };
    let is_it = |process: &Process| u32::try_from(process.pid) == Ok(pid) && !process.has_ended();
    if let Some((exec_id, _)) = state.execs.iter().find(|(_, process)| is_it(process)) {
        let details = ProcessDetails { exec_id: exec_id.clone(), ..ProcessDetails::default() };
        if let Ok(value) = details.write_to_bytes() {
            let type_url = "containerd.runc.v1.ProcessDetails".to_owned();
            info.info = Some(Any { type_url, value, ..Any::default() }).into();
        }
    }
    info
}

/// The pid is that of a child of ours whose exit was not collected, so it is nobody else's.
fn send_signal(pid: i32, signal: u32) -> Result<()> {
    let number = i32::try_from(signal).unwrap_or(i32::MAX);
    match PidFd::open(pid).and_then(|process| process.send_signal(number)) {
        Ok(()) => Ok(()),
        Err(SysError::NoProcess { .. }) => Err(ShimError::Finished),
        Err(error) => {
            Err(ShimError::io(format!("send signal {signal} to {pid}"))(std::io::Error::other(error)))
        }
    }
}

/// Tells "already gone" from other failures by the runtime's words, as containerd's own shim does.
fn kill_error(error: ShimError) -> ShimError {
    let ShimError::Runtime { message, .. } = &error else { return error };
    let message = message.to_lowercase();
    if ["process already finished", "container not running", "no such process"]
        .iter()
        .any(|words| message.contains(words))
    {
        return ShimError::Finished;
    }
    if message.contains("does not exist") { ShimError::Unstarted } else { error }
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn a_runtime_that_finds_nobody_to_signal_means_gone() {
        let kill =
            |message: &str| kill_error(ShimError::Runtime { verb: "kill", message: message.to_owned() });
        assert!(matches!(kill("container not running"), ShimError::Finished));
        assert!(matches!(kill("os: process already finished"), ShimError::Finished));
        assert!(matches!(kill("No such process"), ShimError::Finished));
        assert!(matches!(kill("container does not exist"), ShimError::Unstarted));
        assert!(matches!(kill("permission denied"), ShimError::Runtime { .. }));
    }
}
