//! Writing an image as an OCI archive.
//!
//! The archive is an OCI image layout in a tar file: `oci-layout`, `index.json` and `blobs/sha256/DIGEST`.
//! Layers are plain tar, without compression: they are read back at once on the same machine.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::files::{Entry, Files};
use crate::error::{BedError, Result};

/// What a container of the image runs unless told otherwise.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The command line.
    pub command: Vec<String>,
}

/// Writes the image `name` (such as `localhost/busybox:latest`) to `path`.
///
/// # Errors
/// [`BedError::Io`] when a file of the image cannot be read or the archive not be written.
pub fn write(path: &Path, name: &str, layers: &[Files], config: &Config) -> Result<()> {
    // Under another name until it is whole: another process may be looking for it.
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    write_archive(&partial, name, layers, config).map_err(BedError::io("write image", path)).inspect_err(
        |_| {
            drop(fs::remove_file(&partial));
        },
    )?;
    fs::rename(&partial, path).map_err(BedError::io("write image", path))
}

fn write_archive(path: &Path, name: &str, layers: &[Files], config: &Config) -> io::Result<()> {
    let mut archive = tar::Builder::new(BufWriter::new(File::create(path)?));
    let mut layer_descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    for files in layers {
        let descriptor = blob(&mut archive, "application/vnd.oci.image.layer.v1.tar", &layer(files)?)?;
        diff_ids.push(descriptor["digest"].clone());
        layer_descriptors.push(descriptor);
    }
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": { "Cmd": config.command, "Env": [format!("PATH={SEARCH_PATH}")], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config =
        blob(&mut archive, "application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": layer_descriptors,
    });
    let mut manifest = blob(&mut archive, MANIFEST, &serde_json::to_vec(&manifest)?)?;
    manifest["platform"] = json!({ "architecture": architecture(), "os": "linux" });
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    manifest["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    append(&mut archive, "index.json", &serde_json::to_vec(&index)?)?;
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    archive.into_inner()?.flush()
}

/// Returns the tar file of a layer.
fn layer(files: &Files) -> io::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for (path, entry) in files.iter() {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(0);
        match entry {
            Entry::Directory(mode) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                header.set_size(0);
                layer.append_data(&mut header, path, io::empty())?;
            }
            Entry::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                layer.append_link(&mut header, path, target)?;
            }
            Entry::Text(mode, text) => {
                header.set_mode(*mode);
                header.set_size(text.len() as u64);
                layer.append_data(&mut header, path, text.as_bytes())?;
            }
            Entry::Copy(mode, source) => {
                let content = fs::read(source)?;
                header.set_mode(*mode);
                header.set_size(content.len() as u64);
                layer.append_data(&mut header, path, content.as_slice())?;
            }
        }
    }
    layer.into_inner()
}

/// Adds a blob and returns its descriptor.
fn blob<W: Write>(archive: &mut tar::Builder<W>, media_type: &str, content: &[u8]) -> io::Result<Value> {
    let digest = hex(&Sha256::digest(content));
    append(archive, &format!("blobs/sha256/{digest}"), content)?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() }))
}

fn append<W: Write>(archive: &mut tar::Builder<W>, path: &str, content: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content)
}

/// Returns bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns this machine's architecture as OCI names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_files_make_the_same_archive() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { command: vec!["/bin/true".to_owned()] };
        let archives = ["one.tar", "other.tar"].map(|name| {
            let path = dir.path().join(name);
            write(&path, "localhost/example:latest", &[Files::skeleton()], &config).unwrap();
            fs::read(path).unwrap()
        });
        assert_eq!(archives[0], archives[1]);
    }
}
