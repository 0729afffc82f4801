//! A stand-in for CRIU, for tests.
//!
//! It speaks the RPC from a thread: the test gives a closure that plays CRIU's part with [`Peer`] and gets the
//! session that talks to it.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::{JoinHandle, spawn};

use godwit_sys::fdpass;
use protobuf::{EnumOrUnknown, Message, MessageField};

use crate::rpc::{Criu_notify, Criu_req, Criu_req_type, Criu_resp, Criu_restore_resp};
use crate::session::Session;

/// CRIU's end of the conversation.
#[derive(Debug)]
pub struct Peer {
    socket: OwnedFd,
}

/// Starts a thread in which `part` plays CRIU; joining it yields what `part` returned.
///
/// # Panics
/// When no descriptor is left.
#[expect(clippy::expect_used, reason = "a test cannot go on without its peer")]
pub fn start<T: Send + 'static>(part: impl FnOnce(Peer) -> T + Send + 'static) -> (Session, JoinHandle<T>) {
    let (ours, theirs) = fdpass::seqpacket_pair().expect("a socket pair");
    (Session::over(ours), spawn(move || part(Peer { socket: theirs })))
}

impl Peer {
    /// Waits for the next request; `None` when the client is gone.
    pub fn request(&self) -> Option<Criu_req> {
        let mut buffer = vec![0; 64 * 1024];
        let received = fdpass::receive(&self.socket, &mut buffer).ok()?;
        Criu_req::parse_from_bytes(&buffer[..received.length_bytes]).ok()
    }

    /// Asks the client at point `script`; true when it wants CRIU to go on.
    pub fn notify(&self, script: &str, pid: Option<i32>, fd: Option<&OwnedFd>) -> bool {
        let notify = Criu_notify { script: Some(script.to_owned()), pid, ..Default::default() };
        self.send(
            &Criu_resp {
                type_: Some(EnumOrUnknown::new(Criu_req_type::NOTIFY)),
                success: Some(true),
                notify: MessageField::some(notify),
                ..Default::default()
            },
            fd,
        );
        self.request().is_some_and(|answer| answer.notify_success())
    }

    /// Ends the request.
    pub fn respond(&self, request: Criu_req_type, success: bool, cr_errno: i32, pid: Option<i32>) {
        let restore = pid.map(|pid| Criu_restore_resp { pid: Some(pid), ..Default::default() });
        self.send(
            &Criu_resp {
                type_: Some(EnumOrUnknown::new(request)),
                success: Some(success),
                cr_errno: (cr_errno != 0).then_some(cr_errno),
                restore: restore.into(),
                ..Default::default()
            },
            None,
        );
    }

    /// Sends `message` as it is.
    pub fn send(&self, message: &Criu_resp, fd: Option<&OwnedFd>) {
        if let Ok(bytes) = message.write_to_bytes() {
            self.send_bytes(&bytes, fd);
        }
    }

    /// Sends bytes that need not be a message.
    pub fn send_bytes(&self, bytes: &[u8], fd: Option<&OwnedFd>) {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        fdpass::send(&self.socket, bytes, &fds).ok();
    }
}
