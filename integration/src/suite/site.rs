//! A node as a case uses it: its ctr, its containerd's calls, its events, and names nobody else uses.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::container::Plan;
use super::events::EventLog;
use super::job::{Done, Job};
use super::lane::Lane;
use super::rpc::Rpc;
use super::trouble::Trouble;
use crate::bed::Bed;
use crate::image::{Image, catalog};
use crate::node::{Node, NodeName};
use crate::process::Daemon;
use crate::tools;

/// A bed of a lane, with its two nodes ready to be used.
#[derive(Debug)]
pub struct Stage {
    /// The lane.
    pub lane: Lane,
    /// Node a.
    pub a: Site,
    /// Node b.
    pub b: Site,
    bed: Arc<Bed>,
}

impl Stage {
    /// Makes the sites of a bed.
    ///
    /// # Errors
    /// When a node does not answer.
    pub fn new(lane: Lane, bed: Bed) -> Result<Self, Trouble> {
        let bed = Arc::new(bed);
        let site = |name| Site::new(lane, Arc::clone(&bed), name);
        Ok(Self { lane, a: site(NodeName::A)?, b: site(NodeName::B)?, bed })
    }

    /// Returns its bed.
    #[must_use]
    pub fn bed(&self) -> &Bed {
        &self.bed
    }

    /// Removes the bed.
    ///
    /// # Errors
    /// As [`Bed::down`].
    pub fn down(self) -> Result<(), Trouble> {
        let Self { a, b, bed, .. } = self;
        drop((a, b));
        match Arc::try_unwrap(bed) {
            Ok(bed) if !bed.options().keep => Ok(bed.down()?),
            _ => Ok(()),
        }
    }
}

/// A node in the hands of cases.
#[derive(Debug)]
pub struct Site {
    /// The lane it belongs to.
    pub lane: Lane,
    /// What its containerd has said since the bed was made.
    pub events: EventLog,
    /// The calls that ctr has no command for.
    pub rpc: Rpc,
    bed: Arc<Bed>,
    name: NodeName,
    serial: AtomicU32,
}

impl Site {
    fn new(lane: Lane, bed: Arc<Bed>, name: NodeName) -> Result<Self, Trouble> {
        let node = bed.node(name);
        let events = EventLog::follow(node)?;
        let rpc = Rpc::connect(node)?;
        Ok(Self { lane, events, rpc, bed, name, serial: AtomicU32::new(1) })
    }

    /// Returns the node.
    #[must_use]
    pub fn node(&self) -> &Node {
        self.bed.node(self.name)
    }

    /// Returns an id that begins with `stem` and that no other container of the lane has, on either node.
    #[must_use]
    pub fn id(&self, stem: &str) -> String {
        format!("{stem}-{}{}", self.name, self.serial.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs ctr to its end, which must be a good one, and returns what it wrote to standard output.
    ///
    /// # Errors
    /// [`Trouble::Command`] when it fails, [`Trouble::Late`] when it hangs.
    pub fn ctr(&self, args: &[&str]) -> Result<String, Trouble> {
        self.try_ctr(args)?.ok()
    }

    /// Runs ctr to its end, whatever that is.
    ///
    /// # Errors
    /// [`Trouble::Late`] when it hangs.
    pub fn try_ctr(&self, args: &[&str]) -> Result<Done, Trouble> {
        self.start_ctr(args)?.wait()
    }

    /// Starts ctr.
    ///
    /// # Errors
    /// [`Trouble::Io`] when it cannot be started.
    pub fn start_ctr(&self, args: &[&str]) -> Result<Job, Trouble> {
        Job::start(self.node().ctr_command(args))
    }

    /// Starts ctr on a terminal of `rows` by `columns`, which is what `ctr run --tty` needs. The job's standard
    /// input is what is typed, its standard output what the terminal shows.
    ///
    /// # Errors
    /// [`Trouble::Io`] when it cannot be started.
    pub fn start_ctr_on_terminal(&self, rows: u16, columns: u16, args: &[&str]) -> Result<Job, Trouble> {
        let words = args.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect::<Vec<_>>();
        let line = format!("stty rows {rows} cols {columns}; exec ctr {}", words.join(" "));
        Job::start(self.node().command([
            "script",
            "--quiet",
            "--flush",
            "--return",
            "--command",
            &line,
            "/dev/null",
        ]))
    }

    /// Runs a command in the node to its end, whatever that is.
    ///
    /// # Errors
    /// [`Trouble::Late`] when it hangs.
    pub fn command(&self, argv: &[&str]) -> Result<Done, Trouble> {
        Job::start(self.node().command(argv))?.wait()
    }

    /// Finds a process of the node by its command line, which must have all of `words`, the first of them as the
    /// beginning of the program's name.
    ///
    /// Only the node's own processes are looked at, not those of containers, and in one hierarchy: what is looked for
    /// may live for a tenth of a second.
    #[must_use]
    pub fn process(&self, words: &[&str]) -> Option<Daemon> {
        let list = self.node().cgroups().init_files().into_iter().next()?;
        let pids = fs::read_to_string(list).ok()?;
        pids.lines()
            .filter_map(|pid| pid.parse().ok())
            .find(|pid| has_words(*pid, words))
            .and_then(Daemon::of)
    }

    /// Begins to describe a container of busybox.
    #[must_use]
    pub fn plan(&self, stem: &str) -> Plan<'_> {
        Plan::new(self, self.id(stem))
    }

    /// Returns a directory of the node's `/run` for a case's files: its path in the node, and from outside.
    ///
    /// # Errors
    /// [`Trouble::Io`] when it cannot be made.
    pub fn scratch(&self, stem: &str) -> Result<(String, PathBuf), Trouble> {
        let inside = format!("/run/scratch/{}", self.id(stem));
        let outside = self.node().path(&inside);
        fs::create_dir_all(&outside).map_err(Trouble::io("make", &outside))?;
        Ok((inside, outside))
    }

    /// Imports an image of the self-checking program (see [`crate::workload`]), called `workload`.
    ///
    /// # Errors
    /// When it cannot be built or imported.
    pub fn import_workload(&self) -> Result<(), Trouble> {
        let image = Image::of_program("workload", &tools::built()?.join("workload"))?;
        Ok(self.node().import(&image.build()?)?)
    }

    /// Builds images out of the catalogue and imports them.
    ///
    /// # Errors
    /// When one cannot be built or imported.
    pub fn import(&self, images: &[&str]) -> Result<(), Trouble> {
        for image in images {
            self.node().import(&catalog::by_name(image)?.build()?)?;
        }
        Ok(())
    }
}

fn has_words(pid: i32, words: &[&str]) -> bool {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let parts: Vec<&str> = line.split('\0').collect();
    let Some((first, rest)) = words.split_first() else { return false };
    let program = parts.first().and_then(|program| program.rsplit('/').next());
    program.is_some_and(|program| program.starts_with(first)) && rest.iter().all(|word| parts.contains(word))
}
