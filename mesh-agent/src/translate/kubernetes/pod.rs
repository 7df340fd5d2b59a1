//! Pods: addresses, identity, and the names that metrics carry.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::Deserialize;

use super::{Metadata, Mode, mode};
use crate::model::{SpiffeId, TrustDomain};
use crate::translate::Object;
use crate::translate::report::{Labels, Report, nullable};

#[derive(Debug)]
pub(in crate::translate) struct Pod {
    pub name: String,
    pub namespace: String,
    /// Empty where the manifest has none.
    pub uid: String,
    pub created: Option<String>,
    pub terminating: bool,
    /// Phase Succeeded or Failed: it runs no more, and its address may already be another's.
    pub ended: bool,
    pub ready: bool,
    pub labels: Labels,
    pub mode: Mode,
    pub host_network: bool,
    /// Empty for the usual one.
    pub runtime_class: String,
    /// What the agent has written into the annotation `nodemesh.io/status`.
    pub shown: Option<String>,
    /// The uid by which the kubelet knows a static pod, whose image in the API has one of its own.
    pub static_uid: Option<String>,
    pub node: String,
    pub service_account: String,
    /// At most one of each family.
    pub addresses: Vec<IpAddr>,
    pub netns: Option<PathBuf>,
    /// TCP ports that have a name.
    pub named_ports: Vec<(String, u16)>,
    pub workload_name: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Manifest {
    metadata: Metadata,
    #[serde(default, deserialize_with = "nullable")]
    spec: Spec,
    #[serde(default, deserialize_with = "nullable")]
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Spec {
    #[serde(default, deserialize_with = "nullable")]
    node_name: String,
    service_account_name: Option<String>,
    /// The older name of the same field.
    service_account: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    host_network: bool,
    #[serde(default, deserialize_with = "nullable")]
    runtime_class_name: String,
    #[serde(default, deserialize_with = "nullable")]
    containers: Vec<Container>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Container {
    #[serde(default, deserialize_with = "nullable")]
    ports: Vec<ContainerPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct ContainerPort {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    container_port: u16,
    #[serde(default, deserialize_with = "nullable")]
    protocol: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Status {
    #[serde(default, deserialize_with = "nullable")]
    phase: String,
    #[serde(rename = "podIP", default, deserialize_with = "nullable")]
    pod_ip: String,
    #[serde(rename = "podIPs", default, deserialize_with = "nullable")]
    pod_ips: Vec<PodIp>,
    #[serde(default, deserialize_with = "nullable")]
    conditions: Vec<Condition>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct PodIp {
    #[serde(default, deserialize_with = "nullable")]
    ip: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Condition {
    r#type: String,
    status: String,
}

const NETNS: &str = "nodemesh.io/netns";
const SHOWN: &str = "nodemesh.io/status";
/// Written by the kubelet, but anybody who makes a pod may write it too.
const MIRROR: &str = "kubernetes.io/config.mirror";

pub(in crate::translate) fn pod(object: &Object, report: &mut Report) -> Option<Pod> {
    let Manifest { metadata, spec, status } = report.read(object)?;
    let mode = mode(&metadata.labels, Some("the pod follows its namespace"), report);
    let namespace = object.reference().namespace.clone();
    let service_account = spec.service_account_name.filter(|n| !n.is_empty()).or(spec.service_account);
    let service_account = service_account.filter(|n| !n.is_empty()).unwrap_or_else(|| "default".into());
    check_names(&namespace, &service_account, report);
    let pod = Pod {
        ended: matches!(status.phase.as_str(), "Succeeded" | "Failed"),
        ready: !status.conditions.iter().any(|c| c.r#type == "Ready" && c.status != "True"),
        addresses: addresses(&status, report),
        netns: netns(&metadata, report),
        workload_name: workload_name(&metadata),
        named_ports: named_ports(spec.containers),
        terminating: metadata.deletion_timestamp.is_some(),
        created: metadata.creation_timestamp,
        shown: metadata.annotations.get(SHOWN).cloned(),
        static_uid: metadata.annotations.get(MIRROR).filter(|uid| is_hash(uid)).cloned(),
        runtime_class: spec.runtime_class_name,
        name: metadata.name,
        namespace,
        uid: metadata.uid,
        labels: metadata.labels,
        mode,
        host_network: spec.host_network,
        node: spec.node_name,
        service_account,
    };
    report.unless_broken(pod)
}

/// A static pod's uid is a hash of its file. That of any other pod is none: with the annotation, a pod's owner must not get
/// another's processes for its own. Nor does a forged one come into the mesh: kubelet gives no address to a pod that mirrors
/// nothing.
fn is_hash(uid: &str) -> bool {
    uid.len() == 32 && uid.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The identity is made later, with the mesh's trust domain; its shape can be judged here.
fn check_names(namespace: &str, account: &str, report: &mut Report) {
    let domain = TrustDomain::new("check").expect("`check` is a trust domain");
    if let Err(e) = SpiffeId::new(&domain, namespace, account) {
        let field = if SpiffeId::new(&domain, "default", account).is_err() {
            "spec.serviceAccountName"
        } else {
            "metadata.namespace"
        };
        report.error(field, e.to_string());
    }
}

fn addresses(status: &Status, report: &mut Report) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let first = ("status.podIP".to_owned(), status.pod_ip.as_str());
    let more = status.pod_ips.iter().enumerate().map(|(i, p)| (format!("status.podIPs[{i}].ip"), p.ip.as_str()));
    for (field, text) in std::iter::once(first).chain(more).filter(|(_, text)| !text.is_empty()) {
        let Some(ip) = report.address(&field, text) else { continue };
        match addresses.iter().find(|a| a.is_ipv4() == ip.is_ipv4()) {
            None => addresses.push(ip),
            Some(known) if *known == ip => {}
            Some(known) => report
                .warning(&field, format!("`{text}` is a second address of its family and is not used, `{known}` is")),
        }
    }
    addresses
}

fn netns(metadata: &Metadata, report: &mut Report) -> Option<PathBuf> {
    let path = metadata.annotations.get(NETNS)?;
    // A path that is not absolute would mean another file for each process that reads it.
    if !path.starts_with('/') || path.contains('\0') {
        let message = format!("`{path}` is no absolute path: write the network namespace's, such as /run/netns/web");
        report.error(&format!("metadata.annotations[{NETNS}]"), message);
        return None;
    }
    Some(PathBuf::from(path))
}

fn named_ports(containers: Vec<Container>) -> Vec<(String, u16)> {
    let ports = containers.into_iter().flat_map(|c| c.ports);
    let tcp = ports.filter(|p| !p.name.is_empty() && matches!(p.protocol.as_str(), "" | "TCP"));
    tcp.map(|p| (p.name, p.container_port)).collect()
}

/// The name of what made the pod, derived as Istio does, so that dashboards show a Deployment and not its ReplicaSet.
fn workload_name(metadata: &Metadata) -> String {
    let Some(owner) = metadata.owner_references.iter().find(|o| o.controller) else { return metadata.name.clone() };
    let label = |key: &str| metadata.labels.get(key).filter(|v| !v.is_empty());
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = label("pod-template-hash").or_else(|| label("rollouts-pod-template-hash"));
            let deployment = hash.and_then(|h| owner.name.strip_suffix(h.as_str())?.strip_suffix('-'));
            deployment.unwrap_or(&owner.name).to_owned()
        }
        "ReplicationController" => label("deploymentconfig").unwrap_or(&owner.name).clone(),
        // The Job of a CronJob ends with the minute of its schedule, 8 to 10 digits.
        "Job" => match owner.name.rsplit_once('-') {
            Some((cron, minute)) if (8..=10).contains(&minute.len()) && minute.bytes().all(|b| b.is_ascii_digit()) => {
                cron.to_owned()
            }
            _ => owner.name.clone(),
        },
        _ => owner.name.clone(),
    }
}
