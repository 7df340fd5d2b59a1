//! `cargo xtask fuzz`: each parser of bytes from the network, against bytes that nobody would send, for a bounded time.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, root, step};

/// Coverage that guides libFuzzer, with flags that a stable compiler has; cargo-fuzz would want a nightly one.
const FLAGS: &str = "--cfg fuzzing -Cdebug-assertions -Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table";

/// Runs each target of tests/fuzz for `each`; one that finds something fails the run and leaves the input behind.
pub fn run(each: Duration) -> Result<()> {
    let folder = root().join("tests/fuzz");
    let targets = folder.join("fuzz_targets");
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
    // Named, so that build scripts are built without the flags.
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut build = cargo(&["build", "--release", "--target", &target, "--bins", "--manifest-path", &manifest]);
    build.env("RUSTFLAGS", FLAGS);
    step("build the fuzz targets", build)?;
    for name in &names {
        let corpus = folder.join("corpus").join(name);
        fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
        let mut fuzzer = Command::new(folder.join("target").join(&target).join("release").join(name));
        fuzzer.current_dir(&folder).args([&format!("-max_total_time={}", each.as_secs()), "-timeout=5"]).arg(corpus);
        if name == "manifests" {
            fuzzer.arg(root().join("tests/translate"));
        }
        step(&format!("fuzz {name} for {} s", each.as_secs()), fuzzer)?;
    }
    println!("{} targets held out {} s each", names.len(), each.as_secs());
    Ok(())
}
