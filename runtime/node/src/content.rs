//! Blobs in containerd's content store: looked up, read in pieces, written under a verified digest.

use containerd_client::{
    services::v1::{
        AbortRequest, Info, InfoRequest, ReadContentRequest, ReadContentResponse, UpdateRequest, WriteAction,
        WriteContentRequest, WriteContentResponse, content_client::ContentClient,
    },
    tonic::{Status, Streaming, codegen::tokio_stream::wrappers::ReceiverStream},
};
use prost_types::FieldMask;
use tokio::sync::mpsc;

use crate::{
    client::Containerd,
    error::{NodeError, Optional},
};

impl Containerd {
    /// Returns a blob's size and labels, if it is in the store.
    ///
    /// # Errors
    /// [`NodeError`] if containerd cannot say.
    pub(crate) fn blob_info(&self, digest: &str) -> Result<Option<Info>, NodeError> {
        let request = self.request(InfoRequest { digest: digest.to_owned() });
        let answer =
            self.call("look up a blob", ContentClient::new(self.channel()).info(request)).optional()?;
        Ok(answer.and_then(|answer| answer.info))
    }

    /// Opens a blob for reading.
    ///
    /// # Errors
    /// [`NodeError`] if it is not there.
    pub fn open_blob(&self, digest: &str) -> Result<BlobReader<'_>, NodeError> {
        let request = self.request(ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 });
        let pieces = self.call("read a blob", ContentClient::new(self.channel()).read(request))?;
        Ok(BlobReader { client: self, pieces })
    }

    /// Reads a document, which may have at most [`DOCUMENT_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// [`NodeError::TooLarge`], or what [`Containerd::open_blob`] returns.
    pub(crate) fn read_document(&self, digest: &str) -> Result<Vec<u8>, NodeError> {
        let mut reader = self.open_blob(digest)?;
        let mut document = Vec::new();
        while let Some(piece) = reader.next_piece()? {
            document.extend_from_slice(&piece);
            if document.len() > DOCUMENT_BYTES_MAX {
                return Err(NodeError::TooLarge {
                    what: format!("document {digest}"),
                    size_bytes: document.len() as u64,
                    limit_bytes: DOCUMENT_BYTES_MAX as u64,
                });
            }
        }
        Ok(document)
    }

    /// Sets labels of a blob and leaves its others alone.
    ///
    /// # Errors
    /// [`NodeError`] if it is not there.
    pub(crate) fn label_blob(&self, digest: &str, labels: Vec<(String, String)>) -> Result<(), NodeError> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.iter().map(|(key, _)| format!("labels.{key}")).collect();
        let info =
            Info { digest: digest.to_owned(), labels: labels.into_iter().collect(), ..Info::default() };
        let request =
            self.request(UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) });
        self.call("label a blob", ContentClient::new(self.channel()).update(request))?;
        Ok(())
    }

    /// Begins to write a blob; `None` if the store has it already.
    ///
    /// `reference` names the write; what an earlier write of that name left behind is dropped.
    ///
    /// # Errors
    /// [`NodeError`] if containerd refuses.
    pub(crate) fn ingest(
        &self,
        reference: &str,
        digest: &str,
        size_bytes: u64,
    ) -> Result<Option<Ingest<'_>>, NodeError> {
        let abort = self.request(AbortRequest { r#ref: reference.to_owned() });
        self.call("drop an old write", ContentClient::new(self.channel()).abort(abort)).optional()?;

        let total = i64::try_from(size_bytes)
            .map_err(|_| NodeError::malformed(format!("size of blob {digest}"), size_bytes))?;
        let (requests, outbox) = mpsc::channel(1);
        let mut ingest = Ingest {
            client: self,
            requests,
            answers: None,
            reference: reference.to_owned(),
            digest: digest.to_owned(),
            total,
            offset: 0,
        };
        match ingest.open(outbox) {
            Ok(()) => Ok(Some(ingest)),
            Err(error) if error.already_exists() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A blob being read.
#[derive(Debug)]
pub struct BlobReader<'a> {
    client: &'a Containerd,
    pieces: Streaming<ReadContentResponse>,
}

impl BlobReader<'_> {
    /// Returns the next piece, at most a few megabytes; `None` at the end.
    ///
    /// # Errors
    /// [`NodeError`] if containerd breaks off.
    pub fn next_piece(&mut self) -> Result<Option<Vec<u8>>, NodeError> {
        let piece = self.client.step("read a blob", self.pieces.message())?;
        Ok(piece.map(|piece| piece.data))
    }
}

/// A blob being written. Dropped before [`Ingest::commit`], it leaves a write that its lease cleans up.
#[derive(Debug)]
pub(crate) struct Ingest<'a> {
    client: &'a Containerd,
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Option<Streaming<WriteContentResponse>>,
    reference: String,
    digest: String,
    total: i64,
    offset: i64,
}

impl Ingest<'_> {
    fn open(&mut self, outbox: mpsc::Receiver<WriteContentRequest>) -> Result<(), NodeError> {
        let first = self.message(WriteAction::Stat, Vec::new());
        let request = self.client.request(ReceiverStream::new(outbox));
        // containerd answers the stream's head only after its first message, which therefore goes in before.
        let requests = self.requests.clone();
        let answers = self.client.call(WRITE, async {
            requests.send(first).await.map_err(|_| closed())?;
            ContentClient::new(self.client.channel()).write(request).await
        })?;
        self.answers = Some(answers);
        self.answer()?;
        Ok(())
    }

    /// Appends a piece.
    ///
    /// # Errors
    /// [`NodeError`] if containerd refuses, for one when its disk is full.
    pub(crate) fn write(&mut self, data: Vec<u8>) -> Result<(), NodeError> {
        let written = i64::try_from(data.len()).map_err(|error| NodeError::malformed("piece", error))?;
        let message = self.message(WriteAction::Write, data);
        self.exchange(message)?;
        self.offset += written;
        Ok(())
    }

    /// Ends the blob: containerd compares its digest with the one announced.
    ///
    /// # Errors
    /// [`NodeError`] if size or digest differ.
    pub(crate) fn commit(mut self) -> Result<(), NodeError> {
        let message = self.message(WriteAction::Commit, Vec::new());
        match self.exchange(message) {
            // Another migration may have brought the same blob meanwhile.
            Err(error) if !error.already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    fn exchange(&mut self, message: WriteContentRequest) -> Result<(), NodeError> {
        let requests = &self.requests;
        let sent = self.client.step(WRITE, async { requests.send(message).await.map_err(|_| closed()) });
        // When containerd has given up, the reason is in its answer, not in the closed channel.
        self.answer().and(sent)
    }

    fn answer(&mut self) -> Result<(), NodeError> {
        let Some(answers) = &mut self.answers else { return Ok(()) };
        match self.client.step(WRITE, answers.message())? {
            Some(_) => Ok(()),
            None => Err(NodeError::malformed("containerd's answer to a write", "it ended early")),
        }
    }

    fn message(&self, action: WriteAction, data: Vec<u8>) -> WriteContentRequest {
        WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            total: self.total,
            expected: self.digest.clone(),
            offset: self.offset,
            data,
            ..WriteContentRequest::default()
        }
    }
}

fn closed() -> Status {
    Status::unavailable("containerd closed the write")
}

/// The largest manifest, index or config that is read into memory.
pub(crate) const DOCUMENT_BYTES_MAX: usize = 8 << 20;

const WRITE: &str = "write a blob";
