//! The shim's own service: how far the migration is, and stop it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use godwit_api::{CancelRequest, MigrateClient, StatusRequest};
use godwit_protocol::worker::Snapshot;
use tokio::runtime::{Builder, Runtime};
use ttrpc::context;

/// A connection to the shim of one container.
pub(in crate::commands) struct Shim {
    runtime: Runtime,
    client: MigrateClient,
    namespace: String,
    id: String,
}

impl Shim {
    /// Connects to the shim whose address is in `address_file`, which is named by the container's namespace and id.
    ///
    /// # Errors
    /// A fragment that says why there is no such shim.
    pub(in crate::commands) fn of(address_file: &Path) -> Result<Self, String> {
        let part = |path: Option<&std::ffi::OsStr>| path.unwrap_or_default().to_string_lossy().into_owned();
        let (id, namespace) =
            (part(address_file.file_name()), part(address_file.parent().and_then(Path::file_name)));
        let address = fs::read_to_string(address_file)
            .map_err(|error| format!("{}: {error}", address_file.display()))?;
        let runtime =
            Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
        let client = runtime
            .block_on(async {
                tokio::time::timeout(CALL_MAX, ttrpc::r#async::Client::connect(address.trim())).await
            })
            .map_err(|_| format!("{} does not answer", address.trim()))?
            .map_err(|error| format!("{}: {error}", address.trim()))?;
        Ok(Self { runtime, client: MigrateClient::new(client), namespace, id })
    }

    /// Returns how far the latest migration is; `None` if there has been none.
    ///
    /// # Errors
    /// A text if the shim does not answer, or not as agreed.
    pub(in crate::commands) fn status(&self) -> Result<Option<Snapshot>, String> {
        let request = StatusRequest {
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            ..StatusRequest::default()
        };
        let call = self.client.status(context::with_duration(CALL_MAX), &request);
        match self.runtime.block_on(call) {
            Ok(answer) => {
                serde_json::from_str(&answer.snapshot_json).map(Some).map_err(|error| error.to_string())
            }
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Asks the migration to give up.
    ///
    /// # Errors
    /// A text if the shim refuses or does not answer.
    pub(in crate::commands) fn cancel(&self) -> Result<(), String> {
        let request = CancelRequest {
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            ..CancelRequest::default()
        };
        let call = self.client.cancel(context::with_duration(CALL_MAX), &request);
        self.runtime.block_on(call).map(drop).map_err(|error| error.to_string())
    }
}

const CALL_MAX: Duration = Duration::from_secs(5);
