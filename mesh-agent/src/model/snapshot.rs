//! Everything the data path knows, indexed by address; swapped as one `Arc`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use super::few::Few;
use super::http::HttpRoutes;
use super::traffic::Destinations;
use super::{Service, SharedMap, TrustDomain, Workload};

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
    pub http: Vec<(ServiceKey, Arc<HttpRoutes>)>,
    pub traffic: Vec<(ServiceKey, Arc<Destinations>)>,
}

/// A port of a service that rules speak of, whether or not there is such a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub port: u16,
}

impl ServiceKey {
    pub fn new((namespace, name): &(Arc<str>, Arc<str>), port: u16) -> Self {
        Self { namespace: namespace.clone(), name: name.clone(), port }
    }
}

/// The configuration in force. Two snapshots are equal when they mean the same, whatever their generation.
#[derive(Debug, Clone)]
pub struct Snapshot {
    generation: u64,
    settings: MeshSettings,
    workloads: SharedMap<Arc<str>, Arc<Workload>>,
    /// Of them, those that are judged here.
    judged: SharedMap<Arc<str>, Arc<Workload>>,
    services: SharedMap<(Arc<str>, Arc<str>), Arc<Service>>,
    by_address: SharedMap<IpAddr, Arc<Workload>>,
    by_vip: SharedMap<IpAddr, Arc<Service>>,
    /// Endpoint address -> the services that name it, by namespace and name.
    by_endpoint: SharedMap<SocketAddr, Few<ByName>>,
    http: SharedMap<ServiceKey, Arc<HttpRoutes>>,
    traffic: SharedMap<ServiceKey, Arc<Destinations>>,
}

/// A service in the order of namespace and name, which also tells it from others.
#[derive(Debug, Clone)]
struct ByName(Arc<Service>);

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
        let SnapshotParts { settings, workloads, services, http, traffic } = parts;
        let mut snapshot = Self {
            generation,
            settings,
            workloads: SharedMap::default(),
            judged: SharedMap::default(),
            services: SharedMap::default(),
            by_address: SharedMap::default(),
            by_vip: SharedMap::default(),
            by_endpoint: SharedMap::default(),
            http: SharedMap::default(),
            traffic: SharedMap::default(),
        };
        workloads.into_iter().for_each(|w| snapshot.insert_workload(w));
        services.into_iter().for_each(|s| snapshot.insert_service(s));
        http.into_iter().for_each(|(key, routes)| snapshot.set_http(key, Some(routes)));
        traffic.into_iter().for_each(|(key, destinations)| snapshot.set_traffic(key, Some(destinations)));
        snapshot
    }

    /// A copy to be changed, of the generation that comes next. It shares what does not change.
    pub fn next(&self, settings: MeshSettings) -> Self {
        Self { generation: self.generation + 1, settings, ..self.clone() }
    }

    pub fn insert_workload(&mut self, workload: Arc<Workload>) {
        for address in &*workload.addresses {
            self.by_address.insert(address.to_canonical(), workload.clone());
        }
        if workload.rules.is_some() {
            self.judged.insert(workload.uid.clone(), workload.clone());
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    /// Takes it out wherever this very version of it stands.
    pub fn remove_workload(&mut self, workload: &Arc<Workload>) {
        let is_it = |found: Option<&Arc<Workload>>| found.is_some_and(|w| Arc::ptr_eq(w, workload));
        for address in workload.addresses.iter().map(IpAddr::to_canonical) {
            if is_it(self.by_address.get(&address)) {
                self.by_address.remove(&address);
            }
        }
        for map in [&mut self.workloads, &mut self.judged] {
            if is_it(map.get(&workload.uid)) {
                map.remove(&workload.uid);
            }
        }
    }

    pub fn insert_service(&mut self, service: Arc<Service>) {
        for address in &service.addresses {
            self.by_vip.insert(address.to_canonical(), service.clone());
        }
        for endpoint in service.ports.iter().flat_map(|p| &p.endpoints) {
            self.by_endpoint.change(endpoint.address, |few| Some(Few::with(few, ByName(service.clone()))));
        }
        self.services.insert((service.namespace.clone(), service.name.clone()), service);
    }

    /// Takes it out wherever this very version of it stands.
    pub fn remove_service(&mut self, service: &Arc<Service>) {
        let is_it = |found: Option<&Arc<Service>>| found.is_some_and(|s| Arc::ptr_eq(s, service));
        for address in service.addresses.iter().map(IpAddr::to_canonical) {
            if is_it(self.by_vip.get(&address)) {
                self.by_vip.remove(&address);
            }
        }
        let by_name = ByName(service.clone());
        for endpoint in service.ports.iter().flat_map(|p| &p.endpoints) {
            self.by_endpoint.change(endpoint.address, |few| Few::without(few, &by_name));
        }
        let key = (service.namespace.clone(), service.name.clone());
        if is_it(self.services.get(&key)) {
            self.services.remove(&key);
        }
    }

    /// From now on these rules hold for a port of a service, or none.
    pub fn set_http(&mut self, key: ServiceKey, routes: Option<Arc<HttpRoutes>>) {
        match routes {
            Some(routes) => self.http.insert(key, routes),
            None => self.http.remove(&key),
        }
    }

    /// What holds for HTTP to a port of a service.
    pub fn http(&self, key: &ServiceKey) -> Option<&Arc<HttpRoutes>> {
        self.http.get(key)
    }

    /// From now on these hold for a port of a service, or none.
    pub fn set_traffic(&mut self, key: ServiceKey, destinations: Option<Arc<Destinations>>) {
        match destinations {
            Some(destinations) => self.traffic.insert(key, destinations),
            None => self.traffic.remove(&key),
        }
    }

    /// How the endpoints of a service's port are shared out.
    pub fn traffic(&self, key: &ServiceKey) -> Option<&Arc<Destinations>> {
        self.traffic.get(key)
    }

    /// The ports that have rules for HTTP, in no order.
    pub fn http_ports(&self) -> impl Iterator<Item = (&ServiceKey, &Arc<HttpRoutes>)> {
        self.http.iter()
    }

    /// The ports whose endpoints are shared out by rules, in no order.
    pub fn traffic_ports(&self) -> impl Iterator<Item = (&ServiceKey, &Arc<Destinations>)> {
        self.traffic.iter()
    }

    /// The mesh before anything is known: no workload, no service.
    pub fn empty(settings: MeshSettings) -> Self {
        Self::new(
            0,
            SnapshotParts {
                settings,
                workloads: Vec::new(),
                services: Vec::new(),
                http: Vec::new(),
                traffic: Vec::new(),
            },
        )
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

    /// In no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Those that have rules: a node has a hundred of them where the mesh has a hundred thousand workloads.
    pub fn judged(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.judged.values()
    }

    pub fn count_services(&self) -> usize {
        self.services.len()
    }

    pub fn count_workloads(&self) -> usize {
        self.workloads.len()
    }

    /// In no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn service(&self, namespace: &Arc<str>, name: &Arc<str>) -> Option<&Arc<Service>> {
        self.services.get(&(namespace.clone(), name.clone()))
    }

    /// The service that has `address` among its endpoints, for telemetry.
    pub fn service_of_endpoint(&self, address: SocketAddr) -> Option<&Arc<Service>> {
        self.by_endpoint.get(&address).map(|few| &few.first().0)
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
                service: self.service_of_endpoint(SocketAddr::new(ip, destination.port())).cloned(),
            },
            None => Target::Outside,
        }
    }
}

impl PartialEq for Snapshot {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings
            && self.workloads == other.workloads
            && self.services == other.services
            && self.http == other.http
            && self.traffic == other.traffic
    }
}

impl ByName {
    fn key(&self) -> (&str, &str) {
        (&self.0.namespace, &self.0.name)
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for ByName {}

impl PartialOrd for ByName {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ByName {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}
