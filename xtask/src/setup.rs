//! `cargo xtask setup`: installs what is missing, says what it does, and where it can't, says the one thing to do by hand.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::run::{has, is_root, step};

/// Programs that tests, demo and benchmarks run, with Debian's package for each.
const PROGRAMS: &[(&str, &str)] = &[
    ("ab", "apache2-utils"),
    ("bash", "bash"),
    ("bpftool", "bpftool"),
    ("cat", "coreutils"),
    ("cc", "gcc"),
    ("chrt", "util-linux"),
    ("curl", "curl"),
    ("dpkg", "dpkg"),
    ("dpkg-query", "dpkg"),
    ("git", "git"),
    ("ip", "iproute2"),
    ("iperf3", "iperf3"),
    ("iptables", "iptables"),
    ("kill", "procps"),
    ("ldd", "libc-bin"),
    ("make", "make"),
    ("mariadb", "mariadb-client"),
    ("mariadbd", "mariadb-server"),
    ("mariadb-install-db", "mariadb-server"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("nice", "coreutils"),
    ("nsenter", "util-linux"),
    ("openssl", "openssl"),
    // The benchmark installs Envoy from PyPI.
    ("pip3", "python3-pip"),
    ("python3", "python3"),
    ("redis-cli", "redis-tools"),
    ("redis-server", "redis-server"),
    ("setpriv", "util-linux"),
    ("sh", "dash"),
    ("sha256sum", "coreutils"),
    ("socat", "socat"),
    ("ss", "iproute2"),
    ("strip", "binutils"),
    ("tar", "tar"),
    ("tcpdump", "tcpdump"),
    ("timeout", "coreutils"),
    ("true", "coreutils"),
    ("umount", "mount"),
    ("wrk", "wrk"),
];

/// Debian's compiler, which has the source of `core` beside it as a package.
/// Where Ubuntu's packages are called otherwise than Debian's.
const OF_UBUNTU: &[(&str, &str)] = &[("bpftool", "linux-tools-generic")];

/// What `cargo xtask cluster` needs beside, and Go, which Debian has too old.
const CLUSTER: &[(&str, &str)] = &[
    // Not on PATH: containerd looks for plugins there.
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("curl", "curl"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("openssl", "openssl"),
    ("runc", "runc"),
    ("unshare", "util-linux"),
];

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

pub fn run() -> Result<()> {
    install_packages(&missing_packages())?;
    // A package may be there without what it was installed for.
    check()?;
    let compiler = kernel_compiler()?;
    println!("the kernel programs will be built by {} (LLVM {})", compiler.name, compiler.llvm);
    bpf_linker(&compiler)?;
    cargo_deny()?;
    println!("everything is there: try `cargo xtask demo`");
    Ok(())
}

/// What `cargo xtask demo` needs, which is less.
pub fn run_for_demo() -> Result<()> {
    let wanted = ["cc", "ip", "tcpdump"];
    let missing = missing_packages();
    let missing: Vec<&str> = missing
        .into_iter()
        .filter(|package| PROGRAMS.iter().any(|(program, of)| of == package && wanted.contains(program)))
        .collect();
    install_packages(&missing)?;
    bpf_linker(&kernel_compiler()?)
}

/// What `cargo xtask cluster` needs, which is other.
pub fn run_for_cluster() -> Result<()> {
    match missing_of(CLUSTER) {
        missing if missing.is_empty() => Ok(()),
        missing => install_packages(&missing),
    }
}

/// Fails where something is missing that `run` would install.
pub fn check() -> Result<()> {
    let missing = missing_packages();
    if !missing.is_empty() {
        bail!("programs of {} are missing: run `cargo xtask setup`, or put them on PATH by hand", missing.join(", "));
    }
    Ok(())
}

fn missing_packages() -> Vec<&'static str> {
    missing_of(PROGRAMS)
}

fn missing_of(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let missing = programs.iter().filter(|(program, _)| !has(program)).map(|(_, package)| *package);
    let missing: BTreeSet<&str> = missing.collect();
    missing.into_iter().collect()
}

fn install_packages(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        println!("system packages: all there");
        return Ok(());
    }
    let os = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let packages: Vec<&str> = packages.iter().map(|package| name_here(package, &os)).collect();
    let list = packages.join(" ");
    if !has("apt-get") {
        bail!("this is no Debian: install these packages, or what they are called here, by hand: {list}");
    }
    if !is_root() {
        bail!("run `sudo apt-get update && sudo apt-get install --no-install-recommends {list}`, then this again");
    }
    println!("system packages missing: {list}");
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(args).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        command
    };
    step("apt-get update", apt(&["update", "--quiet"]))?;
    let args = [&["install", "--yes", "--quiet", "--no-install-recommends"], packages.as_slice()].concat();
    step(&format!("apt-get install {list}"), apt(&args))
        .with_context(|| format!("install these packages, or what provides them here, by hand: {list}"))
}

/// What the distribution of this os-release calls a package of Debian.
fn name_here<'a>(package: &'a str, os_release: &str) -> &'a str {
    let ubuntu = os_release.lines().any(|line| line == "ID=ubuntu");
    let other = OF_UBUNTU.iter().find(|(debian, _)| ubuntu && *debian == package);
    other.map_or(package, |(_, here)| here)
}

/// What builds the kernel programs; the same order of preference as mesh-ebpf/toolchain.rs.
struct Compiler {
    name: &'static str,
    llvm: u32,
}

/// Finds a Rust compiler with the source of `core`, or installs Debian's.
fn kernel_compiler() -> Result<Compiler> {
    if let Some(compiler) = find_compiler() {
        return Ok(compiler);
    }
    println!("no Rust compiler here has the source of `core` beside it; Debian has one");
    install_packages(&["rustc-web", "rust-web-src"]).context(
        "the kernel programs need a Rust compiler with the source of `core`; \
         the other way is `rustup toolchain install nightly --component rust-src`",
    )?;
    find_compiler()
        .context("Debian's rustc-web and rust-web-src are there, but /usr/bin/rustc finds no source of `core`")
}

fn find_compiler() -> Option<Compiler> {
    let rustup = |args: &[&str]| {
        let mut command = Command::new("rustup");
        command.args(args);
        command
    };
    compiler("rustup's nightly", || rustup(&["run", "nightly", "rustc"]))
        .or_else(|| compiler("the active Rust tool chain", || Command::new("rustc")))
        .or_else(|| compiler("Debian's rustc", || Command::new(DEBIAN_RUSTC)))
}

fn compiler(name: &'static str, rustc: impl Fn() -> Command) -> Option<Compiler> {
    let sysroot = output(rustc().args(["--print", "sysroot"]))?;
    if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        return None;
    }
    let version = output(rustc().arg("-vV"))?;
    Some(Compiler { name, llvm: llvm_major(&version)? })
}

/// `LLVM version: 22.1.4`
fn llvm_major(version: &str) -> Option<u32> {
    let line = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.trim().parse().ok()
}

/// The standard output of a command that succeeds; `None` where it is not there or fails.
fn output(command: &mut Command) -> Option<String> {
    // The cargo around us chose a compiler for itself; this asks about others.
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC").stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn bpf_linker(compiler: &Compiler) -> Result<()> {
    if output(Command::new("bpf-linker").arg("--version")).is_some() {
        println!("bpf-linker: there");
        return Ok(());
    }
    // It must be linked against the LLVM of the compiler whose bitcode it will read.
    let llvm = compiler.llvm;
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&prefix).join("include/llvm-c").is_dir() {
        install_packages(&[&format!("llvm-{llvm}-dev")]).with_context(|| {
            format!("bpf-linker must be built against LLVM {llvm}; or put a released bpf-linker on PATH by hand")
        })?;
    }
    let mut command = Command::new("cargo");
    let path = std::env::var("PATH").unwrap_or_default();
    let feature = format!("llvm-{llvm}");
    command.args(["install", "bpf-linker", "--locked", "--no-default-features", "--features", &feature]);
    command.env("LLVM_PREFIX", &prefix).env("PATH", format!("{prefix}/bin:{path}"));
    step("cargo install bpf-linker (about a minute)", command)
}

fn cargo_deny() -> Result<()> {
    if has_cargo_deny() {
        println!("cargo-deny: there");
        return Ok(());
    }
    let mut command = Command::new("cargo");
    command.args(["install", "cargo-deny", "--locked"]);
    step("cargo install cargo-deny (a few minutes)", command)
}

pub fn has_cargo_deny() -> bool {
    output(Command::new("cargo").args(["deny", "--version"])).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_that_the_sources_call_has_a_package() {
        // Those that Rust brings, that are asked for only if they are there, that only the demo's text speaks of, or that
        // `cluster` says itself are missing.
        const OTHERS: &[&str] = &["apt-get", "bpf-linker", "cargo", "go", "kubectl", "rustc", "rustup"];
        const CALLS: &[&str] = &["Command::new(\"", ".command(\"", ".start(\"", ".output(\"", " run(&format!(\""];
        fn sources(folder: &Path, found: &mut Vec<String>) {
            for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                    sources(&path, found);
                } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("setup.rs") {
                    found.push(std::fs::read_to_string(path).unwrap());
                }
            }
        }
        let mut texts = Vec::new();
        for folder in ["xtask/src", "tests", "mesh-ebpf"] {
            sources(&crate::run::root().join(folder), &mut texts);
        }
        let mut called = BTreeSet::new();
        for (text, call) in texts.iter().flat_map(|text| CALLS.iter().map(move |call| (text, call))) {
            let programs = text.split(call).skip(1).filter_map(|rest| rest.split(['"', ' ']).next());
            called.extend(programs.filter(|program| !program.is_empty()));
        }
        assert!(called.contains("ip") && called.contains("setpriv"), "{called:?}");
        let known = |program: &str| OTHERS.contains(&program) || PROGRAMS.iter().any(|(of, _)| *of == program);
        let unknown: Vec<_> = called.into_iter().filter(|program| !known(program)).collect();
        assert!(unknown.is_empty(), "PROGRAMS needs a package for {unknown:?}");
    }

    #[test]
    fn ubuntu_calls_some_packages_otherwise() {
        assert_eq!(name_here("bpftool", "NAME=x\nID=ubuntu\n"), "linux-tools-generic");
        assert_eq!(name_here("bpftool", "ID=debian\n"), "bpftool");
        assert_eq!(name_here("curl", "ID=ubuntu\n"), "curl");
    }

    #[test]
    fn reads_the_llvm_of_a_compiler() {
        assert_eq!(llvm_major("rustc 1.96.0\nhost: x86_64\nLLVM version: 22.1.4\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }
}
