//! Whether this host can take a container: a decision from what was observed, without looking at anything itself.
//!
//! All that is in the way is named at once, so that one dry run shows everything there is to repair.

use godwit_protocol::{
    offer::{NodeFacts, Offer},
    wire::{Reject, RejectCode},
};

/// What was observed on this host about an offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The host.
    pub facts: NodeFacts,
    /// What `criu check` said, if it found something missing.
    pub criu_complaint: Option<String>,
    /// Whether a container of that id exists in the namespace.
    pub container_exists: bool,
    /// Whether a snapshot of that key exists.
    pub snapshot_exists: bool,
    /// Snapshotters that work.
    pub snapshotters: Vec<String>,
    /// The binary that containerd will start for the runtime.
    pub shim: String,
    /// Whether it is in the path.
    pub shim_found: bool,
    /// Whether the container has a user namespace of its own.
    pub user_namespace: bool,
    /// Host paths that the container binds or joins and that do not exist.
    pub absent_paths: Vec<String>,
    /// Whether the layers are unpacked here already.
    pub parent_exists: bool,
    /// Digest that the image's name stands for here, if it is another image.
    pub other_image: Option<String>,
    /// Offered blobs that are not in the content store.
    pub missing: Vec<String>,
    /// Layers that are neither here nor offered.
    pub layers_nowhere: Vec<String>,
    /// Free space where the snapshotter keeps its files, in bytes, if it says where that is.
    pub disk_available_bytes: Option<u64>,
}

/// Decides about an offer.
///
/// # Errors
/// [`Reject`] with the code of the first thing in the way and the text of all.
pub fn judge(offer: &Offer, here: &Observed) -> Result<(), Reject> {
    let mut found = Vec::new();
    names(offer, here, &mut found);
    host(offer, here, &mut found);
    criu(offer, here, &mut found);
    containerd(offer, here, &mut found);
    room(offer, here, &mut found);
    let Some((code, _)) = found.first() else { return Ok(()) };
    let code = *code;
    let texts: Vec<String> = found.into_iter().map(|(_, text)| text).collect();
    Err(Reject::new(code, texts.join("; ")))
}

type Findings = Vec<(RejectCode, String)>;

fn names(offer: &Offer, here: &Observed, found: &mut Findings) {
    let (id, namespace) = (&offer.container.id, &offer.container.namespace);
    if here.container_exists {
        found.push((
            RejectCode::NameTaken,
            format!(
                "a container `{id}` exists there already: remove it with `ctr -n {namespace} containers rm {id}` \
                 or rename one of them"
            ),
        ));
    }
    if let Some(snapshot) = offer.container.snapshot.as_ref().filter(|_| here.snapshot_exists) {
        let (snapshotter, key) = (&offer.container.snapshotter, &snapshot.key);
        found.push((
            RejectCode::NameTaken,
            format!(
                "a snapshot `{key}` exists there already: remove it with \
                 `ctr -n {namespace} snapshots --snapshotter {snapshotter} rm {key}`"
            ),
        ));
    }
    if let (Some(image), Some(other)) = (&offer.container.image, &here.other_image) {
        found.push((
            RejectCode::NameTaken,
            format!(
                "the image name `{}` stands for another image there ({other}, here {}): give one of them another \
                 name with `ctr -n {namespace} images tag`, and remove this one",
                image.name, image.target.digest
            ),
        ));
    }
}

fn host(offer: &Offer, here: &Observed, found: &mut Findings) {
    let (source, target) = (&offer.source, &here.facts);
    let mut unfit = |text: String| found.push((RejectCode::Unfit, text));
    if source.arch != target.arch {
        unfit(format!(
            "the target's processor is {}, the container's programs are for {}: choose a host of the same kind",
            target.arch, source.arch
        ));
    }
    let lacking = lacking_instructions(&source.cpu_flags, &target.cpu_flags);
    if !lacking.is_empty() {
        unfit(format!(
            "the target's processor lacks instructions that the container's programs may have chosen to use ({}): \
             choose a host with a processor of the same or a later generation",
            lacking.join(" ")
        ));
    }
    if source.cgroup_version != target.cgroup_version {
        unfit(format!(
            "the target uses cgroup v{}, the source v{}: boot both with the same layout",
            target.cgroup_version, source.cgroup_version
        ));
    }
    if !here.absent_paths.is_empty() {
        unfit(format!(
            "the container binds or joins what does not exist there: {}; create it before the move",
            here.absent_paths.join(", ")
        ));
    }
}

fn criu(offer: &Offer, here: &Observed, found: &mut Findings) {
    let mut unfit = |text: String| found.push((RejectCode::Unfit, text));
    let Some(version) = &here.facts.criu else {
        unfit("there is no criu in the agent's PATH: install CRIU 4.1 or later".to_owned());
        return;
    };
    let number = version_number(version);
    if number < CRIU_MIN {
        unfit(format!("criu there is version {version}: install CRIU 4.1 or later"));
    }
    if let Some(source) = offer.source.criu.as_deref().filter(|source| version_number(source) > number) {
        unfit(format!(
            "criu there is version {version} and may not read the images of the source's {source}: install the \
             same version or a later one on the target"
        ));
    }
    if let Some(complaint) = &here.criu_complaint {
        unfit(format!("`criu check` fails there: {complaint}"));
    }
}

fn containerd(offer: &Offer, here: &Observed, found: &mut Findings) {
    let container = &offer.container;
    let mut unfit = |text: String| found.push((RejectCode::Unfit, text));
    if !here.snapshotters.contains(&container.snapshotter) {
        unfit(format!(
            "containerd there has no working snapshotter `{}` (it has {}): enable it in its configuration",
            container.snapshotter,
            here.snapshotters.join(", ")
        ));
    }
    if !here.shim_found {
        unfit(format!(
            "there is no `{}` in the agent's PATH, which runtime `{}` needs: install godwit's shim on the target, \
             where containerd finds it",
            here.shim, container.runtime.name
        ));
    }
    if !here.parent_exists && !here.layers_nowhere.is_empty() {
        unfit(format!(
            "neither host has the image layers {}: pull the image on one of them, containerd has discarded them \
             after unpacking",
            here.layers_nowhere.join(", ")
        ));
    }
}

fn room(offer: &Offer, here: &Observed, found: &mut Findings) {
    let available = here.facts.memory_available_bytes;
    let needed = memory_needed_bytes(offer.needs.memory_bytes);
    if available < needed {
        found.push((
            RejectCode::NoRoom,
            format!(
                "the target has {} of memory available and needs {}: twice the container's {}, because its images \
                 are held in memory until it is restored; free some",
                mib(available),
                mib(needed),
                mib(offer.needs.memory_bytes)
            ),
        ));
    }
    let blobs = offer.container.image.iter().flat_map(|image| &image.blobs);
    let missing_bytes = blobs
        .filter(|blob| here.missing.contains(&blob.digest))
        .fold(0, |sum: u64, blob| sum.saturating_add(blob.size));
    // Missing layers are stored compressed, and once more unpacked.
    let needed = missing_bytes.saturating_mul(UNPACKED_FACTOR).saturating_add(offer.needs.rootfs_bytes);
    if let Some(available) = here.disk_available_bytes.filter(|&available| available < needed) {
        found.push((
            RejectCode::NoRoom,
            format!(
                "the target has {} of disk for image and writable layer and needs about {}: free some",
                mib(available),
                mib(needed)
            ),
        ));
    }
}

/// Native mode holds the page images beside the memory they are restored into.
fn memory_needed_bytes(container_bytes: u64) -> u64 {
    container_bytes.saturating_mul(2).saturating_add(MEMORY_MARGIN_BYTES)
}

/// Returns the instruction sets of the source that the target lacks. Other flags (timers, mitigations) do not
/// concern programs.
fn lacking_instructions<'a>(source: &'a str, target: &str) -> Vec<&'a str> {
    let target: std::collections::BTreeSet<&str> = target.split_whitespace().collect();
    source
        .split_whitespace()
        .filter(|flag| INSTRUCTION_SETS.iter().any(|prefix| flag.starts_with(prefix)))
        .filter(|flag| !target.contains(flag))
        .collect()
}

/// Returns major and minor of a version, (0, 0) if there are none.
fn version_number(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

const CRIU_MIN: (u32, u32) = (4, 1);

const MEMORY_MARGIN_BYTES: u64 = 64 << 20;

const UNPACKED_FACTOR: u64 = 4;

/// Beginnings of the names of instruction sets that C libraries and runtimes choose code by.
const INSTRUCTION_SETS: &[&str] = &[
    "adx", "aes", "amx", "asimd", "avx", "bmi", "crc32", "f16c", "fma", "gfni", "lzcnt", "movbe", "movdir",
    "pclmul", "pmull", "popcnt", "rdrand", "rdseed", "sha", "sse", "ssse3", "sve", "vaes", "vpclmul",
    "xsave",
];

#[cfg(test)]
#[path = "preflight_tests.rs"]
mod tests;
#[cfg(test)]
pub(crate) use tests::offer as sample_offer;
