//! `meshctl check`: whether a cluster can take the mesh, and how it is once it has.

use std::io::Write;

use serde_json::json;

use super::Access;
use super::install::installed_in;
use super::objects::{AGENT, CONTROLLER, KINDS, name};
use super::ready::{self, is_ready, node_of, pods, trouble};
use super::remote::{self, Pod};
use crate::admin::views::StatusView;
use crate::api_server::{ApiError, ApiServer, Kind};
use crate::cli::exit::Failure;
use crate::cli::meshctl::chart::VERSION;
use crate::cli::meshctl::layout::wrap;

/// Admission policies that know on which node a token's pod runs.
const OLDEST: (u64, u64) = (1, 30);
/// The first kernel on which every hook is there; from 6.1 on all is tested.
const OLDEST_KERNEL: (u64, u64) = (5, 15);
const TESTED_KERNEL: (u64, u64) = (6, 1);

/// What was looked at, and what is to be done about it.
enum Finding {
    Fine(String),
    Warning(String),
    Wrong(String),
}

use Finding::{Fine, Warning, Wrong};

/// Fails where something is wrong, so that a script can go by it.
pub(super) async fn check(access: &Access, out: &mut impl Write) -> anyhow::Result<()> {
    let server = access.connect().await?;
    let mut found = vec![version(&server).await?];
    found.push(rights(&server, access).await?);
    found.extend(nodes(&server).await?);
    found.extend(neighbours(&server).await?);
    match installed_in(&server).await? {
        None => found.push(Fine("Nodemesh is not installed; `meshctl install` does it".to_owned())),
        Some(mesh) if mesh == access.namespace => found.extend(mesh_itself(&server, &mesh).await?),
        Some(mesh) => found.push(Wrong(elsewhere(&mesh))),
    }
    let mut wrong = 0;
    for finding in &found {
        let (word, text) = match finding {
            Fine(text) => ("ok", text),
            Warning(text) => ("warning", text),
            Wrong(text) => ("wrong", text),
        };
        wrong += usize::from(word == "wrong");
        writeln!(out, "{}", wrap(&format!("{word:8} {text}"), 80, 9))?;
    }
    out.flush()?;
    match wrong {
        0 => Ok(()),
        1 => Err(Failure::data("one thing is wrong; what to do stands with it").into()),
        n => Err(Failure::data(format!("{n} things are wrong; what to do stands with each")).into()),
    }
}

/// What an installation needs, before it changes anything.
pub(super) async fn may_install(server: &ApiServer, access: &Access) -> anyhow::Result<()> {
    let mut findings = vec![version(server).await?, rights(server, access).await?];
    if let Some(mesh) = installed_in(server).await?.filter(|mesh| *mesh != access.namespace) {
        findings.push(Wrong(elsewhere(&mesh)));
    }
    for finding in findings {
        if let Wrong(text) = finding {
            return Err(Failure::unavailable(format!("nothing was installed: {text}")).into());
        }
    }
    Ok(())
}

fn elsewhere(mesh: &str) -> String {
    format!(
        "Nodemesh is installed in namespace {mesh}; a cluster has one mesh: give --namespace {mesh}, or uninstall it"
    )
}

async fn version(server: &ApiServer) -> anyhow::Result<Finding> {
    let said = server.request("GET", "/version", None, None).await?;
    let full = said["gitVersion"].as_str().unwrap_or("of unknown version");
    let number = |key: &str| {
        let digits: String = said[key].as_str().unwrap_or_default().chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or_default()
    };
    let (major, minor) = OLDEST;
    Ok(match (number("major"), number("minor")) >= OLDEST {
        true => Fine(format!("Kubernetes {full} at {}", server.url())),
        false => {
            Wrong(format!("Kubernetes {full} is too old: Nodemesh needs {major}.{minor} or newer; upgrade it first"))
        }
    })
}

/// Whether we may make each kind of object. What the API server refuses beyond that shows when it is applied.
async fn rights(server: &ApiServer, access: &Access) -> anyhow::Result<Finding> {
    let mut missing = Vec::new();
    for kind in KINDS.iter().filter(|kind| **kind != Kind::LEASE) {
        let mut wanted = json!({"verb": "patch", "group": kind.group, "resource": kind.plural});
        if kind.namespaced {
            wanted["namespace"] = access.namespace.as_str().into();
        }
        let review = json!({
            "apiVersion": Kind::SUBJECT_ACCESS_REVIEW.api_version(),
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": wanted},
        });
        let answer = server.create(&Kind::SUBJECT_ACCESS_REVIEW, "", &review).await?;
        if answer["status"]["allowed"] != true {
            missing.push(kind.plural.as_ref());
        }
    }
    Ok(match missing.is_empty() {
        true => Fine("you may install it".to_owned()),
        false => Wrong(format!("you may not change {}; ask an administrator of the cluster", missing.join(", "))),
    })
}

async fn nodes(server: &ApiServer) -> Result<Vec<Finding>, ApiError> {
    let mut found = Vec::new();
    let nodes = server.list(&Kind::NODE, None, "").await?;
    let mut fit = 0;
    for node in &nodes {
        let info = &node["status"]["nodeInfo"];
        let text = |key: &str| info[key].as_str().unwrap_or_default();
        let release = text("kernelVersion");
        let kernel = two_numbers(release);
        if text("operatingSystem") != "linux" {
            found.push(Warning(format!("node {} runs {}: it stays outside", name(node), text("operatingSystem"))));
        } else if kernel < OLDEST_KERNEL {
            let (major, minor) = OLDEST_KERNEL;
            found.push(Wrong(format!(
                "node {} has kernel {release}, which is too old: it needs {major}.{minor} or newer",
                name(node)
            )));
        } else {
            fit += 1;
            if kernel < TESTED_KERNEL {
                let (major, minor) = TESTED_KERNEL;
                found.push(Warning(format!(
                    "node {} has kernel {release}; {major}.{minor} and newer are tested",
                    name(node)
                )));
            }
        }
        let conditions = node["status"]["conditions"].as_array();
        let ready = conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True");
        if !ready {
            found.push(Warning(format!("node {} is not Ready: its pods are not in the mesh until it is", name(node))));
        }
    }
    found.insert(0, Fine(format!("{fit} of {} nodes can run an agent", nodes.len())));
    Ok(found)
}

/// `6.1.0-18-amd64`
fn two_numbers(release: &str) -> (u64, u64) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or_default());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

/// What else may want pods' traffic.
async fn neighbours(server: &ApiServer) -> Result<Vec<Finding>, ApiError> {
    let mut found = Vec::new();
    let spaces = server.list(&Kind::NAMESPACE, None, "").await?;
    let others = [("istio-injection", "enabled", "Istio"), ("linkerd.io/inject", "enabled", "Linkerd")];
    for space in &spaces {
        let labels = &space["metadata"]["labels"];
        let notes = &space["metadata"]["annotations"];
        for (key, value, mesh) in others {
            let theirs = labels[key] == value || notes[key] == value;
            if theirs && labels[super::objects::MODE] == "enabled" {
                found.push(Wrong(format!(
                    "namespace {} is in two meshes, {mesh}'s and this; take {key} or nodemesh.io/mode away",
                    name(space)
                )));
            }
        }
    }
    let cilium = server.get(&Kind::CONFIG_MAP, "kube-system", "cilium-config").await?;
    if let Some(cilium) = cilium {
        let is = |key: &str| cilium["data"][key] == "true";
        if (is("kube-proxy-replacement") || is("bpf-lb-sock")) && !is("bpf-lb-sock-hostns-only") {
            found.push(Wrong(
                "Cilium balances Services in pods' sockets, before the mesh sees whom they call; set its \
                 socketLB.hostNamespaceOnly to true"
                    .to_owned(),
            ));
        }
    }
    if found.is_empty() {
        found.push(Fine("no other mesh and no socket balancing is in the way".to_owned()));
    }
    Ok(found)
}

async fn mesh_itself(server: &ApiServer, mesh: &str) -> anyhow::Result<Vec<Finding>> {
    let mut found = Vec::new();
    for (kind, name) in &ready::WORKLOADS {
        let Some(object) = ready::workload(server, mesh, kind, name).await? else {
            found.push(Wrong(format!("{} {name} is missing; run `meshctl install` again", kind.kind)));
            continue;
        };
        let progress = ready::progress(&object);
        let text = format!("{} {name}: {} of {} ready", kind.kind, progress.ready, progress.wanted);
        found.push(if progress.done {
            Fine(text)
        } else {
            Wrong(format!("{text}; see below, or `kubectl describe` it"))
        });
    }
    for app in [CONTROLLER, AGENT] {
        for pod in pods(server, mesh, app).await?.iter().filter(|pod| !is_ready(pod)) {
            let line = ready::log_line(server, mesh, name(pod)).await;
            let why = trouble(pod).unwrap_or_else(|| format!("{} on {} is not ready", name(pod), node_of(pod)));
            let log = line.map(|line| format!("; its log ends with \"{line}\"")).unwrap_or_default();
            found.push(Wrong(format!("{why}{log}")));
        }
    }
    for pod in pods(server, mesh, AGENT).await?.iter().filter(|pod| is_ready(pod)) {
        let node = node_of(pod).to_owned();
        match remote::ask::<StatusView>(&Pod::of(server, pod), &["status"]).await {
            Ok(status) => found.extend(of_agent(&status)),
            Err(failure) => found.push(Wrong(format!("node {node}: {}", failure.message))),
        }
    }
    Ok(found)
}

fn of_agent(status: &StatusView) -> Vec<Finding> {
    let node = &status.node;
    let mut found = Vec::new();
    if status.version != VERSION {
        found.push(Warning(format!(
            "node {node} runs {} and this meshctl is {VERSION}; `meshctl upgrade` brings them together",
            status.version
        )));
    }
    if status.certificates_missing > 0 {
        found.push(Wrong(format!(
            "node {node} lacks {} of {} certificates; see `meshctl certificates --node {node}`",
            status.certificates_missing, status.certificates
        )));
    }
    if status.errors > 0 {
        found.push(Warning(format!(
            "node {node} found {} errors in the configuration; see `meshctl problems`",
            status.errors
        )));
    }
    if status.refused_pods > 0 {
        found.push(Warning(format!(
            "node {node} could not take {} pods into the mesh; see `meshctl workloads --node {node}`",
            status.refused_pods
        )));
    }
    if found.is_empty() {
        found.push(Fine(format!("node {node}: {} pods in the mesh, all certificates there", status.enrolled_pods)));
    }
    found
}

/// For other commands that want to know of an installation before they ask for its pods.
pub(super) fn not_installed(mesh: &str) -> Failure {
    Failure::unavailable(format!(
        "no agent of Nodemesh runs in namespace {mesh}; install it with `meshctl install`, or give --mesh-namespace"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(two_numbers("6.1.0-18-amd64"), (6, 1));
        assert!(two_numbers("5.4.0") < OLDEST_KERNEL && two_numbers("5.15.1-x") >= OLDEST_KERNEL);
        assert!(two_numbers("10.0") > TESTED_KERNEL);
        assert_eq!(two_numbers(""), (0, 0));
    }
}
