//! The images that tests and demonstrations run.
//!
//! Each is busybox with, in a second layer, one program of this machine and what it needs. They are called
//! `localhost/NAME:latest`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::files::{Entry, Files};
use super::oci::{Config, hex, write};
use crate::error::{BedError, Result};
use crate::process::run;
use crate::tools;

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Image {
    name: String,
    layers: Vec<Files>,
    config: Config,
}

impl Image {
    /// Returns an image of busybox: a shell, all applets, and a container that sleeps.
    ///
    /// # Errors
    /// [`BedError::Missing`] when busybox is not installed.
    pub fn busybox() -> Result<Self> {
        Ok(Self {
            name: "busybox".to_owned(),
            layers: vec![busybox_files()?],
            config: Config { command: words(&["sleep", "1000000"]) },
        })
    }

    /// Returns an image of busybox and `program`, a program of this machine, which is what a container of it
    /// runs. Inside, the program is `/usr/bin/NAME`.
    ///
    /// # Errors
    /// [`BedError::Missing`] when one of them is not installed.
    pub fn of_program(name: &str, program: &Path) -> Result<Self> {
        let inside = Path::new("/usr/bin").join(program.file_name().unwrap_or_default());
        let mut files = Files::default();
        files.add_program(program, &inside)?;
        let command = vec![inside.to_string_lossy().into_owned()];
        Self::with(name, files, command)
    }

    /// Returns an image of busybox and `files`, a container of which runs `command`.
    ///
    /// # Errors
    /// [`BedError::Missing`] when busybox is not installed.
    pub fn with(name: &str, files: Files, command: Vec<String>) -> Result<Self> {
        let layers = vec![busybox_files()?, files];
        Ok(Self { name: name.to_owned(), layers, config: Config { command } })
    }

    /// Returns its reference in containerd.
    #[must_use]
    pub fn reference(&self) -> String {
        format!("localhost/{}:latest", self.name)
    }

    /// Builds its archive, unless the cache has it, and returns where it is.
    ///
    /// # Errors
    /// [`BedError::Io`] when a file cannot be read or the archive not be written.
    pub fn build(&self) -> Result<PathBuf> {
        let dir = tools::cache().join("images");
        fs::create_dir_all(&dir).map_err(BedError::io("make", &dir))?;
        let mut key = Sha256::new();
        key.update(format!("{FORMAT} {} {:?}\n", self.name, self.config));
        self.layers.iter().for_each(|files| key.update(files.fingerprint()));
        let path = dir.join(format!("{}-{}.tar", self.name, &hex(&key.finalize())[..KEY_DIGITS]));
        if !path.exists() {
            write(&path, &self.reference(), &self.layers, &self.config)?;
            discard_old(&dir, &self.name);
        }
        Ok(path)
    }
}

/// Returns an image out of the catalogue.
///
/// # Errors
/// [`BedError::Invalid`] for a name that is not in it, [`BedError::Missing`] when what it is made of is not
/// installed.
pub fn by_name(name: &str) -> Result<Image> {
    match name {
        "busybox" => Image::busybox(),
        "memhog" => Image::of_program("memhog", &program("memhog", "numactl")?),
        "bench" => bench(),
        "redis" => redis(),
        "python3" => python3(),
        "node" => node(),
        "nginx" => Image::with("nginx", nginx_files()?, words(&NGINX)),
        "visited" => visited(),
        "postgres" => postgres(),
        _ => Err(BedError::Invalid {
            what: "image",
            value: name.to_owned(),
            expected: "one of busybox, memhog, bench, redis, python3, node, nginx, visited, postgres, or the path of an archive",
        }),
    }
}

/// memhog and this build's `workload`, which ticks beside it.
fn bench() -> Result<Image> {
    let mut files = Files::default();
    files.add_program(&program("memhog", "numactl")?, Path::new("/usr/bin/memhog"))?;
    files.add_program(&tools::built()?.join("workload"), Path::new("/usr/bin/workload"))?;
    Image::with("bench", files, words(&["workload"]))
}

/// redis-server on port 6379 of every address, keeping nothing on disk; redis-cli and redis-benchmark beside it.
fn redis() -> Result<Image> {
    let mut files = Files::default();
    files.add_program(&program("redis-server", "redis-server")?, Path::new("/usr/bin/redis-server"))?;
    for tool in ["redis-cli", "redis-benchmark"] {
        files.add_program(&program(tool, "redis-tools")?, &Path::new("/usr/bin").join(tool))?;
    }
    let command = ["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no"];
    Image::with("redis", files, words(&command))
}

/// Python with its standard library.
fn python3() -> Result<Image> {
    let python = fs::canonicalize(program("python3", "python3")?).map_err(BedError::io("find", "python3"))?;
    let mut files = Files::default();
    files.add_program(&python, Path::new("/usr/bin/python3"))?;
    let library = run(Command::new(&python).args(["-IS", "-c", "import os; print(os.__file__)"]))?;
    let library = Path::new(library.trim()).parent().unwrap_or_else(|| Path::new("/")).to_path_buf();
    let skip =
        ["__pycache__", "test", "idlelib", "ensurepip", "dist-packages", "site-packages", "sitecustomize.py"];
    files.add_host_tree(&library, &|name| skip.contains(&name) || name.starts_with("config-"))?;
    for module in fs::read_dir(library.join("lib-dynload")).into_iter().flatten().flatten() {
        files.add_libraries(&module.path())?;
    }
    Image::with("python3", files, words(&["python3"]))
}

/// Node.js. Debian's reads parts of itself from files.
fn node() -> Result<Image> {
    let mut files = Files::default();
    files.add_program(&program("node", "nodejs")?, Path::new("/usr/bin/node"))?;
    for part in ["acorn", "acorn-walk", "busboy", "cjs-module-lexer", "undici", "xtend"] {
        let dir = Path::new("/usr/share/nodejs").join(part);
        if dir.exists() {
            files.add_host_tree(&dir, &|name| name == "node_modules")?;
        }
    }
    Image::with("node", files, words(&["node"]))
}

/// nginx with one static page on port 80, all of its processes root's.
fn nginx_files() -> Result<Files> {
    let mut files = Files::default();
    files.add_program(&program("nginx", "nginx-light")?, Path::new("/usr/sbin/nginx"))?;
    for dir in ["var/lib/nginx", "var/log/nginx", "run"] {
        files.add(dir, Entry::Directory(0o755));
    }
    files.add("etc/nginx/nginx.conf", Entry::Text(0o644, NGINX_CONF.to_owned()));
    files.add("srv/www/index.html", Entry::Text(0o644, "godwit\n".to_owned()));
    Ok(files)
}

/// nginx, and its clients: the self-checking program, and wrk.
fn visited() -> Result<Image> {
    let mut files = nginx_files()?;
    files.add_program(&program("wrk", "wrk")?, Path::new("/usr/bin/wrk"))?;
    files.add_program(&tools::built()?.join("workload"), Path::new("/usr/bin/workload"))?;
    Image::with("visited", files, words(&NGINX))
}

/// PostgreSQL as Debian has it, with pgbench, at the places where it looks for its own files.
fn postgres() -> Result<Image> {
    let missing = || BedError::Missing {
        tool: "postgres".to_owned(),
        hint: "it is in the package postgresql, which hack/setup installs".to_owned(),
    };
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let version = versions.map(|entry| entry.file_name()).max().ok_or_else(missing)?;
    let home = Path::new("/usr/lib/postgresql").join(&version);
    let mut files = Files::default();
    for tool in ["postgres", "initdb", "psql", "pgbench"] {
        let program = home.join("bin").join(tool);
        if !program.exists() {
            return Err(missing());
        }
        files.add_program(&program, &program)?;
    }
    // Without what compiles queries, which is larger than all the rest.
    files.add_host_tree(&home.join("lib"), &|name| name == "bitcode" || name.contains("llvm"))?;
    for library in fs::read_dir(home.join("lib")).into_iter().flatten().flatten() {
        let name = library.file_name().to_string_lossy().into_owned();
        if name.ends_with(".so") && !name.contains("llvm") {
            files.add_libraries(&library.path())?;
        }
    }
    files.add_host_tree(&Path::new("/usr/share/postgresql").join(&version), &|name| name == "man")?;
    Image::with("postgres", files, words(&["sh"]))
}

fn busybox_files() -> Result<Files> {
    let busybox = program("busybox", "busybox-static")?;
    let applets = run(Command::new(&busybox).arg("--list"))?;
    let mut files = Files::skeleton();
    files.add_program(&busybox, Path::new("/usr/bin/busybox"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        files.add(Path::new("usr/bin").join(applet), Entry::Link(PathBuf::from("busybox")));
    }
    Ok(files)
}

/// Returns where a program of the machine is.
fn program(name: &str, package: &str) -> Result<PathBuf> {
    let dirs = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
    dirs.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists()).ok_or_else(|| {
        BedError::Missing {
            tool: name.to_owned(),
            hint: format!("it is in the package {package}, which hack/setup installs"),
        }
    })
}

/// Removes archives of the image that a day's use has passed by.
fn discard_old(dir: &Path, name: &str) {
    let prefix = format!("{name}-");
    let old = SystemTime::now().checked_sub(Duration::from_secs(24 * 3600));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let rest = file.to_str().and_then(|file| file.strip_prefix(&prefix)?.strip_suffix(".tar"));
        let is_same = rest.is_some_and(|key| key.len() == KEY_DIGITS);
        let is_old =
            entry.metadata().and_then(|metadata| metadata.modified()).is_ok_and(|time| Some(time) < old);
        if is_same && is_old {
            drop(fs::remove_file(entry.path()));
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

const NGINX: [&str; 3] = ["/usr/sbin/nginx", "-g", "daemon off;"];
const KEY_DIGITS: usize = 16;
/// Changes whenever the same files are to make another archive.
const FORMAT: &str = "1";
const NGINX_CONF: &str = "\
user root;
worker_processes 2;
error_log stderr;
pid /run/nginx.pid;
events { worker_connections 256; }
http {
    access_log off;
    keepalive_timeout 3600s;
    keepalive_requests 1000000000;
    server {
        listen 80;
        root /srv/www;
        location = /status { stub_status; }
    }
}
";
