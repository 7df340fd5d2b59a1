//! `cargo xtask build`: the release binaries. The kernel programs are built and embedded by mesh-agent's build script.

use std::path::PathBuf;

use anyhow::Result;

use crate::run::{cargo, root, step};

/// Builds, unless the user has named other binaries (`NODEMESH_AGENT`, `NODEMESH_MESHCTL`) to run.
pub fn unless_named() -> Result<()> {
    if std::env::var_os("NODEMESH_AGENT").is_some() && std::env::var_os("NODEMESH_MESHCTL").is_some() {
        return Ok(());
    }
    run()
}

pub fn run() -> Result<()> {
    // Cargo shows its own progress on a terminal.
    step("build mesh-agent and meshctl (release)", cargo(&["build", "--release", "--package", "mesh-agent", "--bins"]))
}

/// What the harness runs beside the agent.
pub fn peer() -> Result<()> {
    step("build the test peer", cargo(&["build", "--package", "mesh-tests", "--bins"]))
}

/// The same, static: all that there is in a pod's image.
pub fn static_peer() -> Result<PathBuf> {
    let args =
        ["rustc", "--release", "--package", "mesh-tests", "--bin", "mesh-peer", "--", "-Ctarget-feature=+crt-static"];
    step("build the test peer (static)", cargo(&args))?;
    Ok(folder().join("release/mesh-peer"))
}

/// Where cargo puts what it builds.
pub fn folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into)
}
