//! The composite fields of payloads: each `put_` writes what the `take_` beside it accepts.

use super::codec::{Reader, Writer};
use super::message::{DATA_LEN_MAX, DETAIL_LEN_MAX, IMAGE_NAME_LEN_MAX, IMAGES_MAX, Image, Resumed, Step};
use super::{Kind, WireError};
use crate::fate::FateAnswer;
use crate::request::MigrationId;
use crate::rootfs::{
    Entry, Layer, Meta, NAME_LEN_MAX, Node, PATH_LEN_MAX, Pass, XATTR_VALUE_LEN_MAX, XATTRS_MAX, check_path,
    xattr_may_travel,
};

/// Longest digest of a blob in bytes.
pub(super) const DIGEST_LEN_MAX: usize = 256;

/// Returns as much of a reason as a peer takes.
pub(super) fn shortened(detail: &str) -> &str {
    let boundary = (0..=detail.len().min(DETAIL_LEN_MAX)).rev().find(|&at| detail.is_char_boundary(at));
    &detail[..boundary.unwrap_or(0)]
}

pub(super) fn put_json(
    kind: Kind,
    out: &mut Writer<'_>,
    value: &impl serde::Serialize,
) -> Result<(), WireError> {
    serde_json::to_writer(&mut *out.0, value)
        .map_err(|error| WireError::BadJson { kind, detail: error.to_string() })
}

pub(super) fn take_json<T: serde::de::DeserializeOwned>(
    kind: Kind,
    fields: &mut Reader<'_>,
) -> Result<T, WireError> {
    serde_json::from_slice(fields.rest())
        .map_err(|error| WireError::BadJson { kind, detail: error.to_string() })
}

pub(super) fn take_data<'a>(fields: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
    let data = fields.rest();
    if data.is_empty() || data.len() > DATA_LEN_MAX {
        return Err(fields.bad("it holds no content or more than its maximum"));
    }
    Ok(data)
}

pub(super) fn take_path<'a>(fields: &mut Reader<'a>, root_allowed: bool) -> Result<&'a [u8], WireError> {
    let path = fields.bytes(PATH_LEN_MAX)?;
    check_path(path).map_err(|what| fields.bad(what))?;
    if path.is_empty() && !root_allowed {
        return Err(fields.bad("the root cannot be meant"));
    }
    Ok(path)
}

pub(super) const fn pass_code(pass: Pass) -> u8 {
    match pass {
        Pass::Live => 0,
        Pass::Final => 1,
    }
}

pub(super) fn take_pass(fields: &mut Reader<'_>) -> Result<Pass, WireError> {
    Ok(if fields.bool()? { Pass::Final } else { Pass::Live })
}

pub(super) fn take_layer(fields: &mut Reader<'_>) -> Result<Layer, WireError> {
    Ok(if fields.bool()? { Layer::Whole } else { Layer::Delta })
}

pub(super) fn take_step(fields: &mut Reader<'_>) -> Result<Step, WireError> {
    Ok(match fields.u8()? {
        1 => Step::Image,
        2 => Step::Snapshot,
        3 => Step::Container,
        4 => Step::Task,
        _ => return Err(fields.bad("an unknown step")),
    })
}

pub(super) const fn fate_code(answer: FateAnswer) -> u8 {
    match answer {
        FateAnswer::NotHere => 0,
        FateAnswer::Pending => 1,
        FateAnswer::Here => 2,
        FateAnswer::Filling => 3,
        FateAnswer::Lost => 4,
    }
}

pub(super) fn take_fate(fields: &mut Reader<'_>) -> Result<FateAnswer, WireError> {
    Ok(match fields.u8()? {
        0 => FateAnswer::NotHere,
        1 => FateAnswer::Pending,
        2 => FateAnswer::Here,
        3 => FateAnswer::Filling,
        4 => FateAnswer::Lost,
        _ => return Err(fields.bad("an unknown answer")),
    })
}

pub(super) fn put_migration(out: &mut Writer<'_>, migration: &MigrationId) {
    put_bytes(out, migration.as_str().as_bytes());
}

pub(super) fn take_migration(fields: &mut Reader<'_>) -> Result<MigrationId, WireError> {
    let name = fields.text(MigrationId::LEN_MAX)?.to_owned();
    name.try_into().map_err(|_| fields.bad("a migration's name is malformed"))
}

pub(super) fn put_resumed(out: &mut Writer<'_>, resumed: Resumed) {
    let Resumed { pid, cpu_us, disk_bytes_written } = resumed;
    out.i64(i64::from(pid)).u64(cpu_us).u64(disk_bytes_written);
}

pub(super) fn take_resumed(fields: &mut Reader<'_>) -> Result<Resumed, WireError> {
    let pid = i32::try_from(fields.i64()?).map_err(|_| fields.bad("a process id is out of range"))?;
    Ok(Resumed { pid, cpu_us: fields.u64()?, disk_bytes_written: fields.u64()? })
}

pub(super) fn take_image_name<'a>(fields: &mut Reader<'a>) -> Result<&'a str, WireError> {
    let name = fields.text(IMAGE_NAME_LEN_MAX)?;
    let well_formed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.starts_with('.') || !name.bytes().all(well_formed) {
        return Err(fields.bad("an image's name is malformed"));
    }
    Ok(name)
}

pub(super) fn put_bytes(out: &mut Writer<'_>, bytes: &[u8]) {
    out.bytes(bytes);
}

pub(super) fn put_manifest(out: &mut Writer<'_>, manifest: &[Image<'_>]) {
    out.u32(u32::try_from(manifest.len()).unwrap_or(u32::MAX));
    for Image { name, size, crc } in manifest {
        out.bytes(name.as_bytes()).u64(*size).u32(*crc);
    }
}

pub(super) fn take_manifest<'a>(fields: &mut Reader<'a>) -> Result<Vec<Image<'a>>, WireError> {
    let count = fields.u32()? as usize;
    if count > IMAGES_MAX {
        return Err(fields.bad("more images than there may be"));
    }
    (0..count)
        .map(|_| Ok(Image { name: take_image_name(fields)?, size: fields.u64()?, crc: fields.u32()? }))
        .collect()
}

pub(super) fn put_entry(out: &mut Writer<'_>, entry: &Entry<'_>) {
    out.bytes(entry.path);
    match entry.node {
        Node::Directory { clear } => out.u8(0).u8(u8::from(clear)),
        Node::File { size } => out.u8(1).u64(size),
        Node::Symlink { to } => out.u8(2).bytes(to),
        Node::Hardlink { to } => out.u8(3).bytes(to),
        Node::Fifo => out.u8(4),
        Node::Socket => out.u8(5),
        Node::CharDevice { major, minor } => out.u8(6).u32(major).u32(minor),
        Node::BlockDevice { major, minor } => out.u8(7).u32(major).u32(minor),
    };
    let Meta { mode, uid, gid, mtime_s, mtime_ns } = entry.meta;
    out.u32(mode).u32(uid).u32(gid).i64(mtime_s).u32(mtime_ns);
    out.u32(u32::try_from(entry.xattrs.len()).unwrap_or(u32::MAX));
    for (name, value) in &entry.xattrs {
        out.bytes(name).bytes(value);
    }
}

pub(super) fn take_entry<'a>(fields: &mut Reader<'a>) -> Result<Entry<'a>, WireError> {
    let path = take_path(fields, true)?;
    let node = match fields.u8()? {
        0 => Node::Directory { clear: fields.bool()? },
        1 => Node::File { size: fields.u64()? },
        2 => Node::Symlink { to: take_link(fields)? },
        3 => Node::Hardlink { to: take_path(fields, false)? },
        4 => Node::Fifo,
        5 => Node::Socket,
        6 => Node::CharDevice { major: fields.u32()?, minor: fields.u32()? },
        7 => Node::BlockDevice { major: fields.u32()?, minor: fields.u32()? },
        _ => return Err(fields.bad("an unknown kind of file")),
    };
    match node {
        Node::Directory { .. } => {}
        _ if path.is_empty() => return Err(fields.bad("the root is no directory")),
        Node::CharDevice { major: 0, minor: 0 } => {
            return Err(fields.bad("device 0:0 stands for an absent file"));
        }
        _ => {}
    }
    let meta = Meta {
        mode: fields.u32()?,
        uid: fields.u32()?,
        gid: fields.u32()?,
        mtime_s: fields.i64()?,
        mtime_ns: fields.u32()?,
    };
    // The highest number stands for "no change" in system calls and can own nothing.
    if meta.mode > 0o7777 || meta.mtime_ns >= 1_000_000_000 || [meta.uid, meta.gid].contains(&u32::MAX) {
        return Err(fields.bad("an owner, mode or time is out of range"));
    }
    let count = fields.u32()? as usize;
    if count > XATTRS_MAX {
        return Err(fields.bad("more extended attributes than there may be"));
    }
    let xattrs = (0..count).map(|_| take_xattr(fields)).collect::<Result<_, _>>()?;
    Ok(Entry { path, node, meta, xattrs })
}

pub(super) fn take_link<'a>(fields: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
    let to = fields.bytes(PATH_LEN_MAX)?;
    if to.is_empty() || to.contains(&0) {
        return Err(fields.bad("a symbolic link points nowhere"));
    }
    Ok(to)
}

pub(super) fn take_xattr<'a>(fields: &mut Reader<'a>) -> Result<(&'a [u8], &'a [u8]), WireError> {
    let name = fields.bytes(NAME_LEN_MAX)?;
    if !xattr_may_travel(name) {
        return Err(fields.bad("an extended attribute that may not travel"));
    }
    Ok((name, fields.bytes(XATTR_VALUE_LEN_MAX)?))
}
