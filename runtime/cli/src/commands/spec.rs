//! `godwit spec`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::error::{CliError, Result};

/// Write a config.json to start from
///
/// It runs sh on a terminal, with few capabilities, in namespaces of its own, on the root file system in
/// rootfs. An existing config.json is left alone.
#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// Directory to write it to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Refused: godwit needs root
    #[arg(long, hide = true)]
    rootless: bool,
}

impl Spec {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        if self.rootless {
            return Err(CliError::Usage("--rootless: godwit needs root; leave the option out".to_owned()));
        }
        let path = self.bundle.join("config.json");
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let mut file = file.map_err(|source| match source.kind() {
            std::io::ErrorKind::AlreadyExists => {
                CliError::Usage(format!("File {} exists. Remove it first", path.display()))
            }
            _ => CliError::Io { what: path.display().to_string(), source },
        })?;
        file.write_all(TEMPLATE.as_bytes()).map_err(CliError::io(path.display().to_string()))?;
        Ok(ExitCode::SUCCESS)
    }
}

const TEMPLATE: &str = include_str!("spec.json");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_a_spec() {
        let spec: oci_spec::runtime::Spec = serde_json::from_str(TEMPLATE).unwrap();
        let process = spec.process().clone().unwrap();
        assert_eq!((process.terminal(), process.no_new_privileges()), (Some(true), Some(true)));
        assert_eq!(spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap().len(), 6);
    }
}
