//! A blocking client of one containerd in one namespace.
//!
//! The rest of godwit is written with threads, so the asynchronous gRPC client lives behind this type, with a
//! small runtime of its own that runs only while a call is made. One value serves one thread.

use std::{
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_client::tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use tokio::runtime::{Builder, Runtime};

use crate::{error::NodeError, name};

/// Where containerd listens unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";

/// A connection to containerd, bound to a namespace.
#[derive(Debug)]
pub struct Containerd {
    runtime: Runtime,
    channel: Channel,
    address: PathBuf,
    namespace: String,
    namespace_header: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Containerd {
    /// Connects to the containerd that listens at `address`.
    ///
    /// # Errors
    /// [`NodeError::BadName`] for a malformed namespace, [`NodeError::Unreachable`] if nothing answers there.
    pub fn connect(address: &Path, namespace: &str) -> Result<Self, NodeError> {
        name::check("namespace", namespace)?;
        let unreachable = |cause: String| NodeError::Unreachable { address: address.to_owned(), cause };
        let namespace_header = namespace
            .parse()
            .map_err(|_| NodeError::BadName { what: "namespace", name: namespace.to_owned() })?;
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| unreachable(error.to_string()))?;
        let channel = runtime
            .block_on(async {
                tokio::time::timeout(CONNECT_LIMIT, containerd_client::connect(address)).await
            })
            .map_err(|_| unreachable("no answer".to_owned()))?
            .map_err(|error| unreachable(innermost(&error)))?;
        Ok(Self {
            runtime,
            channel,
            address: address.to_owned(),
            namespace: namespace.to_owned(),
            namespace_header,
            lease: None,
        })
    }

    /// Returns the socket this client talks to.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Returns the namespace every call is made in.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Makes everything created from here on belong to `lease`, out of the garbage collector's reach.
    pub(crate) fn hold_lease(&mut self, lease: &str) -> Result<(), NodeError> {
        let header =
            lease.parse().map_err(|_| NodeError::BadName { what: "lease", name: lease.to_owned() })?;
        self.lease = Some(header);
        Ok(())
    }

    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace_header.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        request
    }

    /// Makes a call that containerd answers at once.
    pub(crate) fn call<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, NodeError> {
        self.runtime
            .block_on(async { tokio::time::timeout(CALL_LIMIT, call).await })
            .map_err(|_| NodeError::Silent { what, limit_s: CALL_LIMIT.as_secs() })?
            .map(Response::into_inner)
            .map_err(|status| refused(what, &status))
    }

    /// Makes a call that lasts as long as what it asks for.
    pub(crate) fn call_unbounded<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, NodeError> {
        self.runtime.block_on(call).map(Response::into_inner).map_err(|status| refused(what, &status))
    }

    /// Runs a step of an open stream.
    pub(crate) fn step<T>(
        &self,
        what: &'static str,
        step: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, NodeError> {
        self.runtime
            .block_on(async { tokio::time::timeout(CALL_LIMIT, step).await })
            .map_err(|_| NodeError::Silent { what, limit_s: CALL_LIMIT.as_secs() })?
            .map_err(|status| refused(what, &status))
    }
}

fn refused(what: &'static str, status: &Status) -> NodeError {
    NodeError::Call { what, code: status.code(), message: status.message().to_owned() }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A containerd on a busy disk can take seconds over a database transaction.
const CALL_LIMIT: Duration = Duration::from_secs(120);
