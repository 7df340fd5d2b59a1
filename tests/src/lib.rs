//! The test mesh.

pub mod kernel_fixture;
