//! `cargo xtask chart`: what the Helm chart becomes, by Helm itself.
//!
//! In come chart and profiles; out comes an error where `helm lint` has one, or where Helm renders other objects than
//! `meshctl manifest generate` does: both come from the same templates, by two renderers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cluster;
use crate::run::{cargo, root, step};

/// A chart is rendered in a moment.
const NAMESPACE: &str = "mesh";
/// Something of each kind that a template makes much of.
const VALUES: &str = "agent.probeCgroup=x,agent.extraArgs={--a=b,c},agent.podAnnotations.note=yes: no,\
    image.pullSecrets={a,b},settings.log=debug,settings.san={a.example,b.example},settings.workers=4,\
    settings.istioLabels=true";
const LIMIT: Duration = Duration::from_secs(60);

pub fn run() -> Result<()> {
    step("build meshctl", cargo(&["build", "--quiet", "--package", "mesh-agent", "--bin", "meshctl"]))?;
    compare(&root().join("target/debug/meshctl"))
}

/// Lints the chart with each profile, and fails where this meshctl makes other objects of it than Helm.
pub fn compare(meshctl: &Path) -> Result<()> {
    let helm = cluster::ensure_helm()?;
    let folder = root().join("target/chart");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for profile in profiles()? {
        lint(&helm, &profile)?;
        let keep = |by: &str, text: String| -> Result<PathBuf> {
            let path = folder.join(format!("{profile}-{by}.yaml"));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(path)
        };
        let by_helm = keep("helm", template(&helm, &profile)?)?;
        let by_meshctl = keep("meshctl", generate(meshctl, &profile)?)?;
        let mut command = Command::new(meshctl);
        command.args(["manifest", "diff"]).arg(by_helm).arg(by_meshctl);
        step(&format!("profile {profile}: Helm and meshctl"), command)?;
    }
    Ok(())
}

fn template(helm: &Path, profile: &str) -> Result<String> {
    let mut command = Command::new(helm);
    // The namespace, which meshctl makes and Helm leaves to its own flag.
    command.args([
        "template",
        "nodemesh",
        "--namespace",
        NAMESPACE,
        "--include-crds",
        "--set",
        "namespace.create=true",
    ]);
    command.args(["--set", VALUES, "--values", &values(profile)]).arg(folder());
    cluster::output(command, LIMIT)
}

fn generate(meshctl: &Path, profile: &str) -> Result<String> {
    let mut command = Command::new(meshctl);
    command.args(["manifest", "generate", "--namespace", NAMESPACE, "--profile", profile, "--set", VALUES]);
    cluster::output(command, LIMIT)
}

pub fn folder() -> PathBuf {
    root().join("deploy/helm/nodemesh")
}

/// Their names, sorted.
fn profiles() -> Result<Vec<String>> {
    let folder = folder().join("profiles");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
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
