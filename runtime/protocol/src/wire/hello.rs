//! The first 16 bytes each way, and the version and features that follow from both.

use super::WireError;

/// Length of a hello in bytes.
pub const HELLO_LEN: usize = 16;

/// The newest protocol version this end speaks.
pub const VERSION: u16 = 1;

/// `GDWT`, as the bytes stand on the wire.
pub const MAGIC: u32 = u32::from_le_bytes(*b"GDWT");

/// What an end says of itself before anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Hello {
    magic: u32,
    /// Lowest protocol version this end speaks.
    pub version_min: u16,
    /// Highest protocol version this end speaks.
    pub version_max: u16,
    /// Bit set of optional abilities; bits that are not known are ignored.
    pub features: u64,
}

const _: () = assert!(size_of::<Hello>() == HELLO_LEN);

/// What both ends agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Negotiated {
    /// The highest version both speak.
    pub version: u16,
    /// The features both have.
    pub features: u64,
}

impl Hello {
    /// What this end says: its newest version and the one before, and no optional feature yet.
    pub const OURS: Self = Self::of(if VERSION > 1 { VERSION - 1 } else { 1 }, VERSION, 0);

    /// Returns the hello of an end that speaks the versions `version_min..=version_max`.
    #[must_use]
    pub const fn of(version_min: u16, version_max: u16, features: u64) -> Self {
        Self { magic: MAGIC, version_min, version_max, features }
    }

    /// Returns the bytes that go over the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[0..4].copy_from_slice(&self.magic.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.version_min.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.version_max.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.features.to_le_bytes());
        bytes
    }

    /// Reads what the peer said.
    ///
    /// # Errors
    /// [`WireError::NotGodwit`] if the magic number is another.
    pub fn from_bytes(bytes: [u8; HELLO_LEN]) -> Result<Self, WireError> {
        let [m0, m1, m2, m3, a0, a1, b0, b1, f0, f1, f2, f3, f4, f5, f6, f7] = bytes;
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        if magic != MAGIC {
            return Err(WireError::NotGodwit { magic });
        }
        Ok(Self::of(
            u16::from_le_bytes([a0, a1]),
            u16::from_le_bytes([b0, b1]),
            u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]),
        ))
    }

    /// Returns the highest version and the features that this end and the peer have in common.
    ///
    /// Both ends come to the same answer, so no further round trip is needed.
    ///
    /// # Errors
    /// [`WireError::NoCommonVersion`] if the ranges do not overlap or the peer's is empty.
    pub fn negotiate(self, theirs: Self) -> Result<Negotiated, WireError> {
        let version = self.version_max.min(theirs.version_max);
        let well_formed = theirs.version_min <= theirs.version_max;
        if !well_formed || version < self.version_min.max(theirs.version_min) {
            return Err(WireError::NoCommonVersion {
                ours_min: self.version_min,
                ours_max: self.version_max,
                theirs_min: theirs.version_min,
                theirs_max: theirs.version_max,
            });
        }
        Ok(Negotiated { version, features: self.features & theirs.features })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_version_1() {
        assert_eq!(Hello::OURS.to_bytes(), *b"GDWT\x01\0\x01\0\0\0\0\0\0\0\0\0");
        assert_eq!(Hello::from_bytes(Hello::OURS.to_bytes()).unwrap(), Hello::OURS);
    }

    #[test]
    fn both_ends_come_to_the_same_version() {
        // (ours, theirs, agreed)
        let table = [
            ((1, 1), (1, 1), Some(1)),
            ((1, 2), (1, 1), Some(1)),
            ((2, 3), (1, 2), Some(2)),
            ((2, 3), (3, 4), Some(3)),
            ((2, 3), (1, 1), None),
            ((1, 2), (3, 4), None),
            ((1, 9), (5, 2), None),
        ];
        for (ours, theirs, agreed) in table {
            let (a, b) = (Hello::of(ours.0, ours.1, 0b110), Hello::of(theirs.0, theirs.1, 0b011));
            assert_eq!(a.negotiate(b).ok().map(|n| n.version), agreed, "{ours:?} {theirs:?}");
            if theirs.0 <= theirs.1 {
                assert_eq!(a.negotiate(b).ok(), b.negotiate(a).ok());
            }
        }
        assert_eq!(Hello::of(1, 1, 0b110).negotiate(Hello::of(1, 1, 0b011)).unwrap().features, 0b010);
    }

    #[test]
    fn a_stranger_is_told_apart() {
        let error = Hello::from_bytes(*b"GET / HTTP/1.1\r\n").unwrap_err();
        assert!(matches!(error, WireError::NotGodwit { .. }));
    }
}
