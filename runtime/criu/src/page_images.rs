//! Whether the pages of a checkpoint are all there.
//!
//! CRIU trusts the length of `pages-N.img`: when it is cut short, a restore asks the kernel for the missing
//! bytes for ever and writes a log line each time. So a copied checkpoint is measured first. A `pagemap-*.img`
//! is two magic words, then messages with a length before each: a head with N, and an entry per run of pages
//! (CRIU's `images/pagemap.proto`, `criu/include/pagemap.h`).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use protobuf::CodedInputStream;
use protobuf::rt::skip_field_for_tag;

use crate::failure::{CriuError, Result};

/// Checks that every file of pages is as long as its pagemaps say.
///
/// # Errors
/// [`CriuError::Images`] names the first file that is missing, too short, or no pagemap.
pub fn check_complete(images: &Path) -> Result<()> {
    let wrong = |path: &Path, reason: String| CriuError::Images { path: path.to_owned(), reason };
    let unreadable = |error: io::Error| wrong(images, error.to_string());
    let mut expected: BTreeMap<u32, u64> = BTreeMap::new();
    for entry in fs::read_dir(images).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with("pagemap-") || !name.ends_with(".img") {
            continue;
        }
        let bytes = fs::read(&path).map_err(|error| wrong(&path, error.to_string()))?;
        // An empty one belongs to a process that shares its memory.
        if bytes.is_empty() {
            continue;
        }
        let (number, pages) = read_pagemap(&bytes).map_err(|reason| wrong(&path, reason))?;
        // Several pagemaps may share one file, one after the other.
        *expected.entry(number).or_default() += pages;
    }
    for (number, pages) in expected.into_iter().filter(|(_, pages)| *pages > 0) {
        let path = images.join(format!("pages-{number}.img"));
        let length_bytes = path.metadata().map_err(|error| wrong(&path, error.to_string()))?.len();
        let expected_bytes = pages.saturating_mul(PAGE_BYTES);
        if length_bytes < expected_bytes {
            return Err(wrong(&path, format!("{length_bytes} of {expected_bytes} bytes are there")));
        }
    }
    Ok(())
}

/// Number of the file of pages, and how many of its pages are meant.
fn read_pagemap(bytes: &[u8]) -> std::result::Result<(u32, u64), String> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or("no pagemap")?;
    let (head, mut rest) = next_message(rest)?;
    let number = fields(head)?.get(&1).copied().unwrap_or_default();
    let number = u32::try_from(number).map_err(|_| "pages id out of range")?;
    let mut pages = 0_u64;
    while !rest.is_empty() {
        let (message, after) = next_message(rest)?;
        rest = after;
        let entry = fields(message)?;
        let field = |number: u32| entry.get(&number).copied();
        let here = match field(FLAGS) {
            Some(flags) => flags & PRESENT != 0,
            None => field(IN_PARENT).unwrap_or_default() == 0,
        };
        if here {
            pages = pages.saturating_add(field(PAGES).or_else(|| field(PAGES_OLD)).unwrap_or_default());
        }
    }
    Ok((number, pages))
}

fn next_message(bytes: &[u8]) -> std::result::Result<(&[u8], &[u8]), String> {
    let (length, rest) = bytes.split_first_chunk::<4>().ok_or("cut short")?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| "length out of range")?;
    if length > rest.len() {
        return Err("cut short".to_owned());
    }
    Ok(rest.split_at(length))
}

/// The numbers in a message, by field.
fn fields(message: &[u8]) -> std::result::Result<BTreeMap<u32, u64>, String> {
    let wrong = |error: protobuf::Error| error.to_string();
    let mut input = CodedInputStream::from_bytes(message);
    let mut found = BTreeMap::new();
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(wrong)? {
        if tag & WIRE_TYPE_MASK == VARINT {
            found.insert(tag >> 3, input.read_raw_varint64().map_err(wrong)?);
        } else {
            skip_field_for_tag(tag, &mut input).map_err(wrong)?;
        }
    }
    Ok(found)
}

/// The common magic and the pagemap's, as stored.
const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];
const PAGE_BYTES: u64 = 4096;
const PAGES_OLD: u32 = 2;
const IN_PARENT: u32 = 3;
const FLAGS: u32 = 4;
const PAGES: u32 = 5;
const PRESENT: u64 = 1 << 2;
const WIRE_TYPE_MASK: u32 = 7;
const VARINT: u32 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    /// A pagemap of pages-3.img with entries of (pages, flags).
    fn pagemap(entries: &[(u8, u8)]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([2, 0, 0, 0, 0x08, 3]);
        for (pages, flags) in entries {
            bytes.extend([6, 0, 0, 0, 0x08, 1, 0x10, *pages, 0x20, *flags]);
        }
        bytes
    }

    #[test]
    fn a_file_that_is_too_short_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path();
        check_complete(images).unwrap();
        // 5 pages present, 7 in the parent, 2 present and lazy.
        fs::write(images.join("pagemap-1.img"), pagemap(&[(5, 4), (7, 1), (2, 6)])).unwrap();
        fs::write(images.join("pagemap-2.img"), "").unwrap();
        check_complete(images).unwrap_err();
        fs::write(images.join("pages-3.img"), vec![0; 7 * 4096]).unwrap();
        check_complete(images).unwrap();
        fs::write(images.join("pages-3.img"), vec![0; 7 * 4096 - 1]).unwrap();
        let error = check_complete(images).unwrap_err().to_string();
        assert!(error.ends_with("pages-3.img: 28671 of 28672 bytes are there"), "{error}");
    }

    #[test]
    fn a_damaged_pagemap_is_an_error_and_no_panic() {
        let whole = pagemap(&[(5, 4), (7, 1)]);
        for length in 1..whole.len() {
            // Cut between two messages it is a shorter pagemap, else an error.
            let cut = read_pagemap(&whole[..length]);
            assert!(cut.is_err() || length == 14 || length == 24, "{length}: {cut:?}");
        }
        let mut long = whole;
        long[8] = 0xff;
        read_pagemap(&long).unwrap_err();
    }
}
