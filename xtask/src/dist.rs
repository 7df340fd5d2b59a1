//! `cargo xtask dist`: all that a release is, in `target/dist`, with checksums.
//!
//! In comes the tree; out come the programs, the image with its bill of materials, the chart, and the objects that it makes
//! with its defaults, for those who use neither Helm nor meshctl. The same tree gives the same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::image::{self, VERSION};
use crate::run::{root, step};
use crate::{chart, cluster};

/// meshctl renders the chart in a moment, and sha256sum reads some hundred megabytes.
const LIMIT: Duration = Duration::from_secs(60);

pub fn run() -> Result<()> {
    let folder = root().join("target/dist");
    // What another version has left would be taken for part of this one.
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let image = format!("nodemesh.invalid/nodemesh:{VERSION}");
    image::build(&image, &folder.join(format!("nodemesh-image-{VERSION}.tar")))?;
    for program in ["mesh-agent", "meshctl", "mesh-cni"] {
        let to = folder.join(format!("{program}-{VERSION}-{}-linux", std::env::consts::ARCH));
        let stripped = image::stripped(&root().join("target/release").join(program))?;
        fs::write(&to, stripped).with_context(|| format!("cannot write {}", to.display()))?;
        fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .with_context(|| format!("cannot make {} a program", to.display()))?;
    }
    pack_chart(&folder.join(format!("nodemesh-{VERSION}.tgz")))?;
    let mut generate = Command::new(root().join("target/release/meshctl"));
    generate.args(["manifest", "generate"]);
    write(&folder.join(format!("nodemesh-{VERSION}.yaml")), &cluster::output(generate, LIMIT)?)?;
    write(&folder.join("SHA256SUMS"), &checksums(&folder)?)?;
    println!("version {VERSION} is in {}", folder.display());
    Ok(())
}

/// As Helm packs it: one folder with the chart's name, without times and owners of this machine.
fn pack_chart(to: &Path) -> Result<()> {
    let chart = chart::folder();
    let mut tar = Command::new("tar");
    tar.args([
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--use-compress-program=gzip -n",
    ]);
    tar.arg("-cf").arg(to).arg("-C").arg(chart.parent().context("the chart lies in a folder")?).arg("nodemesh");
    step("pack the chart", tar)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// In the form that `sha256sum --check` reads.
fn checksums(folder: &Path) -> Result<String> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.file_name().into()).collect();
    names.sort();
    let mut command = Command::new("sha256sum");
    command.current_dir(folder).args(&names);
    cluster::output(command, LIMIT)
}
