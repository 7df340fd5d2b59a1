//! EndpointSlices: what is behind a Service.

use std::net::IpAddr;

use serde::Deserialize;

use super::Metadata;
use crate::translate::Object;
use crate::translate::report::{Report, nullable};

#[derive(Debug)]
pub(in crate::translate) struct EndpointSlice {
    pub namespace: String,
    /// Label `kubernetes.io/service-name`; a slice without it belongs to nobody that we know.
    pub service: Option<String>,
    /// TCP ports by name.
    pub ports: Vec<(String, u16)>,
    pub endpoints: Vec<Backend>,
}

#[derive(Debug)]
pub(in crate::translate) struct Backend {
    pub address: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub zone: Option<String>,
    pub node: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Manifest {
    metadata: Metadata,
    address_type: String,
    #[serde(default, deserialize_with = "nullable")]
    endpoints: Vec<Endpoint>,
    #[serde(default, deserialize_with = "nullable")]
    ports: Vec<Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Endpoint {
    addresses: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    conditions: Conditions,
    zone: Option<String>,
    node_name: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(expecting = "an object")]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Port {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    port: Option<u16>,
    #[serde(default, deserialize_with = "nullable")]
    protocol: String,
}

pub(in crate::translate) fn endpoint_slice(object: &Object, report: &mut Report) -> Option<EndpointSlice> {
    let Manifest { metadata, address_type, endpoints, ports } = report.read(object)?;
    let service = metadata.labels.get("kubernetes.io/service-name").filter(|s| !s.is_empty()).cloned();
    let v4 = match address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        "FQDN" => {
            report.warning("addressType", "FQDN is not honoured: its endpoints are not used, write IPv4 or IPv6");
            let namespace = object.reference().namespace.clone();
            return Some(EndpointSlice { namespace, service, ports: Vec::new(), endpoints: Vec::new() });
        }
        other => {
            report.error("addressType", format!("`{other}` is no address type: use IPv4 or IPv6"));
            return None;
        }
    };
    let mut backends = Vec::new();
    for (i, e) in endpoints.into_iter().enumerate() {
        // All addresses of one endpoint are the same backend: Kubernetes tells consumers to use the first.
        let field = format!("endpoints[{i}].addresses[0]");
        let Some(text) = e.addresses.first() else {
            report.error(&format!("endpoints[{i}].addresses"), "the endpoint has no address: write one");
            continue;
        };
        let Some(address) = report.address(&field, text) else { continue };
        if address.is_ipv4() != v4 {
            report.error(
                &field,
                format!("`{text}` is not of the slice's addressType {address_type}: write a slice for each"),
            );
        }
        let Conditions { ready, serving, terminating } = e.conditions;
        let terminating = terminating.unwrap_or(false);
        let ready = ready.unwrap_or(true);
        backends.push(Backend {
            address,
            ready,
            // Where nothing is said of serving, ready says it; a terminating endpoint may serve though never ready.
            serving: serving.unwrap_or(ready && !terminating) || ready,
            zone: e.zone.filter(|z| !z.is_empty()),
            node: e.node_name.filter(|n| !n.is_empty()),
        });
    }
    let mut tcp = Vec::new();
    for (i, p) in ports.into_iter().enumerate().filter(|(_, p)| matches!(p.protocol.as_str(), "" | "TCP")) {
        match p.port {
            Some(0) => report.error(&format!("ports[{i}].port"), "0 is no port: use 1 to 65535"),
            Some(port) => tcp.push((p.name, port)),
            None => report.warning(&format!("ports[{i}].port"), "the port has no number and is not used: write it"),
        }
    }
    let namespace = object.reference().namespace.clone();
    report.unless_broken(EndpointSlice { namespace, service, ports: tcp, endpoints: backends })
}
