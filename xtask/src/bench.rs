//! `cargo xtask bench`: see what it costs.

use anyhow::{Result, bail};

#[derive(clap::Args)]
pub struct Arguments {
    /// Which benchmark
    name: String,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    bail!("there is no benchmark {:?} yet", arguments.name)
}
