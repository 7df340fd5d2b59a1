//! Which tool chain builds the kernel programs, and how. Included by `mesh-agent/build.rs` and by `xtask` with `#[path]`,
//! so it stands alone: the standard library and nothing else. In: this machine. Out: a [`Toolchain`], or one sentence.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The kernel's target, little-endian.
pub const TARGET: &str = "bpfel-unknown-none";

/// Debian's compiler, which comes with the source of `core` (package rust-web-src). No rustup needed.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// A compiler with the source of `core`, which has to be built for [`TARGET`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Toolchain {
    /// `rustup run nightly`, component rust-src.
    Nightly,
    /// The active tool chain, component rust-src; unstable flags by RUSTC_BOOTSTRAP.
    Active,
    /// Debian's rustc with rust-web-src, driven by the active cargo.
    Debian,
}

impl Toolchain {
    /// The first that is there.
    pub fn find() -> Result<Self, String> {
        let candidates = [
            (Self::Nightly, sysroot(Command::new("rustup").args(["run", "nightly", "rustc"]))),
            (Self::Active, sysroot(&mut Command::new("rustc"))),
            (Self::Debian, sysroot(&mut Command::new(DEBIAN_RUSTC))),
        ];
        for (toolchain, root) in candidates {
            if root.is_some_and(|root| has_core_source(&root)) {
                return Ok(toolchain);
            }
        }
        Err("no Rust tool chain here has the source of `core` for the kernel programs: run `cargo xtask setup`".into())
    }

    pub fn describe(&self) -> &'static str {
        match self {
            Self::Nightly => "rustup's nightly with rust-src",
            Self::Active => "the active tool chain with rust-src",
            Self::Debian => "Debian's rustc with rust-web-src",
        }
    }

    /// The build of `mesh-ebpf`. `cargo` is the cargo to use where the tool chain has none of its own.
    fn build_command(&self, cargo: &Path, mesh_ebpf: &Path, target_dir: &Path) -> Command {
        let mut command = match self {
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            Self::Active | Self::Debian => Command::new(cargo),
        };
        clear_outer_cargo(&mut command);
        match self {
            Self::Nightly => {}
            Self::Active => {
                command.env("RUSTC_BOOTSTRAP", "1");
            }
            Self::Debian => {
                command.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", DEBIAN_RUSTC);
            }
        }
        command
            .current_dir(mesh_ebpf)
            .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", TARGET, "--target-dir"])
            .arg(target_dir)
            // The encoded form wins over every config file. BTF is what socket storage maps are made from.
            .env("CARGO_ENCODED_RUSTFLAGS", "-Cdebuginfo=2\u{1f}-Clink-arg=--btf");
        command
    }
}

/// Builds the kernel programs. Returns the object's path and what built it.
pub fn build(cargo: &Path, mesh_ebpf: &Path, target_dir: &Path) -> Result<(PathBuf, Toolchain), String> {
    if Command::new("bpf-linker").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        return Err("bpf-linker is not on PATH, and the kernel programs need it: run `cargo xtask setup`".into());
    }
    let toolchain = Toolchain::find()?;
    let output = toolchain
        .build_command(cargo, mesh_ebpf, target_dir)
        .output()
        .map_err(|error| format!("cannot start cargo for the kernel programs ({}): {error}", toolchain.describe()))?;
    if !output.status.success() {
        return Err(format!(
            "the kernel programs do not build with {}:\n{}",
            toolchain.describe(),
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok((target_dir.join(TARGET).join("release").join("mesh-ebpf"), toolchain))
}

/// The tool chain's root, by asking its rustc.
fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    clear_outer_cargo(rustc);
    let output = rustc.args(["--print", "sysroot"]).stderr(Stdio::null()).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !path.trim().is_empty()).then(|| PathBuf::from(path.trim()))
}

fn has_core_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// Settings of the cargo around us are for another compiler and another target. Registries and proxies stay.
fn clear_outer_cargo(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if is_of_outer_cargo(&name) {
            command.env_remove(name);
        }
    }
}

fn is_of_outer_cargo(name: &OsString) -> bool {
    let Some(name) = name.to_str() else { return false };
    let kept = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"];
    if kept.iter().any(|prefix| name.starts_with(prefix)) {
        return false;
    }
    let names =
        ["CARGO", "RUSTFLAGS", "RUSTDOC", "RUSTDOCFLAGS", "TARGET", "HOST", "OUT_DIR", "PROFILE", "OPT_LEVEL", "DEBUG"];
    names.contains(&name) || name.starts_with("CARGO_") || name.starts_with("RUSTC")
}
