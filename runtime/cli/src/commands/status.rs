//! `godwit status` and `godwit cancel`: a migration that another terminal, or containerd's client, asked for.

use std::process::ExitCode;

use clap::Args;
use godwit_protocol::worker::{Ended, Snapshot};

use crate::commands::migrate::{Shim, line, namespace_or_default};
use crate::error::{CliError, Result};

/// Which container.
#[derive(Debug, Args)]
struct Which {
    /// Name of the container
    id: String,
    /// containerd's namespace [default: $CONTAINERD_NAMESPACE or "default"]
    #[arg(long, short, value_name = "NAME")]
    namespace: Option<String>,
}

impl Which {
    fn shim(&self) -> Result<Shim> {
        let namespace = namespace_or_default(self.namespace.as_deref());
        Shim::of(&godwit_api::address_file(&namespace, &self.id)).map_err(|cause| {
            CliError::Status(format!(
                "no shim of godwit's runs container `{}` in namespace `{namespace}` here ({cause})",
                self.id
            ))
        })
    }

    fn snapshot(&self, shim: &Shim) -> Result<Snapshot> {
        let status = shim.status().map_err(CliError::Status)?;
        status.ok_or_else(|| {
            CliError::Status(format!("no migration of container `{}` has been asked for", self.id))
        })
    }
}

/// Show how far the migration of a container is
///
/// The source answers, while the migration lasts and until the container is removed there.
///
///     godwit status web           one line for people
///     godwit status web --json    the whole of it, as one JSON object
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Status {
    #[command(flatten)]
    which: Which,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let snapshot = self.which.snapshot(&self.which.shim()?)?;
        if self.json {
            let text =
                serde_json::to_string(&snapshot).map_err(|error| CliError::Status(error.to_string()))?;
            println!("{text}");
        } else {
            match &snapshot.ended {
                None => println!("{}", line(&snapshot)),
                Some(Ended::Well { report }) => println!(
                    "{} after {:.0} ms, down for {:.1} ms",
                    report.fate, report.total_ms, report.downtime_ms
                ),
                Some(Ended::Badly { failure }) => println!("failed: {failure}"),
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Give up the migration of a container, which goes on where it is
///
/// Once the target has been told to let the container run there is no way back: the migration then goes on to its
/// end, and `godwit status` says where the container is.
#[derive(Debug, Args)]
pub(crate) struct Cancel {
    #[command(flatten)]
    which: Which,
}

impl Cancel {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let shim = self.which.shim()?;
        let snapshot = self.which.snapshot(&shim)?;
        if snapshot.ended.is_some() {
            return Err(CliError::Status(format!(
                "the migration of container `{}` has ended already",
                self.which.id
            )));
        }
        shim.cancel().map_err(CliError::Status)?;
        Ok(ExitCode::SUCCESS)
    }
}
