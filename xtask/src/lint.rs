//! `cargo xtask lint`: what a machine can check, so that no reviewer has to.

use std::process::Command;

use anyhow::{Result, bail};

use crate::run::{Tally, cargo, root, step};
use crate::{setup, tidy};

pub fn run() -> Result<()> {
    let tally = tally();
    if tally.failed > 0 {
        bail!("{} of {} checks failed", tally.failed, tally.passed + tally.failed);
    }
    println!("all {} checks passed", tally.passed);
    Ok(())
}

type Check = fn() -> Result<()>;

/// Runs every check, also after one has failed.
pub fn tally() -> Tally {
    let checks: [(&str, Check); 6] = [
        ("format", || step("cargo fmt --check", cargo(&["fmt", "--all", "--check"]))),
        ("format of the kernel programs", || step("cargo fmt --check (mesh-ebpf)", kernel(&["fmt", "--check"]))),
        ("clippy", clippy),
        ("clippy of the kernel programs", kernel_clippy),
        ("licences, bans and sources", deny),
        ("house rules", house_rules),
    ];
    let mut tally = Tally::default();
    for (name, check) in checks {
        match check() {
            Ok(()) => tally.passed += 1,
            Err(e) => {
                eprintln!("error: {name}: {e:#}");
                tally.failed += 1;
            }
        }
    }
    tally
}

fn clippy() -> Result<()> {
    let args = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    step("cargo clippy", cargo(&args))
}

/// Cargo in `mesh-ebpf`, which is a workspace of its own.
fn kernel(args: &[&str]) -> Command {
    let mut command = cargo(args);
    command.current_dir(root().join("mesh-ebpf"));
    command
}

/// The kernel programs are checked as if for this machine: their own target has no clippy. No code comes out of it.
fn kernel_clippy() -> Result<()> {
    let mut command = kernel(&["clippy", "--quiet", "--", "--deny", "warnings"]);
    // The machine's target unwinds by default, which a program without the standard library cannot.
    command.env("CARGO_ENCODED_RUSTFLAGS", "-Cpanic=abort");
    command.env("CARGO_TARGET_DIR", root().join("target/ebpf-lint"));
    step("cargo clippy (mesh-ebpf)", command)
}

fn deny() -> Result<()> {
    if !setup::has_cargo_deny() {
        bail!("cargo-deny is missing: run `cargo xtask setup`");
    }
    // Advisories are fetched from the internet, which a build machine may not have: run `cargo deny check` where it is.
    step("cargo deny", cargo(&["deny", "--log-level", "error", "check", "bans", "licenses", "sources"]))
}

fn house_rules() -> Result<()> {
    println!("==> house rules");
    let broken = tidy::check(&root())?;
    for rule in &broken {
        eprintln!("{rule}");
    }
    if !broken.is_empty() {
        bail!("{} places break the house rules (xtask/src/tidy has them)", broken.len());
    }
    Ok(())
}
