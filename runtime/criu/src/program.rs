//! The CRIU binary.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::failure::{CriuError, Result};

/// A version as `criu --version` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The 4 of 4.1.1.
    pub major: u32,
    /// The first 1 of 4.1.1.
    pub minor: u32,
    /// The second 1 of 4.1.1.
    pub sublevel: u32,
}

impl Version {
    /// Older ones fail on kernels from 6.13 on, whose vDSO has another layout.
    pub const MINIMUM: Self = Self { major: 4, minor: 1, sublevel: 0 };
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)?;
        if self.sublevel > 0 {
            write!(formatter, ".{}", self.sublevel)?;
        }
        Ok(())
    }
}

/// Where `criu` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    path: PathBuf,
}

/// What `criu check` says about this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// True when CRIU finds everything it needs.
    pub ok: bool,
    /// Its lines, complaints first.
    pub lines: Vec<String>,
}

impl Program {
    /// Looks for `criu` along `PATH`.
    ///
    /// # Errors
    /// [`CriuError::NotFound`]. The version is checked when a session starts.
    pub fn find() -> Result<Self> {
        // A daemon may have been started with no PATH at all.
        let path =
            std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/sbin:/usr/bin:/sbin:/bin"));
        std::env::split_paths(&path)
            .map(|directory| directory.join("criu"))
            .find(|candidate| is_executable(candidate))
            .map(|path| Self { path })
            .ok_or_else(|| CriuError::NotFound { path: path.to_string_lossy().into_owned() })
    }

    /// Names a binary that need not be on the search path.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Path of the binary.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `criu check`. Takes about 100 ms.
    ///
    /// # Errors
    /// [`CriuError::Spawn`].
    pub fn check(&self) -> Result<Check> {
        let output = Command::new(&self.path)
            .arg("check")
            .stdin(Stdio::null())
            .output()
            .map_err(|source| CriuError::Spawn { path: self.path.clone(), source })?;
        let text = [&output.stderr[..], &output.stdout[..]].map(String::from_utf8_lossy).concat();
        let lines = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
        Ok(Check { ok: output.status.success(), lines })
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_and_print_like_criu_does() {
        let old = Version { major: 3, minor: 17, sublevel: 1 };
        assert!(old < Version::MINIMUM);
        assert!(Version { major: 4, minor: 1, sublevel: 1 } > Version::MINIMUM);
        assert_eq!(old.to_string(), "3.17.1");
        assert_eq!(Version::MINIMUM.to_string(), "4.1");
    }
}
