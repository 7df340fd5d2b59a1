//! A service: a name and virtual addresses in front of endpoints.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use super::Locality;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// `name.namespace.svc.<cluster domain>`, the value of the label `destination_service`.
    pub hostname: Arc<str>,
    /// `spec.clusterIPs`; empty for a headless service.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub algorithm: Algorithm,
    /// `spec.trafficDistribution`: which endpoints are preferred.
    pub scope: Scope,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServicePort {
    pub port: u16,
    pub name: Arc<str>,
    /// `appProtocol`, as written.
    pub app_protocol: Option<Arc<str>>,
    /// All endpoints of all slices, whether ready or not, ordered by address.
    pub endpoints: Vec<Endpoint>,
}

/// Which workload is behind it, `Snapshot::workload_at` says: a pod that changes must not change its services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// `conditions.ready` (absent means ready). Only ready endpoints get new connections, unless none is ready and
    /// some are `serving`.
    pub ready: bool,
    pub serving: bool,
    pub locality: Arc<Locality>,
    pub node: Option<Arc<str>>,
}

/// How one of several equal endpoints is chosen for a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    #[default]
    RoundRobin,
    Random,
    LeastConnections,
}

/// Which endpoints are preferred; the next wider circle is used only where a circle has none that is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    #[default]
    Anywhere,
    /// `PreferSameZone`, and its older name `PreferClose`: same zone, then same region, then anywhere.
    SameZone,
    /// `PreferSameNode`: same node, then as `SameZone`.
    SameNode,
}

impl Service {
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == port)
    }

    pub fn is_headless(&self) -> bool {
        self.addresses.is_empty()
    }
}
