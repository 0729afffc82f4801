//! The event thread: CRIU's messages, faults, and changes of address spaces.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use godwit_sys::SysError;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::handover::{self, Message, SOCKET_NAME};
use super::origin::Origin;
use super::server::{Filling, Shared, call};
use super::space::Space;
use crate::{MemoryError, Result};

/// The event thread.
pub(super) struct Events {
    shared: Arc<Shared>,
    epoll: Epoll,
    listener: Option<UnixListener>,
    criu: Option<UnixStream>,
    next_key: u64,
    /// Spaces with faults that could not be answered yet.
    retry: Vec<u64>,
}

impl Events {
    pub(super) fn new(shared: Arc<Shared>, listener: UnixListener) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(call("epoll_create1"))?;
        let readable = |key| EpollEvent::new(EpollFlags::EPOLLIN, key);
        epoll.add(&shared.doorbell, readable(DOORBELL)).map_err(call("epoll_ctl"))?;
        epoll.add(&listener, readable(LISTENER)).map_err(call("epoll_ctl"))?;
        Ok(Self { shared, epoll, listener: Some(listener), criu: None, next_key: SPACES, retry: Vec::new() })
    }

    pub(super) fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let timeout = self.timeout();
            let count = match self.epoll.wait(&mut ready, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(errno) => return self.shared.fail(SysError::Call { call: "epoll_wait", errno }.into()),
            };
            if count == 0 {
                self.look_for_exits();
            }
            let mut keys: Vec<u64> = std::mem::take(&mut self.retry);
            keys.extend(ready[..count].iter().map(EpollEvent::data));
            for key in keys {
                if let Err(error) = self.handle(key) {
                    self.shared.fail(error);
                }
            }
            if self.finish() {
                return;
            }
        }
    }

    fn handle(&mut self, key: u64) -> Result<()> {
        match key {
            DOORBELL => {
                // Only that it rang matters.
                let _rings = self.shared.doorbell.read();
                let state = self.shared.lock();
                let kept = state.spaces.iter().filter(|(_, space)| space.has_kept()).map(|(key, _)| *key);
                self.retry.extend(kept);
                Ok(())
            }
            LISTENER => self.accept(),
            CRIU => self.hear(),
            key => self.serve(key),
        }
    }

    fn accept(&mut self) -> Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let (criu, _) = listener.accept().map_err(MemoryError::file(SOCKET_NAME))?;
        criu.set_read_timeout(Some(HEAR_LIMIT)).map_err(MemoryError::file(SOCKET_NAME))?;
        self.epoll.add(&criu, EpollEvent::new(EpollFlags::EPOLLIN, CRIU)).map_err(call("epoll_ctl"))?;
        self.criu = Some(criu);
        Ok(())
    }

    fn hear(&mut self) -> Result<()> {
        let Some(criu) = self.criu.as_mut() else { return Ok(()) };
        match handover::receive(criu) {
            Ok(Message::Task { pid, faults }) => {
                let (source, requester) = (self.shared.source.clone(), self.shared.requester.clone());
                let mut state = self.shared.lock();
                // One step to whoever reports what arrives: planned, or handed over.
                let ledger = state.plan.remove(&pid).unwrap_or_default();
                let origin = Origin::new(pid, source, requester);
                state.origins.insert(pid, Arc::downgrade(&origin));
                let space = Space::new(origin, faults, ledger);
                drop(state);
                self.add(space)
            }
            Ok(Message::Zombie) => Ok(()),
            Ok(Message::Restored) => {
                let mut state = self.shared.lock();
                (state.restored, state.filling) = (true, Filling::All);
                let missing = std::mem::take(&mut state.plan);
                drop(state);
                self.shared.changed.notify_all();
                match missing.into_iter().find(|(_, ledger)| ledger.outstanding() > 0) {
                    None => Ok(()),
                    Some((pid, ledger)) => Err(MemoryError::Plan {
                        pid,
                        what: format!("{} pages, but criu restored no such process", ledger.outstanding()),
                    }),
                }
            }
            Ok(Message::Closed) => {
                self.criu = None;
                if self.shared.lock().restored {
                    return Ok(());
                }
                Err(MemoryError::Protocol { what: "closed before all was restored".to_owned() })
            }
            Err(error) => {
                // What follows cannot be understood.
                self.criu = None;
                Err(error)
            }
        }
    }

    fn add(&mut self, space: Arc<Space>) -> Result<()> {
        let key = self.next_key;
        self.next_key += 1;
        if let Some(keeper) = &self.shared.keeper {
            let kept = space.faults.as_fd().try_clone_to_owned().map_err(MemoryError::file("userfaultfd"));
            if let Err(error) = kept.and_then(|fd| keeper.keep(key, space.pid(), fd)) {
                self.shared.fail(error);
            }
        }
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, key);
        self.epoll.add(space.faults.as_fd(), readable).map_err(call("epoll_ctl"))?;
        let mut state = self.shared.lock();
        state.spaces_seen += 1;
        state.spaces.insert(key, space);
        drop(state);
        self.shared.changed.notify_all();
        // A fault may have come before the descriptor was watched, which reports it all the same; a child's
        // may have been kept by nobody.
        self.serve(key)
    }

    fn serve(&mut self, key: u64) -> Result<()> {
        let Some(space) = self.shared.lock().spaces.get(&key).cloned() else { return Ok(()) };
        self.shared.saw_fault();
        let (children, mut answer) = space.serve(&self.shared.service);
        if space.has_kept() {
            self.retry.push(key);
        }
        for child in children {
            let added = self.add(child);
            answer = answer.and(added);
        }
        answer
    }

    /// A moment while something is to be tried again; a little while there are remote pages, since a space whose
    /// pages do not come is not seen to exit otherwise.
    fn timeout(&self) -> EpollTimeout {
        let has_remote = || self.shared.lock().spaces.values().any(|space| space.remote() > 0);
        match self.retry.is_empty() {
            false => EpollTimeout::from(1_u8),
            true if has_remote() => EpollTimeout::from(EXIT_CHECK_MS),
            true => EpollTimeout::NONE,
        }
    }

    fn look_for_exits(&self) {
        let spaces: Vec<Arc<Space>> = self.shared.lock().spaces.values().cloned().collect();
        for space in spaces.iter().filter(|space| space.remote() > 0) {
            if let Err(error) = space.check_alive() {
                self.shared.fail(error);
            }
        }
    }

    /// Lets go of what is complete; true when the thread has nothing more to do.
    fn finish(&mut self) -> bool {
        let mut state = self.shared.lock();
        if state.stopping {
            return true;
        }
        if !state.restored {
            return false;
        }
        let keys: Vec<u64> =
            state.spaces.iter().filter(|(_, space)| space.outstanding() == 0).map(|(key, _)| *key).collect();
        let complete: Vec<(u64, Arc<Space>)> =
            keys.into_iter().filter_map(|key| Some((key, state.spaces.remove(&key)?))).collect();
        drop(state);
        // Outside the lock: letting go of a space tells others about it.
        for (key, space) in complete {
            if let Err(errno) = self.epoll.delete(space.faults.as_fd()) {
                log::debug!("userfaultfd of process {}: {errno}", space.pid());
            }
            close(space);
            if let Some(keeper) = &self.shared.keeper {
                keeper.release(key);
            }
        }
        // A fork may still be on its way while a space is there, not afterwards.
        let mut state = self.shared.lock();
        state.drained = state.spaces.is_empty();
        let is_drained = state.drained;
        drop(state);
        if is_drained {
            self.shared.changed.notify_all();
        }
        is_drained && self.criu.is_none()
    }
}

/// Lets go of a space that nobody can find any more, so that its userfaultfd is closed when this returns.
///
/// A fill thread may have its hands on it for a moment; whoever touched a page never filled would find a descriptor
/// without a reader meanwhile.
fn close(mut space: Arc<Space>) {
    loop {
        match Arc::try_unwrap(space) {
            Ok(space) => return drop(space),
            Err(shared) => space = shared,
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

const DOORBELL: u64 = 0;
const LISTENER: u64 = 1;
const CRIU: u64 = 2;
const SPACES: u64 = 16;
/// For the rest of a message whose first byte is there.
const HEAR_LIMIT: Duration = Duration::from_secs(10);
const EXIT_CHECK_MS: u8 = 100;
