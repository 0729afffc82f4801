//! Building container images from what this machine has, without a network.
//!
//! [`files`] collects the files of an image, [`oci`] writes them as an archive that `ctr image import` reads,
//! [`catalog`] has the images that tests use. Archives depend on nothing but the files' content, and are
//! kept in the cache directory.

pub mod catalog;
pub mod files;
pub mod oci;

pub use catalog::Image;
