//! What `state` and `list` print about a container.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::error::Result;
use crate::state::{Status, Stored};

/// A container as runc's `state` shows it: the fields of the OCI specification and a few more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StateReport {
    /// Version of the specification the state follows.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// Init's process id, 0 once it has ended.
    pub pid: i32,
    /// What the container is.
    pub status: Status,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The root file system on the host.
    pub rootfs: PathBuf,
    /// When it was created: RFC 3339, UTC, nanoseconds.
    pub created: String,
    /// Annotations of the spec.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Name of the user who created it; `state` leaves it empty, as runc does.
    pub owner: String,
}

impl StateReport {
    /// Describes `stored` as it is now.
    ///
    /// # Errors
    /// Those of [`Stored::status`].
    pub fn of(stored: &Stored) -> Result<Self> {
        let record = stored.record();
        let status = stored.status()?;
        let created = record.created.map(|time| serde_json::to_value(time).unwrap_or_default());
        let pid = if status == Status::Stopped { None } else { stored.pid() };
        Ok(Self {
            oci_version: record.oci_version.clone(),
            id: stored.id().to_owned(),
            pid: pid.unwrap_or_default(),
            status,
            bundle: stored.bundle().to_owned(),
            rootfs: stored.rootfs().to_owned(),
            created: created.as_ref().and_then(|time| time.as_str()).unwrap_or_default().to_owned(),
            annotations: record.annotations.clone().unwrap_or_default().into_iter().collect(),
            owner: String::new(),
        })
    }

    /// Fills in the owner's name, as `list` shows it.
    #[must_use]
    pub fn with_owner(mut self, stored: &Stored) -> Self {
        let uid = stored.record().creator.map(nix::unistd::Uid::from_raw);
        let user = uid.and_then(|uid| nix::unistd::User::from_uid(uid).ok().flatten());
        self.owner =
            user.map_or_else(|| uid.map_or_else(String::new, |uid| format!("#{uid}")), |user| user.name);
        self
    }
}
