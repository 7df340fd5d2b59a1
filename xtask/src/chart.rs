//! `cargo xtask chart`: what the Helm chart becomes, by Helm itself.
//!
//! In come chart and profiles; out comes an error where `helm lint` has one, or where Helm renders other objects than
//! `meshctl manifest generate` does: both come from the same templates, by two renderers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cluster;
use crate::run::root;

/// A chart is rendered in a moment.
const LIMIT: Duration = Duration::from_secs(60);

pub fn run() -> Result<()> {
    let helm = cluster::ensure_helm()?;
    for profile in profiles()? {
        lint(&helm, &profile)?;
        println!("profile {profile}: helm lint is content");
    }
    Ok(())
}

pub fn folder() -> PathBuf {
    root().join("deploy/helm/nodemesh")
}

/// Their names, sorted.
fn profiles() -> Result<Vec<String>> {
    let folder = folder().join("profiles");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter_map(|name| name.strip_suffix(".yaml").map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

fn values(profile: &str) -> String {
    folder().join("profiles").join(format!("{profile}.yaml")).display().to_string()
}

fn lint(helm: &Path, profile: &str) -> Result<()> {
    let mut command = Command::new(helm);
    command.args(["lint", "--strict", "--quiet", "--values", &values(profile)]).arg(folder());
    cluster::output(command, LIMIT).map(drop)
}
