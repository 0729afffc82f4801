//! The messages: what each frame's payload means.
//!
//! ```text
//! source → agent          Offer                     Blob BlobData… … BlobsEnd
//! agent → source                   Accept | Reject                            Preparing…
//! target worker → source  Ready
//! source → target worker          RootfsBegin (RootfsEntry RootfsData… | RootfsRemove)… RootfsEnd   (live, then final)
//! target worker → source                                                              RootfsApplied
//! source → target worker  (ImageFile ImageData…)… StateEnd                    Commit
//! target worker → source                                   Received  Restored          Resumed
//! either way              Abort
//!
//! When the pages are godwit's own, beside the main link:
//! source → agent          JoinStream                (first frame of every page stream)
//! source → target worker  (Pages | ZeroPages | AbsentPages)… StreamMark       (bulk streams, round by round)
//! target worker → source                                     RoundReceived    (main link)
//! source → target worker  MemoryPlan…               (main link, in the freeze, before StateEnd)
//! target worker → source  PageRequest…              (fault stream)            MemoryComplete (main link)
//!
//! When the link broke while pages were left behind:
//! source → agent          Rejoin                    (first frame of what is the main link from then on)
//! target worker → source          Lacking… LackingEnd, then the page streams join anew
//!
//! source → agent          FateQuery                 (first frame of a connection of its own)
//! agent → source                     FateAnswer
//! ```
//! Rootfs and image frames may alternate; within a file they come in order. Content is borrowed from the frame,
//! so a page is not copied between the receive buffer and the file it goes to.

use super::WireError;
use super::codec::{Reader, Writer};
use super::pages::{
    RUNS_LEN_MAX, Run, StreamId, put_pages, put_request, put_stream, take_contents, take_run, take_runs,
    take_space, take_stream,
};
use super::payload::{
    DIGEST_LEN_MAX, fate_code, pass_code, put_bytes, put_entry, put_json, put_manifest, put_migration,
    put_resumed, shortened, take_data, take_entry, take_fate, take_image_name, take_json, take_layer,
    take_manifest, take_migration, take_pass, take_path, take_resumed, take_step,
};
use crate::fate::FateAnswer;
use crate::offer::{Accept, Offer};
use crate::report::TargetMemory;
use crate::request::MigrationId;
use crate::rootfs::{Entry, Layer, Pass};

/// Most content bytes in one data frame.
pub const DATA_LEN_MAX: usize = 1 << 20;

/// Longest text that a peer gives as a reason, in bytes.
pub const DETAIL_LEN_MAX: usize = 4096;

/// Longest name of an image file in bytes.
pub const IMAGE_NAME_LEN_MAX: usize = 128;

/// Most image files of one container.
pub const IMAGES_MAX: usize = 1 << 16;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $len_max:expr;)*) => {
        /// What a frame's payload is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $code,)* }

        impl Kind {
            /// Every kind, by its code.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Returns the code in the frame header.
            #[must_use]
            pub const fn code(self) -> u8 {
                match self { $(Self::$name => $code,)* }
            }

            /// Returns the longest payload in bytes.
            #[must_use]
            pub const fn payload_len_max(self) -> u32 {
                match self { $(Self::$name => $len_max,)* }
            }
        }

        impl TryFrom<u8> for Kind {
            type Error = WireError;

            fn try_from(code: u8) -> Result<Self, WireError> {
                match code {
                    $($code => Ok(Self::$name),)*
                    kind => Err(WireError::UnknownKind { kind }),
                }
            }
        }
    };
}

const SMALL: u32 = 64;
const TEXT: u32 = 8 << 10;
const JSON: u32 = 8 << 20;
const DATA: u32 = (1 << 20) + 64;
const PAGES: u32 = (1 << 20) + RUNS_LEN_MAX;

kinds! {
    /// [`Message::Offer`].
    Offer = 0x01, JSON;
    /// [`Message::Accept`].
    Accept = 0x02, JSON;
    /// [`Message::Reject`].
    Reject = 0x03, TEXT;
    /// [`Message::Blob`].
    Blob = 0x04, TEXT;
    /// [`Message::BlobData`].
    BlobData = 0x05, DATA;
    /// [`Message::BlobsEnd`].
    BlobsEnd = 0x06, 0;
    /// [`Message::Preparing`].
    Preparing = 0x07, SMALL;
    /// [`Message::Ready`].
    Ready = 0x10, SMALL;
    /// [`Message::RootfsBegin`].
    RootfsBegin = 0x20, SMALL;
    /// [`Message::RootfsEntry`].
    RootfsEntry = 0x21, 4 << 20;
    /// [`Message::RootfsData`].
    RootfsData = 0x22, DATA;
    /// [`Message::RootfsRemove`].
    RootfsRemove = 0x23, TEXT;
    /// [`Message::RootfsEnd`].
    RootfsEnd = 0x24, SMALL;
    /// [`Message::RootfsApplied`].
    RootfsApplied = 0x25, SMALL;
    /// [`Message::ImageFile`].
    ImageFile = 0x30, TEXT;
    /// [`Message::ImageData`].
    ImageData = 0x31, DATA;
    /// [`Message::StateEnd`].
    StateEnd = 0x32, JSON;
    /// [`Message::Received`].
    Received = 0x33, 0;
    /// [`Message::Restored`].
    Restored = 0x34, 0;
    /// [`Message::Commit`].
    Commit = 0x35, 0;
    /// [`Message::Resumed`].
    Resumed = 0x36, SMALL;
    /// [`Message::Abort`].
    Abort = 0x3f, TEXT;
    /// [`Message::FateQuery`].
    FateQuery = 0x40, TEXT;
    /// [`Message::FateAnswer`].
    FateAnswer = 0x41, SMALL;
    /// [`Message::JoinStream`].
    JoinStream = 0x42, TEXT;
    /// [`Message::Rejoin`].
    Rejoin = 0x43, TEXT;
    /// [`Message::Pages`].
    Pages = 0x50, PAGES;
    /// [`Message::ZeroPages`].
    ZeroPages = 0x51, RUNS_LEN_MAX;
    /// [`Message::AbsentPages`].
    AbsentPages = 0x52, RUNS_LEN_MAX;
    /// [`Message::StreamMark`].
    StreamMark = 0x53, SMALL;
    /// [`Message::RoundReceived`].
    RoundReceived = 0x54, SMALL;
    /// [`Message::MemoryPlan`].
    MemoryPlan = 0x55, RUNS_LEN_MAX;
    /// [`Message::PageRequest`].
    PageRequest = 0x56, SMALL;
    /// [`Message::MemoryComplete`].
    MemoryComplete = 0x57, TEXT;
    /// [`Message::Lacking`].
    Lacking = 0x58, RUNS_LEN_MAX;
    /// [`Message::LackingEnd`].
    LackingEnd = 0x59, 0;
}

/// What one end tells the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// The source offers a container to the agent.
    Offer(Box<Offer>),
    /// The agent takes it and says which blobs it lacks.
    Accept(Box<Accept>),
    /// The agent, or the target's worker before anything was received, declines.
    Reject(Reject),
    /// A blob begins; its content follows.
    Blob {
        /// `sha256:…`, one of those the agent asked for.
        digest: &'a str,
        /// Size in bytes.
        size: u64,
    },
    /// The next bytes of the blob.
    BlobData(&'a [u8]),
    /// All blobs that the agent asked for have been sent.
    BlobsEnd,
    /// The agent is at this step; also a sign of life.
    Preparing(Step),
    /// The target's worker has the link and takes the writable layer and the images.
    Ready {
        /// Bytes of images that it has room for.
        room_bytes: u64,
    },
    /// A pass over the writable layer begins.
    RootfsBegin {
        /// Which pass.
        pass: Pass,
        /// What its entries describe.
        layer: Layer,
    },
    /// What a path is to be.
    RootfsEntry(Entry<'a>),
    /// Content of the file whose entry came last.
    RootfsData {
        /// Offset in the file, not below the end of what came before.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// The path is to be absent, with everything under it.
    RootfsRemove {
        /// The path; never the root.
        path: &'a [u8],
    },
    /// The pass is over.
    RootfsEnd {
        /// Which pass.
        pass: Pass,
    },
    /// The target has applied the pass.
    RootfsApplied {
        /// Which pass.
        pass: Pass,
    },
    /// An image file begins.
    ImageFile {
        /// Number of the file, counted from 0.
        index: u32,
        /// Its name, without a directory.
        name: &'a str,
    },
    /// The next bytes of an image file.
    ImageData {
        /// Number of the file.
        index: u32,
        /// Offset in the file: the end of what came before.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Everything the target needs to restore has been sent.
    StateEnd {
        /// The image files in the order of their numbers.
        manifest: Vec<Image<'a>>,
    },
    /// The target has everything, and it matches the manifest.
    Received,
    /// The target holds the container restored and stopped.
    Restored,
    /// The target may let the container run. Sent once.
    Commit,
    /// The container runs on the target.
    Resumed(Resumed),
    /// The sender gives up. From the target it also says that nothing of the container runs there, or will.
    Abort {
        /// What happened: a lowercase fragment without a full stop.
        detail: &'a str,
    },
    /// Where is the container of this migration?
    FateQuery {
        /// The migration's name.
        migration: MigrationId,
    },
    /// The answer to it.
    FateAnswer(FateAnswer),
    /// This connection carries pages of a migration that is under way.
    JoinStream {
        /// The migration's name.
        migration: MigrationId,
        /// Which of its streams.
        stream: StreamId,
    },
    /// This connection is the main link, from now on, of a migration whose link broke while pages were left behind.
    Rejoin {
        /// The migration's name.
        migration: MigrationId,
    },
    /// Pages with their contents.
    Pages {
        /// Whose.
        space: i32,
        /// Which, in order of address.
        runs: Vec<Run>,
        /// Their contents, one after the other.
        bytes: &'a [u8],
    },
    /// Pages that hold only zeros.
    ZeroPages {
        /// Whose.
        space: i32,
        /// Which, in order of address.
        runs: Vec<Run>,
    },
    /// Pages that are not there any more, whatever was sent of them.
    AbsentPages {
        /// Whose.
        space: i32,
        /// Which, in order of address.
        runs: Vec<Run>,
    },
    /// Everything of a round has been sent on this stream.
    StreamMark {
        /// The round, counted from 0; [`super::pages::ROUND_LAST`] when nothing follows any more.
        round: u32,
    },
    /// Everything of a round has come on every bulk stream.
    RoundReceived {
        /// The round.
        round: u32,
    },
    /// What the target must have of a space to restore it, and what stays at the source until then. A space
    /// with many runs takes several frames.
    MemoryPlan {
        /// Whose.
        space: i32,
        /// The plan holds once this round has come on every bulk stream.
        round: u32,
        /// How many of its pages have been sent with contents and hold: the same in every frame of the space.
        stored_pages: u64,
        /// Pages that stay at the source.
        remote: Vec<Run>,
    },
    /// A task waits for these pages.
    PageRequest {
        /// Whose.
        space: i32,
        /// Which.
        run: Run,
    },
    /// Every page is in its task; the source is not needed any more.
    MemoryComplete(TargetMemory),
    /// Pages that have not come. A space with many runs takes several frames.
    Lacking {
        /// Whose.
        space: i32,
        /// Which, in order of address.
        runs: Vec<Run>,
    },
    /// Nothing else has not come.
    LackingEnd,
}

/// Why an offer is declined; the code is stable, the text is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    /// One of [`RejectCode`], or one that a later version knows.
    pub code: u16,
    /// What is in the way and what to do about it: a lowercase fragment without a full stop.
    pub detail: String,
}

impl Reject {
    /// Returns a rejection whose text fits the wire.
    #[must_use]
    pub fn new(code: RejectCode, detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        detail.truncate(shortened(&detail).len());
        Self { code: code as u16, detail }
    }
}

/// The reasons for which an offer is declined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RejectCode {
    /// The message is not one the receiver expects, or is malformed.
    Protocol = 1,
    /// A container, task or snapshot of that name exists.
    NameTaken = 2,
    /// The host cannot run the container: architecture, kernel, CRIU, cgroup layout, runtime, snapshotter, mounts.
    Unfit = 3,
    /// There is not enough memory or disk.
    NoRoom = 4,
    /// A migration of that name is known already.
    MigrationKnown = 5,
    /// containerd on the target failed.
    Containerd = 6,
    /// A blob does not match its digest or size, or was not asked for.
    BadBlob = 7,
    /// The agent is shutting down.
    GoingAway = 8,
}

/// What the agent is doing after it has the blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Step {
    /// Taking blobs and registering the image.
    Image = 1,
    /// Unpacking layers and preparing the snapshot.
    Snapshot = 2,
    /// Creating the container's record.
    Container = 3,
    /// Creating the incoming task.
    Task = 4,
}

/// A received image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image<'a> {
    /// Its name, without a directory.
    pub name: &'a str,
    /// Size in bytes.
    pub size: u64,
    /// CRC-32 of its content.
    pub crc: u32,
}

/// What the target's worker says once the container runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resumed {
    /// Process id of the container's init on the target.
    pub pid: i32,
    /// Processor time of the worker and its CRIU, in microseconds.
    pub cpu_us: u64,
    /// Bytes that they caused to be written to storage.
    pub disk_bytes_written: u64,
}

impl<'a> Message<'a> {
    /// Appends everything but bulk content to `head` and returns the kind and the content that follows it.
    ///
    /// # Errors
    /// [`WireError::BadJson`] if a record cannot be expressed in JSON.
    pub fn encode(&self, head: &mut Vec<u8>) -> Result<(Kind, &'a [u8]), WireError> {
        let mut out = Writer(head);
        let mut bulk: &'a [u8] = &[];
        let kind = self.kind();
        match self {
            Self::Offer(offer) => put_json(kind, &mut out, offer)?,
            Self::Accept(accept) => put_json(kind, &mut out, accept)?,
            Self::Reject(Reject { code, detail }) => {
                out.u16(*code).bytes(detail.as_bytes());
            }
            Self::Blob { digest, size } => {
                out.bytes(digest.as_bytes()).u64(*size);
            }
            Self::BlobData(bytes) => bulk = bytes,
            Self::Preparing(step) => {
                out.u8(*step as u8);
            }
            Self::Ready { room_bytes } => {
                out.u64(*room_bytes);
            }
            Self::RootfsBegin { pass, layer } => {
                out.u8(pass_code(*pass)).u8(u8::from(*layer == Layer::Whole));
            }
            Self::RootfsEntry(entry) => put_entry(&mut out, entry),
            Self::RootfsData { offset, bytes } => {
                out.u64(*offset);
                bulk = bytes;
            }
            Self::RootfsRemove { path } => put_bytes(&mut out, path),
            Self::RootfsEnd { pass } | Self::RootfsApplied { pass } => {
                out.u8(pass_code(*pass));
            }
            Self::ImageFile { index, name } => {
                out.u32(*index).bytes(name.as_bytes());
            }
            Self::ImageData { index, offset, bytes } => {
                out.u32(*index).u64(*offset);
                bulk = bytes;
            }
            Self::StateEnd { manifest } => put_manifest(&mut out, manifest),
            Self::Resumed(resumed) => put_resumed(&mut out, *resumed),
            Self::Abort { detail } => put_bytes(&mut out, shortened(detail).as_bytes()),
            Self::FateQuery { migration } | Self::Rejoin { migration } => put_migration(&mut out, migration),
            Self::FateAnswer(answer) => {
                out.u8(fate_code(*answer));
            }
            Self::JoinStream { migration, stream } => {
                put_migration(&mut out, migration);
                put_stream(&mut out, *stream);
            }
            Self::Pages { space, runs, bytes } => {
                put_pages(&mut out, *space, runs);
                bulk = bytes;
            }
            Self::ZeroPages { space, runs }
            | Self::AbsentPages { space, runs }
            | Self::Lacking { space, runs } => {
                put_pages(&mut out, *space, runs);
            }
            Self::StreamMark { round } | Self::RoundReceived { round } => {
                out.u32(*round);
            }
            Self::MemoryPlan { space, round, stored_pages, remote } => {
                out.u32(*round).u64(*stored_pages);
                put_pages(&mut out, *space, remote);
            }
            Self::PageRequest { space, run } => put_request(&mut out, *space, *run),
            Self::MemoryComplete(memory) => put_json(kind, &mut out, memory)?,
            Self::BlobsEnd | Self::Received | Self::Restored | Self::Commit | Self::LackingEnd => {}
        }
        Ok((kind, bulk))
    }

    /// Reads a payload that has passed its checksum.
    ///
    /// # Errors
    /// [`WireError::BadPayload`] or [`WireError::BadJson`] if it breaks a rule of its kind.
    pub fn decode(kind: Kind, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Reader::new(kind, payload);
        let message = match kind {
            Kind::Offer => Self::Offer(take_json(kind, &mut fields)?),
            Kind::Accept => Self::Accept(take_json(kind, &mut fields)?),
            Kind::Reject => {
                Self::Reject(Reject { code: fields.u16()?, detail: fields.text(DETAIL_LEN_MAX)?.to_owned() })
            }
            Kind::Blob => Self::Blob { digest: fields.text(DIGEST_LEN_MAX)?, size: fields.u64()? },
            Kind::BlobData => Self::BlobData(take_data(&mut fields)?),
            Kind::BlobsEnd => Self::BlobsEnd,
            Kind::Preparing => Self::Preparing(take_step(&mut fields)?),
            Kind::Ready => Self::Ready { room_bytes: fields.u64()? },
            Kind::RootfsBegin => {
                Self::RootfsBegin { pass: take_pass(&mut fields)?, layer: take_layer(&mut fields)? }
            }
            Kind::RootfsEntry => Self::RootfsEntry(take_entry(&mut fields)?),
            Kind::RootfsData => Self::RootfsData { offset: fields.u64()?, bytes: take_data(&mut fields)? },
            Kind::RootfsRemove => Self::RootfsRemove { path: take_path(&mut fields, false)? },
            Kind::RootfsEnd => Self::RootfsEnd { pass: take_pass(&mut fields)? },
            Kind::RootfsApplied => Self::RootfsApplied { pass: take_pass(&mut fields)? },
            Kind::ImageFile => Self::ImageFile { index: fields.u32()?, name: take_image_name(&mut fields)? },
            Kind::ImageData => Self::ImageData {
                index: fields.u32()?,
                offset: fields.u64()?,
                bytes: take_data(&mut fields)?,
            },
            Kind::StateEnd => Self::StateEnd { manifest: take_manifest(&mut fields)? },
            Kind::Received => Self::Received,
            Kind::Restored => Self::Restored,
            Kind::Commit => Self::Commit,
            Kind::Resumed => Self::Resumed(take_resumed(&mut fields)?),
            Kind::Abort => Self::Abort { detail: fields.text(DETAIL_LEN_MAX)? },
            Kind::FateQuery => Self::FateQuery { migration: take_migration(&mut fields)? },
            Kind::FateAnswer => Self::FateAnswer(take_fate(&mut fields)?),
            Kind::JoinStream => Self::JoinStream {
                migration: take_migration(&mut fields)?,
                stream: take_stream(&mut fields)?,
            },
            Kind::Rejoin => Self::Rejoin { migration: take_migration(&mut fields)? },
            Kind::Pages => {
                let (space, runs) = (take_space(&mut fields)?, take_runs(&mut fields)?);
                let bytes = take_contents(&mut fields, &runs)?;
                Self::Pages { space, runs, bytes }
            }
            Kind::ZeroPages => {
                Self::ZeroPages { space: take_space(&mut fields)?, runs: take_runs(&mut fields)? }
            }
            Kind::AbsentPages => {
                Self::AbsentPages { space: take_space(&mut fields)?, runs: take_runs(&mut fields)? }
            }
            Kind::StreamMark => Self::StreamMark { round: fields.u32()? },
            Kind::RoundReceived => Self::RoundReceived { round: fields.u32()? },
            Kind::MemoryPlan => Self::MemoryPlan {
                round: fields.u32()?,
                stored_pages: fields.u64()?,
                space: take_space(&mut fields)?,
                remote: take_runs(&mut fields)?,
            },
            Kind::PageRequest => {
                Self::PageRequest { space: take_space(&mut fields)?, run: take_run(&mut fields)? }
            }
            Kind::MemoryComplete => Self::MemoryComplete(take_json(kind, &mut fields)?),
            Kind::Lacking => Self::Lacking { space: take_space(&mut fields)?, runs: take_runs(&mut fields)? },
            Kind::LackingEnd => Self::LackingEnd,
        };
        fields.end()?;
        Ok(message)
    }

    /// Returns the kind of frame that carries this message.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Offer(_) => Kind::Offer,
            Self::Accept(_) => Kind::Accept,
            Self::Reject(_) => Kind::Reject,
            Self::Blob { .. } => Kind::Blob,
            Self::BlobData(_) => Kind::BlobData,
            Self::BlobsEnd => Kind::BlobsEnd,
            Self::Preparing(_) => Kind::Preparing,
            Self::Ready { .. } => Kind::Ready,
            Self::RootfsBegin { .. } => Kind::RootfsBegin,
            Self::RootfsEntry(_) => Kind::RootfsEntry,
            Self::RootfsData { .. } => Kind::RootfsData,
            Self::RootfsRemove { .. } => Kind::RootfsRemove,
            Self::RootfsEnd { .. } => Kind::RootfsEnd,
            Self::RootfsApplied { .. } => Kind::RootfsApplied,
            Self::ImageFile { .. } => Kind::ImageFile,
            Self::ImageData { .. } => Kind::ImageData,
            Self::StateEnd { .. } => Kind::StateEnd,
            Self::Received => Kind::Received,
            Self::Restored => Kind::Restored,
            Self::Commit => Kind::Commit,
            Self::Resumed(_) => Kind::Resumed,
            Self::Abort { .. } => Kind::Abort,
            Self::FateQuery { .. } => Kind::FateQuery,
            Self::FateAnswer(_) => Kind::FateAnswer,
            Self::JoinStream { .. } => Kind::JoinStream,
            Self::Rejoin { .. } => Kind::Rejoin,
            Self::Pages { .. } => Kind::Pages,
            Self::ZeroPages { .. } => Kind::ZeroPages,
            Self::AbsentPages { .. } => Kind::AbsentPages,
            Self::StreamMark { .. } => Kind::StreamMark,
            Self::RoundReceived { .. } => Kind::RoundReceived,
            Self::MemoryPlan { .. } => Kind::MemoryPlan,
            Self::PageRequest { .. } => Kind::PageRequest,
            Self::MemoryComplete(_) => Kind::MemoryComplete,
            Self::Lacking { .. } => Kind::Lacking,
            Self::LackingEnd => Kind::LackingEnd,
        }
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
