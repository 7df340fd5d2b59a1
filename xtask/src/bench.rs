//! `cargo xtask bench`: what it costs, beside no mesh and beside sidecars. Builds the release binaries and `mesh-bench`, which
//! does the rest.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

use crate::cluster::scale;
use crate::run::{cargo, is_root, root, step};
use crate::setup;

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Which benchmark (l4, scale), then its options: `cargo xtask bench l4 --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    arguments: Vec<OsString>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.arguments[0] == "scale" {
        return run_scale(&arguments.arguments);
    }
    let asks = arguments.arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    if !asks {
        if !is_root() {
            bail!("the benchmark makes network namespaces: run as root");
        }
        setup::check()?;
        crate::build::run()?;
    }
    step(
        "build mesh-bench (release)",
        cargo(&["build", "--release", "--package", "mesh-tests", "--bin", "mesh-bench"]),
    )?;
    let release = target().join("release");
    let mut bench = Command::new(release.join("mesh-bench"));
    // The newest build would be taken otherwise, which may be one for debugging.
    for (variable, name) in [("NODEMESH_AGENT", "mesh-agent"), ("NODEMESH_MESHCTL", "meshctl")] {
        if std::env::var_os(variable).is_none() {
            bench.env(variable, release.join(name));
        }
    }
    let status = bench.args(&arguments.arguments).status().context("cannot run mesh-bench")?;
    if !status.success() {
        bail!("mesh-bench ended with {status}");
    }
    Ok(())
}

/// What an agent needs in a large cluster. Needs no mesh: a real API server is part of it.
fn run_scale(arguments: &[OsString]) -> Result<()> {
    let arguments = scale::Arguments::parse_from(arguments);
    if arguments.builds() {
        crate::build::run()?;
    }
    scale::run(arguments, &target().join("release/mesh-agent"))
}

fn target() -> std::path::PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into)
}
