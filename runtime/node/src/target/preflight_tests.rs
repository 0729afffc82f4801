//! Every reason for which a target declines an offer, one at a time on an offer that is otherwise fine.

use godwit_protocol::{
    Mode,
    offer::{Blob, ContainerRecord, Descriptor, Image, Needs, Runtime, Snapshot, Stdio, TypedBytes},
    plan::Abilities,
    request,
};

use super::*;

fn facts() -> NodeFacts {
    NodeFacts {
        host: "a".to_owned(),
        arch: "x86_64".to_owned(),
        kernel: "6.12.1".to_owned(),
        criu: Some("4.1.1".to_owned()),
        godwit: "0.1.0".to_owned(),
        containerd: Some("1.7.24".to_owned()),
        cgroup_version: 2,
        cpu_flags: "fpu avx2 sse4_2 nonstop_tsc".to_owned(),
        memory_available_bytes: 4 << 30,
    }
}

pub(crate) fn offer() -> Offer {
    let digest = format!("sha256:{}", "a".repeat(64));
    Offer {
        migration: "m-1".to_owned().try_into().unwrap(),
        mode: Mode::Native,
        dry_run: false,
        keep: false,
        source: facts(),
        container: ContainerRecord {
            id: "web".to_owned(),
            namespace: "default".to_owned(),
            labels: Default::default(),
            image: Some(Image {
                name: "busybox:1".to_owned(),
                labels: Default::default(),
                target: Descriptor {
                    media_type: "m".to_owned(),
                    digest: digest.clone(),
                    size: 1,
                    annotations: Default::default(),
                },
                blobs: vec![Blob { digest, size: 1 << 20, labels: Default::default() }],
                absent: Vec::new(),
            }),
            runtime: Runtime { name: "io.containerd.godwit.v1".to_owned(), options: None },
            spec: TypedBytes::default(),
            snapshotter: "overlayfs".to_owned(),
            snapshot: Some(Snapshot {
                key: "web".to_owned(),
                parent: String::new(),
                labels: Default::default(),
            }),
            extensions: Default::default(),
            sandbox_id: None,
        },
        stdio: Stdio::default(),
        needs: Needs { memory_bytes: 1 << 30, rootfs_bytes: 1 << 20, tasks: 1 },
        abilities: Abilities::default(),
        images: request::Images::Cache,
        streams: 2,
    }
}

fn here() -> Observed {
    Observed {
        facts: facts(),
        criu_complaint: None,
        container_exists: false,
        snapshot_exists: false,
        snapshotters: vec!["native".to_owned(), "overlayfs".to_owned()],
        shim: "containerd-shim-godwit-v1".to_owned(),
        shim_found: true,
        user_namespace: false,
        absent_paths: Vec::new(),
        parent_exists: true,
        other_image: None,
        missing: Vec::new(),
        layers_nowhere: Vec::new(),
        disk_available_bytes: Some(1 << 30),
    }
}

#[test]
fn a_host_like_the_source_takes_the_container() {
    judge(&offer(), &here()).unwrap();
}

/// One row per thing that can be in the way: what is changed, the code, and a word that must be in the text.
#[test]
fn each_thing_in_the_way_is_named_with_its_code() {
    type Change = fn(&mut Observed);
    let table: &[(Change, RejectCode, &str)] = &[
        (|here| here.container_exists = true, RejectCode::NameTaken, "containers rm web"),
        (
            |here| here.snapshot_exists = true,
            RejectCode::NameTaken,
            "snapshots --snapshotter overlayfs rm web",
        ),
        (|here| here.other_image = Some("sha256:b".to_owned()), RejectCode::NameTaken, "busybox:1"),
        (|here| here.facts.arch = "aarch64".to_owned(), RejectCode::Unfit, "aarch64"),
        (|here| here.facts.cpu_flags = "fpu sse4_2".to_owned(), RejectCode::Unfit, "(avx2)"),
        (|here| here.facts.cgroup_version = 1, RejectCode::Unfit, "cgroup v1"),
        (|here| here.absent_paths = vec!["/data".to_owned()], RejectCode::Unfit, "/data"),
        (|here| here.facts.criu = None, RejectCode::Unfit, "no criu"),
        (|here| here.facts.criu = Some("3.17.1".to_owned()), RejectCode::Unfit, "3.17.1"),
        (|here| here.criu_complaint = Some("no ptrace".to_owned()), RejectCode::Unfit, "no ptrace"),
        (|here| here.snapshotters.truncate(1), RejectCode::Unfit, "`overlayfs`"),
        (|here| here.shim_found = false, RejectCode::Unfit, "containerd-shim-godwit-v1"),
        (|here| here.facts.memory_available_bytes = 2 << 30, RejectCode::NoRoom, "2112 MiB"),
    ];
    for (change, code, word) in table {
        let mut here = here();
        change(&mut here);
        let reject = judge(&offer(), &here).unwrap_err();
        assert_eq!(reject.code, *code as u16, "{word}");
        assert!(reject.detail.contains(word), "{}", reject.detail);
    }
}

#[test]
fn discarded_layers_matter_only_when_there_is_something_to_unpack() {
    let mut here = here();
    here.layers_nowhere = vec!["sha256:c".to_owned()];
    judge(&offer(), &here).unwrap();
    here.parent_exists = false;
    assert!(judge(&offer(), &here).unwrap_err().detail.contains("sha256:c"));
}

#[test]
fn disk_is_needed_for_what_is_missing_and_for_the_writable_layer() {
    let mut here = here();
    here.disk_available_bytes = Some(2 << 20);
    judge(&offer(), &here).unwrap();
    here.missing = vec![offer().container.image.unwrap().blobs[0].digest.clone()];
    let reject = judge(&offer(), &here).unwrap_err();
    assert_eq!(reject.code, RejectCode::NoRoom as u16);
    assert!(reject.detail.contains("2 MiB") && reject.detail.contains("5 MiB"), "{}", reject.detail);
    here.disk_available_bytes = None;
    judge(&offer(), &here).unwrap();
}

#[test]
fn an_older_criu_than_the_sources_is_refused_and_a_newer_one_is_not() {
    let (mut offer, mut here) = (offer(), here());
    offer.source.criu = Some("4.2".to_owned());
    assert!(judge(&offer, &here).unwrap_err().detail.contains("4.2"));
    here.facts.criu = Some("4.10.3".to_owned());
    judge(&offer, &here).unwrap();
}

#[test]
fn everything_in_the_way_is_told_at_once() {
    let mut here = here();
    here.container_exists = true;
    here.facts.memory_available_bytes = 0;
    let reject = judge(&offer(), &here).unwrap_err();
    assert_eq!(reject.code, RejectCode::NameTaken as u16);
    assert!(reject.detail.contains("containers rm") && reject.detail.contains("memory"));
}
