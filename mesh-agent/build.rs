//! Builds the kernel programs (`mesh-ebpf`) and puts the object where `redirect/load.rs` embeds it; lists the files of
//! the Helm chart, which `meshctl` embeds.

#[path = "../mesh-ebpf/toolchain.rs"]
mod toolchain;

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context as _, Result, anyhow};

fn main() -> Result<()> {
    build_kernel_programs()?;
    list_chart()
}

/// `chart.rs`: path and text of each file of the chart, in the order of their paths.
fn list_chart() -> Result<()> {
    let chart = Path::new(&env::var_os("CARGO_MANIFEST_DIR").context("cargo did not set CARGO_MANIFEST_DIR")?)
        .join("../deploy/helm/nodemesh");
    println!("cargo::rerun-if-changed={}", chart.display());
    let mut files = Vec::new();
    for folder in ["", "crds", "profiles", "templates"] {
        let path = chart.join(folder);
        for entry in fs::read_dir(&path).with_context(|| format!("cannot read {}", path.display()))? {
            let path = entry?.path();
            if path.is_file() {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut list = String::from("&[\n");
    for file in files {
        let name = file.strip_prefix(&chart).unwrap_or(&file);
        list += &format!("    ({:?}, include_str!({:?})),\n", name.display().to_string(), file.display().to_string());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo did not set OUT_DIR")?);
    fs::write(out.join("chart.rs"), list + "]\n").context("cannot write the list of the chart's files")
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
