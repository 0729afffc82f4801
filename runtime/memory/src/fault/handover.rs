//! What CRIU says on its lazy-pages socket.
//!
//! Per task an `int`: the id it has in the container's pid namespace; negated for a zombie, to which nothing
//! more belongs; else one byte follows that carries the userfaultfd. At the end the magic "restored" number,
//! when all tasks are ready to go on; CRIU closes the socket then. All of it comes from a program that may
//! have gone wrong: anything else is an error.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use godwit_sys::fdpass;
use godwit_sys::userfaultfd::Userfaultfd;

use crate::{MemoryError, Result};

/// The name CRIU looks for in its working directory.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// One message.
#[derive(Debug)]
pub(super) enum Message {
    /// A task's page faults.
    Task { pid: i32, faults: Userfaultfd },
    /// A task without memory.
    Zombie,
    /// Every task is restored.
    Restored,
    /// The socket was closed.
    Closed,
}

/// Reads the next message; blocks for as long as the socket's time limit says.
pub(super) fn receive(socket: &mut UnixStream) -> Result<Message> {
    let strange = |what: String| MemoryError::Protocol { what };
    let mut word = [0; 4];
    let mut length = 0;
    while length < word.len() {
        match socket.read(&mut word[length..]) {
            Ok(0) if length == 0 => return Ok(Message::Closed),
            Ok(0) => return Err(strange("ended within a number".into())),
            Ok(read) => length += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(strange(error.to_string())),
        }
    }
    match i32::from_ne_bytes(word) {
        RESTORED => Ok(Message::Restored),
        ..0 => Ok(Message::Zombie),
        0 => Err(strange("process 0".into())),
        pid => {
            let received = fdpass::receive(&*socket, &mut [0; 1])?;
            let [fd] = <[OwnedFd; 1]>::try_from(received.fds)
                .map_err(|fds| strange(format!("{} descriptors for process {pid}", fds.len())))?;
            Ok(Message::Task { pid, faults: Userfaultfd::from_fd(fd) })
        }
    }
}

/// "RSTF"
const RESTORED: i32 = 0x5253_5446;

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_sequence_of_a_restore_is_read() {
        let (mut ours, mut criu) = UnixStream::pair().unwrap();
        criu.write_all(&7_i32.to_ne_bytes()).unwrap();
        fdpass::send(&criu, &[0], &[ours.as_fd()]).unwrap();
        criu.write_all(&(-9_i32).to_ne_bytes()).unwrap();
        criu.write_all(&RESTORED.to_ne_bytes()).unwrap();
        drop(criu);
        assert!(matches!(receive(&mut ours).unwrap(), Message::Task { pid: 7, .. }));
        assert!(matches!(receive(&mut ours).unwrap(), Message::Zombie));
        assert!(matches!(receive(&mut ours).unwrap(), Message::Restored));
        assert!(matches!(receive(&mut ours).unwrap(), Message::Closed));
    }

    #[test]
    fn what_criu_would_not_send_is_an_error() {
        for bytes in [&[0, 0, 0, 0][..], &[1, 0], &[1, 0, 0, 0, 0]] {
            let (mut ours, mut criu) = UnixStream::pair().unwrap();
            criu.write_all(bytes).unwrap();
            drop(criu);
            let answer = receive(&mut ours);
            assert!(matches!(answer, Err(MemoryError::Protocol { .. })), "{bytes:?}: {answer:?}");
        }
    }
}
