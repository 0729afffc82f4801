//! The writable layer: read on the source, applied on the target.
//!
//! ```text
//! source   Layer::of(rootfs) ──► Copier::copy(Live) ──► … freeze … ──► Copier::copy(Final)
//!                                    │ entries, content, removals           │ only what differs from the live pass
//! target                         Applier ◄────────────────────────────────┘
//! ```
//! With overlayfs the source reads the *upper* directory, in which a removed path is a character device 0:0 and a
//! replaced directory is marked opaque, and says what that means: `remove`, `clear`. The target applies it through
//! the mounted root, so its own kernel decides how to store it; nobody ever writes to the upper directory of a
//! mounted overlay. Any other file system is read whole (`Layer::Whole`).
//!
//! What the copier relies on: an inode whose content or attributes change gets a new change time. Two things do
//! not follow that rule, and are sent again in the final pass whether or not they seem changed: files changed
//! within the clock's granularity of the live pass, and files that a task has mapped shared and writable, whose
//! pages the kernel may let be written without a further fault.
//!
//! What the applier relies on: nothing that comes from the peer. A path is resolved component by component below
//! the root without following links or crossing mounts (`openat2`), so neither a path nor a link that was
//! planted before leads out.
//!
//! Not handled here: files that are open and have no name (CRIU's ghost files), and bind mounts, which belong to
//! the host.

mod apply;
mod copy;
mod layer;
mod mapped;
mod size;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

pub use apply::Applier;
pub use copy::{Copier, Sink};
pub use layer::LayerRoot;
pub use mapped::shared_writable_paths;

/// A writable layer that cannot be read or applied.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A file cannot be read, written or changed.
    #[error("failed to {what} `{}`", .path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The path, relative to the root where it lies in it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The layer uses a feature of overlayfs that cannot be expressed.
    #[error(
        "`{}` is stored by overlayfs with {feature}, which cannot be moved: set the module parameter of that \
         name to N and write the file anew", .path.display()
    )]
    Overlay {
        /// The path, relative to the root.
        path: PathBuf,
        /// `redirect_dir` or `metacopy`.
        feature: &'static str,
    },
    /// No mount is found where the container's root should be.
    #[error("`{}` is no mounted root of a container", .path.display())]
    NoRoot {
        /// The path.
        path: PathBuf,
    },
    /// The peer's messages do not fit together.
    #[error("the peer's copy of the writable layer is malformed: {what}")]
    Malformed {
        /// Which rule they break.
        what: &'static str,
    },
    /// The link failed under the copy.
    #[error(transparent)]
    Link(#[from] crate::link::LinkError),
}

impl RootfsError {
    fn file(what: &'static str, path: &[u8]) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path_of(path);
        move |errno| Self::File { what, path, source: errno.into() }
    }

    /// Tells whether the cause is that something has vanished, which is no error while the container runs.
    fn is_vanished(&self) -> bool {
        matches!(self, Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn path_of(path: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(path))
}
