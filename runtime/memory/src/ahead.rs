//! What CRIU has to know of a process's mappings, read while the process still runs.
//!
//! CRIU takes mappings and their flags from `/proc/PID/smaps`. For the figures in it, which CRIU does not need, the
//! kernel looks at every page: some 25 ms per GiB, with the container frozen. So the text is read before, and given to
//! CRIU instead of that file.
//! ```text
//! running: Ahead::read    frozen: is_current ─► CRIU gets the text    dumped: still_holds, before anything is final
//! ```
//! `/proc/PID/maps`, which costs nothing, tells at the freeze whether the mappings are the same. It does not show their
//! flags, which madvise(2) and mlock(2) may have changed in between: so smaps is read once more when the dump is
//! complete, while the target restores, and the dump is good only if it still holds. A process that is seen to change
//! flags between two readings is left alone from then on.
//!
//! While the kernel looks at the pages of a mapping the process can map nothing, so a reading that took long is not
//! repeated as long as maps is the same.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_sys::SysError;

use crate::maps::read_file;
use crate::{MemoryError, Result};

/// The mappings of one process, with their flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mappings {
    /// Lines as in smaps, those with figures left out: each mapping's own, then its `VmFlags`.
    text: Arc<[u8]>,
}

impl Mappings {
    /// Reads them; the kernel looks at every page.
    ///
    /// # Errors
    /// [`SysError::NoProcess`] when it has ended, [`MemoryError::File`].
    pub fn read(pid: i32) -> Result<Self> {
        Ok(Self::of_smaps(&read_file(pid, &PathBuf::from(format!("/proc/{pid}/smaps")))?))
    }

    fn of_smaps(text: &[u8]) -> Self {
        let kept = lines(text).filter(|line| is_mapping(line) || line.starts_with(FLAGS));
        Self { text: kept.collect::<Vec<_>>().concat().into() }
    }

    /// The text, a smaps without figures.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.text
    }

    /// Tells whether the process, which is frozen, has the same mappings now. Their flags may differ.
    ///
    /// # Errors
    /// As [`Mappings::read`].
    pub fn is_current(&self, pid: i32) -> Result<bool> {
        let maps = read_file(pid, &PathBuf::from(format!("/proc/{pid}/maps")))?;
        Ok(lines(&self.text).filter(|line| is_mapping(line)).eq(lines(&maps)))
    }

    /// Tells whether every mapping is there in `now` with the same flags. There may be more: CRIU keeps a helper in a
    /// task that it dumps lazily.
    #[must_use]
    pub fn still_holds(&self, now: &Self) -> bool {
        let mut now = now.entries();
        self.entries().all(|known| {
            let same = now.find(|(mapping, _)| *mapping == known.0);
            same.is_some_and(|(_, flags)| told(flags).eq(told(known.1)))
        })
    }

    /// Tells whether a mapping that is in both has other flags in `now`.
    fn flags_differ(&self, now: &Self) -> bool {
        let before: HashMap<_, _> = self.entries().collect();
        now.entries()
            .any(|(mapping, flags)| before.get(mapping).is_some_and(|before| !told(before).eq(told(flags))))
    }

    /// Each mapping's line and its flags.
    fn entries(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut lines = lines(&self.text).peekable();
        std::iter::from_fn(move || {
            let mapping = lines.next()?;
            Some((mapping, lines.next_if(|line| line.starts_with(FLAGS)).unwrap_or_default()))
        })
    }
}

/// The flags that say something about the program, and not about who follows its memory.
fn told(flags: &[u8]) -> impl Iterator<Item = &[u8]> {
    let flags = flags.split(u8::is_ascii_whitespace).filter(|flag| !flag.is_empty());
    flags.filter(|flag| ![b"um", b"uw", b"ui", b"sd"].iter().any(|ours| ours == flag))
}

/// Each line with its end. A file's name may be any bytes, but for a newline, which the kernel writes as `\012`.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|&byte| byte == b'\n')
}

/// Whether a line of smaps begins a mapping: with an address, and no capital.
fn is_mapping(line: &[u8]) -> bool {
    line.first().is_some_and(|first| first.is_ascii_hexdigit() && !first.is_ascii_uppercase())
}

/// What was read ahead, by process; shared between who reads and who dumps.
#[derive(Debug, Clone, Default)]
pub struct Ahead {
    read: Arc<Mutex<Read>>,
}

#[derive(Debug, Default)]
struct Read {
    mappings: BTreeMap<i32, Reading>,
    /// Processes that change the flags of their mappings.
    changing: BTreeSet<i32>,
}

/// The mappings of a process, and what it took to read them.
#[derive(Debug, Clone)]
struct Reading {
    mappings: Mappings,
    took: Duration,
}

impl Reading {
    /// Reads them, unless the reading `before` took long and is as good.
    fn of(pid: i32, before: Option<&Self>) -> Result<Self> {
        if let Some(before) = before.filter(|before| before.took > OFTEN_MAX)
            && before.mappings.is_current(pid)?
        {
            return Ok(before.clone());
        }
        let begin = Instant::now();
        Ok(Self { mappings: Mappings::read(pid)?, took: begin.elapsed() })
    }
}

impl Ahead {
    /// Reads the mappings of the processes, which may run, in place of what was read before.
    ///
    /// A process that has ended is left out, as is one that cannot be read: whoever dumps it will say why.
    pub fn read(&self, processes: &[i32]) {
        let before = self.lock().mappings.clone();
        let read = |pid: &i32| match Reading::of(*pid, before.get(pid)) {
            Ok(reading) => Some((*pid, reading)),
            Err(MemoryError::Sys(SysError::NoProcess { .. })) => None,
            Err(error) => {
                log::debug!("mappings of process {pid} are not read ahead: {error}");
                None
            }
        };
        let now: BTreeMap<i32, Reading> = processes.iter().filter_map(read).collect();
        let mut known = self.lock();
        let changes = |(pid, reading): (&i32, &Reading)| {
            before
                .get(pid)
                .is_some_and(|before| before.mappings.flags_differ(&reading.mappings))
                .then_some(*pid)
        };
        let changing: Vec<i32> = now.iter().filter_map(changes).collect();
        known.changing.extend(changing);
        known.mappings = now;
    }

    /// What was read of a process, unless its mappings were seen to change their flags.
    #[must_use]
    pub fn of(&self, pid: i32) -> Option<Mappings> {
        let known = self.lock();
        let reading = known.mappings.get(&pid).filter(|_| !known.changing.contains(&pid))?;
        Some(reading.mappings.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Read> {
        // A panic elsewhere leaves what was read at most older than it could be.
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const FLAGS: &[u8] = b"VmFlags:";
/// What a program may be kept from mapping memory for again and again.
const OFTEN_MAX: Duration = Duration::from_millis(3);

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
            let path = format!("/proc/{}/exe", child.id());
            // Until it has become sleep and sleeps.
            while !std::fs::read_link(&path).unwrap().ends_with("sleep")
                || !std::fs::read_to_string(format!("/proc/{}/wchan", child.id()))
                    .unwrap()
                    .contains("nanosleep")
            {
                std::thread::yield_now();
            }
            Self(child)
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    const SMAPS: &str = "\
        55d0-55e0 rw-p 00000000 00:00 0                          [heap]\n\
        Size:                132 kB\n\
        Anonymous:             0 kB\n\
        VmFlags: rd wr mr mw me ac \n\
        7f00-7f10 r--s 00000000 00:01 9 /dev/Zero (deleted)\n\
        Rss:                   4 kB\n\
        VmFlags: rd mr me ms sd \n";

    #[test]
    fn figures_are_left_out_and_nothing_else() {
        let text = "\
            55d0-55e0 rw-p 00000000 00:00 0                          [heap]\n\
            VmFlags: rd wr mr mw me ac \n\
            7f00-7f10 r--s 00000000 00:01 9 /dev/Zero (deleted)\n\
            VmFlags: rd mr me ms sd \n";
        assert_eq!(Mappings::of_smaps(SMAPS.as_bytes()).as_bytes(), text.as_bytes());
    }

    #[test]
    fn what_the_program_changed_counts_and_who_follows_it_does_not() {
        let known = Mappings::of_smaps(SMAPS.as_bytes());
        let now = |from: &str, to: &str| Mappings::of_smaps(SMAPS.replacen(from, to, 1).as_bytes());
        assert!(known.still_holds(&known));
        assert!(known.still_holds(&now("me ac", "me ac uw")));
        assert!(known.still_holds(&now("ms sd", "ms")));
        assert!(known.still_holds(&now("7f00", "6000-6010 rwxs 00000000 00:01 7 /memfd:\n7f00")));
        assert!(!known.still_holds(&now("me ac", "me ac dc")), "a flag more");
        assert!(!known.still_holds(&now("me ac", "me")), "a flag less");
        assert!(!known.still_holds(&now("7f00-7f10", "7f00-7f20")), "another mapping");
        assert!(!known.still_holds(&now("VmFlags: rd wr mr mw me ac \n", "")), "no flags");
        assert!(!known.still_holds(&Mappings::of_smaps(b"")));
        assert!(known.flags_differ(&now("me ac", "me ac dc")));
        assert!(!known.flags_differ(&now("me ac", "me ac uw")));
        assert!(!known.flags_differ(&now("7f00-7f10", "7f00-7f20")), "another mapping");
    }

    #[test]
    fn a_reading_that_took_long_is_repeated_only_if_the_mappings_are_others() {
        let (sleeper, other) = (Sleeper::start(), Sleeper::start());
        let told = |took| Reading { mappings: Mappings::of_smaps(SMAPS.as_bytes()), took };
        let real = Reading { took: OFTEN_MAX * 2, ..Reading::of(sleeper.pid(), None).unwrap() };
        let again = |before: &Reading| Reading::of(sleeper.pid(), Some(before)).unwrap();
        assert_eq!(again(&real).took, real.took, "it was not read");
        assert_ne!(
            again(&Reading { took: Duration::ZERO, ..real.clone() }).took,
            Duration::ZERO,
            "it was read"
        );
        assert_eq!(again(&told(OFTEN_MAX * 2)).mappings, real.mappings, "other mappings");
        assert!(Reading::of(other.pid(), Some(&real)).unwrap().mappings.is_current(other.pid()).unwrap());
        Reading::of(i32::MAX, Some(&real)).unwrap_err();
    }

    #[test]
    fn the_mappings_of_a_process_that_does_nothing_stay_current() {
        let (sleeper, ahead) = (Sleeper::start(), Ahead::default());
        ahead.read(&[sleeper.pid(), i32::MAX]);
        let mappings = ahead.of(sleeper.pid()).unwrap();
        assert!(String::from_utf8_lossy(mappings.as_bytes()).contains("[stack]"));
        assert!(mappings.is_current(sleeper.pid()).unwrap());
        assert!(mappings.still_holds(&Mappings::read(sleeper.pid()).unwrap()));
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(!mappings.is_current(own).unwrap());
        assert_eq!(ahead.of(i32::MAX), None);
        ahead.read(&[]);
        assert_eq!(ahead.of(sleeper.pid()), None);
    }
}
