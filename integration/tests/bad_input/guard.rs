//! Disturbances of node b that end when they are dropped, so that a case that fails does not spoil the next.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};

use godwit_integration::Node;
use godwit_integration::node::{AGENT, AGENT_PORT};
use godwit_integration::suite::{Outcome, Stage, Trouble, await_that};
use godwit_integration::tools;
use nix::sys::signal::Signal;

/// What takes the room of a node's `/run`, and how much of it at a time.
const FILLER: &str = "/run/filler";
const FILLER_BLOCK_BYTES: usize = 1 << 20;

/// A peer on node b that is no agent.
#[derive(Debug)]
pub(super) struct FalseAgent<'a> {
    node: &'a Node,
    manner: &'static str,
}

impl<'a> FalseAgent<'a> {
    /// Starts one on `port`, of a manner that `workload peer` knows.
    pub(super) fn start(stage: &'a Stage, manner: &'static str, port: u16) -> Result<Self, Trouble> {
        let program = tools::built()?.join("workload").to_string_lossy().into_owned();
        let node = stage.b.node();
        node.start(manner, [program.as_str(), "peer", &port.to_string(), manner])?;
        let started = Self { node, manner };
        await_that("the peer listens", || node.listens(port))?;
        Ok(started)
    }
}

impl Drop for FalseAgent<'_> {
    fn drop(&mut self) {
        self.node.stop(self.manner, Signal::SIGKILL);
    }
}

/// Node b's agent, ended. It runs again as before when this is dropped.
#[derive(Debug)]
pub(super) struct AgentAway<'a> {
    node: &'a Node,
}

impl<'a> AgentAway<'a> {
    pub(super) fn on_b(stage: &'a Stage) -> Self {
        let node = stage.b.node();
        node.stop_agent(Signal::SIGTERM);
        Self { node }
    }

    /// Starts another in its place, which searches for programs in `path` alone.
    pub(super) fn replace_with_path(&self, path: &str) -> Outcome {
        let (path, listen) = (format!("PATH={path}"), format!("{}:{AGENT_PORT}", self.node.address()));
        self.node.start(AGENT, ["env", &path, "godwit", "agent", "--listen", &listen])?;
        await_that("the agent listens", || self.node.listens(AGENT_PORT))
    }
}

impl Drop for AgentAway<'_> {
    fn drop(&mut self) {
        self.node.stop_agent(Signal::SIGTERM);
        if let Err(error) = self.node.start_agent::<[&str; 0], _>([]) {
            eprintln!("failed to {error}");
        }
    }
}

/// Node b's `/run`, in which its containerd has its data here, made small. It is as large as before when this is
/// dropped.
#[derive(Debug)]
pub(super) struct SmallStorage<'a> {
    stage: &'a Stage,
}

impl<'a> SmallStorage<'a> {
    pub(super) fn with_free(stage: &'a Stage, free_bytes: u64) -> Result<Self, Trouble> {
        let run = stage.b.node().path("/run");
        let space = nix::sys::statvfs::statvfs(&run);
        let space = space.map_err(|errno| Trouble::io("look at", &run)(errno.into()))?;
        let used_bytes = (space.blocks() - space.blocks_free()) * space.fragment_size();
        let small = Self { stage };
        small.remount(&(used_bytes + free_bytes).to_string())?;
        Ok(small)
    }

    fn remount(&self, size: &str) -> Outcome {
        let option = format!("remount,size={size}");
        self.stage.b.command(&["mount", "-o", &option, "/run"])?.ok().map(drop)
    }

    /// Takes all the room that is left, but for a little that the node needs to say so.
    pub(super) fn fill(&self) -> Outcome {
        let path = self.stage.b.node().path(FILLER);
        let mut filler = File::create(&path).map_err(Trouble::io("make", &path))?;
        let block = vec![0; FILLER_BLOCK_BYTES];
        let mut filled_bytes = 0;
        loop {
            match filler.write(&block) {
                Ok(written) => filled_bytes += written as u64,
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(Trouble::io("fill", &path)(error)),
            }
        }
        let leaves = filled_bytes.saturating_sub(FILLER_BLOCK_BYTES as u64);
        filler.set_len(leaves).map_err(Trouble::io("shorten", &path))
    }
}

impl Drop for SmallStorage<'_> {
    fn drop(&mut self) {
        // There is none unless it was filled.
        fs::remove_file(self.stage.b.node().path(FILLER)).ok();
        // The size that a tmpfs has unless told another.
        if let Err(trouble) = self.remount("50%") {
            eprintln!("node b stays small: {trouble}");
        }
    }
}
