//! The 16 bytes before each message.

use super::{Kind, WireError};

/// Length of a frame header in bytes.
pub const FRAME_HEADER_LEN: usize = 16;

/// A frame header whose kind, bits and length have been checked; its checksum needs the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct FrameHeader {
    /// What the payload is.
    pub kind: Kind,
    flags: u8,
    reserved: u16,
    /// Length of the payload in bytes, at most the kind's maximum.
    pub len: u32,
    /// Number of the frame in its direction, from 0.
    pub seq: u32,
    crc: u32,
}

const _: () = assert!(size_of::<FrameHeader>() == FRAME_HEADER_LEN);

impl FrameHeader {
    /// Returns the header of a frame whose payload is `head` followed by `bulk`.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if the payload exceeds the maximum of its kind.
    pub fn seal(kind: Kind, seq: u32, head: &[u8], bulk: &[u8]) -> Result<Self, WireError> {
        Self::seal_parts(kind, seq, &[head, bulk])
    }

    /// Returns the header of a frame whose payload is `parts`, one after the other.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if the payload exceeds the maximum of its kind.
    pub fn seal_parts(kind: Kind, seq: u32, parts: &[&[u8]]) -> Result<Self, WireError> {
        let len_max = kind.payload_len_max();
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        if len > len_max {
            return Err(WireError::TooLong { kind, len, len_max });
        }
        let mut header = Self { kind, flags: 0, reserved: 0, len, seq, crc: 0 };
        header.crc = header.checksum(parts);
        Ok(header)
    }

    /// Returns the bytes that go over the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; FRAME_HEADER_LEN] {
        let mut bytes = [0; FRAME_HEADER_LEN];
        bytes[..CRC_AT].copy_from_slice(&self.checked_bytes());
        bytes[CRC_AT..].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks everything that can be checked without the payload.
    ///
    /// # Errors
    /// [`WireError`] if the kind is unknown, undefined bits are set, the length exceeds the kind's maximum, or
    /// the frame is not number `expected_seq`.
    pub fn from_bytes(bytes: [u8; FRAME_HEADER_LEN], expected_seq: u32) -> Result<Self, WireError> {
        let [kind, flags, r0, r1, l0, l1, l2, l3, s0, s1, s2, s3, c0, c1, c2, c3] = bytes;
        let kind = Kind::try_from(kind)?;
        let reserved = u16::from_le_bytes([r0, r1]);
        if flags != 0 || reserved != 0 {
            return Err(WireError::UndefinedBits { kind, flags, reserved });
        }
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let len_max = kind.payload_len_max();
        if len > len_max {
            return Err(WireError::TooLong { kind, len, len_max });
        }
        let seq = u32::from_le_bytes([s0, s1, s2, s3]);
        if seq != expected_seq {
            return Err(WireError::OutOfSequence { seq, expected: expected_seq });
        }
        Ok(Self { kind, flags, reserved, len, seq, crc: u32::from_le_bytes([c0, c1, c2, c3]) })
    }

    /// Checks the payload against the header's checksum.
    ///
    /// # Errors
    /// [`WireError::BadChecksum`] if they do not match.
    pub fn verify(&self, payload: &[u8]) -> Result<(), WireError> {
        let computed = self.checksum(&[payload]);
        if computed == self.crc {
            return Ok(());
        }
        Err(WireError::BadChecksum { kind: self.kind, seq: self.seq, crc: self.crc, computed })
    }

    fn checked_bytes(&self) -> [u8; CRC_AT] {
        let mut bytes = [0; CRC_AT];
        bytes[0] = self.kind.code();
        bytes[1] = self.flags;
        bytes[2..4].copy_from_slice(&self.reserved.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.seq.to_le_bytes());
        bytes
    }

    fn checksum(&self, parts: &[&[u8]]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.checked_bytes());
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize()
    }
}

/// Offset of the checksum, which covers what stands before it and the payload.
const CRC_AT: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_frame_opens_and_any_flipped_bit_is_found() {
        let header = FrameHeader::seal(Kind::ImageData, 7, b"head", b"bulk").unwrap();
        let bytes = header.to_bytes();
        assert_eq!(FrameHeader::from_bytes(bytes, 7).unwrap(), header);
        header.verify(b"headbulk").unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            let opened = FrameHeader::from_bytes(damaged, 7).and_then(|header| header.verify(b"headbulk"));
            assert!(opened.is_err(), "bit {bit}");
        }
        assert!(header.verify(b"headbulK").is_err());
    }

    #[test]
    fn a_length_above_the_maximum_is_refused_before_the_payload_is_read() {
        let mut bytes = FrameHeader::seal(Kind::Commit, 0, b"", b"").unwrap().to_bytes();
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(FrameHeader::from_bytes(bytes, 0), Err(WireError::TooLong { len: u32::MAX, .. })));
    }

    #[test]
    fn a_repeated_frame_is_refused() {
        let bytes = FrameHeader::seal(Kind::Commit, 3, b"", b"").unwrap().to_bytes();
        assert_eq!(FrameHeader::from_bytes(bytes, 4), Err(WireError::OutOfSequence { seq: 3, expected: 4 }));
    }
}
