//! What a client may set when it creates or checkpoints a container.
//!
//! Five message types arrive here, by containerd's version and the runtime's name:
//!
//! ```text
//! Create      containerd.runc.v1.Options            every client, for names that begin io.containerd.runc
//!             containerd.linux.runc.CreateOptions   1.6/1.7 restoring, for other names
//!             runtimeoptions.v1.Options             CRI and `ctr --runtime-config-path`, for other names
//! Checkpoint  containerd.runc.v1.CheckpointOptions
//!             containerd.linux.runc.CheckpointOptions   1.6/1.7, for other names
//! ```
//! Every field works or is refused by name: a setting that is dropped without a word is worse than an error.

use std::path::PathBuf;

use containerd_shim_protos::shim::oci;
use protobuf::{CodedInputStream, Message, UnknownValueRef, well_known_types::any::Any};

use crate::{
    error::{Result, ShimError},
    verb,
};

/// How a container is created.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CreateOptions {
    pub(crate) no_pivot_root: bool,
    pub(crate) no_new_keyring: bool,
    pub(crate) shim_cgroup: String,
    pub(crate) io_uid: u32,
    pub(crate) io_gid: u32,
    /// The runtime's program; empty for godwit.
    pub(crate) binary_name: String,
    /// Where the runtime keeps its state; empty for the default.
    pub(crate) root: String,
    pub(crate) systemd_cgroup: bool,
    /// An image to restore from, or an incoming migration.
    pub(crate) criu_image_path: String,
    /// Where CRIU keeps its logs; empty for a directory in the bundle.
    pub(crate) criu_work_path: String,
}

/// How a container is checkpointed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CheckpointOptions {
    /// Whether the container ends with the checkpoint.
    pub(crate) exit: bool,
    pub(crate) open_tcp: bool,
    pub(crate) external_unix_sockets: bool,
    pub(crate) terminal: bool,
    pub(crate) file_locks: bool,
    pub(crate) empty_namespaces: Vec<String>,
    pub(crate) cgroups_mode: String,
    /// A directory, or a `godwit://` request.
    pub(crate) image_path: String,
    pub(crate) work_path: String,
    pub(crate) parent_path: String,
}

impl CreateOptions {
    /// Decodes the options of a Create or of the `start` action.
    ///
    /// # Errors
    /// [`ShimError::UnknownOptions`], [`ShimError::RefusedOption`], [`ShimError::Undecodable`].
    pub(crate) fn decode(any: Option<&Any>) -> Result<Self> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        match type_name(any) {
            "containerd.runc.v1.Options" => Self::from_runc(&any.value),
            "containerd.linux.runc.CreateOptions" => Self::from_linux(&any.value),
            "runtimeoptions.v1.Options" => Self::from_runtime_options(&any.value),
            _ => Err(ShimError::UnknownOptions { type_url: any.type_url.clone() }),
        }
    }

    fn from_runc(bytes: &[u8]) -> Result<Self> {
        let options = oci::Options::parse_from_bytes(bytes).map_err(undecodable("runtime options"))?;
        // Removed in containerd 2.0; 1.6 and 1.7 may still send it.
        if let Some(UnknownValueRef::LengthDelimited(path)) = options.special_fields.unknown_fields().get(8)
            && !path.is_empty()
        {
            return Err(refused("CriuPath", "criu is found through PATH"));
        }
        // `task_api_address` and `task_api_version` tell containerd where to find this shim when somebody else
        // started it; there is nothing for the shim itself to do.
        Ok(Self {
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            shim_cgroup: options.shim_cgroup,
            io_uid: options.io_uid,
            io_gid: options.io_gid,
            binary_name: options.binary_name,
            root: options.root,
            systemd_cgroup: options.systemd_cgroup,
            criu_image_path: options.criu_image_path,
            criu_work_path: options.criu_work_path,
        })
    }

    fn from_linux(bytes: &[u8]) -> Result<Self> {
        let mut options = Self::default();
        for_each_field(bytes, "create options", |field, input| {
            match field {
                1 => options.no_pivot_root = input.read_bool()?,
                8 => options.no_new_keyring = input.read_bool()?,
                9 => options.shim_cgroup = input.read_string()?,
                10 => options.io_uid = input.read_uint32()?,
                11 => options.io_gid = input.read_uint32()?,
                12 => options.criu_work_path = input.read_string()?,
                13 => options.criu_image_path = input.read_string()?,
                // 2 to 7 repeat what the checkpoint was made with; a restore finds that in the image.
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(options)
    }

    fn from_runtime_options(bytes: &[u8]) -> Result<Self> {
        let (mut path, mut body) = (String::new(), Vec::new());
        for_each_field(bytes, "runtime options", |field, input| {
            match field {
                2 => path = input.read_string()?,
                3 => body = input.read_bytes()?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        if body.is_empty() && !path.is_empty() {
            body = std::fs::read(&path).map_err(ShimError::io(format!("read {path}")))?;
        }
        Self::from_table(&String::from_utf8_lossy(&body))
    }

    /// Reads the flat TOML table that containerd makes of a runtime's `options`.
    fn from_table(text: &str) -> Result<Self> {
        let mut options = Self::default();
        for line in text.lines() {
            let line = line.trim();
            if line.is_empty() || line.starts_with(['#', '[']) {
                continue;
            }
            let (key, value) = line.split_once('=').unwrap_or((line, ""));
            let (key, value) = (key.trim(), value.trim());
            let flag = || value.parse().map_err(|_| refused(key, "its value is neither true nor false"));
            let text = || value.trim_matches(['"', '\'']).to_owned();
            let number = || value.parse().map_err(|_| refused(key, "its value is not a number"));
            match key {
                "NoPivotRoot" => options.no_pivot_root = flag()?,
                "NoNewKeyring" => options.no_new_keyring = flag()?,
                "ShimCgroup" => options.shim_cgroup = text(),
                "IoUid" => options.io_uid = number()?,
                "IoGid" => options.io_gid = number()?,
                "BinaryName" => options.binary_name = text(),
                "Root" => options.root = text(),
                "SystemdCgroup" => options.systemd_cgroup = flag()?,
                "CriuImagePath" => options.criu_image_path = text(),
                "CriuWorkPath" => options.criu_work_path = text(),
                "TaskApiAddress" | "TaskApiVersion" => {}
                "CriuPath" if text().is_empty() => {}
                "CriuPath" => return Err(refused("CriuPath", "criu is found through PATH")),
                _ => return Err(refused(key, "it is not known to this runtime")),
            }
        }
        Ok(options)
    }
}

impl CheckpointOptions {
    /// Decodes the options of a Checkpoint.
    ///
    /// # Errors
    /// [`ShimError::UnknownOptions`], [`ShimError::RefusedOption`], [`ShimError::Undecodable`].
    pub(crate) fn decode(any: Option<&Any>) -> Result<Self> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        let options = match type_name(any) {
            "containerd.runc.v1.CheckpointOptions" => Self::from_fields(&any.value, 8, 9)?,
            "containerd.linux.runc.CheckpointOptions" => Self::from_fields(&any.value, 9, 8)?,
            "runtimeoptions.v1.Options" => Self::default(),
            _ => return Err(ShimError::UnknownOptions { type_url: any.type_url.clone() }),
        };
        match options.cgroups_mode.as_str() {
            "" | "soft" | "full" | "strict" | "ignore" => Ok(options),
            _ => Err(refused("CgroupsMode", "expected one of soft, full, strict, ignore")),
        }
    }

    /// The two messages differ only in the numbers of their paths.
    fn from_fields(bytes: &[u8], image_path: u32, work_path: u32) -> Result<Self> {
        let mut options = Self::default();
        for_each_field(bytes, "checkpoint options", |field, input| {
            match field {
                1 => options.exit = input.read_bool()?,
                2 => options.open_tcp = input.read_bool()?,
                3 => options.external_unix_sockets = input.read_bool()?,
                4 => options.terminal = input.read_bool()?,
                5 => options.file_locks = input.read_bool()?,
                6 => options.empty_namespaces.push(input.read_string()?),
                7 => options.cgroups_mode = input.read_string()?,
                field if field == image_path => options.image_path = input.read_string()?,
                field if field == work_path => options.work_path = input.read_string()?,
                10 => options.parent_path = input.read_string()?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(options)
    }

    /// Returns the runtime's operands for an ordinary checkpoint into `image`.
    pub(crate) fn into_verb(self, image: PathBuf, work: PathBuf) -> verb::Checkpoint {
        verb::Checkpoint {
            image,
            work,
            parent: Some(self.parent_path).filter(|path| !path.is_empty()).map(PathBuf::from),
            leave_running: !self.exit,
            open_tcp: self.open_tcp,
            external_unix_sockets: self.external_unix_sockets,
            terminal: self.terminal,
            file_locks: self.file_locks,
            empty_namespaces: self.empty_namespaces,
            cgroups_mode: self.cgroups_mode,
        }
    }
}

/// containerd writes bare names, protobuf's own `pack` puts a host before them.
fn type_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

fn undecodable(what: &'static str) -> impl FnOnce(protobuf::Error) -> ShimError {
    move |source| ShimError::Undecodable { what, source }
}

fn refused(name: &str, reason: &'static str) -> ShimError {
    ShimError::RefusedOption { name: name.to_owned(), reason }
}

/// Calls `read` with the number of each field; fields it does not read (false) are skipped.
fn for_each_field(
    bytes: &[u8],
    what: &'static str,
    mut read: impl FnMut(u32, &mut CodedInputStream<'_>) -> protobuf::Result<bool>,
) -> Result<()> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut walk = || -> protobuf::Result<()> {
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            let before = input.pos();
            if !read(tag >> 3, &mut input)? {
                debug_assert_eq!(before, input.pos(), "a field that is not read is not touched");
                protobuf::rt::skip_field_for_tag(tag, &mut input)?;
            }
        }
        Ok(())
    };
    walk().map_err(undecodable(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any { type_url: type_url.to_owned(), value, ..Any::default() }
    }

    #[test]
    fn runc_options_are_read_with_and_without_a_host_before_the_name() {
        let message = oci::Options {
            binary_name: "runc".to_owned(),
            io_uid: 1000,
            systemd_cgroup: true,
            criu_image_path: "/i".to_owned(),
            ..oci::Options::default()
        };
        let bytes = message.write_to_bytes().unwrap();
        for url in ["containerd.runc.v1.Options", "type.googleapis.com/containerd.runc.v1.Options"] {
            let options = CreateOptions::decode(Some(&any(url, bytes.clone()))).unwrap();
            assert_eq!((options.binary_name.as_str(), options.io_uid), ("runc", 1000));
            assert!(options.systemd_cgroup);
            assert_eq!(options.criu_image_path, "/i");
        }
        assert_eq!(CreateOptions::decode(None).unwrap(), CreateOptions::default());
    }

    #[test]
    fn every_runc_option_is_read_by_message_and_by_table() {
        let message = oci::Options {
            no_pivot_root: true,
            no_new_keyring: true,
            shim_cgroup: "/shims".to_owned(),
            io_uid: 1000,
            io_gid: 2000,
            binary_name: "runc".to_owned(),
            root: "/r".to_owned(),
            systemd_cgroup: true,
            criu_image_path: "/i".to_owned(),
            criu_work_path: "/w".to_owned(),
            task_api_address: "unix:///s".to_owned(),
            task_api_version: 3,
            ..oci::Options::default()
        };
        let expected = CreateOptions {
            no_pivot_root: true,
            no_new_keyring: true,
            shim_cgroup: "/shims".to_owned(),
            io_uid: 1000,
            io_gid: 2000,
            binary_name: "runc".to_owned(),
            root: "/r".to_owned(),
            systemd_cgroup: true,
            criu_image_path: "/i".to_owned(),
            criu_work_path: "/w".to_owned(),
        };
        let message = any("containerd.runc.v1.Options", message.write_to_bytes().unwrap());
        assert_eq!(CreateOptions::decode(Some(&message)).unwrap(), expected);
        let table = "NoPivotRoot = true\nNoNewKeyring = true\nShimCgroup = '/shims'\nIoUid = 1000\nIoGid = 2000\n\
             BinaryName = \"runc\"\nRoot = \"/r\"\nSystemdCgroup = true\nCriuImagePath = \"/i\"\n\
             CriuWorkPath = \"/w\"\nCriuPath = \"\"\nTaskApiAddress = \"unix:///s\"\nTaskApiVersion = 3\n";
        assert_eq!(CreateOptions::from_table(table).unwrap(), expected);
        for wrong in ["NoPivotRoot = \"yes\"", "IoUid = \"root\"", "CriuPath = \"/criu\""] {
            let error = CreateOptions::from_table(wrong).unwrap_err().to_string();
            assert!(error.contains(wrong.split(' ').next().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_path_to_criu_is_refused_by_name() {
        // Field 8, length-delimited.
        let bytes = [&[8 << 3 | 2, 5][..], b"/criu"].concat();
        let error = CreateOptions::decode(Some(&any("containerd.runc.v1.Options", bytes))).unwrap_err();
        assert_eq!(error.to_string(), "option CriuPath is refused: criu is found through PATH");
    }

    #[test]
    fn both_messages_for_checkpoints_give_the_same_options() {
        let message = oci::CheckpointOptions {
            exit: true,
            file_locks: true,
            empty_namespaces: vec!["network".to_owned()],
            image_path: "/i".to_owned(),
            work_path: "/w".to_owned(),
            ..oci::CheckpointOptions::default()
        };
        let new = message.write_to_bytes().unwrap();
        let swapped = oci::CheckpointOptions {
            image_path: message.work_path.clone(),
            work_path: message.image_path.clone(),
            ..message
        };
        let old = swapped.write_to_bytes().unwrap();
        let new = CheckpointOptions::decode(Some(&any("containerd.runc.v1.CheckpointOptions", new))).unwrap();
        let old =
            CheckpointOptions::decode(Some(&any("containerd.linux.runc.CheckpointOptions", old))).unwrap();
        assert_eq!(new, old);
        assert_eq!((new.image_path.as_str(), new.work_path.as_str()), ("/i", "/w"));
        assert!(new.exit && new.file_locks && !new.open_tcp);
    }

    #[test]
    fn a_table_is_read_and_what_it_does_not_know_refused_by_name() {
        let table = "BinaryName = \"/usr/bin/crun\"\nSystemdCgroup = true\nIoUid = 7\n";
        let options = CreateOptions::from_table(table).unwrap();
        assert_eq!((options.binary_name.as_str(), options.io_uid), ("/usr/bin/crun", 7));
        assert!(options.systemd_cgroup);
        let error = CreateOptions::from_table("BinaryNames = \"x\"").unwrap_err();
        assert!(error.to_string().contains("BinaryNames"), "{error}");
    }

    #[test]
    fn unknown_types_and_broken_messages_are_errors() {
        assert!(matches!(
            CheckpointOptions::decode(Some(&any("x.Y", vec![]))),
            Err(ShimError::UnknownOptions { .. })
        ));
        let cut = any("containerd.runc.v1.CheckpointOptions", vec![8 << 3 | 2, 200]);
        assert!(matches!(CheckpointOptions::decode(Some(&cut)), Err(ShimError::Undecodable { .. })));
    }
}
