//! Links over loopback sockets, and what a broken or hostile peer sends on one.

use std::net::TcpListener;
use std::thread;

use godwit_protocol::wire::{Reject, RejectCode};

use super::*;

/// A connected pair of sockets on the loopback.
fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn links() -> (Link, Link) {
    let (near, far) = sockets();
    let near = thread::spawn(move || Link::accept(near).unwrap());
    (Link::accept(far).unwrap(), near.join().unwrap())
}

#[test]
fn a_message_arrives_with_its_content_and_is_counted() {
    let (mut near, mut far) = links();
    let bytes = vec![7; 1 << 20];
    let sender = thread::spawn(move || {
        near.send(&Message::ImageData { index: 1, offset: 2, bytes: &bytes }).unwrap();
        near.send(&Message::Commit).unwrap();
        near.state()
    });
    match far.receive().unwrap() {
        Message::ImageData { index: 1, offset: 2, bytes } => assert_eq!(bytes, vec![7; 1 << 20]),
        other => panic!("{other:?}"),
    }
    assert_eq!(far.receive().unwrap(), Message::Commit);
    let sent = sender.join().unwrap();
    assert_eq!(sent.sent_bytes, far.state().received_bytes);
    assert_eq!((sent.send_seq, far.state().receive_seq), (2, 2));
    assert!(matches!(far.receive(), Err(LinkError::Closed)));
}

#[test]
fn a_link_changes_hands_between_two_frames_without_losing_one() {
    let (mut near, mut far) = links();
    near.send(&Message::BlobsEnd).unwrap();
    near.send(&Message::Received).unwrap();
    assert_eq!(far.receive().unwrap(), Message::BlobsEnd);
    let socket = TcpStream::from(far.as_fd().try_clone_to_owned().unwrap());
    let mut resumed = Link::resume(socket, far.state()).unwrap();
    drop(far);
    assert_eq!(resumed.receive().unwrap(), Message::Received);
    resumed.send(&Message::Restored).unwrap();
    assert_eq!(near.receive().unwrap(), Message::Restored);
}

#[test]
fn an_end_of_another_version_is_told_which_versions_there_are() {
    let (near, far) = sockets();
    let stranger = thread::spawn(move || {
        let hello = Hello::of(40, 41, 0);
        Link::greet(near, hello).unwrap_err().to_string()
    });
    let error = Link::accept(far).unwrap_err().to_string();
    assert!(error.contains("40 to 41"), "{error}");
    assert!(stranger.join().unwrap().contains("40 to 41"));
}

#[test]
fn a_stranger_and_a_silent_peer_are_errors() {
    let (mut near, far) = sockets();
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(matches!(Link::accept(far), Err(LinkError::Wire(WireError::NotGodwit { .. }))));

    let (_near, mut far) = links();
    far.set_silence_max(Some(Duration::from_millis(10))).unwrap();
    assert!(matches!(far.receive(), Err(LinkError::Silent { .. })));
}

#[test]
fn a_frame_that_breaks_off_or_is_damaged_is_an_error() {
    let reject = Message::Reject(Reject::new(RejectCode::NameTaken, "taken"));
    let mut head = Vec::new();
    let (kind, bulk) = reject.encode(&mut head).unwrap();
    let header = FrameHeader::seal(kind, 0, &head, bulk).unwrap().to_bytes();
    let frame = [&header[..], &head].concat();
    for cut in 1..frame.len() {
        let (near, mut far) = links();
        (&*near.send.socket).write_all(&frame[..cut]).unwrap();
        drop(near);
        assert!(matches!(far.receive(), Err(LinkError::Closed)), "{cut}");
    }
    let (near, mut far) = links();
    let mut damaged = frame;
    *damaged.last_mut().unwrap() ^= 1;
    (&*near.send.socket).write_all(&damaged).unwrap();
    assert!(matches!(far.receive(), Err(LinkError::Wire(WireError::BadChecksum { .. }))));
}

#[test]
fn a_broken_link_ends_a_receive_that_waits() {
    let (near, far) = links();
    let breaker = far.breaker();
    let (_send, mut receive) = far.split();
    let waiting = thread::spawn(move || receive.receive().map(|_| ()).unwrap_err());
    breaker.break_link();
    assert!(matches!(waiting.join().unwrap(), LinkError::Closed));
    drop(near);
}
