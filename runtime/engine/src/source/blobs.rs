//! Sends the blobs of the container's image that the target lacks.

use godwit_protocol::offer;
use godwit_protocol::wire::Message;
use godwit_protocol::wire::message::DATA_LEN_MAX;

use super::Origin;
use super::bulk::{BulkError, BulkLink};

/// Sends the blobs that the target named, in its order, and then their end.
pub(super) fn send(
    link: &BulkLink,
    origin: &dyn Origin,
    offered: &[offer::Blob],
    missing: &[String],
) -> Result<(), BulkError> {
    for digest in missing {
        let failed = |source| BulkError::Blob { digest: digest.clone(), source };
        // The target has no claim to anything but what it was offered.
        let blob = offered.iter().find(|blob| blob.digest == *digest);
        let size = blob.ok_or_else(|| failed("it was not offered".into()))?.size;
        link.send(&Message::Blob { digest, size })?;
        let mut content = origin.open_blob(digest).map_err(failed)?;
        let mut sent = 0;
        while let Some(piece) = content.next_piece().map_err(failed)? {
            for bytes in piece.chunks(DATA_LEN_MAX) {
                link.send(&Message::BlobData(bytes))?;
            }
            sent += piece.len() as u64;
        }
        if sent != size {
            return Err(failed(format!("it has {sent} bytes where {size} were offered").into()));
        }
    }
    link.send(&Message::BlobsEnd)
}
