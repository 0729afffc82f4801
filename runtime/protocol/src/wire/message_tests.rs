//! Every message there and back, and messages that are malformed.

use proptest::prelude::*;

use super::*;
use crate::offer::{ContainerRecord, Needs, NodeFacts, Runtime, Stdio, TypedBytes};
use crate::plan::Abilities;
use crate::report::TargetMemory;
use crate::request::Mode;
use crate::rootfs::{Meta, Node};
use crate::wire::FrameHeader;
use crate::wire::pages::ROUND_LAST;

fn facts() -> NodeFacts {
    NodeFacts {
        host: "node-a".to_owned(),
        arch: "x86_64".to_owned(),
        kernel: "6.12.43".to_owned(),
        criu: Some("4.1.1".to_owned()),
        godwit: "0.1.0".to_owned(),
        containerd: None,
        cgroup_version: 2,
        cpu_flags: String::new(),
        memory_available_bytes: 1 << 30,
    }
}

fn offer() -> Offer {
    Offer {
        migration: "m-1".to_owned().try_into().unwrap(),
        mode: Mode::Native,
        images: crate::request::Images::Cache,
        dry_run: false,
        keep: true,
        source: facts(),
        container: ContainerRecord {
            id: "web".to_owned(),
            namespace: "default".to_owned(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            image: None,
            runtime: Runtime { name: "io.containerd.godwit.v1".to_owned(), options: None },
            spec: TypedBytes { type_url: "t".to_owned(), value: b"{}".to_vec() },
            snapshotter: "overlayfs".to_owned(),
            snapshot: None,
            extensions: [].into(),
            sandbox_id: None,
        },
        stdio: Stdio::default(),
        needs: Needs { memory_bytes: 1, rootfs_bytes: 2, tasks: 3 },
        abilities: Abilities { cannot_track: Some("no soft-dirty".to_owned()), ..Abilities::default() },
        streams: 3,
    }
}

fn every_message() -> Vec<Message<'static>> {
    let meta = Meta { mode: 0o4755, uid: 1, gid: u32::MAX - 1, mtime_s: -1, mtime_ns: 999_999_999 };
    let entry = |path: &'static [u8], node| {
        Message::RootfsEntry(Entry {
            path,
            node,
            meta,
            xattrs: vec![(b"user.a", b""), (b"security.b", b"c")],
        })
    };
    let abilities = Abilities { cannot_serve: Some("no userfaultfd".to_owned()), ..Abilities::default() };
    let accept = Accept { missing: vec!["sha256:0".to_owned()], target: facts(), abilities };
    vec![
        Message::Offer(Box::new(offer())),
        Message::Accept(Box::new(accept)),
        Message::Reject(Reject::new(RejectCode::NameTaken, "the name is taken")),
        Message::Blob { digest: "sha256:00", size: u64::MAX },
        Message::BlobData(b"data"),
        Message::BlobsEnd,
        Message::Preparing(Step::Snapshot),
        Message::Ready { room_bytes: 1 << 40 },
        Message::RootfsBegin { pass: Pass::Final, layer: Layer::Whole },
        entry(b"", Node::Directory { clear: true }),
        entry(b"a/b", Node::File { size: 1 }),
        entry(b"a", Node::Symlink { to: b"/../x" }),
        entry(b"a", Node::Hardlink { to: b"b" }),
        entry(b"a", Node::Fifo),
        entry(b"a", Node::Socket),
        entry(b"a", Node::CharDevice { major: 1, minor: 3 }),
        entry(b"a", Node::BlockDevice { major: 0, minor: 0 }),
        Message::RootfsData { offset: 4096, bytes: b"x" },
        Message::RootfsRemove { path: b"gone" },
        Message::RootfsEnd { pass: Pass::Live },
        Message::RootfsApplied { pass: Pass::Final },
        Message::ImageFile { index: 1, name: "pages-1.img" },
        Message::ImageData { index: 1, offset: 1 << 33, bytes: b"page" },
        Message::StateEnd { manifest: vec![Image { name: "pages-1.img", size: 4, crc: 5 }] },
        Message::Received,
        Message::Restored,
        Message::Commit,
        Message::Resumed(Resumed { pid: i32::MAX, cpu_us: 2, disk_bytes_written: 3 }),
        Message::Abort { detail: "no" },
        Message::FateQuery { migration: "m-1".to_owned().try_into().unwrap() },
        Message::FateAnswer(FateAnswer::Pending),
        Message::FateAnswer(FateAnswer::Filling),
        Message::FateAnswer(FateAnswer::Lost),
        Message::JoinStream { migration: "m-1".to_owned().try_into().unwrap(), stream: StreamId::Bulk(63) },
        Message::JoinStream { migration: "m-1".to_owned().try_into().unwrap(), stream: StreamId::Fault },
        Message::Rejoin { migration: "m-1".to_owned().try_into().unwrap() },
        Message::Pages { space: 1, runs: runs(), bytes: &[7; 3 * 4096] },
        Message::ZeroPages { space: i32::MAX, runs: runs() },
        Message::AbsentPages { space: 1, runs: runs() },
        Message::StreamMark { round: ROUND_LAST },
        Message::RoundReceived { round: 3 },
        Message::MemoryPlan { space: 1, round: 2, stored_pages: 1 << 40, remote: runs() },
        Message::PageRequest { space: 1, run: runs()[0] },
        Message::MemoryComplete(TargetMemory { peak_bytes: 5, ..TargetMemory::default() }),
        Message::Lacking { space: 1, runs: runs() },
        Message::LackingEnd,
    ]
}

fn runs() -> Vec<Run> {
    vec![Run { start: 0x7f00_0000_0000, pages: 1 }, Run { start: 0x7f00_0000_2000, pages: 2 }]
}

fn payload(message: &Message<'_>) -> (Kind, Vec<u8>) {
    let mut head = Vec::new();
    let (kind, bulk) = message.encode(&mut head).unwrap();
    head.extend_from_slice(bulk);
    (kind, head)
}

#[test]
fn every_message_reads_back_the_same_and_fits_its_kind() {
    let messages = every_message();
    for message in &messages {
        let (kind, bytes) = payload(message);
        assert_eq!(kind, message.kind());
        assert_eq!(&Message::decode(kind, &bytes).unwrap(), message);
        assert!(bytes.len() <= kind.payload_len_max() as usize);
    }
    for kind in Kind::ALL {
        assert!(messages.iter().any(|message| message.kind() == *kind), "no example of {kind:?}");
        assert_eq!(Kind::try_from(kind.code()).unwrap(), *kind);
    }
}

#[test]
fn a_payload_cut_short_or_with_a_tail_is_refused() {
    for message in every_message() {
        let (kind, mut bytes) = payload(&message);
        let bulk = matches!(kind, Kind::BlobData | Kind::RootfsData | Kind::ImageData);
        for len in 0..bytes.len() {
            // Content has no end of its own: the frame's length is its end.
            assert!(Message::decode(kind, &bytes[..len]).is_err() || (bulk && len > 0), "{kind:?} at {len}");
        }
        bytes.push(b'!');
        assert!(Message::decode(kind, &bytes).is_err() || bulk, "{kind:?} with a tail");
    }
}

#[test]
fn the_largest_legal_fields_fit_their_frames() {
    let path = vec![b'x'; 255];
    let big = vec![0; 65_536];
    let entry = Entry {
        path: &path,
        node: Node::File { size: 0 },
        meta: Meta::default(),
        xattrs: (0..60).map(|_| (b"user.x".as_slice(), big.as_slice())).collect(),
    };
    let data = vec![0; DATA_LEN_MAX];
    let manifest = vec![Image { name: "pages-4294967295.img", size: 0, crc: 0 }; IMAGES_MAX];
    for message in [
        Message::RootfsEntry(entry),
        Message::ImageData { index: 0, offset: 0, bytes: &data },
        Message::StateEnd { manifest },
    ] {
        let mut head = Vec::new();
        let (kind, bulk) = message.encode(&mut head).unwrap();
        FrameHeader::seal(kind, 0, &head, bulk).unwrap();
    }
}

#[test]
fn what_could_lead_out_of_the_root_or_deceive_the_overlay_is_refused() {
    let meta = Meta::default();
    let refused = |path: &'static [u8], node, xattrs: Vec<(&'static [u8], &'static [u8])>| {
        let (kind, bytes) = payload(&Message::RootfsEntry(Entry { path, node, meta, xattrs }));
        Message::decode(kind, &bytes).unwrap_err();
    };
    refused(b"../etc/passwd", Node::Fifo, vec![]);
    refused(b"/etc/passwd", Node::Fifo, vec![]);
    refused(b"a", Node::Hardlink { to: b"../../shadow" }, vec![]);
    refused(b"", Node::Symlink { to: b"/" }, vec![]);
    refused(b"a", Node::CharDevice { major: 0, minor: 0 }, vec![]);
    refused(b"a", Node::Fifo, vec![(b"trusted.overlay.redirect", b"/x")]);
    for (kind, bytes) in [
        payload(&Message::RootfsRemove { path: b"" }),
        payload(&Message::ImageFile { index: 0, name: "../x" }),
        payload(&Message::ImageFile { index: 0, name: ".hidden" }),
    ] {
        Message::decode(kind, &bytes).unwrap_err();
    }
}

#[test]
fn runs_that_are_not_pages_of_a_user_are_refused() {
    let bad = [
        vec![Run { start: 1, pages: 1 }],
        vec![Run { start: 4096, pages: 0 }],
        vec![Run { start: 1 << 56, pages: 1 }],
        vec![Run { start: (1 << 56) - 4096, pages: 2 }],
        vec![Run { start: 8192, pages: 2 }, Run { start: 12_288, pages: 1 }],
        vec![Run { start: 8192, pages: 1 }, Run { start: 4096, pages: 1 }],
    ];
    for runs in bad {
        let (kind, bytes) = payload(&Message::AbsentPages { space: 1, runs: runs.clone() });
        assert!(Message::decode(kind, &bytes).is_err(), "{runs:?}");
    }
    for space in [0, i32::MIN] {
        let (kind, bytes) = payload(&Message::ZeroPages { space, runs: runs() });
        Message::decode(kind, &bytes).unwrap_err();
    }
    let (kind, bytes) = payload(&Message::Pages { space: 1, runs: runs(), bytes: &[0; 2 * 4096] });
    Message::decode(kind, &bytes).unwrap_err();
}

proptest! {
    #[test]
    fn no_payload_makes_the_decoder_panic(kind in 0..Kind::ALL.len(), bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        drop(Message::decode(Kind::ALL[kind], &bytes));
    }

    #[test]
    fn no_damaged_message_makes_the_decoder_panic(which in 0..every_message().len(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let (kind, mut bytes) = payload(&every_message()[which]);
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        drop(Message::decode(kind, &bytes));
    }
}
