//! Fields of a payload: fixed little-endian numbers, and byte strings led by a `u32` length.

use super::{Kind, WireError};

/// Appends fields to a payload.
#[derive(Debug)]
pub(super) struct Writer<'o>(pub(super) &'o mut Vec<u8>);

impl Writer<'_> {
    pub(super) fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn i64(&mut self, value: i64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends a byte string. A length that does not fit in the field makes the frame too long to be sealed,
    /// whatever the field says, so saturating it here hides nothing.
    pub(super) fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(value);
        self
    }
}

/// Takes fields from a payload, each bounded.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) const fn new(kind: Kind, payload: &'a [u8]) -> Self {
        Self { kind, rest: payload }
    }

    pub(super) const fn bad(&self, what: &'static str) -> WireError {
        WireError::BadPayload { kind: self.kind, what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (field, rest) = self.rest.split_first_chunk().ok_or_else(|| self.bad("it ends too soon"))?;
        self.rest = rest;
        Ok(*field)
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(super) fn bool(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.bad("a switch is neither 0 nor 1")),
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn i64(&mut self) -> Result<i64, WireError> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// Takes a byte string of at most `len_max` bytes.
    pub(super) fn bytes(&mut self, len_max: usize) -> Result<&'a [u8], WireError> {
        let len = usize::try_from(self.u32()?).map_err(|_| self.bad("a length does not fit in memory"))?;
        if len > len_max {
            return Err(self.bad("a field is longer than its maximum"));
        }
        let (field, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.bad("it ends too soon"))?;
        self.rest = rest;
        Ok(field)
    }

    /// Takes a text of at most `len_max` bytes.
    pub(super) fn text(&mut self, len_max: usize) -> Result<&'a str, WireError> {
        let bytes = self.bytes(len_max)?;
        str::from_utf8(bytes).map_err(|_| self.bad("a text is not UTF-8"))
    }

    /// Takes everything that is left.
    pub(super) const fn rest(&mut self) -> &'a [u8] {
        let rest = self.rest;
        self.rest = &[];
        rest
    }

    /// Checks that nothing is left.
    pub(super) const fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.bad("it goes on after its end")) }
    }
}
