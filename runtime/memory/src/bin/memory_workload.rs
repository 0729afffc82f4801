//! A program whose memory is what a test is about.
//!
//! `memory-workload check MIB REPORT`: fills so much memory, rewrites pages at random, and checks each before
//! it does; every page is checked in turn as well. The file REPORT says how many pages were rewritten, how many
//! words were found wrong, and how many full passes there were.
//!
//! `memory-workload scan PID START END ROOM`: prints the resident pages of a range of another process as ranges,
//! asking for at most ROOM of them at once, as criu does.
//!
//! `memory-workload obey`: does what lines on its input say, answers each with one line, and touches no other
//! memory of interest:
//! ```text
//! map PAGES        -> INDEX ADDRESS     write INDEX PAGE VALUE -> ok      read INDEX PAGE -> VALUE
//! drop INDEX PAGE COUNT -> ok           unmap INDEX -> ok                 move INDEX -> ADDRESS
//! forbid INDEX PAGE COUNT -> ok         allow INDEX PAGE COUNT -> ok      huge INDEX -> ok
//! fork VALUE -> PID (the child writes VALUE to the first page of each map, then sleeps)
//! exec -> ok (begins anew, with nothing mapped)
//! ```
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use godwit_sys::arena::{Advice, Arena};
use godwit_sys::page_range::{PAGE_BYTES, PageRange};
use godwit_sys::pagemap_scan::{Categories, Pagemap, Region, Scan};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[1..] {
        ["check", mebibytes, report] => check(mebibytes.parse()?, report),
        ["scan", pid, start, end, room] => {
            let range = PageRange::new(start.parse()?, end.parse()?).ok_or("no pages")?;
            scan(pid.parse()?, range, room.parse()?)
        }
        ["obey"] => obey(),
        _ => Err("usage: memory-workload check MIB REPORT | scan PID START END ROOM | obey".into()),
    }
}

/// Word `index` of a page that was written with `seed`.
fn word(seed: u64, index: u64) -> u64 {
    (seed ^ index).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(arena: &Arena, page: u64, seed: u64) {
    arena.store(page * WORDS, seed);
    for index in 1..WORDS {
        arena.store(page * WORDS + index, word(seed, index));
    }
}

fn wrong(arena: &Arena, page: u64) -> u64 {
    let seed = arena.load(page * WORDS);
    (1..WORDS).filter(|index| arena.load(page * WORDS + index) != word(seed, *index)).count() as u64
}

fn check(mebibytes: u64, report: &str) -> Result<()> {
    // criu dumps no process whose session leader it cannot see, as in a pid namespace begun within a session.
    nix::unistd::setsid()?;
    let pages = mebibytes * 256;
    let arena = Arena::map(pages * PAGE_BYTES)?;
    for page in 0..pages {
        fill(&arena, page, page << 20);
    }
    let report = File::create(report)?;
    let (mut state, mut errors, mut rewritten, mut turn) = (1_u64, 0, 0_u64, 0);
    loop {
        for _ in 0..25 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (state >> 33) % pages;
            errors += wrong(&arena, page);
            fill(&arena, page, arena.load(page * WORDS) + 1);
            rewritten += 1;
        }
        for _ in 0..250 {
            errors += wrong(&arena, turn % pages);
            // The seed carries the number of the page: contents of another page are wrong as well.
            errors += u64::from(arena.load(turn % pages * WORDS) >> 20 != turn % pages);
            turn += 1;
        }
        report.write_all_at(format!("{rewritten:12} {errors:12} {:12}\n", turn / pages).as_bytes(), 0)?;
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn scan(pid: i32, range: PageRange, room: usize) -> Result<()> {
    let resident = Categories::PRESENT.with(Categories::SWAPPED);
    let not = Categories::ZERO.with(Categories::FILE);
    let scan = Scan { protect: false, inverted: not, all_of: not, any_of: resident, report: resident };
    let mut regions = vec![Region::default(); room];
    Pagemap::open(pid)?.scan_all(range, scan, &mut regions, |pages, _| println!("{pages}"))?;
    Ok(())
}

fn obey() -> Result<()> {
    let mut arenas: Vec<Option<Arena>> = Vec::new();
    let input = std::io::stdin();
    let mut line = String::with_capacity(256);
    loop {
        line.clear();
        if input.lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_ascii_whitespace();
        let verb = words.next().unwrap_or("");
        let numbers = words.map(str::parse).collect::<std::result::Result<Vec<u64>, _>>()?;
        let answer = act(&mut arenas, verb, &numbers)?;
        let mut output = std::io::stdout();
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
}

fn act(arenas: &mut Vec<Option<Arena>>, verb: &str, numbers: &[u64]) -> Result<String> {
    let ok = || Ok("ok".to_owned());
    match (verb, numbers) {
        ("map", [pages]) => {
            let arena = Arena::map(pages * PAGE_BYTES)?;
            let address = arena.range().start();
            arenas.push(Some(arena));
            Ok(format!("{} {address}", arenas.len() - 1))
        }
        ("fork", [value]) => fork(arenas, *value),
        ("exec", []) => {
            println!("ok");
            Err(std::process::Command::new("/proc/self/exe").arg("obey").exec().into())
        }
        (verb, [index, rest @ ..]) => {
            let slot = arenas.get_mut(usize::try_from(*index)?).ok_or("no such map")?;
            if verb == "move" {
                let moved = slot.take().ok_or("unmapped")?.relocate()?;
                let address = moved.range().start();
                *slot = Some(moved);
                return Ok(address.to_string());
            }
            if verb == "unmap" {
                *slot = None;
                return ok();
            }
            let arena = slot.as_ref().ok_or("unmapped")?;
            let part = |page: u64, count: u64| {
                let start = arena.range().start() + page * PAGE_BYTES;
                PageRange::new(start, start + count * PAGE_BYTES).ok_or("no pages")
            };
            match (verb, rest) {
                ("write", [page, value]) => arena.store(page * WORDS, *value),
                ("read", [page]) => return Ok(arena.load(page * WORDS).to_string()),
                ("drop", [page, count]) => arena.discard(part(*page, *count)?)?,
                ("forbid", [page, count]) => arena.forbid(part(*page, *count)?, true)?,
                ("allow", [page, count]) => arena.forbid(part(*page, *count)?, false)?,
                ("huge", []) => arena.advise(arena.range(), Advice::HugePage)?,
                _ => return Err(format!("what is '{verb}'?").into()),
            }
            ok()
        }
        _ => Err(format!("what is '{verb}'?").into()),
    }
}

fn fork(arenas: &[Option<Arena>], value: u64) -> Result<String> {
    let (ready, done) = UnixStream::pair()?;
    let mut waiting = ready.try_clone()?;
    let pid = godwit_sys::fork::run(move || {
        for arena in arenas.iter().flatten() {
            arena.store(0, value);
        }
        drop((ready, done));
        std::thread::sleep(Duration::from_secs(600));
        0
    })?;
    // Ends when the child, too, has closed the other end: it has written what it was to write.
    waiting.read_to_end(&mut Vec::new())?;
    Ok(pid.to_string())
}

const WORDS: u64 = 512;
