//! What happens when a process of the container ends.

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskExit;
use tokio::sync::oneshot;

use super::{Container, Phase};
use crate::{reaper::Exit, stdio::Streams, verb::Verb};

/// SIGKILL.
const KILL: u32 = 9;

impl Container {
    /// Waits for the end of the init in a task of its own.
    pub(super) fn watch_init(self: &Arc<Self>, ended: oneshot::Receiver<Exit>) {
        let container = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(exit) = ended.await {
                container.init_ended(exit).await;
            }
        });
    }

    /// Waits for the end of an exec in a task of its own.
    pub(super) fn watch_exec(self: &Arc<Self>, exec_id: String, ended: oneshot::Receiver<Exit>) {
        let container = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(exit) = ended.await {
                container.exec_ended(&exec_id, exit).await;
            }
        });
    }

    async fn exec_ended(&self, exec_id: &str, exit: Exit) {
        self.wait_for_readers(exec_id).await;
        {
            let mut state = self.lock();
            state.running_execs -= 1;
            if let Ok(process) = state.process(exec_id) {
                process.end(exit.status, Some(exit.at));
            }
        }
        self.publish_exit(exec_id, exit);
        self.exec_ended.notify_waiters();
    }

    pub(super) async fn init_ended(&self, exit: Exit) {
        {
            let mut state = self.lock();
            if state.init.has_ended() {
                return;
            }
            state.init_ended = true;
            if state.starting {
                // Published by the start, after its own event.
                state.deferred_exit = Some(exit);
                return;
            }
        }
        if !self.settings.own_pids
            && let Err(error) = self.run(Verb::Kill { signal: KILL, all: true }).await
        {
            log::debug!("{}: failed to kill what the init left behind: {error}", self.id);
        }
        self.wait_for_execs().await;
        self.wait_for_readers("").await;
        let was_paused = self.lock().phase == Phase::Paused;
        if was_paused && let Err(error) = self.run(Verb::Resume).await {
            log::warn!("{}: failed to thaw after the init ended: {error}", self.id);
        }
        {
            let mut state = self.lock();
            state.phase = Phase::Stopped;
            state.oom = None;
            state.init.end(exit.status, Some(exit.at));
        }
        self.publish_exit("", exit);
    }

    /// What a process wrote last is read before its end is told.
    async fn wait_for_readers(&self, exec_id: &str) {
        let unread = {
            let state = self.lock();
            let process = state.process(exec_id).ok();
            process.and_then(|process| process.streams.as_ref()).map(Streams::unread)
        };
        if let Some(unread) = unread {
            unread.none_left().await;
        }
    }

    /// The init's exit is the last one published.
    async fn wait_for_execs(&self) {
        loop {
            let ended = self.exec_ended.notified();
            if self.lock().running_execs == 0 {
                return;
            }
            ended.await;
        }
    }

    fn publish_exit(&self, exec_id: &str, exit: Exit) {
        let id = if exec_id.is_empty() { &self.id } else { exec_id };
        self.shared.events.publish(&TaskExit {
            container_id: self.id.clone(),
            id: id.to_owned(),
            pid: exit.pid.unsigned_abs(),
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..TaskExit::default()
        });
    }
}
