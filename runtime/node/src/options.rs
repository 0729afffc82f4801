//! The options of the incoming task: the container's own, with the place where its migration comes in.
//!
//! A protobuf message is the concatenation of its fields, and the last value of a field that is no list wins. So
//! one field is set in options of any version of containerd, and none is lost, by appending it.

use std::path::Path;

use godwit_protocol::offer::TypedBytes;
use prost::Message;
use prost_types::Any;

/// What a `criu_image_path` begins with that names the socket of an incoming migration.
pub const INCOMING_SCHEME: &str = "godwit-incoming://";

/// The one field of `containerd.runc.v1.Options` that is set here.
#[derive(Clone, PartialEq, Eq, Message)]
struct CriuImagePath {
    #[prost(string, tag = "10")]
    criu_image_path: String,
}

/// Returns the options of a task that a migration comes into over `socket`, an absolute path.
///
/// Options of another type than runc's (a CRI handler's configuration file) cannot carry the socket; they stay in
/// the container's record and the task gets the socket alone.
#[must_use]
pub(crate) fn incoming(options: Option<&TypedBytes>, socket: &Path) -> Any {
    let field = CriuImagePath { criu_image_path: format!("{INCOMING_SCHEME}{}", socket.display()) };
    let mut value = options
        .filter(|options| is_runc_options(&options.type_url))
        .map(|options| options.value.clone())
        .unwrap_or_default();
    value.extend(field.encode_to_vec());
    Any { type_url: RUNC_OPTIONS.to_owned(), value }
}

/// Tells whether a type is runc's, by its name alone or behind a `type.googleapis.com/`.
fn is_runc_options(type_url: &str) -> bool {
    type_url.rsplit('/').next() == Some(RUNC_OPTIONS)
}

const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";

#[cfg(test)]
mod tests {
    use super::*;

    /// `containerd.runc.v1.Options` with a field that is kept, the one that is set, and one of a later version.
    #[derive(Clone, PartialEq, Message)]
    struct Options {
        #[prost(bool, tag = "1")]
        no_pivot_root: bool,
        #[prost(string, tag = "6")]
        binary_name: String,
        #[prost(string, tag = "10")]
        criu_image_path: String,
        #[prost(string, tag = "99")]
        later: String,
    }

    fn merged(type_url: &str, value: Vec<u8>) -> Options {
        let options = TypedBytes { type_url: type_url.to_owned(), value };
        let any = incoming(Some(&options), Path::new("/run/godwit/x.sock"));
        assert_eq!(any.type_url, RUNC_OPTIONS);
        Options::decode(any.value.as_slice()).unwrap()
    }

    #[test]
    fn the_socket_replaces_an_image_path_and_everything_else_is_kept() {
        let options = Options {
            no_pivot_root: true,
            binary_name: "godwit".to_owned(),
            criu_image_path: "/old".to_owned(),
            later: "x".to_owned(),
        };
        let expected =
            Options { criu_image_path: "godwit-incoming:///run/godwit/x.sock".to_owned(), ..options.clone() };
        for type_url in [RUNC_OPTIONS, "type.googleapis.com/containerd.runc.v1.Options"] {
            assert_eq!(merged(type_url, options.encode_to_vec()), expected);
        }
    }

    #[test]
    fn options_of_another_type_do_not_leak_into_runcs() {
        let merged = merged("runtimeoptions.v1.Options", vec![0x0a, 1, b'x']);
        assert_eq!(merged.criu_image_path, "godwit-incoming:///run/godwit/x.sock");
        assert!(merged.binary_name.is_empty());
    }
}
