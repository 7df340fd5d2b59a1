//! `cargo xtask image`: the one image that agent, controller and CNI installer run, and what is in it.
//!
//! In come the release programs; out come an OCI archive and its SBOM below `target/image`. No container engine is
//! needed, and no distribution's image below it: the programs, their loader and their libraries are all there is. It has
//! no shell, and no list of certificate authorities: the one it needs comes with the pod's service account.

pub mod oci;
mod sbom;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use self::oci::{File, Image};
use crate::run::{cargo, root, step};

pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Nobody can own this registry: an image that was not brought onto the node is not found.
const REPOSITORY: &str = "nodemesh.invalid/nodemesh";

#[derive(clap::Args)]
pub struct Arguments {
    /// What the image is called [default: nodemesh.invalid/nodemesh:VERSION]
    #[arg(long)]
    name: Option<String>,
    /// Where the archive goes [default: target/image/nodemesh-VERSION.tar]; the SBOM goes beside it
    #[arg(long)]
    output: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let name = arguments.name.clone().unwrap_or_else(|| format!("{REPOSITORY}:{VERSION}"));
    let archive = arguments.output.clone().unwrap_or_else(|| folder().join(format!("nodemesh-{VERSION}.tar")));
    build(&name, &archive).map(drop)
}

fn folder() -> PathBuf {
    root().join("target/image")
}

/// Builds the image called `name` as an archive at `archive`; the answer is the SBOM's path.
pub fn build(name: &str, archive: &Path) -> Result<PathBuf> {
    let programs = programs()?;
    let mut files = Vec::new();
    let mut libraries = BTreeMap::new();
    for program in &programs {
        let file = program.file_name().and_then(|n| n.to_str()).context("a program has a name")?;
        libraries.extend(needed(program)?);
        files.push(File::new(format!("usr/bin/{file}"), 0o755, stripped(program)?));
    }
    for (path, real) in &libraries {
        let content = fs::read(real).with_context(|| format!("cannot read {}", real.display()))?;
        files.push(File::new(path.trim_start_matches('/'), 0o755, content));
    }
    let bill = sbom::bill(name, &files, &libraries)?;
    let packed = oci::archive(Image { name, files, entrypoint: "/usr/bin/mesh-agent" })?;
    let beside = archive.with_extension("spdx.json");
    write(archive, &packed)?;
    write(&beside, bill.as_bytes())?;
    println!("{name}: {} MB in {}", packed.len() / 1_000_000, archive.display());
    println!("  its parts are listed in {}", beside.display());
    Ok(beside)
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

/// Builds the programs of the image.
fn programs() -> Result<Vec<PathBuf>> {
    let release = root().join("target/release");
    let args = ["build", "--release", "--package", "mesh-agent", "--bin", "mesh-agent", "--bin", "meshctl"];
    step("build mesh-agent and meshctl (release)", cargo(&args))?;
    let mut programs = vec![release.join("mesh-agent"), release.join("meshctl")];
    if root().join("mesh-agent/src/bin/mesh-cni.rs").is_file() {
        // The container runtime starts it in the node's own file system, whose libraries may be of another kind.
        let args = ["rustc", "--release", "--package", "mesh-agent", "--bin", "mesh-cni"];
        step(
            "build mesh-cni (release, static)",
            cargo(&[&args[..], &["--", "-Ctarget-feature=+crt-static"]].concat()),
        )?;
        let cni = release.join("mesh-cni");
        if !needed(&cni)?.is_empty() {
            bail!("{} needs shared libraries: a static libc is missing (Debian's libc6-dev has it)", cni.display());
        }
        programs.push(cni);
    }
    Ok(programs)
}

/// The loader and the shared libraries that a program asks for: the paths where it looks for them, and the files there.
fn needed(program: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd, which comes with the C library")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let mut found = BTreeMap::new();
    for path in libraries(&said).with_context(|| program.display().to_string())? {
        let real = fs::canonicalize(&path).with_context(|| format!("cannot find the library {path}"))?;
        found.insert(path, real);
    }
    Ok(found)
}

/// Of what `ldd` says. The kernel's own library has no file; a static program has none at all.
fn libraries(said: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for line in said.lines().map(str::trim) {
        if line.contains("not found") {
            bail!("it needs a library that is missing here: {line}");
        }
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        if path.starts_with('/') {
            found.push(path.split(" (").next().unwrap_or(path).to_owned());
        }
    }
    Ok(found)
}

/// The program without what only a debugger reads. Symbols stay: a panic names its functions.
pub fn stripped(program: &Path) -> Result<Vec<u8>> {
    let copy = folder().join(format!("{}.stripped", program.file_name().and_then(|n| n.to_str()).unwrap_or_default()));
    fs::create_dir_all(folder()).with_context(|| format!("cannot make {}", folder().display()))?;
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("--enable-deterministic-archives").arg("-o").arg(&copy).arg(program);
    let status = strip.status().context("cannot run strip, which comes with binutils: `cargo xtask setup`")?;
    if !status.success() {
        bail!("strip cannot read {} ({status})", program.display());
    }
    let content = fs::read(&copy).with_context(|| format!("cannot read {}", copy.display()))?;
    fs::remove_file(&copy).with_context(|| format!("cannot remove {}", copy.display()))?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_file() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibgcc_s.so.1 => /lib/x/libgcc_s.so.1 (0x00007f)\n\
                    \tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x/libgcc_s.so.1", "/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(said).unwrap(), expected);
        assert!(libraries("\tstatically linked\n").unwrap().is_empty());
        assert!(libraries("\tlibz.so.1 => not found\n").is_err(), "the image would not start");
    }
}
