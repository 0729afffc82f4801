//! What a container's specification expects to find on its host.

use std::path::Path;

use serde::Deserialize;

use crate::error::NodeError;

/// The parts of an OCI runtime specification that name things on the host.
#[derive(Debug, Deserialize)]
struct Spec {
    #[serde(default)]
    mounts: Vec<Mount>,
    #[serde(default)]
    linux: Option<Linux>,
}

#[derive(Debug, Deserialize)]
struct Mount {
    #[serde(default)]
    source: String,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    options: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<Namespace>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

/// Returns the host paths that the specification binds or joins and for which `exists` says no.
///
/// # Errors
/// [`NodeError::Malformed`] if it is no specification.
pub(crate) fn absent(spec: &[u8], exists: impl Fn(&Path) -> bool) -> Result<Vec<String>, NodeError> {
    let spec = parse(spec)?;
    let is_bind = |mount: &&Mount| {
        mount.kind == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
    };
    let linux = spec.linux.unwrap_or_default();
    let mut absent: Vec<String> = spec
        .mounts
        .iter()
        .filter(is_bind)
        .map(|mount| &mount.source)
        .chain(linux.namespaces.iter().map(|namespace| &namespace.path))
        .filter(|path| path.starts_with('/') && !exists(Path::new(path)))
        .cloned()
        .collect();
    absent.sort();
    absent.dedup();
    Ok(absent)
}

/// Tells whether the container has a user namespace of its own.
///
/// # Errors
/// As [`absent`].
pub(crate) fn has_user_namespace(spec: &[u8]) -> Result<bool, NodeError> {
    Ok(parse(spec)?.linux.unwrap_or_default().namespaces.iter().any(|namespace| namespace.kind == "user"))
}

fn parse(spec: &[u8]) -> Result<Spec, NodeError> {
    serde_json::from_slice(spec).map_err(|error| NodeError::malformed("the container's specification", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_and_joined_namespaces_must_exist_and_nothing_else_must() {
        let spec = br#"{"mounts":[
            {"destination":"/proc","type":"proc","source":"proc"},
            {"destination":"/d","type":"bind","source":"/data","options":["rbind"]},
            {"destination":"/e","type":"none","source":"/here","options":["bind"]},
            {"destination":"/dev","type":"tmpfs","source":"/tmpfs"}],
            "linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/run/netns/x"}]}}"#;
        let absent = |path: &Path| path == Path::new("/here");
        assert_eq!(super::absent(spec, absent).unwrap(), ["/data", "/run/netns/x"]);
        assert!(super::absent(spec, |_| true).unwrap().is_empty());
        super::absent(b"{", |_| true).unwrap_err();
        assert!(super::absent(b"{}", |_| false).unwrap().is_empty());
    }

    #[test]
    fn user_namespace_is_one_among_the_namespaces() {
        let of =
            |kind: &str| format!(r#"{{"linux":{{"namespaces":[{{"type":"pid"}},{{"type":"{kind}"}}]}}}}"#);
        assert!(has_user_namespace(of("user").as_bytes()).unwrap());
        assert!(!has_user_namespace(of("uts").as_bytes()).unwrap());
        assert!(!has_user_namespace(b"{}").unwrap());
    }
}
