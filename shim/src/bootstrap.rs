//! How containerd starts a shim: what it says, how it is answered.
//!
//! ```text
//! 1.6 1.7 2.0–2.2   flags, environment, the runtime's options (Any) on stdin   ──► the socket's address
//! 2.3               the same flags, BootstrapParams on stdin                   ──► BootstrapResult
//! ```
//! A plain address means version 2 of the Task service to every containerd that takes one, and the shim serves
//! versions 2 and 3 alike. containerd reads standard output and error as one, so `start` writes nothing else.
//!
//! The listening socket is made here and inherited by the serving process as its standard input: the address
//! is good before that process has run its first instruction, and nothing has to be waited for.
//!
//! containerd kills `start` when the client that wanted the container goes away, and then knows of no shim that it
//! could end. So the serving process also inherits, as its standard output, a pipe to read from: it ends unless it gets
//! [`ANSWERED`] there.

use std::{
    env, fs,
    io::{self, IsTerminal, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use containerd_shim::{Flags, StartOpts};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::{Message, well_known_types::any::Any};

use crate::{
    bundle::Spec,
    error::{Result, ShimError},
    options::CreateOptions,
};

/// Longest message on stdin, in bytes; containerd's own limit.
const STDIN_MAX: u64 = 10 << 20;

/// Version of the Task service that a [`BootstrapResult`] announces.
const TASK_VERSION: i32 = 3;

/// What the serving process is told once containerd has its address.
pub(crate) const ANSWERED: u8 = b'a';

/// How long the shim of an earlier container of the same name has to end: longer than containerd waits for what it then
/// kills.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(10);
const PREDECESSOR_POLL: Duration = Duration::from_millis(10);

/// Environment variable with the address of containerd's ttrpc socket, which takes events.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// File in the bundle that holds the shim's address: containerd finds the shim by it after a restart.
pub(crate) const ADDRESS: &str = "address";

/// What containerd said to `start`.
#[derive(Debug, Default)]
struct Params {
    options: CreateOptions,
    containerd: String,
    containerd_ttrpc: String,
    socket_dir: Option<String>,
    debug: bool,
    /// Whether the answer is a [`BootstrapResult`].
    bootstrap: bool,
}

/// The `start` action: makes sure that a shim serves this container, and answers with its address.
///
/// # Errors
/// Whatever keeps the shim from serving; nothing is left behind then.
pub(crate) fn start(flags: &Flags) -> Result<()> {
    let params = Params::parse(&read_stdin()?, flags)?;
    let bundle = env::current_dir().map_err(ShimError::io("find the bundle"))?;
    let spec = Spec::read(&bundle)?;
    let group = spec.group(&flags.id);
    let address = socket_address(flags, &params, group);
    let path = socket_path(&address);
    if group == flags.id {
        await_predecessor(&path, PREDECESSOR_LIMIT)?;
    }
    let tell = match listen(&path)? {
        Some(listener) => Some(serve_apart(flags, &params, listener, &address).inspect_err(|_| {
            fs::remove_file(&path).ok();
        })?),
        None => None,
    };
    fs::write(bundle.join(ADDRESS), &address).map_err(ShimError::io(format!("write {ADDRESS}")))?;
    let mut stdout = io::stdout();
    stdout
        .write_all(&answer(&address, params.bootstrap)?)
        .and_then(|()| stdout.flush())
        .map_err(ShimError::io("answer containerd"))?;
    match tell {
        Some(mut tell) => tell.write_all(&[ANSWERED]).map_err(ShimError::io("tell the shim")),
        None => Ok(()),
    }
}

impl Params {
    fn parse(input: &[u8], flags: &Flags) -> Result<Self> {
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && params.instance_id == flags.id
            && params.namespace == flags.namespace
        {
            return Self::from_bootstrap(params, flags);
        }
        // Anything that is no message with a type is no options either.
        let any = Any::parse_from_bytes(input).ok();
        Ok(Self {
            options: CreateOptions::decode(any.as_ref())?,
            containerd: flags.address.clone(),
            containerd_ttrpc: env::var(TTRPC_ADDRESS).unwrap_or_default(),
            socket_dir: None,
            debug: flags.debug,
            bootstrap: false,
        })
    }

    fn from_bootstrap(params: BootstrapParams, flags: &Flags) -> Result<Self> {
        let opts = StartOpts::from(params);
        let known = |any: &&Any| any.type_url.ends_with("Options");
        Ok(Self {
            options: CreateOptions::decode(opts.extensions.iter().find(known))?,
            containerd: opts.address,
            containerd_ttrpc: opts.ttrpc_address,
            socket_dir: opts.socket_dir,
            debug: opts.debug || flags.debug,
            bootstrap: true,
        })
    }
}

fn read_stdin() -> Result<Vec<u8>> {
    let stdin = io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        stdin.lock().take(STDIN_MAX).read_to_end(&mut input).map_err(ShimError::io("read stdin"))?;
    }
    Ok(input)
}

fn socket_address(flags: &Flags, params: &Params, group: &str) -> String {
    let opts = StartOpts {
        address: params.containerd.clone(),
        namespace: flags.namespace.clone(),
        socket_dir: params.socket_dir.clone(),
        ..StartOpts::default()
    };
    opts.socket_address(group)
}

/// Returns the path in an address such as `unix:///run/…`.
pub(crate) fn socket_path(address: &str) -> PathBuf {
    address.strip_prefix("unix://").unwrap_or(address).into()
}

/// Waits until no shim listens at `path`, where only one of the same container can: it has been told to end, or is
/// about to be. It serves another bundle, which is or will be gone, and would take the container down with it.
///
/// # Errors
/// [`ShimError::Predecessor`] when it does not end.
fn await_predecessor(path: &Path, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    while UnixStream::connect(path).is_ok() {
        if Instant::now() > deadline {
            return Err(ShimError::Predecessor { socket: path.to_owned() });
        }
        thread::sleep(PREDECESSOR_POLL);
    }
    Ok(())
}

/// Listens at `path`; nothing if a shim does already, which then serves this container as well.
fn listen(path: &Path) -> Result<Option<UnixListener>> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(parent)
            .map_err(ShimError::io(format!("make {}", parent.display())))?;
    }
    let bind = || UnixListener::bind(path);
    let listener = match bind() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Left by a shim that was killed.
            fs::remove_file(path).map_err(ShimError::io(format!("remove {}", path.display())))?;
            bind()
        }
        listener => listener,
    };
    let listener = listener.map_err(ShimError::io(format!("bind {}", path.display())))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(ShimError::io(format!("protect {}", path.display())))?;
    Ok(Some(listener))
}

/// Starts the serving process. It ends when the pipe that is returned closes without [`ANSWERED`].
fn serve_apart(
    flags: &Flags,
    params: &Params,
    listener: UnixListener,
    address: &str,
) -> Result<io::PipeWriter> {
    let shim = env::current_exe().map_err(ShimError::io("find the shim's program"))?;
    let mut command = Command::new(shim);
    command.args(["-namespace", &flags.namespace, "-id", &flags.id]);
    command.args(["-address", &params.containerd, "-socket", address]);
    if params.debug {
        command.arg("-debug");
    }
    if !params.containerd_ttrpc.is_empty() {
        command.env(TTRPC_ADDRESS, &params.containerd_ttrpc);
    }
    let (word, tell) = io::pipe().map_err(ShimError::io("make a pipe"))?;
    command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(word).stderr(Stdio::null());
    // Signals meant for containerd's group are not meant for the shim.
    command.process_group(0);
    let mut child = command.spawn().map_err(ShimError::io("start the shim"))?;
    let confined = containerd_shim::cgroup::set_cgroup_and_oom_score(child.id(), &params.options.shim_cgroup);
    if let Err(source) = confined {
        child.kill().and_then(|()| child.wait()).ok();
        return Err(ShimError::Library { action: "put the shim into its cgroup", source });
    }
    Ok(tell)
}

fn answer(address: &str, bootstrap: bool) -> Result<Vec<u8>> {
    if !bootstrap {
        return Ok(address.as_bytes().to_vec());
    }
    let result = BootstrapResult {
        version: TASK_VERSION,
        address: address.to_owned(),
        protocol: "ttrpc".to_owned(),
        ..BootstrapResult::default()
    };
    result.write_to_bytes().map_err(|source| ShimError::Undecodable { what: "the answer to start", source })
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::shim::oci::Options;

    use super::*;

    fn flags() -> Flags {
        Flags {
            id: "web".to_owned(),
            namespace: "default".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            ..Flags::default()
        }
    }

    fn any(options: &Options) -> Any {
        Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: options.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn older_containerds_send_options_and_get_a_plain_address() {
        let options = Options { shim_cgroup: "/shims".to_owned(), ..Options::default() };
        for (input, cgroup) in [(any(&options).write_to_bytes().unwrap(), "/shims"), (vec![], "")] {
            let params = Params::parse(&input, &flags()).unwrap();
            assert!(!params.bootstrap);
            assert_eq!(params.options.shim_cgroup, cgroup);
            assert_eq!(answer("unix:///s", params.bootstrap).unwrap(), b"unix:///s");
        }
    }

    #[test]
    fn options_that_are_all_default_are_not_taken_for_bootstrap_parameters() {
        let input = any(&Options::default()).write_to_bytes().unwrap();
        assert!(!Params::parse(&input, &flags()).unwrap().bootstrap);
    }

    #[test]
    fn bootstrap_parameters_get_a_bootstrap_result() {
        let params = BootstrapParams {
            instance_id: "web".to_owned(),
            namespace: "default".to_owned(),
            containerd_ttrpc_address: "/t".to_owned(),
            containerd_grpc_address: "/g".to_owned(),
            socket_dir: Some("/run/s".to_owned()),
            ..BootstrapParams::default()
        };
        let params = Params::parse(&params.write_to_bytes().unwrap(), &flags()).unwrap();
        assert!(params.bootstrap);
        assert_eq!((params.containerd.as_str(), params.containerd_ttrpc.as_str()), ("/g", "/t"));
        let address = socket_address(&flags(), &params, "web");
        assert!(address.starts_with("unix:///run/s/"), "{address}");
        let result = BootstrapResult::parse_from_bytes(&answer(&address, true).unwrap()).unwrap();
        assert_eq!((result.version, result.address, result.protocol.as_str()), (3, address, "ttrpc"));
    }

    #[test]
    fn a_second_container_of_a_group_finds_the_shim_listening() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/0");
        let first = listen(&path).unwrap();
        assert!(first.is_some());
        assert!(listen(&path).unwrap().is_none());
        drop(first);
        assert!(listen(&path).unwrap().is_some(), "a dead shim's socket is replaced");
    }
    #[test]
    fn a_container_of_its_own_never_joins_an_earlier_ones_shim() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        await_predecessor(&path, Duration::ZERO).unwrap();
        let earlier = listen(&path).unwrap();
        let refused = await_predecessor(&path, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(refused, ShimError::Predecessor { .. }), "{refused}");
        let waits = thread::spawn(move || await_predecessor(&path, PREDECESSOR_LIMIT));
        drop(earlier);
        waits.join().unwrap().unwrap();
    }
}
