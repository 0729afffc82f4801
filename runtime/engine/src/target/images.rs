//! The image set as it comes in: files in one directory, checked against the source's manifest.
//!
//! Every name and offset is the source's word. A name has no directory part (the wire format sees to it), a file
//! is written once and in order, and the directory is a tmpfs whose size bounds them all.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use godwit_protocol::wire::message::{IMAGES_MAX, Image};

/// An image set that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImagesError {
    /// A file cannot be written: mostly, that memory for it is exhausted.
    #[error("image {name} cannot be written to memory")]
    Write {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The source's messages do not fit together.
    #[error("the images are malformed: {what}")]
    Malformed {
        /// Which rule they break.
        what: &'static str,
    },
    /// The manifest names something else than came.
    #[error("image {name} is not what the source's manifest says")]
    Mismatch {
        /// Its name.
        name: String,
    },
}

/// The image files received so far.
#[derive(Debug)]
pub(super) struct Images {
    directory: PathBuf,
    files: Vec<Incoming>,
}

#[derive(Debug)]
struct Incoming {
    name: String,
    file: File,
    size: u64,
    crc: crc32fast::Hasher,
}

impl Images {
    /// Takes images into `directory`, which is empty and the caller's alone.
    pub(super) fn into_directory(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), files: Vec::new() }
    }

    /// Begins the file with the number `index`: the one after the last.
    pub(super) fn begin(&mut self, index: u32, name: &str) -> Result<(), ImagesError> {
        if index as usize != self.files.len() || self.files.len() >= IMAGES_MAX {
            return Err(ImagesError::Malformed { what: "a file is out of order, or one too many" });
        }
        // A second file of a name is refused here as well.
        let opened = OpenOptions::new().write(true).create_new(true).open(self.directory.join(name));
        let file = opened.map_err(|source| ImagesError::Write { name: name.to_owned(), source })?;
        self.files.push(Incoming { name: name.to_owned(), file, size: 0, crc: crc32fast::Hasher::new() });
        Ok(())
    }

    /// Appends to the file with the number `index`.
    pub(super) fn append(&mut self, index: u32, offset: u64, bytes: &[u8]) -> Result<(), ImagesError> {
        let incoming = self.files.get_mut(index as usize);
        let incoming = incoming.filter(|incoming| incoming.size == offset);
        let incoming = incoming.ok_or(ImagesError::Malformed { what: "content is out of order" })?;
        incoming
            .file
            .write_all(bytes)
            .map_err(|source| ImagesError::Write { name: incoming.name.clone(), source })?;
        incoming.crc.update(bytes);
        incoming.size += bytes.len() as u64;
        Ok(())
    }

    /// Ends the set: everything in `manifest` has come, and nothing else.
    pub(super) fn finish(self, manifest: &[Image<'_>]) -> Result<(), ImagesError> {
        if manifest.len() != self.files.len() {
            return Err(ImagesError::Malformed { what: "the manifest names more or fewer files than came" });
        }
        for (incoming, image) in self.files.into_iter().zip(manifest) {
            let is_same = incoming.name == image.name && incoming.size == image.size;
            if !is_same || incoming.crc.finalize() != image.crc {
                return Err(ImagesError::Mismatch { name: image.name.to_owned() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT: &[u8] = b"pages";

    fn received() -> (tempfile::TempDir, Images) {
        let directory = tempfile::tempdir().unwrap();
        let mut images = Images::into_directory(directory.path());
        images.begin(0, "pages-1.img").unwrap();
        images.append(0, 0, CONTENT).unwrap();
        images.append(0, CONTENT.len() as u64, CONTENT).unwrap();
        (directory, images)
    }

    #[test]
    fn a_set_that_matches_its_manifest_is_complete() {
        let (directory, images) = received();
        let content = [CONTENT, CONTENT].concat();
        let image = Image { name: "pages-1.img", size: 10, crc: crc32fast::hash(&content) };
        images.finish(&[image]).unwrap();
        assert_eq!(std::fs::read(directory.path().join("pages-1.img")).unwrap(), content);
    }

    #[test]
    fn what_differs_from_the_manifest_is_found() {
        let crc = crc32fast::hash(&[CONTENT, CONTENT].concat());
        let image = |name, size, crc| Image { name, size, crc };
        for wrong in [image("x", 10, crc), image("pages-1.img", 9, crc), image("pages-1.img", 10, crc ^ 1)] {
            assert!(matches!(received().1.finish(&[wrong]), Err(ImagesError::Mismatch { .. })));
        }
        assert!(received().1.finish(&[]).is_err());
    }

    #[test]
    fn content_out_of_order_is_refused() {
        let (_directory, mut images) = received();
        assert!(images.begin(0, "again").is_err());
        assert!(images.begin(2, "later").is_err());
        assert!(images.begin(1, "pages-1.img").is_err(), "a name comes once");
        assert!(images.append(0, 9, CONTENT).is_err());
        assert!(images.append(7, 0, CONTENT).is_err());
    }
}
