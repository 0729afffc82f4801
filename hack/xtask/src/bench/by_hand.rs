//! The peers' ways of moving a container, each as good as it can be made: everything in memory, commands prepared
//! beforehand, both sides started before they are needed.
//!
//! A container under runc by hand is in `/run/by-hand` of each node. Its output is a pipe, since CRIU restores no
//! file of the host as a descriptor, and a `cat` behind the pipe writes what it ticks to the file that the
//! observer watches.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use godwit_integration::Node;
use godwit_integration::process::run;

use super::RUNC;
use super::stage::{Load, Running, Stage, Written, ms};
use crate::Result;
use crate::observer::Observer;

/// What a move came to, seen from outside.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// From the last tick that counts on the source to the first on the target.
    pub(super) downtime_ms: f64,
    /// From the first command to the first tick on the target.
    pub(super) total_ms: f64,
    /// From there until all memory was in place; 0 where it was before, nothing where nobody waited for so long.
    pub(super) fill_ms: Option<f64>,
    /// What a busy program did on the target.
    pub(super) written: Option<Written>,
}

/// The route that ctr offers: checkpoint, export, copy, import, restore.
///
/// The source cannot be stopped by its checkpoint, so it runs on until it is killed, and what it did since is
/// undone: the downtime runs from the pause of the checkpoint.
pub(super) fn by_ctr(stage: &Stage, load: Load, memory_mb: u32) -> Result<Seen> {
    let running = stage.start(RUNC, load, memory_mb)?;
    let (a, b) = (stage.bed.a(), stage.bed.b());
    let image = format!("localhost/{}:moved", running.id);
    let observer = Observer::watch(&running.output);
    let begin = Instant::now();
    a.ctr(["container", "checkpoint", "--rw", "--image", "--task", &running.id, &image])?;
    a.ctr(["task", "kill", "--signal", "SIGKILL", &running.id])?;
    a.ctr(["image", "export", "--skip-manifest-json", ARCHIVE, &image])?;
    copy(stage)?;
    b.ctr(["image", "import", "--no-unpack", ARCHIVE])?;
    // It returns as soon as the task runs, and leaves nobody to read what the task writes.
    b.ctr(["container", "restore", "--live", "--rw", &running.id, &image])?;
    let output = File::options().append(true).open(&running.output)?;
    let mut attach = b.ctr_command(["task", "attach", &running.id]);
    let mut attach = attach.stdin(Stdio::null()).stdout(output).stderr(Stdio::null()).spawn()?;
    let ticks = running.await_ticks();
    let total = begin.elapsed();
    let gaps = observer.finish().gaps;
    attach.kill()?;
    attach.wait()?;
    for node in [a, b] {
        node.ctr(["image", "rm", &image])?;
        node.exec(["rm", "-f", ARCHIVE])?;
    }
    ticks?;
    // The longest is from the kill to the restored container; the one before it is the checkpoint's pause.
    let last = gaps.first().ok_or("the observer saw no downtime")?;
    let pause = gaps.iter().find(|gap| gap.start < last.start).unwrap_or(last);
    let end = last.start + last.length;
    Ok(Seen {
        downtime_ms: ms(end.saturating_sub(pause.start)),
        total_ms: ms(total),
        fill_ms: Some(0.0),
        written: None,
    })
}

/// Copies the archive over the link, as scp would but without its cipher.
fn copy(stage: &Stage) -> Result<()> {
    let (sink, listen) = (format!("OPEN:{ARCHIVE},creat,trunc"), "TCP-LISTEN:7451,reuseaddr");
    let mut receive = stage.bed.b().command(["socat", "-u", "-b", "1048576", listen, &sink]).spawn()?;
    let connect = format!("TCP:{}:7451,retry=100,interval=0.01", stage.bed.b().address());
    stage.bed.a().exec(["socat", "-u", "-b", "1048576", &format!("OPEN:{ARCHIVE}"), &connect])?;
    if receive.wait()?.success() { Ok(()) } else { Err("failed to copy the archive".into()) }
}

/// How runc moves a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Checkpoint, copy of all images, restore.
    Copy,
    /// Checkpoint with a lazy page server, copy of the small images, lazy restore.
    Lazy,
}

/// Moves a container under runc by hand.
pub(super) fn by_runc(stage: &Stage, way: Way, load: Load, memory_mb: u32) -> Result<Seen> {
    let (a, b) = (stage.bed.a(), stage.bed.b());
    let _pipes = (way == Way::Lazy).then(LargePipes::allow).transpose()?;
    let running = stage.name();
    let moved = start(stage, &running, load, memory_mb).and_then(|()| {
        let (source, target) = match way {
            Way::Copy => (COPY_SOURCE, COPY_TARGET),
            Way::Lazy => (LAZY_SOURCE, LAZY_TARGET),
        };
        let addresses = [a.address().to_string(), b.address().to_string()];
        let observer = Observer::watch(&running.output);
        let begin = Instant::now();
        let there = script(b, target, &running, &addresses);
        let there = thread::spawn(move || output(there));
        let here = run(&mut script(a, source, &running, &addresses));
        let there = there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let end = begin.elapsed();
        let ticks = running.await_ticks();
        let seen = observer.finish();
        // What the target has to say of a failure is nearer to its cause than a broken connection.
        let there = there?;
        if !there.status.success() {
            return Err(String::from_utf8_lossy(&there.stderr).trim().to_owned().into());
        }
        // The lazy page server was ended by its time limit: what the source says of that is no news.
        let was_cut_short = way == Way::Lazy && end >= Duration::from_secs(LAZY_S);
        if !was_cut_short {
            here?;
        }
        ticks?;
        let gap = seen.gaps.first().ok_or("the observer saw no downtime")?;
        let resumed = gap.start + gap.length;
        let written = (load == Load::Busy).then(|| Written::of(&seen));
        let filled = if way == Way::Lazy { end.saturating_sub(resumed) } else { Duration::ZERO };
        let fill_ms = (!was_cut_short).then(|| ms(filled));
        Ok(Seen { downtime_ms: ms(gap.length), total_ms: ms(resumed), fill_ms, written })
    });
    for node in [a, b] {
        let removed = run(&mut script(node, REMOVE, &running, &[String::new(), String::new()]));
        if moved.is_ok() {
            removed?;
        }
    }
    moved
}

fn start(stage: &Stage, running: &Running<'_>, load: Load, memory_mb: u32) -> Result<()> {
    let none = [String::new(), String::new()];
    for node in [stage.bed.a(), stage.bed.b()] {
        let mut prepare = script(node, PREPARE, running, &none);
        run(prepare.arg(&stage.reference).args(load.command(memory_mb)))?;
    }
    run(&mut script(stage.bed.a(), START, running, &none))?;
    running.await_filled(load)
}

/// A command that runs a script in a node with the container's name, the file it ticks to, and the addresses of
/// both nodes.
fn script(node: &Node, text: &str, running: &Running<'_>, addresses: &[String; 2]) -> Command {
    let text =
        format!("set -eu\nid=$1 out=$2 source=$3 target=$4 dir=/run/by-hand patience={LAZY_S}\n{text}");
    let mut command = node.command(["bash", "-c", &text, "by-hand", &running.id]);
    command.arg(&running.output).args(addresses).stdin(Stdio::null());
    command
}

fn output(mut command: Command) -> std::io::Result<Output> {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?.wait_with_output()
}

/// While it lives, pipes may be as large as CRIU's lazy page server makes them: without CAP_SYS_RESOURCE it fails
/// at the kernel's default.
#[derive(Debug)]
struct LargePipes {
    before: String,
}

impl LargePipes {
    fn allow() -> Result<Self> {
        let before = std::fs::read_to_string(PIPE_MAX)?;
        if before.trim().parse::<u64>()? < PIPE_BYTES {
            std::fs::write(PIPE_MAX, PIPE_BYTES.to_string())?;
        }
        Ok(Self { before })
    }
}

impl Drop for LargePipes {
    fn drop(&mut self) {
        drop(std::fs::write(Path::new(PIPE_MAX), self.before.trim()));
    }
}

/// Within which criu lazy-pages has to be done: a program that writes all over its memory can keep it busy for minutes.
const LAZY_S: u64 = 30;
const PIPE_MAX: &str = "/proc/sys/fs/pipe-max-size";
const PIPE_BYTES: u64 = 4 << 20;
/// Where the checkpoint's archive lies on both nodes: in the node's own tmpfs.
const ARCHIVE: &str = "/run/moved.tar";

/// Makes the bundle out of the image. Arguments from the fifth on: the image, the command.
const PREPARE: &str = r#"
shift 4; image=$1; shift
mkdir -p $dir/rootfs $dir/images $dir/work
ctr image mount --rw "$image" $dir/rootfs >/dev/null
cd $dir
rm -f config.json
runc spec
words=$(printf '%s\n' "$@" | jq --raw-input . | jq --slurp .)
jq --argjson words "$words" '.process.terminal = false | .root.readonly = false | .process.args = $words' \
    config.json >new
mv new config.json
"#;

const START: &str = r#"
runc run --detach --bundle $dir "$id" > >(exec cat >>"$out" 2>/dev/null) 2>&1
"#;

const COPY_SOURCE: &str = r#"
runc checkpoint --image-path $dir/images --work-path $dir/work "$id" >/dev/null
tar -C $dir/images -c . | socat -u -b 1048576 - TCP:$target:7451,retry=100,interval=0.01
"#;

const COPY_TARGET: &str = r#"
socat -u -b 1048576 TCP-LISTEN:7451,reuseaddr - | tar -C $dir/images -x
runc restore --detach --bundle $dir --image-path $dir/images --work-path $dir/work "$id" \
    > >(exec cat >>"$out" 2>/dev/null) 2>&1
"#;

const LAZY_SOURCE: &str = r#"
mkfifo $dir/ready
runc checkpoint --lazy-pages --page-server $source:7452 --status-fd 3 \
    --image-path $dir/images --work-path $dir/work "$id" 3>$dir/ready >/dev/null &
head -c 1 <$dir/ready >/dev/null
tar -C $dir/images -c . | socat -u -b 1048576 - TCP:$target:7451,retry=100,interval=0.01
wait $!
"#;

const LAZY_TARGET: &str = r#"
socat -u -b 1048576 TCP-LISTEN:7451,reuseaddr - | tar -C $dir/images -x
timeout $patience criu lazy-pages --page-server --address $source --port 7452 \
    --images-dir $dir/images --work-dir $dir/work --log-file lazy.log &
while [ ! -S $dir/work/lazy-pages.socket ]; do sleep 0.002; done
runc restore --detach --lazy-pages --bundle $dir --image-path $dir/images --work-path $dir/work "$id" \
    > >(exec cat >>"$out" 2>/dev/null) 2>&1
wait $! || [ $? = 124 ]
"#;

const REMOVE: &str = r#"
runc delete --force "$id" 2>/dev/null || true
ctr image unmount --rm $dir/rootfs >/dev/null || true
rm -rf --one-file-system $dir
"#;
