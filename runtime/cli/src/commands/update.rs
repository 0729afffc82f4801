//! `godwit update`.

use std::io::{Read, stdin};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use godwit_container::update::update;
use godwit_container::{ContainerError, Store};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use crate::error::{CliError, Result};

/// Change the limits of a running container
///
/// What is left out, or zero, stays as it is; -1 lifts a limit.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Name of the container
    id: String,
    /// File with the limits as in config.json's linux.resources, or - for stdin; then no other option counts
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of its block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Length of the period that --cpu-quota is per, in µs
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU time per period, in µs
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// Weight of its CPU time against other containers'
    #[arg(long, visible_alias = "cpu-shares", value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// Length of the realtime period, in µs (cgroup version 1)
    #[arg(long, value_name = "US")]
    cpu_rt_period: Option<u64>,
    /// Realtime CPU time per period, in µs (cgroup version 1)
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,
    /// CPUs it may use, such as 0-2,7
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes it may use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Memory limit in bytes, or with a unit such as 64M or 1.5g
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = parse_bytes)]
    memory: Option<i64>,
    /// Memory it should get back to under pressure, in bytes or with a unit
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = parse_bytes)]
    memory_reservation: Option<i64>,
    /// Limit of memory and swap together, in bytes or with a unit
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = parse_bytes)]
    memory_swap: Option<i64>,
    /// Number of processes it may have
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Refused: godwit does not change Intel RDT schemas
    #[arg(long, value_name = "SCHEMA", hide = true)]
    l3_cache_schema: Option<String>,
    /// Refused: godwit does not change Intel RDT schemas
    #[arg(long, value_name = "SCHEMA", hide = true)]
    mem_bw_schema: Option<String>,
}

impl Update {
    pub(crate) fn run(&self, store: &Store) -> Result<ExitCode> {
        let stored = store.open(&self.id)?;
        let resources = match &self.resources {
            Some(file) => read(file)?,
            None => self.wanted()?,
        };
        update(&stored, resources)?;
        Ok(ExitCode::SUCCESS)
    }

    fn wanted(&self) -> Result<LinuxResources> {
        for (what, value) in
            [("--l3-cache-schema", &self.l3_cache_schema), ("--mem-bw-schema", &self.mem_bw_schema)]
        {
            if value.as_ref().is_some_and(|value| !value.is_empty()) {
                let reason = "Intel RDT is set when a container is created and cannot be updated".to_owned();
                return Err(ContainerError::Unsupported { what, reason }.into());
            }
        }
        let mut cpu = LinuxCpu::default();
        cpu.set_shares(self.cpu_share)
            .set_quota(self.cpu_quota)
            .set_period(self.cpu_period)
            .set_realtime_runtime(self.cpu_rt_runtime)
            .set_realtime_period(self.cpu_rt_period)
            .set_cpus(self.cpuset_cpus.clone())
            .set_mems(self.cpuset_mems.clone());
        let mut memory = LinuxMemory::default();
        memory.set_limit(self.memory).set_reservation(self.memory_reservation).set_swap(self.memory_swap);
        let mut resources = LinuxResources::default();
        resources.set_devices(None).set_cpu(Some(cpu)).set_memory(Some(memory));
        if let Some(limit) = self.pids_limit {
            let mut pids = LinuxPids::default();
            pids.set_limit(limit);
            resources.set_pids(Some(pids));
        }
        if let Some(weight) = self.blkio_weight.filter(|weight| *weight != 0) {
            let mut io = LinuxBlockIo::default();
            io.set_weight(Some(weight));
            resources.set_block_io(Some(io));
        }
        Ok(resources)
    }
}

fn read(file: &Path) -> Result<LinuxResources> {
    let (what, text) = if file == Path::new("-") {
        let mut text = String::new();
        stdin().read_to_string(&mut text).map_err(CliError::io("stdin"))?;
        ("stdin".to_owned(), text)
    } else {
        let what = file.display().to_string();
        let text = std::fs::read_to_string(file).map_err(CliError::io(what.as_str()))?;
        (what, text)
    };
    serde_json::from_str(&text).map_err(CliError::json(what))
}

/// Reads a size as runc takes it: digits, perhaps with a fraction, and a unit of powers of 1024.
fn parse_bytes(text: &str) -> std::result::Result<i64, String> {
    let unit_at = text.find(|c: char| !matches!(c, '0'..='9' | '.' | '-')).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit = unit.trim_start().to_ascii_lowercase();
    let shift = match unit.strip_suffix('b').unwrap_or(&unit).trim_end_matches('i') {
        "" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        "p" => Some(50),
        _ => None,
    };
    let bytes = || {
        if let Ok(whole) = number.parse::<i64>()
            && whole < 0
        {
            // No size but a word: -1 lifts the limit.
            return shift.filter(|shift| *shift == 0).map(|_| whole);
        }
        let unit_bytes = 1_i128 << shift?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = u32::try_from(fraction.len()).ok().filter(|digits| *digits <= FRACTION_DIGITS_MAX)?;
        let tens = 10_i128.pow(digits);
        let number = format!("{whole}{fraction}").parse::<i64>().ok()?;
        i64::try_from(i128::from(number) * unit_bytes / tens).ok()
    };
    bytes().ok_or_else(|| "expected a number of bytes, perhaps with a unit: 67108864, 64M, 1.5g".to_owned())
}

const FRACTION_DIGITS_MAX: u32 = 9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_runcs_units() {
        for (text, bytes) in [
            ("0", 0),
            ("67108864", 67_108_864),
            ("64m", 67_108_864),
            ("64M", 67_108_864),
            ("64 MiB", 67_108_864),
            ("64mb", 67_108_864),
            ("1.5g", 1_610_612_736),
            ("7b", 7),
            ("-1", -1),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "m", "1x", "1.2.3", "-1m", "--1", "9999999999p", "1.00000000001g"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
