//! Source and agent against two real containerds, without a worker: everything up to the point at which CRIU
//! would take over, and the way back from there.
//!
//! Needs root. The containers run under containerd's own shim, which knows no incoming migrations, so every real
//! attempt fails at its last step: what is then left on the target is what these tests look at.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    thread,
    time::Duration,
};

use godwit_engine::Link;
use godwit_integration::{Bed, BedError, BedOptions, Node, Version, image::catalog::Image, skip::skip};
use godwit_node::{
    Containerd, NodeError, Source,
    agent::{Agent, Config},
    target::Arrival,
};
use godwit_protocol::{
    MigrationRequest,
    offer::{Accept, Offer},
    wire::{Message, Reject, RejectCode},
};

const SOCKET: &str = "/run/containerd/containerd.sock";

struct Scene {
    bed: Bed,
    agent: SocketAddr,
    attempts: u32,
    _directory: tempfile::TempDir,
}

impl Scene {
    /// A container `web` that runs on node a, and an agent in this process that works with node b's containerd.
    fn set(version: Version) -> Option<Self> {
        // The agent of this process looks for both where the process itself would.
        let programs = ["criu", "containerd-shim-runc-v2"];
        if !nix::unistd::geteuid().is_root() || !programs.into_iter().all(on_path) {
            skip("needs root, and criu and containerd-shim-runc-v2 in PATH");
            return None;
        }
        let name = format!("node-{}", version.as_str().replace('.', "-"));
        let bed = match Bed::up(BedOptions::for_test(&name).containerd(version)) {
            Err(BedError::Missing { tool, hint }) => {
                skip(&format!("{tool}: {hint}"));
                return None;
            }
            bed => bed.unwrap(),
        };
        let image = Image::busybox().unwrap();
        bed.a().import(&image.build().unwrap()).unwrap();
        bed.a()
            .ctr(["run", "-d", "--null-io", "--label", "x=y", &image.reference(), "web", "sleep", "1000"])
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let agent = Agent::bind(Config {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            containerd: bed.b().path(SOCKET),
            directory: directory.path().to_owned(),
        })
        .unwrap();
        let address = agent.address().unwrap();
        // It serves until the test's process ends.
        thread::spawn(move || agent.serve());
        Some(Self { bed, agent: address, attempts: 0, _directory: directory })
    }

    fn source(&self) -> Source {
        Source::open(&self.bed.a().path(SOCKET), "default", "web").unwrap()
    }

    fn offer(&mut self, dry_run: bool) -> Offer {
        self.attempts += 1;
        let request = MigrationRequest { dry_run, ..MigrationRequest::to_target("127.0.0.1").unwrap() };
        let migration = format!("attempt-{}", self.attempts).try_into().unwrap();
        self.source().offer(&request, migration).unwrap()
    }

    /// Makes an offer; returns the link on which it was accepted.
    fn make(&self, offer: Offer) -> Result<(Link, Accept), Reject> {
        let mut link = Link::connect("127.0.0.1", self.agent.port()).unwrap();
        link.send(&Message::Offer(Box::new(offer))).unwrap();
        let answer = match link.receive().unwrap() {
            Message::Accept(accept) => Ok(*accept),
            Message::Reject(reject) => Err(reject),
            other => panic!("{other:?}"),
        };
        answer.map(|accept| (link, accept))
    }

    fn send_blobs(&self, link: &mut Link, missing: &[String]) {
        let source = self.source();
        for digest in missing {
            let mut blob = Vec::new();
            let mut reader = source.containerd().open_blob(digest).unwrap();
            while let Some(piece) = reader.next_piece().unwrap() {
                blob.extend(piece);
            }
            link.send(&Message::Blob { digest, size: blob.len() as u64 }).unwrap();
            for piece in blob.chunks(100_000) {
                link.send(&Message::BlobData(piece)).unwrap();
            }
        }
        link.send(&Message::BlobsEnd).unwrap();
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Waits for the agent to give up and returns its reason.
fn rejection(link: &mut Link) -> Reject {
    loop {
        match link.receive().unwrap() {
            Message::Preparing(_) => {}
            Message::Reject(reject) => return reject,
            other => panic!("{other:?}"),
        }
    }
}

/// Waits until a node has what it had before.
fn await_contents(node: &Node, before: &[String]) {
    for _ in 0..200 {
        if contents(node) == before {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(contents(node), before);
}

/// Everything a migration can leave in a containerd.
fn contents(node: &Node) -> Vec<String> {
    let lists: [&[&str]; 6] = [
        &["containers", "ls", "-q"],
        &["tasks", "ls", "-q"],
        &["images", "ls", "-q"],
        &["snapshots", "ls"],
        &["content", "ls", "-q"],
        &["leases", "ls", "-q"],
    ];
    lists.iter().map(|list| node.ctr(list.iter()).unwrap()).collect()
}

#[test]
fn containerd_1_6_is_as_it_was_when_the_container_does_not_come() {
    run(Version::V1_6);
}

#[test]
fn containerd_1_7_is_as_it_was_when_the_container_does_not_come() {
    run(Version::V1_7);
}

#[test]
fn containerd_2_1_is_as_it_was_when_the_container_does_not_come() {
    run(Version::V2_1);
}

/// One bed for all of it: making one takes seconds.
fn run(version: Version) {
    let Some(mut scene) = Scene::set(version) else { return };
    let before = contents(scene.bed.b());

    a_dry_run_changes_nothing(&mut scene, &before);
    a_blob_with_the_wrong_content_is_refused(&mut scene, &before);
    a_source_that_vanishes_is_cleaned_up_after(&mut scene, &before);
    everything_is_made_and_taken_back(&mut scene, &before);
    the_next_agent_takes_back_what_a_killed_one_left(&mut scene, &before);
    a_name_that_is_taken_is_told(&mut scene);
    the_source_is_cleaned_up_once_and_again(&scene);
    scene.bed.down().unwrap();
}

fn a_dry_run_changes_nothing(scene: &mut Scene, before: &[String]) {
    let offer = scene.offer(true);
    assert_eq!(offer.container.labels.get("x").map(String::as_str), Some("y"));
    assert!(offer.needs.memory_bytes > 0 && offer.needs.tasks == 1);
    let blobs: Vec<String> =
        offer.container.image.iter().flat_map(|image| &image.blobs).map(|blob| blob.digest.clone()).collect();
    let (_, accept) = scene.make(offer).unwrap();
    assert_eq!(accept.missing, blobs);
    assert!(accept.target.containerd.is_some() && accept.target.criu.is_some());
    assert_eq!(contents(scene.bed.b()), before);
}

fn a_blob_with_the_wrong_content_is_refused(scene: &mut Scene, before: &[String]) {
    let offer = scene.offer(false);
    let blob = offer.container.image.as_ref().unwrap().blobs[0].clone();
    let (mut link, _) = scene.make(offer).unwrap();
    let size = usize::try_from(blob.size).unwrap();
    link.send(&Message::Blob { digest: &blob.digest, size: blob.size }).unwrap();
    link.send(&Message::BlobData(&vec![b' '; size])).unwrap();
    let reject = rejection(&mut link);
    assert_eq!(reject.code, RejectCode::BadBlob as u16, "{}", reject.detail);
    assert_eq!(contents(scene.bed.b()), before);
}

fn a_source_that_vanishes_is_cleaned_up_after(scene: &mut Scene, before: &[String]) {
    let offer = scene.offer(false);
    let (mut link, accept) = scene.make(offer).unwrap();
    scene.send_blobs(&mut link, &accept.missing);
    drop(link);
    await_contents(scene.bed.b(), before);
}

fn everything_is_made_and_taken_back(scene: &mut Scene, before: &[String]) {
    let offer = scene.offer(false);
    let (mut link, accept) = scene.make(offer).unwrap();
    scene.send_blobs(&mut link, &accept.missing);
    let reject = rejection(&mut link);
    // It came as far as the shim, which is not godwit's.
    assert!(reject.detail.contains("task"), "{}", reject.detail);
    assert_eq!(contents(scene.bed.b()), before, "{}", reject.detail);
}

fn the_next_agent_takes_back_what_a_killed_one_left(scene: &mut Scene, before: &[String]) {
    let directory = tempfile::tempdir().unwrap();
    let socket = scene.bed.b().path(SOCKET);
    let containerd = Containerd::connect(&socket, "default").unwrap();
    let mut arrival = Arrival::begin(containerd, scene.offer(false), directory.path()).unwrap();
    arrival.create_container().unwrap();
    // As if the process had been killed: nothing is dropped.
    std::mem::forget(arrival);
    assert_ne!(contents(scene.bed.b()), before);
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let config = Config { listen, containerd: socket, directory: directory.path().to_owned() };
    let next = Agent::bind(config.clone()).unwrap();
    await_contents(scene.bed.b(), before);
    assert!(matches!(Agent::bind(config), Err(NodeError::AgentRuns { .. })));
    drop(next);
}

fn a_name_that_is_taken_is_told(scene: &mut Scene) {
    let node = scene.bed.b();
    let image = Image::busybox().unwrap();
    node.import(&image.build().unwrap()).unwrap();
    node.ctr(["containers", "create", &image.reference(), "web"]).unwrap();
    let reject = scene.offer(true);
    let reject = scene.make(reject).map(|(_, accept)| accept).unwrap_err();
    assert_eq!(reject.code, RejectCode::NameTaken as u16);
    assert!(reject.detail.contains("containers rm web"), "{}", reject.detail);
    scene.bed.b().ctr(["containers", "rm", "web"]).unwrap();
    let offer = scene.offer(true);
    let (_, accept) = scene.make(offer).unwrap();
    assert!(accept.missing.is_empty());
}

fn the_source_is_cleaned_up_once_and_again(scene: &Scene) {
    let source = scene.source();
    let node = scene.bed.a();
    node.ctr(["tasks", "kill", "-s", "KILL", "web"]).unwrap();
    source.clean_up(true).unwrap();
    assert!(source.is_gone(true).unwrap() && !source.is_gone(false).unwrap());
    source.clean_up(false).unwrap();
    source.clean_up(false).unwrap();
    assert!(source.is_gone(false).unwrap());
    let snapshots = node.ctr(["snapshots", "ls"]).unwrap();
    assert!(!snapshots.contains("web"), "{snapshots}");
    assert!(!Path::new("/run/containerd/fifo").join("godwit-attempt-1").exists());
}
