//! The serving process: one thread, one socket, until containerd says Shutdown, or turns out not to know of it.
//!
//! Everything runs on one thread. That keeps the shim small, makes fork and descriptors predictable (no other
//! thread opens one between them), and costs nothing: a shim waits. What may block goes to tokio's pool.

use std::{
    env, fs,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::OpenOptionsExt, net::UnixListener},
    },
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim::Flags;
use containerd_shim_protos::shim_async::create_task;
use godwit_api::create_migrate;
use nix::fcntl::OFlag;
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    bootstrap::{ANSWERED, TTRPC_ADDRESS, socket_path},
    bundle::godwit_binary,
    container::Shared,
    error::{Result, ShimError},
    events::Publisher,
    reaper::{Reaper, Scope},
    service::{MigrateService, Service, TaskService},
};

/// From containerd's knowing of the shim to the Create that it is started for, which follows at once.
const FIRST_CREATE_MAX: Duration = Duration::from_secs(60);
const FIRST_CREATE_POLL: Duration = Duration::from_millis(50);

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// Serves on the socket that is standard input, until Shutdown.
///
/// # Errors
/// Whatever keeps it from serving.
pub(crate) fn serve(flags: &Flags) -> Result<()> {
    crate::stdio::reserve_descriptors().map_err(ShimError::io("reserve descriptors"))?;
    init_log(flags);
    godwit_sys::process::set_subreaper(true)
        .map_err(std::io::Error::other)
        .map_err(ShimError::io("become the subreaper"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_stack_size(256 << 10)
        .build()
        .map_err(ShimError::io("start the runtime"))?;
    let served = runtime.block_on(run(flags));
    // What still runs in the pool is not waited for.
    runtime.shutdown_background();
    served
}

async fn run(flags: &Flags) -> Result<()> {
    let (listener, starter) = inherited()?;
    let containerd_ttrpc = env::var(TTRPC_ADDRESS).unwrap_or_else(|_| format!("{}.ttrpc", flags.address));
    let reaper = Arc::new(Reaper::default());
    reaper.run(Scope::Everything).map_err(ShimError::io("wait for children"))?;
    ignore_termination()?;
    let shared = Shared {
        namespace: flags.namespace.clone(),
        containerd: flags.address.clone(),
        socket: flags.socket.clone(),
        addresses: godwit_api::address_directory(&flags.namespace),
        worker: godwit_binary(),
        reaper,
        events: Publisher::connect(containerd_ttrpc, &flags.namespace),
    };
    let events = shared.events.clone();
    let (shutdown, mut wanted) = watch::channel(false);
    let service = Service::new(shared, shutdown);
    let mut server = server(listener, &service);
    let served = server.start().await.map_err(std::io::Error::other).map_err(ShimError::io("serve"));
    if served.is_ok() {
        tokio::select! {
            wanted = wanted.wait_for(|wanted| *wanted) => drop(wanted),
            () = abandoned(starter, &service) => log::warn!("nobody knows of this shim: it ends"),
        }
    }
    // While it is still listened to: afterwards the name may be the next shim's.
    fs::remove_file(socket_path(&flags.socket)).ok();
    served?;
    events.flush().await;
    server.shutdown().await.ok();
    Ok(())
}

/// Returns once it is clear that containerd will not use this shim: the starter died before it had answered, or
/// containerd gave up at the very moment when it had, and removed the bundle, which is the working directory.
async fn abandoned(mut starter: pipe::Receiver, service: &Service) {
    if !matches!(starter.read_u8().await, Ok(ANSWERED)) {
        return;
    }
    let deadline = Instant::now() + FIRST_CREATE_MAX;
    while !service.was_used() {
        let bundle_is_gone = env::current_dir().is_err();
        if bundle_is_gone || Instant::now() > deadline {
            return;
        }
        tokio::time::sleep(FIRST_CREATE_POLL).await;
    }
    std::future::pending::<()>().await;
}

/// Takes the socket out of standard input, and the pipe from the starter out of standard output.
fn inherited() -> Result<(Listener, pipe::Receiver)> {
    let take = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(ShimError::io("take what was inherited"));
    let listener = UnixListener::from(take(std::io::stdin().as_fd())?);
    let starter = take(std::io::stdout().as_fd())?;
    // They stay open otherwise, the socket after it is wanted.
    let null = fs::File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(ShimError::io("open /dev/null"))?;
    nix::unistd::dup2_stdin(&null).map_err(ShimError::errno("replace stdin"))?;
    nix::unistd::dup2_stdout(&null).map_err(ShimError::errno("replace stdout"))?;
    let listener = Listener::try_from(listener).map_err(ShimError::io("take the socket"))?;
    Ok((listener, pipe::Receiver::from_owned_fd(starter).map_err(ShimError::io("take the pipe"))?))
}

fn server(listener: Listener, service: &Arc<Service>) -> Server {
    let task = || create_task(Arc::new(TaskService(Arc::clone(service))));
    let mut older = task();
    // Version 3 is a renamed copy of version 2, and handlers do not look at the name.
    if let Some(methods) = older.remove(TASK_V3) {
        older.insert(TASK_V2.to_owned(), methods);
    }
    Server::new()
        .add_listener(listener)
        .register_service(task())
        .register_service(older)
        .register_service(create_migrate(Arc::new(MigrateService(Arc::clone(service)))))
}

/// A shim outlives whoever asks it politely to end: its containers would be orphans.
fn ignore_termination() -> Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(ShimError::io("handle signals"))?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                log::debug!("ignoring a signal to end");
            }
        });
    }
    Ok(())
}

/// Logs to containerd's own log by the FIFO it made in the bundle; without it, not at all.
fn init_log(flags: &Flags) {
    // To open it for writing waits for somebody who reads, and nobody ever will if containerd has given this shim up
    // meanwhile: for that moment it is read here.
    let reader = fs::File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("log");
    containerd_shim::logger::init(flags.debug, "info", &flags.namespace, &flags.id).ok();
    drop(reader);
}
