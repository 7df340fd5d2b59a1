//! Everything the data path knows, indexed by address; swapped as one `Arc`.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use super::{Service, TrustDomain, Workload};

/// Settings of the whole mesh that the data path needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MeshSettings {
    pub trust_domain: TrustDomain,
    pub outbound: OutboundPolicy,
}

/// What happens to connections whose destination is no service or workload of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundPolicy {
    #[default]
    AllowAny,
    RegistryOnly,
}

/// What goes into a snapshot; `Snapshot::new` makes the indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotParts {
    pub settings: MeshSettings,
    pub workloads: Vec<Arc<Workload>>,
    pub services: Vec<Arc<Service>>,
}

/// The configuration in force. Two snapshots are equal when they mean the same, whatever their generation.
#[derive(Debug)]
pub struct Snapshot {
    generation: u64,
    settings: MeshSettings,
    workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    services: BTreeMap<(Arc<str>, Arc<str>), Arc<Service>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    by_vip: HashMap<IpAddr, Arc<Service>>,
    /// Endpoint address -> the service that names it; the first by namespace and name where several do.
    by_endpoint: HashMap<SocketAddr, Arc<Service>>,
}

/// What a destination means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A port of a service with a virtual address: `port` is an index into `service.ports`.
    Service { service: Arc<Service>, port: usize },
    /// The virtual address of a service that has no such port: nothing listens there.
    NoSuchPort { service: Arc<Service> },
    /// A pod, by its own address (headless services end here too). `service` is for telemetry only.
    Workload { workload: Arc<Workload>, service: Option<Arc<Service>> },
    /// Nothing the mesh knows.
    Outside,
}

impl Snapshot {
    /// Later workloads and services win where two claim one address; `translate` has made a Problem of it.
    pub fn new(generation: u64, parts: SnapshotParts) -> Self {
        let SnapshotParts { settings, workloads, services } = parts;
        let by_address =
            workloads.iter().flat_map(|w| w.addresses.iter().map(|a| (a.to_canonical(), w.clone()))).collect();
        let by_vip = services.iter().flat_map(|s| s.addresses.iter().map(|a| (a.to_canonical(), s.clone()))).collect();
        let services: BTreeMap<_, _> =
            services.into_iter().map(|s| ((s.namespace.clone(), s.name.clone()), s)).collect();
        let mut by_endpoint = HashMap::new();
        for service in services.values() {
            for endpoint in service.ports.iter().flat_map(|p| &p.endpoints) {
                by_endpoint.entry(endpoint.address).or_insert_with(|| service.clone());
            }
        }
        let workloads = workloads.into_iter().map(|w| (w.uid.clone(), w)).collect();
        Self { generation, settings, workloads, services, by_address, by_vip, by_endpoint }
    }

    /// The mesh before anything is known: no workload, no service.
    pub fn empty(settings: MeshSettings) -> Self {
        Self::new(0, SnapshotParts { settings, workloads: Vec::new(), services: Vec::new() })
    }

    /// Counts up with each change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn settings(&self) -> &MeshSettings {
        &self.settings
    }

    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The service that has `address` among its endpoints, for telemetry.
    pub fn service_of_endpoint(&self, address: SocketAddr) -> Option<&Arc<Service>> {
        self.by_endpoint.get(&address)
    }

    /// What the destination of a connection means.
    pub fn resolve(&self, destination: SocketAddr) -> Target {
        let ip = destination.ip().to_canonical();
        if let Some(service) = self.by_vip.get(&ip) {
            return match service.ports.iter().position(|p| p.port == destination.port()) {
                Some(port) => Target::Service { service: service.clone(), port },
                None => Target::NoSuchPort { service: service.clone() },
            };
        }
        match self.by_address.get(&ip) {
            Some(workload) => Target::Workload {
                workload: workload.clone(),
                service: self.by_endpoint.get(&SocketAddr::new(ip, destination.port())).cloned(),
            },
            None => Target::Outside,
        }
    }
}

impl PartialEq for Snapshot {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings && self.workloads == other.workloads && self.services == other.services
    }
}
