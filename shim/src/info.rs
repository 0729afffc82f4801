//! The `-info` action: what this shim, and the runtime it would use, is able to do.

use std::{
    env,
    io::{self, Read, Write},
    process::{Command, Stdio},
};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, well_known_types::any::Any};

use crate::{
    bundle::runtime_binary,
    error::{Result, ShimError},
    options::CreateOptions,
};

/// How containerd names the runtime's features, which are JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

const STDIN_MAX: u64 = 1 << 20;

/// Answers containerd 2's question before a container exists.
///
/// # Errors
/// When the question cannot be read or the answer not be written. A runtime without features is none.
pub(crate) fn info() -> Result<()> {
    let mut input = Vec::new();
    io::stdin().lock().take(STDIN_MAX).read_to_end(&mut input).map_err(ShimError::io("read stdin"))?;
    let any = Any::parse_from_bytes(&input).ok().filter(|any| !any.type_url.is_empty());
    let options = CreateOptions::decode(any.as_ref())?;
    let version =
        RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..RuntimeVersion::default() };
    let info = RuntimeInfo {
        name: env::args().next().unwrap_or_default(),
        version: Some(version).into(),
        options: any.into(),
        features: features(&options).into(),
        ..RuntimeInfo::default()
    };
    let bytes = info
        .write_to_bytes()
        .map_err(|source| ShimError::Undecodable { what: "the answer to -info", source })?;
    let mut stdout = io::stdout();
    stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(ShimError::io("answer containerd"))
}

fn features(options: &CreateOptions) -> Option<Any> {
    let output = Command::new(runtime_binary(&options.binary_name))
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let well_formed = serde_json::from_slice::<serde_json::Value>(&output.stdout).is_ok();
    (output.status.success() && well_formed).then(|| Any {
        type_url: FEATURES_TYPE.to_owned(),
        value: output.stdout,
        ..Any::default()
    })
}
