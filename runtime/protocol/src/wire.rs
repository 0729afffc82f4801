//! What travels over the link: a hello of 16 bytes each way, then frames.
//!
//! ```text
//! Hello   magic u32 | version_min u16 | version_max u16 | features u64                         16 bytes
//! frame   kind u8 | flags u8 | reserved u16 | len u32 | seq u32 | crc u32 | payload [len]      16 + len bytes
//! ```
//! Everything is little-endian. `crc` is the CRC-32 of the twelve header bytes before it and of the payload; it
//! is verified before the payload is looked at. `seq` counts the frames of one direction from 0, so a frame that
//! was lost, repeated or injected by a bug in either end is found at once and not as a torn image.
//!
//! Invariants: every length that comes from the peer has a named maximum, checked before memory is taken for it;
//! a kind that is not known is an error; decoding never panics. There is no I/O here, see `godwit_engine::link`.
//!
//! Compatibility: this end speaks [`VERSION`] and the version before it ([`hello::Hello::OURS`]). Fields are
//! never added to an existing message without a new version; JSON messages (`Offer`, `Accept`) may gain optional
//! keys within a version, since both ends ignore keys they do not know.

mod codec;
pub mod frame;
pub mod hello;
pub mod message;
pub mod pages;
mod payload;

pub use frame::{FRAME_HEADER_LEN, FrameHeader};
pub use hello::{HELLO_LEN, Hello, Negotiated, VERSION};
pub use message::{Kind, Message, Reject, RejectCode};
pub use pages::{Run, StreamId};

/// Bytes from the peer that are not what the protocol allows there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first bytes are not a hello.
    #[error("the peer does not speak the godwit protocol (magic {magic:#010x})")]
    NotGodwit {
        /// What came in the place of the magic number.
        magic: u32,
    },
    /// There is no version that both ends speak.
    #[error(
        "the peer speaks protocol versions {theirs_min} to {theirs_max}, this end {ours_min} to {ours_max}: \
         install the same release of godwit on both hosts"
    )]
    NoCommonVersion {
        /// Lowest version of this end.
        ours_min: u16,
        /// Highest version of this end.
        ours_max: u16,
        /// Lowest version of the peer.
        theirs_min: u16,
        /// Highest version of the peer.
        theirs_max: u16,
    },
    /// The frame's kind is none of [`Kind`].
    #[error("unknown frame kind {kind:#04x}")]
    UnknownKind {
        /// What the header says.
        kind: u8,
    },
    /// Flags or reserved bits are set that version 1 does not define.
    #[error("frame of kind {kind:?} with undefined flags {flags:#04x} or reserved bits {reserved:#06x}")]
    UndefinedBits {
        /// The frame's kind.
        kind: Kind,
        /// What the header says.
        flags: u8,
        /// What the header says.
        reserved: u16,
    },
    /// The frame is longer than its kind may be.
    #[error("frame of kind {kind:?} with {len} bytes, more than its maximum of {len_max}")]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// What the header says.
        len: u32,
        /// The maximum for this kind.
        len_max: u32,
    },
    /// A frame is missing, repeated or out of order.
    #[error("frame number {seq} where {expected} was due")]
    OutOfSequence {
        /// What the header says.
        seq: u32,
        /// What was due.
        expected: u32,
    },
    /// The checksum does not match.
    #[error("frame {seq} of kind {kind:?} is damaged (checksum {crc:#010x}, computed {computed:#010x})")]
    BadChecksum {
        /// The frame's kind.
        kind: Kind,
        /// The frame's number.
        seq: u32,
        /// What the header says.
        crc: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// The payload ends before the message does, or goes on after it.
    #[error("frame of kind {kind:?} is malformed: {what}")]
    BadPayload {
        /// The frame's kind.
        kind: Kind,
        /// Which rule the payload breaks.
        what: &'static str,
    },
    /// A JSON payload does not have the agreed shape.
    #[error("frame of kind {kind:?} holds malformed JSON: {detail}")]
    BadJson {
        /// The frame's kind.
        kind: Kind,
        /// What the parser says.
        detail: String,
    },
}
