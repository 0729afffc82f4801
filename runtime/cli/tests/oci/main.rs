//! The OCI verbs over a real bundle, the same suite against runc and against godwit.
//!
//! runc is the oracle: a test that fails there is wrong. Every test has a state root, a bundle (busybox) and a
//! cgroup of its own. Needs root, a static busybox and, for the oracle, runc; prints `SKIP: ..` and passes
//! where one is missing (fails instead when `SKIP_IS_FAILURE` is 1).

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod bed;

mod exec;
mod lifecycle;
mod limits;
mod own;

/// Makes of each function `fn(&Bed)` two tests, `<name>::runc` and `<name>::godwit`.
macro_rules! against_both {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[test]
            fn runc() {
                crate::bed::Bed::with(crate::bed::Runtime::Runc, super::super::$name);
            }

            #[test]
            fn godwit() {
                crate::bed::Bed::with(crate::bed::Runtime::Godwit, super::super::$name);
            }
        }
    )+ };
}
pub(crate) use against_both;
