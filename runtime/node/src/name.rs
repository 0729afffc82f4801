//! The names containerd accepts, checked before one from a peer becomes part of a path or a message.

use crate::error::NodeError;

/// The longest name containerd accepts, in bytes.
pub(crate) const LEN_MAX: usize = 76;

/// Checks a container id or namespace.
///
/// # Errors
/// [`NodeError::BadName`] unless it is letters and digits in groups parted by single separators.
pub(crate) fn check(what: &'static str, name: &str) -> Result<(), NodeError> {
    let group = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if name.len() <= LEN_MAX && name.split(['.', '_', '-']).all(group) {
        return Ok(());
    }
    Err(NodeError::BadName { what, name: name.chars().take(LEN_MAX).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_containerd_takes_are_taken_and_no_others() {
        for good in ["a", "web-1", "k8s.io", "A_b.c-9", "0"] {
            check("container id", good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "-a", "a-", "a--b", "a b", "ä", &"x".repeat(77)] {
            check("container id", bad).unwrap_err();
        }
    }
}
