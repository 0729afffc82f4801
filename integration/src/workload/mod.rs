//! A program that knows what its memory must hold: what the system tests move from host to host.
//!
//! Every page holds a function of its place and its version ([`page`]). Writers go on choosing pages at random,
//! check what is in them, and write the next version ([`memory`]). Asked to, the program stops its writers,
//! checks every page and says what it found ([`program`]); so a page that was lost, mixed up with another, or
//! taken back to an earlier version is found, whether it was rewritten since or not.
//!
//! The binary `workload` runs it; it also holds things that a checkpoint must ask for by name, a file lock and
//! a TCP connection, plays peers that do not keep to the migration protocol ([`peer`]), and is the memory that
//! benchmarks move ([`hold`]). Programs that treat memory in every other way are in [`storm`]; [`visit`] is a client.

pub mod hold;
pub mod memory;
pub mod page;
pub mod peer;
pub mod program;
pub mod storm;
pub mod visit;
