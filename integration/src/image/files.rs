//! The files of an image layer.
//!
//! Paths inside are relative to the image's root. Everything belongs to root and has the same time, so that
//! a layer depends on nothing but its content.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::error::{BedError, Result};
use crate::process::run;

/// A file as it is to be in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A directory with its mode.
    Directory(u32),
    /// A symbolic link and what it points to.
    Link(PathBuf),
    /// A file with its mode and content.
    Text(u32, String),
    /// A file copied from the machine with its mode.
    Copy(u32, PathBuf),
}

/// The files of one layer, sorted by path.
#[derive(Clone, Debug, Default)]
pub struct Files {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Files {
    /// Returns a layer with the directories that every root file system has, in the merged layout (`/bin` is
    /// `/usr/bin`).
    #[must_use]
    pub fn skeleton() -> Self {
        let mut files = Self::default();
        for dir in
            ["dev", "etc", "proc", "root", "run", "sys", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var"]
        {
            files.add(dir, Entry::Directory(0o755));
        }
        files.add("tmp", Entry::Directory(0o1777));
        for dir in ["bin", "lib", "lib64", "sbin"] {
            files.add(dir, Entry::Link(Path::new("usr").join(dir)));
        }
        files.add("etc/passwd", Entry::Text(0o644, PASSWD.to_owned()));
        files.add("etc/group", Entry::Text(0o644, GROUP.to_owned()));
        files
    }

    /// Adds one file, with its parent directories.
    pub fn add(&mut self, path: impl AsRef<Path>, entry: Entry) {
        let path = path.as_ref();
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            self.entries.entry(parent.to_path_buf()).or_insert(Entry::Directory(0o755));
        }
        self.entries.insert(path.to_path_buf(), entry);
    }

    /// Adds a file of the machine at the place it has here.
    ///
    /// # Errors
    /// [`BedError::Io`] when it is not there.
    pub fn add_host_file(&mut self, path: &Path) -> Result<()> {
        // The directory's own path, without the links of the merged layout; the file under the name by which
        // it is asked for (a library's soname is a link to its version).
        let parent = path.parent().unwrap_or_else(|| Path::new("/"));
        let parent = fs::canonicalize(parent).map_err(BedError::io("find", path))?;
        let inside = parent.join(path.file_name().unwrap_or_default());
        self.add_copy(path, &inside)
    }

    /// Adds a program of the machine at `inside`, with the libraries it is linked with at the places they
    /// have here.
    ///
    /// # Errors
    /// [`BedError::Io`] when a file is not there, [`BedError::Command`] when ldd(1) refuses the program.
    pub fn add_program(&mut self, program: &Path, inside: &Path) -> Result<()> {
        self.add_copy(program, inside)?;
        self.add_libraries(program)
    }

    /// Adds the libraries that a program or library of the machine is linked with.
    ///
    /// # Errors
    /// As [`Files::add_program`].
    pub fn add_libraries(&mut self, program: &Path) -> Result<()> {
        for library in libraries(program)? {
            self.add_host_file(&library)?;
        }
        Ok(())
    }

    /// Adds a directory of the machine with all below it, but for what `skip` says of the names.
    ///
    /// # Errors
    /// [`BedError::Io`] when it cannot be read.
    pub fn add_host_tree(&mut self, dir: &Path, skip: &dyn Fn(&str) -> bool) -> Result<()> {
        for entry in fs::read_dir(dir).map_err(BedError::io("read", dir))? {
            let entry = entry.map_err(BedError::io("read", dir))?;
            if skip(&entry.file_name().to_string_lossy()) {
                continue;
            }
            let kind = entry.file_type().map_err(BedError::io("read", entry.path()))?;
            if kind.is_dir() {
                self.add_host_tree(&entry.path(), skip)?;
            } else if entry.path().exists() {
                self.add_host_file(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Returns the files with their paths, each directory before what is in it.
    pub fn iter(&self) -> impl Iterator<Item = (&Path, &Entry)> {
        self.entries.iter().map(|(path, entry)| (path.as_path(), entry))
    }

    /// Returns a text that differs whenever the layer may: paths, and for copied files their size and time.
    pub(crate) fn fingerprint(&self) -> String {
        let mut text = String::new();
        for (path, entry) in &self.entries {
            text.push_str(&format!("{} {entry:?}", path.display()));
            if let Entry::Copy(_, source) = entry
                && let Ok(metadata) = fs::metadata(source)
            {
                text.push_str(&format!(" {} {:?}", metadata.len(), metadata.modified().ok()));
            }
            text.push('\n');
        }
        text
    }

    fn add_copy(&mut self, source: &Path, inside: &Path) -> Result<()> {
        let metadata = fs::metadata(source).map_err(BedError::io("find", source))?;
        let inside: PathBuf =
            inside.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        self.add(inside, Entry::Copy(metadata.permissions().mode() & 0o777, source.to_path_buf()));
        Ok(())
    }
}

/// Returns the libraries, the loader included, that a program is linked with.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = run(Command::new("ldd").arg(program));
    let text = match listed {
        Ok(text) => text,
        // It says so of a static program, with status 1.
        Err(BedError::Command { stderr, .. }) if stderr.contains("not a dynamic executable") => String::new(),
        Err(error) => return Err(error),
    };
    // Lines are `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` for the loader.
    let paths = text.lines().filter_map(|line| {
        let path = line.rsplit("=>").next()?.split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    });
    Ok(paths.collect())
}

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh\n\
www-data:x:33:33:www-data:/var/www:/bin/sh\n\
nobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_before_what_is_in_them() {
        let mut files = Files::default();
        files.add("a/b/c", Entry::Text(0o644, String::new()));
        let paths: Vec<_> = files.iter().map(|(path, _)| path.to_string_lossy().into_owned()).collect();
        assert_eq!(paths, ["a", "a/b", "a/b/c"]);
    }

    #[test]
    fn program_brings_its_loader_and_libraries() {
        let mut files = Files::skeleton();
        files.add_program(Path::new("/bin/sh"), Path::new("/bin/example")).unwrap();
        let names: Vec<_> = files.iter().filter_map(|(path, _)| path.file_name()?.to_str()).collect();
        assert!(names.contains(&"example"));
        assert!(names.contains(&"libc.so.6"), "{names:?}");
        assert!(names.iter().any(|name| name.starts_with("ld-linux")), "{names:?}");
    }
}
