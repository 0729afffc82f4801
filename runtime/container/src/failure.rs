//! Turns libcontainer's errors into one line that says what to do.
//!
//! Inside the container libcontainer reports with the outermost text alone ("failed to prepare rootfs"); what
//! it knew went to its trace. [`crate::trace`] keeps the last of that, so that the cause can be named here.

use libcontainer::error::LibcontainerError;

use crate::error::{ContainerError, causes};
use crate::trace;

/// The failure of a process that libcontainer was setting up.
pub(crate) fn process_failure(error: &LibcontainerError) -> ContainerError {
    let text = causes(error);
    if let Some(exec) = text.find("exec: \"") {
        // Our executor's own words, which callers parse, without the wrapping.
        return ContainerError::Process { detail: text[exec..].to_owned() };
    }
    let mut detail = strip(&text).to_owned();
    if let Some(cause) = trace::first_error().filter(|cause| !detail.contains(cause)) {
        detail.push_str(": ");
        detail.push_str(&cause);
    }
    if let Some(hint) = hint(&detail) {
        detail.push_str(" (");
        detail.push_str(hint);
        detail.push(')');
    }
    ContainerError::Process { detail }
}

/// Removes the words each layer of libcontainer puts in front.
fn strip(text: &str) -> &str {
    let mut rest = text;
    for prefix in [
        "failed to create container: ",
        "exec process failed with error error in executing process : ",
        "exec process failed with error ",
        "intermediate process error ",
    ] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    rest
}

fn hint(detail: &str) -> Option<&'static str> {
    if detail.contains("oom_score_adj") {
        Some("lowering it needs CAP_SYS_RESOURCE")
    } else if detail.contains("rlimit") {
        Some("raising a hard limit needs CAP_SYS_RESOURCE")
    } else if detail.contains("seccomp") {
        Some(
            "without noNewPrivileges loading a profile needs CAP_SYS_ADMIN; leave the field out rather than false",
        )
    } else {
        None
    }
}
