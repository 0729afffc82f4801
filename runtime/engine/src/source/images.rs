//! Sends CRIU's images while CRIU writes them.
//!
//! Pages are most of the bytes, and their files only grow, so they are sent as they grow; their memory is given
//! back as it is sent, which keeps the peak near what is under way instead of at the size of the container.
//! Everything else is small, and is sent once CRIU says that it is complete.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use godwit_protocol::wire::Message;
use godwit_protocol::wire::message::{DATA_LEN_MAX, Image};
use rustix::fs::FallocateFlags;

use super::bulk::{BulkError, BulkLink};

/// The image files of one container on their way.
#[derive(Debug)]
pub(super) struct ImageStream {
    directory: PathBuf,
    files: Vec<Outgoing>,
    buffer: Vec<u8>,
    page_bytes: u64,
    state_bytes: u64,
}

#[derive(Debug)]
struct Outgoing {
    name: String,
    file: File,
    sent: u64,
    crc: crc32fast::Hasher,
}

impl ImageStream {
    pub(super) fn of(directory: &Path) -> Self {
        let buffer = vec![0; DATA_LEN_MAX];
        Self { directory: directory.to_owned(), files: Vec::new(), buffer, page_bytes: 0, state_bytes: 0 }
    }

    /// Sends what page files have grown by, in whole chunks. Returns whether that was anything.
    pub(super) fn send_grown(&mut self, link: &BulkLink) -> Result<bool, BulkError> {
        self.send(link, is_pages, CHUNK_MIN_BYTES)
    }

    /// Sends all that is left; CRIU has written everything.
    pub(super) fn send_rest(&mut self, link: &BulkLink) -> Result<(), BulkError> {
        self.send(link, |_| true, 1)?;
        Ok(())
    }

    /// Sends the manifest, which ends the images.
    pub(super) fn send_manifest(&self, link: &BulkLink) -> Result<(), BulkError> {
        let manifest = self
            .files
            .iter()
            .map(|file| Image { name: &file.name, size: file.sent, crc: file.crc.clone().finalize() })
            .collect();
        link.send(&Message::StateEnd { manifest })
    }

    /// Returns the bytes of page contents sent so far.
    pub(super) const fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Returns the bytes of everything else sent so far.
    pub(super) const fn state_bytes(&self) -> u64 {
        self.state_bytes
    }

    fn send(&mut self, link: &BulkLink, wanted: fn(&str) -> bool, min: u64) -> Result<bool, BulkError> {
        let mut sent_any = false;
        for name in self.names().map_err(BulkError::images("list"))? {
            if wanted(&name) {
                let index = self.index_of(link, name)?;
                sent_any |= self.send_file(link, index, min)?;
            }
        }
        Ok(sent_any)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn index_of(&mut self, link: &BulkLink, name: String) -> Result<usize, BulkError> {
        if let Some(index) = self.files.iter().position(|file| file.name == name) {
            return Ok(index);
        }
        let path = self.directory.join(&name);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(BulkError::images("open"))?;
        let index = self.files.len();
        link.send(&Message::ImageFile { index: index_on_wire(index), name: &name })?;
        self.files.push(Outgoing { name, file, sent: 0, crc: crc32fast::Hasher::new() });
        Ok(index)
    }

    /// Sends a file from where it was left off, until less than `min` bytes remain.
    fn send_file(&mut self, link: &BulkLink, index: usize, min: u64) -> Result<bool, BulkError> {
        let file = &mut self.files[index];
        let pages = is_pages(&file.name);
        let begun = file.sent;
        let size = file.file.metadata().map_err(BulkError::images("look at"))?.len();
        while size - file.sent >= min {
            let want = usize::try_from(size - file.sent).unwrap_or(usize::MAX).min(self.buffer.len());
            let bytes = &mut self.buffer[..want];
            file.file.read_exact_at(bytes, file.sent).map_err(BulkError::images("read"))?;
            link.send(&Message::ImageData { index: index_on_wire(index), offset: file.sent, bytes })?;
            file.crc.update(bytes);
            if pages {
                // Only memory is at stake: CRIU never reads them again, and a rollback throws them away.
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file.file, punch, file.sent, want as u64).ok();
            }
            file.sent += want as u64;
        }
        let sent = file.sent - begun;
        *(if pages { &mut self.page_bytes } else { &mut self.state_bytes }) += sent;
        Ok(sent > 0)
    }
}

/// Tells whether a file of this name only grows, and holds nothing but pages.
fn is_pages(name: &str) -> bool {
    name.starts_with("pages-") && name.ends_with(".img")
}

fn index_on_wire(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// Less than this is left to grow while CRIU still writes.
const CHUNK_MIN_BYTES: u64 = 256 << 10;
