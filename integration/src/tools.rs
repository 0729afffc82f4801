//! Where the programs that a bed runs are.
//!
//! Everything `hack/setup` fetches or builds is in one cache directory outside the source tree:
//! `criu/sbin/criu`, `containerd/VERSION/bin/{containerd,ctr,containerd-shim-runc-v2}`, `runc/bin/runc`,
//! `images/` and the build directory `target/`. CRIU and runc are there only when the machine has none of its
//! own that will do.

use std::env;
use std::path::{Path, PathBuf};

use crate::containerd::Version;
use crate::error::{BedError, Result};

/// Returns the cache directory: `$GODWIT_CACHE`, else `godwit` in the user's own cache directory.
#[must_use]
pub fn cache() -> PathBuf {
    let dir = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    dir("GODWIT_CACHE")
        .or_else(|| Some(dir("XDG_CACHE_HOME")?.join("godwit")))
        .or_else(|| Some(dir("HOME")?.join(".cache/godwit")))
        .unwrap_or_else(|| PathBuf::from("/var/cache/godwit"))
}

/// Returns the directory below which beds keep their files: `$GODWIT_TESTBED_DIR`, else a fixed one.
#[must_use]
pub fn state() -> PathBuf {
    env::var_os("GODWIT_TESTBED_DIR").map_or_else(|| PathBuf::from("/var/lib/godwit-testbed"), PathBuf::from)
}

/// Returns the directory that holds the binaries of this build.
///
/// # Errors
/// [`BedError::Missing`] when neither `$GODWIT_BIN` nor the place of the running program tells.
pub fn built() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("GODWIT_BIN") {
        return Ok(PathBuf::from(dir));
    }
    // The running program is `target/debug/testbed` or a test, `target/debug/deps/NAME-HASH`.
    let program = env::current_exe().map_err(BedError::io("read", "/proc/self/exe"))?;
    let dir = program.parent().unwrap_or_else(|| Path::new("/"));
    if dir.ends_with("deps") {
        return Ok(dir.parent().unwrap_or(dir).to_path_buf());
    }
    Ok(dir.to_path_buf())
}

/// Returns the directory of one containerd's programs.
///
/// # Errors
/// [`BedError::Missing`] when this version is not installed.
pub fn containerd(version: Version) -> Result<PathBuf> {
    let dir = cache().join("containerd").join(version.as_str()).join("bin");
    if dir.join("containerd").exists() {
        return Ok(dir);
    }
    Err(BedError::Missing {
        tool: format!("containerd {version}"),
        hint: format!("not in {}; hack/setup installs it", dir.display()),
    })
}

/// Returns the search path for programs in a node: `first`, this build's binaries (by way of `links`, the
/// bed's own directory), CRIU and runc, the chosen containerd, and the machine's.
///
/// # Errors
/// As [`containerd`].
pub fn search_path(first: &[PathBuf], links: &Path, version: Version) -> Result<String> {
    let mut dirs: Vec<PathBuf> = first.to_vec();
    dirs.push(links.to_path_buf());
    for dir in ["criu/sbin", "runc/bin"] {
        dirs.extend(Some(cache().join(dir)).filter(|dir| dir.exists()));
    }
    dirs.push(containerd(version)?);
    dirs.extend(SYSTEM.iter().map(PathBuf::from));
    let dirs: Vec<_> = dirs.iter().map(|dir| dir.to_string_lossy().into_owned()).collect();
    Ok(dirs.join(":"))
}

const SYSTEM: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
