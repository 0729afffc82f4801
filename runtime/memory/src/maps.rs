//! What a process has mapped, and what of it godwit answers for.
//!
//! CRIU restores lazily what is private, anonymous, not locked and not made of huge pages of hugetlbfs; all
//! else, shared memory and private copies of file pages above all, travels in its images. The same rule
//! decides here what is followed, and what is hidden from CRIU.
//!
//! It is all or nothing. A lazy restore skips *every* page of such memory, also one that stands in its images,
//! and leaves it to the server of the page faults: memory that CRIU would restore lazily and that is neither
//! hidden nor served is lost. (The one exception, the page under a thread's stack pointer, is better served
//! like the others than found by reading stack pointers twice.)
//!
//! Sources: proc(5); CRIU 4.1.1 criu/include/vma.h (`vma_entry_can_be_lazy`) and criu/mem.c
//! (`restore_priv_vma_content`).

use std::fs;
use std::path::PathBuf;

use godwit_sys::SysError;
use godwit_sys::page_range::PageRange;

use crate::{MemoryError, PageSet, Result};

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Where it lies.
    pub range: PageRange,
    /// Whether it belongs to this process alone and to no file.
    pub private_anonymous: bool,
    /// Whether it may be executed.
    pub executable: bool,
    /// `[heap]`, `[stack]`, a path, or nothing.
    pub name: String,
}

/// Reads the mappings of `pid`, in order of address.
///
/// # Errors
/// [`SysError::NoProcess`] when it has ended, [`MemoryError::File`], [`MemoryError::Line`].
pub fn read(pid: i32) -> Result<Vec<Mapping>> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let text = read_text(pid, &path)?;
    text.lines()
        .map(|line| parse(line).ok_or_else(|| MemoryError::Line { path: path.clone(), line: line.into() }))
        .collect()
}

/// The private anonymous memory of `pid`: what trackers follow.
///
/// # Errors
/// As [`read`].
pub fn private_anonymous(pid: i32) -> Result<Vec<PageRange>> {
    Ok(read(pid)?
        .into_iter()
        .filter(|mapping| mapping.private_anonymous)
        .map(|mapping| mapping.range)
        .collect())
}

/// The memory of `pid` that CRIU restores lazily: all of it is to be hidden from its dump, and to be served.
///
/// # Errors
/// As [`read`].
pub fn lazy(pid: i32) -> Result<PageSet> {
    Ok(dumped(pid)?.lazy)
}

/// What matters of a process's memory when CRIU dumps it.
#[derive(Debug)]
pub struct Dumped {
    /// See [`lazy`].
    pub lazy: PageSet,
    /// Those of these pages, at most one, that the dump may change for a moment. To have the process make system calls,
    /// CRIU puts them at the start of the first mapping that may be executed, and puts back what was there. Mostly that
    /// is a file's. (CRIU 4.2.1: criu/parasite-syscall.c, `get_exec_start`; compel/src/lib/infect.c.)
    pub injected: PageSet,
}

/// Finds it, with one look at the mappings, which may be many.
///
/// # Errors
/// As [`read`].
pub fn dumped(pid: i32) -> Result<Dumped> {
    let mappings = read(pid)?;
    let anonymous = mappings.iter().filter(|mapping| mapping.private_anonymous);
    let candidates: PageSet = anonymous.map(|mapping| mapping.range).collect();
    let lazy = candidates.difference(&locked(pid)?);
    let first = mappings.iter().find(|mapping| mapping.executable);
    let injected: PageSet =
        first.map(|mapping| PageRange::page_at(mapping.range.start())).into_iter().collect();
    Ok(Dumped { injected: injected.intersection(&lazy), lazy })
}

/// The number by which CRIU names process `pid`: its id in the innermost pid namespace that it lives in.
///
/// # Errors
/// As [`read`].
pub fn space(pid: i32) -> Result<i32> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let text = read_text(pid, &path)?;
    let line = text.lines().find(|line| line.starts_with("NSpid:")).unwrap_or("");
    let number = line.split_ascii_whitespace().next_back().and_then(|number| number.parse().ok());
    number.ok_or_else(|| MemoryError::Line { path, line: line.to_owned() })
}

/// Memory locked by mlock(2) and its kin. Reading smaps takes some 15 ms per GiB, so it is only done when the
/// process has any.
fn locked(pid: i32) -> Result<PageSet> {
    let status = read_text(pid, &PathBuf::from(format!("/proc/{pid}/status")))?;
    let has_none = status.lines().any(|line| line.starts_with("VmLck:") && line.ends_with(" 0 kB"));
    if has_none {
        return Ok(PageSet::new());
    }
    let mut found = PageSet::new();
    let mut current = None;
    for line in read_text(pid, &PathBuf::from(format!("/proc/{pid}/smaps")))?.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|flag| flag == "lo") {
                found.extend(current);
            }
        } else if let Some(mapping) = parse(line) {
            current = Some(mapping.range);
        }
    }
    Ok(found)
}

/// One line of maps; `None` for anything else.
fn parse(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let start = rest.trim_start_matches(' ');
        let (field, tail) = start.split_at(start.find(' ').unwrap_or(start.len()));
        rest = tail;
        field
    };
    let (start, end) = field().split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let permissions = field();
    let (_offset, device, inode) = (field(), field(), field());
    let name = rest.trim_start_matches(' ').to_owned();
    if permissions.len() != 4 || !device.contains(':') {
        return None;
    }
    let kernels = name.starts_with("[v") || name == "[uprobes]";
    let private_anonymous = permissions.ends_with('p') && inode == "0" && device == "00:00" && !kernels;
    let executable = permissions.contains('x');
    Some(Mapping { range: PageRange::new(start, end)?, private_anonymous, executable, name })
}

fn read_text(pid: i32, path: &PathBuf) -> Result<String> {
    // A file's name may be any bytes.
    Ok(String::from_utf8_lossy(&read_file(pid, path)?).into_owned())
}

/// Reads a file below `/proc/PID`.
pub(crate) fn read_file(pid: i32, path: &PathBuf) -> Result<Vec<u8>> {
    match fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            Err(SysError::NoProcess { pid }.into())
        }
        Err(error) => Err(MemoryError::file(path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use godwit_sys::arena::Arena;

    use super::*;

    #[test]
    fn a_process_has_a_number_of_its_own() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(space(own).unwrap() > 0);
        assert!(matches!(space(i32::MAX), Err(MemoryError::Sys(SysError::NoProcess { .. }))));
    }

    #[test]
    fn lines_of_every_kind_are_told_apart() {
        let kind = |line| parse(line).map(|mapping| (mapping.private_anonymous, mapping.name));
        let is = |anonymous, name: &str| Some((anonymous, name.to_owned()));
        assert_eq!(kind("7f0000000000-7f0000021000 rw-p 00000000 00:00 0 "), is(true, ""));
        assert_eq!(
            kind("55d000-55e000 rw-p 00000000 00:00 0                          [heap]"),
            is(true, "[heap]")
        );
        assert_eq!(
            kind("7ffd1000-7ffd3000 r-xp 00000000 00:00 0                  [vdso]"),
            is(false, "[vdso]")
        );
        assert_eq!(
            kind("7f0000-7f1000 rw-p 00002000 fe:00 123    /usr/lib/a b.so"),
            is(false, "/usr/lib/a b.so")
        );
        assert_eq!(
            kind("7f0000-7f1000 rw-s 00000000 00:01 99 /dev/zero (deleted)"),
            is(false, "/dev/zero (deleted)")
        );
        assert_eq!(
            kind("7f000000-7f200000 rw-p 00000000 00:0f 7 /anon_hugepage (deleted)"),
            is(false, "/anon_hugepage (deleted)")
        );
        assert_eq!(parse("Rss:                 132 kB"), None);
        assert_eq!(parse("VmFlags: rd wr mr mw me gd ac"), None);
    }

    #[test]
    fn what_may_be_executed_is_told_from_what_may_not() {
        let executable = |line| parse(line).unwrap().executable;
        assert!(executable("40000000-40001000 rwxp 00000000 00:00 0 "));
        assert!(!executable("7f0000000000-7f0000021000 rw-p 00000000 00:00 0 "));
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(dumped(own).unwrap().injected.is_empty(), "a program's own file comes first");
    }

    #[test]
    fn own_memory_is_found_and_locked_memory_is_left_to_criu() {
        let arena = Arena::map(8 * 4096).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(lazy(own).unwrap().contains(arena.range().start()));
        let page = PageRange::page_at(arena.range().start() + 4096);
        match arena.lock(page) {
            Ok(()) => {
                assert!(!lazy(own).unwrap().contains(page.start()));
                assert!(lazy(own).unwrap().contains(page.end()));
            }
            Err(error) => eprintln!("SKIP: locking memory: {error}"),
        }
        let stack = read(own).unwrap().into_iter().find(|mapping| mapping.name == "[stack]").unwrap();
        assert!(private_anonymous(own).unwrap().contains(&stack.range));
        assert!(lazy(own).unwrap().contains(stack.range.end() - 4096));
        assert!(matches!(read(i32::MAX), Err(MemoryError::Sys(SysError::NoProcess { .. }))));
    }
}
