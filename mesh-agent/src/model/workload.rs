//! A workload: one pod (or machine) that sends and receives traffic.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::{Rules, SpiffeId};

/// A pod's labels.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// One pod, with all that a connection from or to it needs to know. A mesh has many: what repeats is shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Stable over the pod's life and never used again: `metadata.uid`, or `namespace/name` where a manifest has none.
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub identity: SpiffeId,
    /// `status.podIPs`; at most one of each family is used as the pod's own address.
    pub addresses: Arc<[IpAddr]>,
    /// `spec.nodeName`.
    pub node: Arc<str>,
    pub locality: Arc<Locality>,
    /// How other nodes reach it.
    pub transport: Transport,
    /// Whether a manifest says so: its own label or a Namespace. Without either it is outside, but only for want of better.
    pub mode_is_said: bool,
    /// Set by the annotation `nodemesh.io/netns`: where the pod's network namespace is, in standalone mode.
    pub netns: Option<Arc<Path>>,
    /// By which connections *to* it are judged. `None` where another node does that: nothing is let in by it here.
    pub rules: Option<Arc<Rules>>,
    /// Of a workload of this node: what its requests are told apart by.
    pub labels: Option<Arc<Labels>>,
    pub names: Arc<Names>,
    pub cluster: Arc<str>,
}

/// Names for metrics and logs, from labels and owners as Istio derives them. `unknown` where there is none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Names {
    /// Of what made the pod, such as its Deployment.
    pub workload: Arc<str>,
    pub app: Arc<str>,
    pub version: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
}

/// How a workload is reached from another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// It is in the mesh: mutual TLS to port 15008 of the pod, always. Never downgraded to plaintext.
    Hbone,
    /// It is not in the mesh: plain TCP.
    Plain,
}

/// Where a workload is, from the node's `topology.kubernetes.io` labels. An empty text means not known.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
}

impl Workload {
    /// Its address in the family of `other`, if it has one.
    pub fn address_like(&self, other: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|a| a.is_ipv4() == other.is_ipv4())
    }

    pub fn is_on(&self, node: &str) -> bool {
        &*self.node == node
    }
}
