//! `godwit check`.

use std::process::ExitCode;

use clap::Args;
use godwit_container::checkpoint::machine::{Machine, look};

use crate::commands::{print_json_indented, print_line};
use crate::error::Result;

/// Say what this machine can do for checkpoints and migrations
///
/// The exit code is 0 when containers can be checkpointed and restored here, 1 otherwise.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let machine = look();
        if self.json {
            print_json_indented(&machine)?;
        } else {
            print_line(&text(&machine))?;
        }
        Ok(if machine.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn text(machine: &Machine) -> String {
    let yes = |answer: bool| if answer { "yes" } else { "no" };
    let criu = machine.criu.as_ref();
    let found = criu.map_or_else(|| "none".to_owned(), |criu| format!("{} ({})", criu.version, criu.path));
    let of_criu = |answer: Option<bool>| answer.map_or("unknown", yes);
    let mut lines = vec![
        format!("kernel                    {}", machine.kernel),
        format!("cgroups                   {}", machine.cgroups),
        format!("criu                      {found}"),
        format!("criu check                {}", of_criu(criu.map(|criu| criu.check))),
        format!("memory on demand          {}", of_criu(criu.map(|criu| criu.lazy_pages))),
        format!("tracking: userfaultfd     {}", yes(machine.userfaultfd_wp_async)),
        format!("tracking: soft-dirty      {}", of_criu(criu.map(|criu| criu.soft_dirty))),
        format!("other users' processes    {}", yes(machine.cap_sys_resource)),
    ];
    lines.extend(machine.problems.iter().map(|problem| format!("- {problem}")));
    lines.push(
        if machine.ok { "containers can be checkpointed and restored" } else { "not usable as it is" }
            .to_owned(),
    );
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_criu_says_what_is_missing() {
        let machine = Machine {
            kernel: "6.1.0".to_owned(),
            cgroups: "v2",
            criu: None,
            userfaultfd_wp_async: false,
            cap_sys_resource: true,
            ok: false,
            problems: vec!["criu not found".to_owned()],
        };
        let text = text(&machine);
        assert!(text.contains("\ncriu check                unknown\n"));
        assert!(text.ends_with("- criu not found\nnot usable as it is"));
    }
}
