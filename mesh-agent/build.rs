//! Builds the kernel programs (`mesh-ebpf`) and puts the object where `redirect/load.rs` embeds it.

#[path = "../mesh-ebpf/toolchain.rs"]
mod toolchain;

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context as _, Result, anyhow};

fn main() -> Result<()> {
    build_kernel_programs()
}

fn build_kernel_programs() -> Result<()> {
    for path in ["src", "Cargo.toml", "Cargo.lock", "toolchain.rs"] {
        println!("cargo::rerun-if-changed=../mesh-ebpf/{path}");
    }
    for path in ["src", "Cargo.toml"] {
        println!("cargo::rerun-if-changed=../mesh-common/{path}");
    }
    let variable =
        |name: &str| env::var_os(name).map(PathBuf::from).with_context(|| format!("cargo did not set {name}"));
    let out = variable("OUT_DIR")?;
    let mesh_ebpf = variable("CARGO_MANIFEST_DIR")?.join("../mesh-ebpf");
    let (object, _) =
        toolchain::build(&variable("CARGO")?, &mesh_ebpf, &ebpf_target_dir(&out)).map_err(|sentence| {
            println!("cargo::warning={}", sentence.lines().next().unwrap_or_default());
            anyhow!(sentence)
        })?;
    fs::copy(&object, out.join("mesh-ebpf.o")).with_context(|| format!("cannot copy {}", object.display()))?;
    Ok(())
}

/// `<target>/ebpf`: one for all profiles, so that `core` is compiled once.
fn ebpf_target_dir(out: &Path) -> PathBuf {
    let target = out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    target.map_or_else(|| out.join("ebpf"), |target| target.join("ebpf"))
}
