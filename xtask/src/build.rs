//! `cargo xtask build`: the release binaries. The kernel programs are built and embedded by mesh-agent's build script.

use anyhow::Result;

use crate::run::{cargo, step};

pub fn run() -> Result<()> {
    // Cargo shows its own progress on a terminal.
    step("build mesh-agent and meshctl (release)", cargo(&["build", "--release", "--package", "mesh-agent", "--bins"]))
}

/// What the harness runs beside the agent.
pub fn peer() -> Result<()> {
    step("build the test peer", cargo(&["build", "--package", "mesh-tests", "--bins"]))
}
