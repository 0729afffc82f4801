//! Saying that a test did not run.

/// Says on standard output that a test does not run here, and why.
///
/// `hack/test` reads these lines and fails on every reason that is not in its list of expected ones, so
/// that a machine on which half of the tests silently do nothing is not taken for a green one.
pub fn skip(reason: &str) {
    println!("SKIP: {reason}");
}
