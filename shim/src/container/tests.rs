//! The actor over a runtime that does only what a test tells it to.

mod migration;

use std::{
    collections::HashMap,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{Semaphore, mpsc::UnboundedReceiver};

use super::*;
use crate::{
    options::CheckpointOptions,
    reaper::{Exit, Scope},
    runtime::{Call, VerbStdio},
    verb::Verb,
};

/// The init's pid; far above what the kernel gives out by default, so that nobody is signalled.
const INIT: i32 = 0x3fff_fff0;
const EXEC: i32 = 0x3fff_fff1;

/// Writes the pids that a runtime would, and holds verbs back until the test lets them go.
#[derive(Debug, Default)]
struct Fake {
    verbs: Mutex<Vec<String>>,
    /// The command line of the latest verb, and who owns what it has as stdin, stdout and stderr.
    latest: Mutex<(String, Vec<(u32, u32)>)>,
    held: HashMap<&'static str, Semaphore>,
    failing: Mutex<HashMap<&'static str, &'static str>>,
}

impl Fake {
    fn holding(verb: &'static str) -> Arc<Self> {
        Arc::new(Self { held: [(verb, Semaphore::new(0))].into(), ..Self::default() })
    }

    fn let_go(&self, verb: &str) {
        self.held[verb].add_permits(1);
    }

    fn fail(&self, verb: &'static str, message: &'static str) {
        self.failing.lock().unwrap().insert(verb, message);
    }

    fn verbs(&self) -> Vec<String> {
        self.verbs.lock().unwrap().clone()
    }
}

#[async_trait]
impl Runtime for Fake {
    async fn run(&self, call: Call) -> Result<Vec<u8>> {
        let name = call.verb.name();
        self.verbs.lock().unwrap().push(name.to_owned());
        *self.latest.lock().unwrap() = (spelled(&call.verb), owners(&call.stdio));
        if let Some(held) = self.held.get(name) {
            held.acquire().await.unwrap().forget();
        }
        if let Some(message) = self.failing.lock().unwrap().get(name) {
            return Err(ShimError::Runtime { verb: name, message: (*message).to_owned() });
        }
        let write = |path: &Path, pid: i32| std::fs::write(path, pid.to_string()).unwrap();
        match &call.verb {
            Verb::Create(create) => write(&create.pid_file, INIT),
            Verb::Restore(restore) => write(&restore.pid_file, INIT),
            Verb::Exec { pid_file, .. } => write(pid_file, EXEC),
            _ => {}
        }
        Ok(Vec::new())
    }
}

fn spelled(verb: &Verb) -> String {
    let words = verb.arguments("web");
    words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
}

fn owners(stdio: &VerbStdio) -> Vec<(u32, u32)> {
    let VerbStdio::Container(fds) = stdio else { return Vec::new() };
    let owner = |fd: &OwnedFd| std::fs::File::from(fd.try_clone().unwrap()).metadata().unwrap();
    fds.iter().flatten().map(owner).map(|file| (file.uid(), file.gid())).collect()
}

struct Bench {
    container: Arc<Container>,
    fake: Arc<Fake>,
    reaper: Arc<Reaper>,
    topics: UnboundedReceiver<String>,
    bundle: tempfile::TempDir,
}

impl Bench {
    async fn new(fake: Arc<Fake>) -> Self {
        Self::with(fake, |_| {}).await
    }

    async fn with(fake: Arc<Fake>, change: impl FnOnce(&mut CreateRequest)) -> Self {
        let bundle = tempfile::tempdir().unwrap();
        let spec = r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#;
        std::fs::write(bundle.path().join("config.json"), spec).unwrap();
        let (events, topics) = Publisher::recording();
        let reaper = Arc::new(Reaper::default());
        reaper.run(Scope::Claimed).unwrap();
        let shared = Shared {
            namespace: "shim-unit-test".to_owned(),
            containerd: String::new(),
            socket: String::new(),
            addresses: bundle.path().join("addresses"),
            worker: bundle.path().join("worker"),
            reaper: Arc::clone(&reaper),
            events,
        };
        let mut request = CreateRequest {
            id: "web".to_owned(),
            bundle: bundle.path().to_owned(),
            ..CreateRequest::default()
        };
        change(&mut request);
        let runtime: Arc<dyn Runtime> = Arc::<Fake>::clone(&fake);
        let container = Container::create_with(request, shared, runtime).await.unwrap();
        Self { container, fake, reaper, topics, bundle }
    }

    async fn started(fake: Arc<Fake>) -> Self {
        let bench = Self::new(fake).await;
        assert_eq!(bench.start("").await.unwrap(), INIT);
        bench
    }

    async fn start(&self, exec_id: &str) -> Result<i32> {
        self.container.call(|reply| Request::Start(exec_id.to_owned(), reply)).await
    }

    async fn delete(&self, exec_id: &str) -> Result<(i32, Option<Ended>)> {
        self.container.call(|reply| Request::Delete(exec_id.to_owned(), reply)).await
    }

    async fn checkpoint(&self, path: &str) -> Result<()> {
        let options = CheckpointOptions { work_path: path.to_owned(), ..CheckpointOptions::default() };
        self.container.call(|reply| Request::Checkpoint(path.to_owned(), options, reply)).await
    }

    fn exits(&self, pid: i32, status: u32) {
        self.reaper.report(Exit { pid, status, at: SystemTime::now() });
    }

    async fn status(&self, exec_id: &str) -> u32 {
        let mut end = self.container.end_of(exec_id).unwrap();
        let ended = end.wait_for(Option::is_some).await.unwrap();
        ended.unwrap().status
    }

    async fn topics(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        for _ in 0..count {
            topics.push(self.topics.recv().await.unwrap());
        }
        topics
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_life_publishes_its_events_in_order() {
    let mut bench = Bench::started(Arc::default()).await;
    bench.container.add_exec("e", Address::default(), b"{}".to_vec()).unwrap();
    assert_eq!(bench.start("e").await.unwrap(), EXEC);
    assert_eq!(bench.container.view("e").unwrap().status, "running");
    // The init's exit comes first, and is published last.
    bench.exits(INIT, 3);
    tokio::task::yield_now().await;
    assert_eq!(bench.container.view("").unwrap().status, "running");
    bench.exits(EXEC, 4);
    assert_eq!((bench.status("e").await, bench.status("").await), (4, 3));
    assert_eq!(bench.delete("e").await.unwrap().0, EXEC);
    assert_eq!(bench.delete("").await.unwrap().1.unwrap().status, 3);
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
    ];
    assert_eq!(bench.topics(expected.len()).await, expected);
}

#[tokio::test(flavor = "current_thread")]
async fn an_init_that_ends_while_it_is_started_is_announced_first() {
    let fake = Fake::holding("start");
    let mut bench = Bench::new(Arc::clone(&fake)).await;
    let container = Arc::clone(&bench.container);
    let start =
        tokio::spawn(async move { container.call(|reply| Request::Start(String::new(), reply)).await });
    tokio::task::yield_now().await;
    bench.exits(INIT, 0);
    tokio::time::sleep(Duration::from_millis(5)).await;
    fake.let_go("start");
    start.await.unwrap().unwrap();
    assert_eq!(bench.status("").await, 0);
    assert_eq!(bench.topics(3).await, ["/tasks/create", "/tasks/start", "/tasks/exit"]);
}

#[tokio::test(flavor = "current_thread")]
async fn questions_and_signals_are_answered_while_a_checkpoint_runs() {
    let fake = Fake::holding("checkpoint");
    let bench = Arc::new(Bench::started(Arc::clone(&fake)).await);
    let image = tempfile::tempdir().unwrap();
    let path = image.path().display().to_string();
    let asking = Arc::clone(&bench);
    let checkpoint = tokio::spawn(async move { asking.checkpoint(&path).await });
    while !fake.verbs().contains(&"checkpoint".to_owned()) {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.container.view("").unwrap().status, "running");
    assert!(matches!(bench.container.kill("", 15, false).await, Err(ShimError::Finished)));
    bench.container.kill("", 15, true).await.unwrap();
    // The client goes away; the checkpoint goes on.
    checkpoint.abort();
    fake.let_go("checkpoint");
    bench.exits(INIT, 137);
    assert_eq!(bench.status("").await, 137);
    assert_eq!(fake.verbs(), ["create", "start", "checkpoint", "kill"]);
}

#[tokio::test(flavor = "current_thread")]
async fn verbs_that_do_not_fit_the_state_are_refused_in_containerds_words() {
    let bench = Bench::new(Arc::default()).await;
    let text = |result: Result<()>| result.unwrap_err().to_string();
    let pause = || bench.container.call(Request::Pause);
    let resume = || bench.container.call(Request::Resume);
    assert_eq!(text(pause().await), "cannot pause a created task");
    assert_eq!(text(bench.checkpoint("/i").await), "cannot checkpoint a created task");
    bench.start("").await.unwrap();
    assert_eq!(text(resume().await), "cannot resume a running process");
    assert_eq!(text(bench.start("").await.map(drop)), "cannot start a running process");
    assert_eq!(text(bench.delete("").await.map(drop)), "cannot delete a running process");
    pause().await.unwrap();
    assert_eq!(text(pause().await), "cannot pause a paused container");
    let exec = || bench.container.add_exec("e", Address::default(), b"{}".to_vec());
    assert_eq!(text(exec()), "cannot exec in a paused container");
    resume().await.unwrap();
    exec().unwrap();
    assert_eq!(exec().unwrap_err().code(), ttrpc::Code::ALREADY_EXISTS);
    assert_eq!(bench.container.view("x").unwrap_err().code(), ttrpc::Code::NOT_FOUND);
    bench.exits(INIT, 0);
    assert_eq!(bench.status("").await, 0);
    assert_eq!(bench.start("e").await.unwrap_err().code(), ttrpc::Code::FAILED_PRECONDITION);
}

#[tokio::test(flavor = "current_thread")]
async fn a_failed_pause_leaves_the_container_running() {
    let bench = Bench::started(Arc::default()).await;
    bench.fake.fail("pause", "no freezer");
    let error = bench.container.call(Request::Pause).await.unwrap_err();
    assert_eq!(error.to_string(), "OCI runtime pause failed: no freezer");
    assert_eq!(bench.container.view("").unwrap().status, "running");
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_that_ends_while_paused_is_thawed() {
    let bench = Bench::started(Arc::default()).await;
    bench.container.call(Request::Pause).await.unwrap();
    bench.exits(INIT, 137);
    assert_eq!(bench.status("").await, 137);
    assert_eq!(bench.fake.verbs(), ["create", "start", "pause", "resume"]);
}

#[tokio::test(flavor = "current_thread")]
async fn a_container_from_an_image_exists_only_when_it_is_started() {
    let mut bench = Bench::with(Arc::default(), |request| request.checkpoint = "/image".to_owned()).await;
    assert_eq!((bench.container.pid(), bench.fake.verbs().len()), (0, 0));
    assert!(matches!(bench.container.kill("", 9, false).await, Err(ShimError::Unstarted)));
    bench.fake.fail("restore", "no such image");
    bench.start("").await.unwrap_err();
    assert_eq!(bench.container.view("").unwrap().status, "created");
    bench.fake.failing.lock().unwrap().clear();
    assert_eq!(bench.start("").await.unwrap(), INIT);
    assert_eq!(bench.topics(2).await, ["/tasks/create", "/tasks/start"]);
    assert_eq!(bench.fake.verbs(), ["restore", "delete", "restore"]);
}

#[tokio::test(flavor = "current_thread")]
async fn options_of_a_create_reach_the_runtime() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let bench = Bench::with(Arc::default(), |request| {
        request.address.stdout = format!("file://{}", output.display());
        request.options.no_pivot_root = true;
        request.options.no_new_keyring = true;
        // Only root can give a pipe away.
        let own = directory.path().metadata().unwrap().uid() == 0;
        (request.options.io_uid, request.options.io_gid) = if own { (1000, 2000) } else { (0, 0) };
    })
    .await;
    let (line, owners) = bench.fake.latest.lock().unwrap().clone();
    let bundle = bench.bundle.path().display().to_string();
    assert_eq!(
        line,
        format!("create --bundle {bundle} --pid-file {bundle}/init.pid --no-pivot --no-new-keyring web")
    );
    if directory.path().metadata().unwrap().uid() == 0 {
        assert_eq!(owners, [(1000, 2000)]);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn options_of_a_restore_reach_the_runtime() {
    let directory = tempfile::tempdir().unwrap();
    let work = directory.path().join("work").display().to_string();
    let bench = Bench::with(Arc::default(), |request| {
        request.options.criu_image_path = "/image".to_owned();
        request.options.criu_work_path = work.clone();
        request.options.no_pivot_root = true;
    })
    .await;
    bench.start("").await.unwrap();
    let line = bench.fake.latest.lock().unwrap().0.clone();
    assert!(line.starts_with(&format!("restore --image-path /image --work-path {work} ")), "{line}");
    assert!(line.contains(" --no-pivot "), "{line}");
    assert!(Path::new(&work).is_dir());
}

#[tokio::test(flavor = "current_thread")]
async fn an_exec_that_fails_to_start_holds_up_neither_waiters_nor_the_inits_exit() {
    let bench = Bench::started(Arc::default()).await;
    bench.container.add_exec("e", Address::default(), b"{}".to_vec()).unwrap();
    bench.fake.fail("exec", "no such file");
    bench.start("e").await.unwrap_err();
    assert_eq!(bench.status("e").await, 255);
    bench.exits(INIT, 0);
    assert_eq!(bench.status("").await, 0);
}
