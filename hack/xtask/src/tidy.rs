//! What the compiler and clippy do not check: file sizes, where `unsafe` stands, unfinished places.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;

/// Checks every Rust file below `root` and prints each finding as `file:line: text`.
///
/// # Errors
/// If a file cannot be read, or anything was found.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    let mut files = 0;
    for part in ["shim", "runtime", "integration", "hack"] {
        visit(&root.join(part), &mut |path, text| {
            files += 1;
            inspect(path, text, &mut findings);
        })?;
    }
    if files == 0 {
        return Err(format!("no Rust file below {}: give the root of the tree", root.display()).into());
    }
    for finding in &findings {
        println!("{finding}");
    }
    if findings.is_empty() { Ok(()) } else { Err(format!("{} findings", findings.len()).into()) }
}

fn visit(dir: &Path, each: &mut impl FnMut(&Path, &str)) -> Result<()> {
    let mut entries = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<PathBuf>, std::io::Error>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            visit(&path, each)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            each(&path, &fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

fn inspect(path: &Path, text: &str, findings: &mut Vec<String>) {
    let shown = path.display();
    let is_sys = path.components().any(|part| part.as_os_str() == "sys");
    let is_root = path.parent().is_some_and(|dir| dir.ends_with("src"))
        && path.file_name().is_some_and(|name| name == "lib.rs" || name == "main.rs");
    let lines = text.lines().count();
    if lines > LINES_MAX {
        findings.push(format!("{shown}:1: {lines} lines: split it, {LINES_MAX} is the most"));
    }
    if is_root && !is_sys && !text.contains("#![forbid(unsafe_code)]") {
        findings.push(format!("{shown}:1: every crate but sys forbids unsafe code"));
    }
    if !text.starts_with("//!") && path.components().any(|part| part.as_os_str() == "src") {
        findings.push(format!("{shown}:1: a module opens with what it is for"));
    }
    for (index, line) in text.lines().enumerate() {
        for word in UNFINISHED {
            if line.contains(word) {
                findings.push(format!("{shown}:{}: unfinished: {word}", index + 1));
            }
        }
    }
}

/// A file longer than this reads better as two.
const LINES_MAX: usize = 800;

/// Spelt in two halves, so that this file does not find itself.
const UNFINISHED: [&str; 4] =
    [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("FIX", "ME"), concat!("XX", "X:")];

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        inspect(Path::new(path), text, &mut findings);
        findings
    }

    #[test]
    fn a_crate_root_that_allows_unsafe_code_is_found_except_in_sys() {
        assert_eq!(findings("runtime/criu/src/lib.rs", "//! Talks.\n").len(), 1);
        assert!(findings("runtime/sys/src/lib.rs", "//! Calls.\n").is_empty());
        assert!(findings("runtime/criu/src/lib.rs", "//! Talks.\n#![forbid(unsafe_code)]\n").is_empty());
    }

    #[test]
    fn long_files_and_unfinished_places_are_found() {
        let long = format!("//! Long.\n{}", "\n".repeat(LINES_MAX));
        assert_eq!(findings("shim/src/a.rs", &long).len(), 1);
        assert_eq!(findings("shim/src/a.rs", concat!("//! A.\nfn f() { todo", "!() }\n")).len(), 1);
    }
}
