//! CRIU's pre-dump with its page server, against godwit's pre-copy: between two emulated machines, whose kernels have
//! the soft-dirty bits that CRIU follows writes by.
//!
//! The container says in every tick what time it is, by the clock of the machine that it runs on; its downtime is from
//! the last tick on one to the first on the other, less what the clocks differ by. Everything takes some ten times as
//! long as it would, so what counts is the ratio.

use std::thread;

use godwit_integration::NodeName;
use godwit_integration::guests::{Guest, Guests};
use godwit_integration::image::catalog::by_name;
use godwit_integration::suite::Trouble;
use godwit_protocol::Mode;
use serde_json::{Value, json};

use super::stage::Load;
use super::{Arguments, GODWIT, note_versions};
use crate::Result;
use crate::draw::{Bar, Drawing};
use crate::figure::Figure;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let loads: &[Load] = if arguments.full { &[Load::Idle, Load::Rate(100)] } else { &[Load::Idle] };
    let mut figure = Figure::new("predump", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    let guests = Guests::up([KERNEL; 2])?;
    let pair = Pair { a: guests.guest(NodeName::A), b: guests.guest(NodeName::B) };
    pair.prepare()?;
    figure.sum_up(&["kernel"], Some(pair.a.sh("uname -r")?))?;
    for run in 1..=arguments.runs(1, 5) {
        for &load in loads {
            for contender in CONTENDERS {
                let clocks = pair.clocks()?;
                let ticks = match contender {
                    Contender::Predump => pair.by_predump(load)?,
                    Contender::Godwit => pair.by_godwit(load)?,
                };
                figure.add(json!({
                    "contender": contender.name(), "content": load.name(), "memory_mb": MEMORY_MB, "run": run,
                    "outcome": "migrated", "observed_downtime_ms": ticks.gap_ms(clocks.ahead_us),
                    "clocks_known_to_ms": ms(clocks.known_to_us),
                }))?;
            }
        }
    }
    guests.down()?;
    let mut bars = Vec::new();
    for load in loads {
        let seen = CONTENDERS.map(|contender| {
            let wanted = [("contender", json!(contender.name())), ("content", json!(load.name()))];
            figure.spread(&wanted, "observed_downtime_ms")
        });
        for (contender, seen) in CONTENDERS.into_iter().zip(seen) {
            figure.sum_up(&["observed_downtime_ms", &load.name(), contender.name()], seen)?;
            let label = format!("{}, {}", contender.name(), load.name());
            bars.extend(seen.map(|spread| Bar { label, spread }));
        }
        let [theirs, ours] = seen;
        let ratio = theirs.zip(ours).map(|(theirs, ours)| theirs.median / ours.median);
        figure.sum_up(&["downtime_runc_predump_over_godwit", &load.name()], ratio)?;
    }
    figure.write(&Drawing::Bars { unit: "observed downtime in ms, emulated".to_owned(), bars })
}

/// Who moves the container.
#[derive(Debug, Clone, Copy)]
enum Contender {
    Predump,
    Godwit,
}

impl Contender {
    const fn name(self) -> &'static str {
        match self {
            Self::Predump => "runc with criu pre-dump and page server",
            Self::Godwit => "godwit precopy",
        }
    }
}

/// The two machines.
struct Pair<'a> {
    a: Guest<'a>,
    b: Guest<'a>,
}

/// What the clock of b shows beyond that of a, and how well that is known, in µs.
struct Clocks {
    ahead_us: i64,
    known_to_us: i64,
}

/// When a container ticked last on a, and first on b, by their clocks in µs.
struct Ticks {
    last_us: i64,
    first_us: i64,
}

impl Ticks {
    fn gap_ms(&self, ahead_us: i64) -> f64 {
        ms(self.first_us - self.last_us - ahead_us)
    }
}

impl Pair<'_> {
    fn prepare(&self) -> Result<()> {
        for guest in [self.a, self.b] {
            guest.import(&by_name("bench")?)?;
        }
        Ok(())
    }

    /// Asks both machines for the time, one between two answers of the other; the quickest of some tries counts.
    fn clocks(&self) -> Result<Clocks> {
        let mut best: Option<Clocks> = None;
        for _ in 0..CLOCK_TRIES {
            let [before, there, after] =
                [self.a, self.b, self.a].map(|guest| guest.sh("echo ${EPOCHREALTIME/./}"));
            let [before, there, after]: [i64; 3] = [before?.parse()?, there?.parse()?, after?.parse()?];
            let known_to_us = (after - before) / 2;
            if best.as_ref().is_none_or(|best| known_to_us < best.known_to_us) {
                best = Some(Clocks { ahead_us: there - before - known_to_us, known_to_us });
            }
        }
        Ok(best.ok_or("the clocks were not asked")?)
    }

    fn by_predump(&self, load: Load) -> Result<Ticks> {
        let spec = self.a.sh(SPEC)?;
        let spec = serde_json::to_string(&bundle(&spec, load)?)?;
        for guest in [self.a, self.b] {
            guest.sh(&format!("{PREPARE}\ncat >$dir/config.json <<'END'\n{spec}\nEND"))?;
        }
        self.a.sh(START)?;
        self.await_filled(load)?;
        self.b.sh(SERVE_PREDUMP)?;
        self.a.sh(PREDUMP)?;
        self.b.sh(SERVE_DUMP)?;
        thread::scope(|scope| {
            let restore = scope.spawn(|| self.b.sh(RESTORE));
            let dump = self.a.sh(DUMP);
            // What the target has to say of a failure is nearer to its cause than a broken connection.
            restore.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            dump
        })?;
        let ticks = self.ticks();
        for guest in [self.a, self.b] {
            guest.sh(REMOVE)?;
        }
        ticks
    }

    fn by_godwit(&self, load: Load) -> Result<Ticks> {
        let command = load.command(MEMORY_MB).join(" ");
        let run = format!("ctr run -d --runtime {GODWIT} --log-uri file://{OUT} {IMAGE} moved {command}");
        self.a.sh(&run)?;
        self.await_filled(load)?;
        self.a.migrate("moved", Mode::Precopy)?;
        let ticks = self.ticks();
        self.b.remove("moved")?;
        for guest in [self.a, self.b] {
            guest.sh(&format!("rm -f {OUT}"))?;
        }
        ticks
    }

    /// An idle program's ticks count 1 when it is at rest; one that writes counts what it has written.
    fn await_filled(&self, load: Load) -> Result<(), Trouble> {
        let least = if load == Load::Idle { 1 } else { 20 };
        self.a.await_that(&format!("(($(tail -n 1 {OUT} | cut -d ' ' -f 1) >= {least}))"))
    }

    fn ticks(&self) -> Result<Ticks> {
        // The first tick on b may still be on its way; the last one there may be half a line.
        self.b.await_that(&format!("(($(wc -l <{OUT}) > 0))"))?;
        let last = self.a.sh(&format!("tail -n 1 {OUT} | cut -d ' ' -f 2"))?;
        let first = self.b.sh(&format!("head -n 1 {OUT} | cut -d ' ' -f 2"))?;
        Ok(Ticks { last_us: last.parse()?, first_us: first.parse()? })
    }
}

/// Returns what `runc spec` printed, with the program of a load.
fn bundle(spec: &str, load: Load) -> Result<Value> {
    let mut spec: Value = serde_json::from_str(spec)?;
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(load.command(MEMORY_MB));
    spec["root"]["readonly"] = json!(false);
    Ok(spec)
}

fn ms(us: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "minutes at most")]
    let us = us as f64;
    us / 1000.0
}

const CONTENDERS: [Contender; 2] = [Contender::Predump, Contender::Godwit];
const KERNEL: &str = "6.12";
const MEMORY_MB: u32 = 256;
const CLOCK_TRIES: u32 = 5;
const IMAGE: &str = "localhost/bench:latest";
/// Where the container's output goes on both machines, in memory.
const OUT: &str = "/run/moved.out";

const SPEC: &str = "cd $(mktemp -d) && runc spec && cat config.json";

const PREPARE: &str = r#"
set -eu
dir=/run/by-hand
# For process substitution: CRIU takes pipes without names from outside, and no others.
if [ ! -e /dev/fd ]; then ln -s /proc/self/fd /dev/fd; fi
mkdir -p $dir/rootfs $dir/pre $dir/images $dir/work
ctr image mount --rw localhost/bench:latest $dir/rootfs >/dev/null"#;

const START: &str = r#"
set -eu
dir=/run/by-hand
runc run --detach --bundle $dir moved </dev/null > >(exec setsid cat >>/run/moved.out 2>/dev/null) 2>&1"#;

const SERVE_PREDUMP: &str = r#"
set -eu
dir=/run/by-hand
criu page-server --images-dir $dir/pre --work-dir $dir/work --log-file pre.log --port 7452 --daemon </dev/null >/dev/null 2>&1"#;

const PREDUMP: &str = r#"
set -eu
dir=/run/by-hand
target=$(awk '$2 == "node-b" { print $1 }' /etc/hosts)
runc checkpoint --pre-dump --page-server $target:7452 --image-path $dir/pre --work-path $dir/work moved >/dev/null"#;

const SERVE_DUMP: &str = r#"
set -eu
dir=/run/by-hand
criu page-server --images-dir $dir/images --prev-images-dir ../pre --work-dir $dir/work --log-file dump.log \
    --port 7453 --daemon </dev/null >/dev/null 2>&1"#;

const DUMP: &str = r#"
set -eu
dir=/run/by-hand
target=$(awk '$2 == "node-b" { print $1 }' /etc/hosts)
runc checkpoint --page-server $target:7453 --parent-path ../pre --image-path $dir/images --work-path $dir/work moved >/dev/null
tar -C $dir/images -c . | socat -u -b 1048576 - TCP:$target:7451,retry=1000,interval=0.01"#;

const RESTORE: &str = r#"
set -eu
dir=/run/by-hand
socat -u -b 1048576 TCP-LISTEN:7451,reuseaddr - | tar -C $dir/images -x
if ! runc restore --detach --bundle $dir --image-path $dir/images --work-path $dir/work moved \
    </dev/null > >(exec setsid cat >>/run/moved.out 2>/dev/null) 2>$dir/restore.err; then
    cat $dir/restore.err >&2
    grep Error $dir/work/*.log >&2
    exit 1
fi"#;

const REMOVE: &str = r#"
set -eu
dir=/run/by-hand
runc delete --force moved 2>/dev/null || true
ctr image unmount --rm $dir/rootfs >/dev/null
rm -rf $dir /run/moved.out"#;
