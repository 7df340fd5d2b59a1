//! `cargo xtask fuzz`: each parser of bytes from the network, against bytes that nobody would send, for a bounded time.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, root, step};

/// A target is a program in tests/fuzz that takes the seconds it may run, and ends with a failure where it found one.
pub fn run(each: Duration) -> Result<()> {
    let folder = root().join("tests/fuzz");
    let targets = folder.join("src/bin");
    let entries =
        fs::read_dir(&targets).with_context(|| format!("there are no fuzz targets in {}", targets.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    if names.is_empty() {
        bail!("there are no fuzz targets in {}", targets.display());
    }
    let manifest = folder.join("Cargo.toml").display().to_string();
    for name in &names {
        let seconds = each.as_secs().to_string();
        let args = ["run", "--release", "--quiet", "--manifest-path", &manifest, "--bin", name, "--", &seconds];
        step(&format!("fuzz {name} for {seconds} s"), cargo(&args))?;
    }
    println!("{} targets held out {} s each", names.len(), each.as_secs());
    Ok(())
}
