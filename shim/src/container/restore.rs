//! What a container is restored from.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use super::{Container, create::CreateRequest};
use crate::{
    error::{Result, ShimError},
    verb::{Restore, Verb},
};

/// Marks a Create whose container comes from another host; the path of a socket follows.
const INCOMING: &str = "godwit-incoming://";

/// Names that containerd (1.6: the first, later: the second) gives the temporary directories into which it
/// unpacks a checkpoint, and which it never removes; a random number follows.
const UNPACKED: [&str; 2] = ["ctd-checkpoint", "ctrd-checkpoint"];

/// Where the container's state comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Image {
    /// A directory of CRIU images.
    Directory { path: PathBuf, parent: Option<PathBuf> },
    /// A migration, whose socket comes from this socket.
    Incoming(PathBuf),
}

impl Image {
    /// Returns what `request` asks to restore from, if it does.
    pub(super) fn of(request: &CreateRequest) -> Result<Option<Self>> {
        let path = match (request.checkpoint.as_str(), request.options.criu_image_path.as_str()) {
            ("", "") => return Ok(None),
            // containerd copies the option here only for runtimes with names that begin io.containerd.runc.
            ("", option) => option,
            (checkpoint, _) => checkpoint,
        };
        if let Some(socket) = path.strip_prefix(INCOMING) {
            if !socket.starts_with('/') {
                let reason = "expected godwit-incoming:///ABSOLUTE/PATH";
                return Err(ShimError::RefusedOption { name: path.to_owned(), reason });
            }
            return Ok(Some(Self::Incoming(socket.into())));
        }
        let parent = Some(&request.parent_checkpoint).filter(|path| !path.is_empty()).map(PathBuf::from);
        Ok(Some(Self::Directory { path: path.into(), parent }))
    }

    /// Removes the directory if containerd made it by unpacking a checkpoint.
    pub(super) fn remove_if_unpacked(&self) {
        let Self::Directory { path, .. } = self else { return };
        let temporary = env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
        let temporary = temporary.map_or_else(env::temp_dir, PathBuf::from);
        if !is_unpacked(path, &temporary) {
            return;
        }
        if let Err(error) = fs::remove_dir_all(path) {
            log::warn!("failed to remove {}: {error}", path.display());
        }
    }
}

/// Tells whether `path` is a real directory in `temporary` with a name that containerd makes up.
fn is_unpacked(path: &Path, temporary: &Path) -> bool {
    let made_up = |name: &str| {
        UNPACKED
            .iter()
            .filter_map(|prefix| name.strip_prefix(prefix))
            .any(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    path.parent() == Some(temporary)
        && path.file_name().and_then(|name| name.to_str()).is_some_and(made_up)
        && fs::symlink_metadata(path).is_ok_and(|entry| entry.is_dir())
}

impl Container {
    /// Returns the verb that restores from the images in `path`.
    pub(super) fn restore_verb(
        &self,
        path: &Path,
        parent: Option<&PathBuf>,
        pid_file: &Path,
        console: Option<PathBuf>,
    ) -> Result<Verb> {
        let settings = &self.settings;
        let work = settings.work.clone();
        fs::create_dir_all(&work).map_err(ShimError::io(format!("make {}", work.display())))?;
        Ok(Verb::Restore(Restore {
            image: path.to_owned(),
            work,
            parent: parent.cloned(),
            bundle: self.bundle.clone(),
            pid_file: pid_file.to_owned(),
            console,
            no_pivot: settings.no_pivot,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_that_containerd_unpacked_into_are_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = temporary.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        assert!(is_unpacked(&make("ctrd-checkpoint123"), temporary.path()));
        assert!(is_unpacked(&make("ctd-checkpoint9"), temporary.path()));
        for name in ["ctrd-checkpoint", "ctrd-checkpoint1x", "my-checkpoint1", "sub/ctrd-checkpoint1"] {
            assert!(!is_unpacked(&make(name), temporary.path()), "{name}");
        }
        std::os::unix::fs::symlink("/", temporary.path().join("ctrd-checkpoint7")).unwrap();
        assert!(!is_unpacked(&temporary.path().join("ctrd-checkpoint7"), temporary.path()));
    }

    #[test]
    fn a_create_is_a_restore_by_its_checkpoint_or_by_its_options() {
        let mut request = CreateRequest::default();
        assert_eq!(Image::of(&request).unwrap(), None);
        request.options.criu_image_path = "godwit-incoming:///run/s".to_owned();
        assert_eq!(Image::of(&request).unwrap(), Some(Image::Incoming("/run/s".into())));
        request.checkpoint = "/i".to_owned();
        assert_eq!(Image::of(&request).unwrap(), Some(Image::Directory { path: "/i".into(), parent: None }));
        request.checkpoint = "godwit-incoming://x".to_owned();
        Image::of(&request).unwrap_err();
    }
}
