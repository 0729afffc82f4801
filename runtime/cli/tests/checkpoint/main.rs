//! Checkpoint and restore over real bundles and a real CRIU.
//!
//! Every test has a state root, bundles (busybox) and cgroups of its own, and checks at its end that no state
//! and no mount is left. Needs root, a static busybox, criu, and for the interchange runc; prints `SKIP: ..`
//! and passes where one is missing (fails instead when `SKIP_IS_FAILURE` is set).

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bed;

mod failure;
mod hold;
mod interchange;
mod lazy;
mod preflight;
mod round_trip;
mod terminal;
