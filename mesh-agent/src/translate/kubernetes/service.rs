//! Services: virtual addresses and ports.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::Deserialize;

use super::Metadata;
use crate::model::{Algorithm, Scope};
use crate::translate::Object;
use crate::translate::report::{Labels, Report, nullable};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Service {
    pub name: String,
    pub namespace: String,
    pub created: Option<String>,
    pub kind: Kind,
    pub selector: Labels,
    pub ports: Vec<Port>,
    pub publish_not_ready: bool,
    pub algorithm: Algorithm,
    pub scope: Scope,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) enum Kind {
    /// With virtual addresses; none for a headless service.
    Addresses(Vec<IpAddr>),
    /// Only a name for something elsewhere.
    ExternalName,
}

impl Kind {
    pub fn addresses(&self) -> &[IpAddr] {
        match self {
            Self::Addresses(addresses) => addresses,
            Self::ExternalName => &[],
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Port {
    pub port: u16,
    pub name: String,
    pub app_protocol: Option<String>,
    /// Needed only where endpoints are made from pods.
    pub target: TargetPort,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected a port number or the name of a port")]
pub(in crate::translate) enum TargetPort {
    Number(u16),
    Name(String),
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Manifest {
    metadata: Metadata,
    #[serde(default, deserialize_with = "nullable")]
    spec: Spec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Spec {
    #[serde(default, deserialize_with = "nullable")]
    r#type: String,
    #[serde(rename = "clusterIP", default, deserialize_with = "nullable")]
    cluster_ip: String,
    #[serde(rename = "clusterIPs", default, deserialize_with = "nullable")]
    cluster_ips: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    selector: Labels,
    #[serde(default, deserialize_with = "nullable")]
    ports: Vec<SpecPort>,
    #[serde(default, deserialize_with = "nullable")]
    publish_not_ready_addresses: bool,
    traffic_distribution: Option<String>,
    session_affinity: Option<String>,
    internal_traffic_policy: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecPort {
    port: u16,
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    protocol: String,
    app_protocol: Option<String>,
    target_port: Option<TargetPort>,
}

const BALANCING: &str = "nodemesh.io/balancing";

pub(in crate::translate) fn service(object: &Object, report: &mut Report) -> Option<Service> {
    let Manifest { metadata, spec } = report.read(object)?;
    let kind = kind(&spec, report);
    let service = Service {
        algorithm: algorithm(&metadata.annotations, report),
        scope: scope(spec.traffic_distribution.as_deref(), report),
        ports: ports(spec.ports, report),
        kind,
        name: metadata.name,
        namespace: object.reference().namespace.clone(),
        created: metadata.creation_timestamp,
        selector: spec.selector,
        publish_not_ready: spec.publish_not_ready_addresses,
    };
    for (field, value, harmless) in [
        ("spec.sessionAffinity", spec.session_affinity, "None"),
        ("spec.internalTrafficPolicy", spec.internal_traffic_policy, "Cluster"),
    ] {
        if let Some(value) = value.filter(|v| !v.is_empty() && v != harmless) {
            report.warning(field, format!("`{value}` is not honoured yet: connections are balanced as without it"));
        }
    }
    report.unless_broken(service)
}

fn kind(spec: &Spec, report: &mut Report) -> Kind {
    if spec.r#type == "ExternalName" {
        report.warning(
            "spec.type",
            "ExternalName is no service of the mesh: its connections count as those to a destination outside",
        );
        return Kind::ExternalName;
    }
    let mut addresses = Vec::new();
    let one = ("spec.clusterIP".to_owned(), &spec.cluster_ip);
    let more = spec.cluster_ips.iter().enumerate().map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), ip));
    let mut headless = false;
    for (field, text) in std::iter::once(one).chain(more).filter(|(_, text)| !text.is_empty()) {
        if text == "None" {
            headless = true;
        } else if let Some(ip) = report.address(&field, text)
            && !addresses.contains(&ip)
        {
            addresses.push(ip);
        }
    }
    if headless && !addresses.is_empty() {
        report.error("spec.clusterIPs", "None stands beside an address: a service is headless or has addresses");
    }
    if !headless && addresses.is_empty() && !report.is_broken() {
        report.warning(
            "spec.clusterIP",
            "the service has no address, so it is reached by its pods' addresses only: write one, or None",
        );
    }
    Kind::Addresses(addresses)
}

/// TCP only: the mesh leaves the other protocols alone.
fn ports(ports: Vec<SpecPort>, report: &mut Report) -> Vec<Port> {
    let mut seen = BTreeSet::new();
    let mut names = BTreeSet::new();
    let mut result = Vec::new();
    for (i, p) in ports.into_iter().enumerate().filter(|(_, p)| matches!(p.protocol.as_str(), "" | "TCP")) {
        if p.port == 0 {
            report.error(&format!("spec.ports[{i}].port"), "0 is no port: use 1 to 65535");
        }
        if !seen.insert(p.port) {
            report.error(&format!("spec.ports[{i}].port"), format!("port {} stands twice: remove one", p.port));
        }
        if !names.insert(p.name.clone()) {
            let message = match p.name.as_str() {
                "" => "two ports have no name: give each one of its own".into(),
                name => format!("the name `{name}` stands twice: give each port one of its own"),
            };
            report.error(&format!("spec.ports[{i}].name"), message);
        }
        if matches!(p.target_port, Some(TargetPort::Number(0))) {
            report.error(&format!("spec.ports[{i}].targetPort"), "0 is no port: use 1 to 65535");
        }
        let target = p.target_port.unwrap_or(TargetPort::Number(p.port));
        result.push(Port { port: p.port, name: p.name, app_protocol: p.app_protocol, target });
    }
    result
}

fn algorithm(annotations: &Labels, report: &mut Report) -> Algorithm {
    match annotations.get(BALANCING).map(String::as_str) {
        None | Some("round-robin") => Algorithm::RoundRobin,
        Some("random") => Algorithm::Random,
        Some("least-connections") => Algorithm::LeastConnections,
        Some(other) => {
            let message =
                format!("`{other}` is not known, round-robin is used: use round-robin, random or least-connections");
            report.warning(&format!("metadata.annotations[{BALANCING}]"), message);
            Algorithm::RoundRobin
        }
    }
}

fn scope(distribution: Option<&str>, report: &mut Report) -> Scope {
    match distribution {
        None | Some("") => Scope::Anywhere,
        Some("PreferClose" | "PreferSameZone") => Scope::SameZone,
        Some("PreferSameNode") => Scope::SameNode,
        Some(other) => {
            let message = format!(
                "`{other}` is not known, all endpoints are used alike: use PreferSameZone, PreferSameNode or PreferClose"
            );
            report.warning("spec.trafficDistribution", message);
            Scope::Anywhere
        }
    }
}
