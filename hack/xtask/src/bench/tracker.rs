//! What following a program's memory costs: the stop to attach, the scans, and the program's own pace.
//!
//! A program on this machine writes pages at random between calculations, so that its pace shows every
//! microsecond that a write takes longer. It is followed and left alone by turns. While followed, its pages are
//! collected as by rounds of pre-copy over a link of some speed: when the link could have carried what was found
//! last. So it is the link that sets the pace of the faults: of each page, the first write after a scan is one.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use godwit_integration::process::wait_until;
use godwit_integration::workload::hold::count_of;
use godwit_memory::tracker::{Collection, DirtyTracker, WpAsyncTracker};
use serde_json::{Value, json};

use super::stage::{merged, ms};
use super::{Arguments, PAGE_BITS, note_versions};
use crate::Result;
use crate::draw::{Bar, Drawing};
use crate::figure::Figure;

/// Runs the figure.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let runs = arguments.runs(2, 5);
    let sizes: &[u32] = if arguments.full { &[100, 1024, 3096] } else { &[1024] };
    let mut figure = Figure::new("tracker", &arguments.out);
    note_versions(&mut figure, arguments.containerd)?;
    for &memory_mb in sizes {
        for turns in TURNS {
            let writer = Writer::start(memory_mb, turns)?;
            for run in 1..=runs {
                for link in LINKS {
                    let begin = writer.now();
                    thread::sleep(WINDOW);
                    let alone = writer.now().since(begin);
                    let followed = follow(&writer, link)?;
                    let row = json!({
                        "memory_mb": memory_mb, "turns_between_writes": turns, "rate": link.name, "run": run,
                    });
                    figure.add(merged(row, columns(alone, &followed)))?;
                }
            }
        }
    }
    let bars = sum_up(&mut figure, sizes)?;
    figure.write(&Drawing::Bars { unit: "pages/s or ms".to_owned(), bars })
}

/// The columns of what a program did alone and followed.
fn columns(alone: Pace, followed: &Followed) -> Value {
    let pace = followed.pace;
    json!({
        "alone_pages_per_s": alone.per_s, "alone_pages_per_cpu_s": alone.per_cpu_s,
        "followed_pages_per_s": pace.per_s, "followed_pages_per_cpu_s": pace.per_cpu_s,
        "slowdown": 1.0 - pace.per_s / alone.per_s,
        "slowdown_of_cpu": 1.0 - pace.per_cpu_s / alone.per_cpu_s,
        "attach_stop_ms": followed.stop_ms,
        "first_scan_ms": followed.first_scan_ms, "later_scan_ms": followed.later_scan_ms,
        "rounds": followed.rounds, "faults_per_s": followed.faults / pace.seconds(),
        "us_per_fault": fault_us(alone, followed), "outcome": "measured",
    })
}

/// What a page that is found written cost the program: the processor time that its pages took more than alone.
fn fault_us(alone: Pace, followed: &Followed) -> Option<f64> {
    let more_s = followed.pace.pages / followed.pace.per_cpu_s - followed.pace.pages / alone.per_cpu_s;
    (followed.faults > 0.0).then(|| more_s / followed.faults * 1e6)
}

fn sum_up(figure: &mut Figure, sizes: &[u32]) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for &memory_mb in sizes {
        let size = format!("{memory_mb}mb");
        for (column, unit) in [("attach_stop_ms", "ms"), ("first_scan_ms", "ms"), ("later_scan_ms", "ms")] {
            let spread = figure.spread(&[("memory_mb", json!(memory_mb))], column);
            figure.sum_up(&[column, &size], spread)?;
            bars.extend(
                spread.map(|spread| Bar { label: format!("{column} ({unit}), {memory_mb} MB"), spread }),
            );
        }
        for turns in TURNS {
            let writer = [("memory_mb", json!(memory_mb)), ("turns_between_writes", json!(turns))];
            let Some(alone) = figure.spread(&writer, "alone_pages_per_s") else { continue };
            let pace = format!("at {:.0} pages/s", alone.median);
            let label = |name: &str| format!("{name} (pages/s), {memory_mb} MB, {turns} turns");
            bars.push(Bar { label: label("alone"), spread: alone });
            for link in LINKS {
                let wanted = [writer.as_slice(), &[("rate", json!(link.name))]].concat();
                for column in ["slowdown", "slowdown_of_cpu", "faults_per_s", "us_per_fault"] {
                    let spread = figure.spread(&wanted, column);
                    figure.sum_up(&[column, &size, link.name, &pace], spread)?;
                }
                let followed = figure.spread(&wanted, "followed_pages_per_s");
                let label = label(&format!("followed at {}", link.name));
                bars.extend(followed.map(|spread| Bar { label, spread }));
            }
        }
    }
    Ok(bars)
}

/// What following came to.
struct Followed {
    pace: Pace,
    stop_ms: f64,
    first_scan_ms: f64,
    later_scan_ms: f64,
    rounds: u32,
    /// Pages found written in all: each began with a fault.
    faults: f64,
}

fn follow(writer: &Writer, link: Link) -> Result<Followed> {
    let pid = [i32::try_from(writer.child.id())?];
    let mut tracker = WpAsyncTracker::new(STOP_LIMIT)?;
    let armed = tracker.arm(&pid)?;
    let stop = armed.stopped.first().ok_or("the program cannot be followed")?.1;
    let first = tracker.collect(&pid)?;
    let from = writer.now();
    let (mut scan, mut faults, mut rounds) = (Duration::ZERO, 0, 0_u32);
    let mut found = pages_in(&first);
    while from.time.elapsed() < WINDOW {
        thread::sleep(link.time_for(found));
        let collection = tracker.collect(&pid)?;
        scan += collection.scan;
        found = pages_in(&collection);
        faults += found;
        rounds += 1;
    }
    Ok(Followed {
        pace: writer.now().since(from),
        stop_ms: ms(stop),
        first_scan_ms: ms(first.scan),
        later_scan_ms: ms(scan / rounds.max(1)),
        rounds,
        faults: faults as f64,
    })
}

fn pages_in(collection: &Collection) -> u64 {
    collection.deltas.iter().map(|delta| delta.dirty.pages()).sum()
}

/// A link that would carry what is found.
#[derive(Debug, Clone, Copy)]
struct Link {
    name: &'static str,
    bits_per_s: f64,
}

impl Link {
    /// How long a round takes that sends so many pages.
    fn time_for(self, pages: u64) -> Duration {
        Duration::from_secs_f64(pages as f64 * PAGE_BITS / self.bits_per_s).max(ROUND_MIN)
    }
}

/// A program that writes, and how many pages it says it has written.
#[derive(Debug)]
struct Writer {
    child: Child,
    count: Arc<AtomicU64>,
}

impl Writer {
    fn start(memory_mb: u32, turns: u32) -> Result<Self> {
        let program = godwit_integration::tools::built()?.join("workload");
        let (size, turns) = (memory_mb.to_string(), turns.to_string());
        let mut child = Command::new(program)
            .args(["hold", "--megabytes", &size, "--busy", &turns])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("the program has no output")?;
        let count = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&count);
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                counter.store(count_of(&line).unwrap_or(0), Ordering::Relaxed);
            }
        });
        let writer = Self { child, count };
        if !wait_until(Duration::from_secs(60), || writer.count() > 0) {
            return Err("the program writes nothing".into());
        }
        Ok(writer)
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn now(&self) -> Moment {
        // Fields of stat(5) from the 3rd on, after the name in parentheses; 14 and 15 are times of user and system.
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
        let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        Moment { time: Instant::now(), pages: self.count(), cpu_s: ticks / TICKS_PER_S }
    }
}

/// What a writer had done at a point in time.
#[derive(Debug, Clone, Copy)]
struct Moment {
    time: Instant,
    pages: u64,
    cpu_s: f64,
}

/// How fast a writer wrote, by the clock, and by its own processor time, which other work on the machine changes
/// less.
#[derive(Debug, Clone, Copy)]
struct Pace {
    pages: f64,
    per_s: f64,
    per_cpu_s: f64,
}

impl Pace {
    fn seconds(self) -> f64 {
        self.pages / self.per_s
    }
}

impl Moment {
    fn since(self, earlier: Self) -> Pace {
        let pages = self.pages.saturating_sub(earlier.pages) as f64;
        Pace {
            pages,
            per_s: pages / (self.time - earlier.time).as_secs_f64(),
            per_cpu_s: pages / (self.cpu_s - earlier.cpu_s).max(1.0 / TICKS_PER_S),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Turns of the calculation between two writes; a turn takes some nanoseconds.
const TURNS: [u32; 4] = [0, 2_000, 10_000, 100_000];
/// The unit of times in stat(5), on every Linux there is.
const TICKS_PER_S: f64 = 100.0;
/// A slow link of today, and about what two ends on one machine come to.
const LINKS: [Link; 2] = [Link { name: "1gbit", bits_per_s: 1e9 }, Link { name: "10gbit", bits_per_s: 10e9 }];
/// A program is followed for so long, and to the end of a round.
const WINDOW: Duration = Duration::from_secs(4);
/// What a round takes with nothing to send.
const ROUND_MIN: Duration = Duration::from_millis(100);
const STOP_LIMIT: Duration = Duration::from_millis(500);
