//! Generates the messages, the service trait and the client of `godwit.migrate.v1` from its definition.

use std::{env, fs, io, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=protos/migrate.proto");
    let out_dir = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?;
    let out_dir = Path::new(&out_dir);
    Codegen::new()
        .out_dir(out_dir)
        .input("protos/migrate.proto")
        .include("protos")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    for name in ["migrate.rs", "migrate_ttrpc.rs"] {
        without_inner_attributes(&out_dir.join(name))?;
    }
    Ok(())
}

/// Removes the attributes and docs that speak for the file they are in: they may not stand in an `include!`.
fn without_inner_attributes(path: &Path) -> io::Result<()> {
    let text = fs::read_to_string(path)?;
    let inner = |line: &&str| !line.starts_with("#!") && !line.starts_with("//!");
    fs::write(path, text.lines().filter(inner).collect::<Vec<_>>().join("\n"))
}
