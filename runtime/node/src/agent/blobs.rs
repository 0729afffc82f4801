//! Taking in the blobs that the target lacks: only those that were asked for, each once and of the offered size.

use std::collections::BTreeMap;

use godwit_engine::link::{Link, LinkError};
use godwit_protocol::{
    offer::Offer,
    wire::{Message, RejectCode},
};

use super::migration::Refusal;
use crate::{content::Ingest, target::Arrival};

/// Returns size by digest of the blobs that are missing.
pub(super) fn wanted(offer: &Offer, missing: &[String]) -> BTreeMap<String, u64> {
    let blobs = offer.container.image.iter().flat_map(|image| &image.blobs);
    blobs.filter(|blob| missing.contains(&blob.digest)).map(|blob| (blob.digest.clone(), blob.size)).collect()
}

/// Receives blobs until all that are wanted are in the content store.
///
/// # Errors
/// [`Refusal`] if one was not wanted, is of another size, or does not have its digest.
pub(super) fn receive(
    link: &mut Link,
    arrival: &Arrival,
    mut wanted: BTreeMap<String, u64>,
) -> Result<(), Refusal> {
    let mut current: Option<Incoming<'_>> = None;
    loop {
        match link.receive()? {
            Message::Blob { digest, size } if current.is_none() => {
                let expected = wanted.remove(digest);
                if expected != Some(size) {
                    return Err(bad(format!("blob {digest} of {size} bytes was not asked for")));
                }
                let incoming = Incoming { ingest: arrival.blob(digest, size)?, left: size };
                current = incoming.unless_complete()?;
            }
            Message::BlobData(bytes) => {
                let Some(incoming) = current.take() else { return Err(bad("content without a blob")) };
                current = incoming.take(bytes)?.unless_complete()?;
            }
            Message::BlobsEnd if current.is_none() && wanted.is_empty() => return Ok(()),
            Message::BlobsEnd => return Err(bad("the blobs ended before all had come")),
            Message::Abort { detail } => return Err(Refusal::Aborted(detail.to_owned())),
            other => {
                return Err(LinkError::Unexpected { kind: other.kind(), expected: "a blob" }.into());
            }
        }
    }
}

struct Incoming<'a> {
    /// Where it goes; none if the store has got it by another way, and the content is only counted.
    ingest: Option<Ingest<'a>>,
    left: u64,
}

impl Incoming<'_> {
    fn take(mut self, bytes: &[u8]) -> Result<Self, Refusal> {
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| bad("a blob is longer than it was said to be"))?;
        if let Some(ingest) = &mut self.ingest {
            ingest.write(bytes.to_vec())?;
        }
        Ok(self)
    }

    fn unless_complete(self) -> Result<Option<Self>, Refusal> {
        if self.left > 0 {
            return Ok(Some(self));
        }
        if let Some(ingest) = self.ingest {
            ingest.commit().map_err(|error| bad(error.to_string()))?;
        }
        Ok(None)
    }
}

fn bad(detail: impl Into<String>) -> Refusal {
    Refusal::reject(RejectCode::BadBlob, detail)
}
