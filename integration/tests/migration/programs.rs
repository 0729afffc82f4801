//! Programs whose memory is checked page by page, and programs that count.

use std::fs;

use godwit_integration::case;
use godwit_integration::suite::{Case, Container, Outcome, Stage, Trouble, await_that};
use godwit_integration::workload::memory::Findings;

use super::workload::{Shape, TICKER, assert_usable, await_ticks_past, findings, ticks};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(every_page_of_a_plain_program_arrives),
        case!(every_page_of_a_program_with_threads_arrives),
        case!(every_page_of_a_program_with_processes_arrives),
        case!(counter_loses_and_repeats_no_tick),
        case!(memhog_arrives_with_its_memory_and_goes_on),
        case!(container_moves_back_and_forth_twenty_times).alone(),
        case!(gigabyte_of_pages_arrives).alone().slow(),
    ]
}

fn every_page_of_a_plain_program_arrives(stage: &Stage) -> Outcome {
    arrives_whole(stage, Shape { processes: 1, threads: 1, pages: 8192 })
}

fn every_page_of_a_program_with_threads_arrives(stage: &Stage) -> Outcome {
    arrives_whole(stage, Shape { processes: 1, threads: 8, pages: 1024 })
}

fn every_page_of_a_program_with_processes_arrives(stage: &Stage) -> Outcome {
    arrives_whole(stage, Shape { processes: 4, threads: 2, pages: 1024 })
}

fn gigabyte_of_pages_arrives(stage: &Stage) -> Outcome {
    arrives_whole(stage, Shape { processes: 1, threads: 2, pages: 131_072 })
}

/// Moves the self-checking program while it writes, and has it check all pages on the target.
fn arrives_whole(stage: &Stage, shape: Shape) -> Outcome {
    let container = shape.run(stage.a.plan("pages"))?;
    let earlier = findings(&container)?;
    let (moved, answer) = container.move_to(&stage.b)?;
    shape.assert_whole(&moved, earlier)?;
    let pages = answer.number("pages.total").unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "a number of pages stays far below 2^53")]
    let expected = (shape.processes * shape.threads * shape.pages) as f64;
    assert!(pages >= expected, "{pages} pages are reported, and the program has {expected}");
    assert_usable(&moved)
}

fn counter_loses_and_repeats_no_tick(stage: &Stage) -> Outcome {
    let container = stage.a.plan("counter").run(&TICKER)?;
    let before = await_ticks_past(&container, 20)?;
    let (moved, _) = container.move_to(&stage.b)?;
    let after = await_ticks_past(&moved, before + 20)?;
    assert!(ticks(&moved)? >= after);
    assert_usable(&moved)
}

/// Debian's memhog walks over its memory again and again; it is seen to run by its processor time.
fn memhog_arrives_with_its_memory_and_goes_on(stage: &Stage) -> Outcome {
    let plan = stage.a.plan("memhog").image("memhog").flags(&["--null-io"]);
    let container = plan.run(&["memhog", "-r1000000", "64m"])?;
    await_that("it has its memory", || resident_kb(&container).is_ok_and(|kb| kb >= 64 << 10))?;
    let (moved, answer) = container.move_to(&stage.b)?;
    assert!(answer.number("pages.total").is_some_and(|pages| pages >= f64::from(64_u32 << 8)));
    await_that("it has its memory again", || resident_kb(&moved).is_ok_and(|kb| kb >= 64 << 10))?;
    let before = processor_ticks(&moved)?;
    await_that("it works", || processor_ticks(&moved).is_ok_and(|now| now > before))?;
    moved.stop()
}

fn container_moves_back_and_forth_twenty_times(stage: &Stage) -> Outcome {
    let shape = Shape { processes: 1, threads: 2, pages: 2048 };
    let pages = shape.run(stage.a.plan("to-and-fro"))?;
    let counter = stage.a.plan("ticks-to-and-fro").run(&TICKER)?;
    let mut places = vec![(pages, counter)];
    let mut earlier = Findings::default();
    let mut ticked = 0;
    for turn in 0..20 {
        let target = if turn % 2 == 0 { &stage.b } else { &stage.a };
        let (pages, counter) = places.last().expect("it begins with one and only grows");
        let (pages, _) = pages.move_to(target)?;
        let (counter, _) = counter.move_to(target)?;
        earlier = shape.assert_whole(&pages, earlier)?;
        ticked = await_ticks_past(&counter, ticked)?;
        places.push((pages, counter));
    }
    Ok(())
}

fn resident_kb(container: &Container<'_>) -> Result<u64, Trouble> {
    let path = format!("/proc/{}/status", container.pid()?);
    let text = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
    let field = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kb = field.and_then(|field| field.trim().trim_end_matches(" kB").parse().ok());
    kb.ok_or(Trouble::Garbled { what: "the status of a process", text })
}

/// Returns the processor time of a container's init in user mode, in the kernel's ticks.
fn processor_ticks(container: &Container<'_>) -> Result<u64, Trouble> {
    let path = format!("/proc/{}/stat", container.pid()?);
    let text = fs::read_to_string(&path).map_err(Trouble::io("read", &path))?;
    // utime is the 14th field of proc_pid_stat(5), the 12th after the name in parentheses.
    let field = text.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(11)?.parse().ok());
    field.ok_or(Trouble::Garbled { what: "the status of a process", text })
}
