//! This host's containerd as a migration needs it: reading a container off the source, making it on the target.
//!
//! ```text
//! source                                             target
//! source        record, image, snapshot ──Offer──►   preflight   may it come?
//! content       blobs by digest         ──Blob───►   target      image, snapshot, record, incoming task
//! cleanup       after commit                         agent       listens, hands the link to the worker
//! ```
//! Everything is blocking; [`client::Containerd`] hides the asynchronous gRPC client. Nothing here knows of CRIU,
//! pages or the writable layer's content: that is `godwit-engine`'s.
#![forbid(unsafe_code)]

pub mod agent;
mod ask;
pub mod cleanup;
pub mod client;
pub mod content;
pub mod error;
pub mod facts;
mod image;
mod manifest;
mod name;
mod needs;
mod options;
mod record;
pub mod source;
mod source_image;
mod stdio;
pub mod target;

pub use client::Containerd;
pub use error::NodeError;
pub use options::INCOMING_SCHEME;
pub use source::Source;
