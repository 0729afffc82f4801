//! The ttrpc service a shim offers beside containerd's Task service: how far a migration is, and stop it.
//!
//! ```text
//! godwit migrate ──Status, Cancel──► the shim's socket (its address: /run/godwit/shims/NAMESPACE/ID)
//! ```
//! containerd does not pass on services it does not know, so clients dial the shim itself. Progress is asked
//! for again and again with unary calls: the last frame of a ttrpc stream can be lost when a connection ends.
//! Everything here is generated from `protos/migrate.proto`, apart from where the address is kept.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

/// The messages.
#[expect(
    missing_docs,
    non_upper_case_globals,
    unused_mut,
    clippy::allow_attributes_without_reason,
    clippy::cast_possible_truncation,
    clippy::match_single_binding,
    clippy::redundant_static_lifetimes,
    clippy::unwrap_used,
    clippy::use_self,
    clippy::vec_init_then_push,
    reason = "generated; the definition carries the documentation"
)]
pub mod migrate {
    include!(concat!(env!("OUT_DIR"), "/migrate.rs"));
}

/// The service trait [`Migrate`](migrate_ttrpc::Migrate), its registration and its client.
#[expect(
    missing_docs,
    missing_debug_implementations,
    unused_imports,
    clippy::needless_pass_by_value,
    clippy::use_self,
    reason = "generated; the definition carries the documentation"
)]
pub mod migrate_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/migrate_ttrpc.rs"));
}

pub use migrate::{CancelRequest, CancelResponse, StatusRequest, StatusResponse};
pub use migrate_ttrpc::{Migrate, MigrateClient, create_migrate};

/// Directory in which shims leave the addresses of their sockets.
pub const ADDRESS_ROOT: &str = "/run/godwit/shims";

/// Returns the directory with the address files of a namespace's containers, each named by the container's id.
#[must_use]
pub fn address_directory(namespace: &str) -> PathBuf {
    Path::new(ADDRESS_ROOT).join(namespace)
}

/// Returns the file that holds the socket address of the shim of container `id` in `namespace`.
///
/// The file holds one line such as `unix:///run/containerd/s/0123…`, without a line break.
#[must_use]
pub fn address_file(namespace: &str, id: &str) -> PathBuf {
    address_directory(namespace).join(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_file_is_named_by_namespace_and_id() {
        assert_eq!(address_file("default", "web"), Path::new("/run/godwit/shims/default/web"));
    }
}
