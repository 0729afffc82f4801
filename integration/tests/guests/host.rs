//! What a guest has beyond what `hack/guests` gives it: images, and a worker that can be denied system calls.

use std::fs;

use godwit_integration::NodeName;
use godwit_integration::guests::{Guest, Guests};
use godwit_integration::image::{Image, catalog};
use godwit_integration::suite::{Outcome, Trouble};
use godwit_integration::tools;

pub(super) fn prepare(guests: &Guests) -> Outcome {
    let dir = tempfile::tempdir().map_err(Trouble::io("make", "a directory"))?;
    let script = dir.path().join("godwit");
    fs::write(&script, WRAPPER).map_err(Trouble::io("write", &script))?;
    let workload = Image::of_program("workload", &tools::built()?.join("workload"))?;
    for name in NodeName::ALL {
        let guest = guests.guest(name);
        guest.put(&script, "/usr/local/bin/godwit")?;
        // A shim takes the `godwit` of its own directory, and containerd the first shim of its path.
        guest.sh("chmod 755 /usr/local/bin/godwit; cp /usr/bin/containerd-shim-godwit-v1 /usr/local/bin/")?;
        for image in ["busybox", "memhog", "redis"] {
            guest.import(&catalog::by_name(image)?)?;
        }
        guest.import(&workload)?;
    }
    Ok(())
}

/// Has a guest's workers of a source lack what `flags` of `workload deny` say.
pub(super) fn lack(guest: Guest<'_>, flags: &str) -> Outcome {
    guest.sh(&format!("echo '{flags}' >/run/lacks")).map(drop)
}

/// Returns what it lacks.
pub(super) fn lacks(guest: Guest<'_>) -> Result<String, Trouble> {
    guest.sh("cat /run/lacks 2>/dev/null || true")
}

pub(super) const NOTHING: &str = "";
/// Takes the better way of following writes from it.
pub(super) const NO_USERFAULTFD: &str = "--userfaultfd";
const WRAPPER: &str = r#"#!/bin/bash
if [[ " $* " == *" migrate-source "* ]]; then lacks=$(cat /run/lacks 2>/dev/null); fi
if [[ -n $lacks ]]; then exec workload deny $lacks -- /usr/bin/godwit "$@"; fi
exec /usr/bin/godwit "$@"
"#;
