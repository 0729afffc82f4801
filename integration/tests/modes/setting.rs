//! Settings of the machine (sysctl) that a case needs, for as long as it needs them.

use std::fs::{self, File};
use std::io;

use godwit_integration::tools;
use nix::fcntl::{Flock, FlockArg};

/// A setting that was raised, given back on drop. Cases of several lanes may run at the same time: whoever wants the same
/// setting waits.
#[derive(Debug)]
pub(super) struct Setting {
    path: String,
    before: u64,
    _turn: Flock<File>,
}

impl Setting {
    /// Raises the setting `name`, as sysctl(8) calls it, to `least`, unless it is there; `Err` with the reason when it does
    /// not come to that.
    pub(super) fn at_least(name: &str, least: u64) -> Result<Self, String> {
        let turn = turn(name).map_err(|error| format!("{name} cannot be locked: {error}"))?;
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let read =
            |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let before = read(&path).ok_or_else(|| format!("{path} cannot be read"))?;
        let setting = Self { path, before, _turn: turn };
        if before < least {
            fs::write(&setting.path, least.to_string())
                .map_err(|error| format!("{}: {error}", setting.path))?;
        }
        match read(&setting.path) {
            Some(now) if now >= least => Ok(setting),
            now => Err(format!("{name} was to become {least}, and is {now:?}")),
        }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // What was raised a moment ago can be lowered.
        drop(fs::write(&self.path, self.before.to_string()));
    }
}

/// Waits until nobody else has raised it.
fn turn(name: &str) -> io::Result<Flock<File>> {
    let dir = tools::cache().join("locks");
    fs::create_dir_all(&dir)?;
    let file = File::create(dir.join(name))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}
