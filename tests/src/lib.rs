//! The test mesh.
