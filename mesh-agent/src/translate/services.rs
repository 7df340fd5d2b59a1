//! Services and what is behind them.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::hosts::Host;
use super::kubernetes::{self, Kind, Port, Service, TargetPort};
use super::mesh::{Changes, Nodes, Surroundings};
use super::problem;
use super::report::selects;
use super::texts::{Name, Spot, Texts};
use super::workloads::Pods;
use crate::model::{self, Endpoint, Few, Problem, ServicePort, Severity};

/// An EndpointSlice, as it is kept.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slice {
    /// A slice without one belongs to nobody that we know.
    service: Option<Name>,
    ports: Vec<(Arc<str>, u16)>,
    endpoints: Box<[Backend]>,
}

#[derive(Debug, PartialEq, Eq)]
struct Backend {
    address: IpAddr,
    ready: bool,
    serving: bool,
    spot: Arc<Spot>,
}

impl Slice {
    pub fn new(slice: &kubernetes::EndpointSlice, texts: &mut Texts) -> Self {
        let kubernetes::EndpointSlice { namespace, service, ports, endpoints } = slice;
        let service = service.as_ref().map(|name| (texts.text(namespace), texts.text(name)));
        let ports = ports.iter().map(|(name, number)| (texts.text(name), *number)).collect();
        let backend = |b: &kubernetes::Backend| Backend {
            address: b.address,
            ready: b.ready,
            serving: b.serving,
            spot: {
                let (zone, node) = (b.zone.as_deref(), b.node.as_deref());
                let spot = Spot { zone: zone.map(|zone| texts.text(zone)), node: node.map(|node| texts.text(node)) };
                texts.spot(spot)
            },
        };
        Self { service, ports, endpoints: endpoints.iter().map(backend).collect() }
    }
}

/// The oldest keeps an address that two claim: the newer one is more likely the mistake.
#[derive(Debug, Clone)]
struct ByAge(Arc<Service>);

impl ByAge {
    fn age(&self) -> impl Ord {
        let s = &*self.0;
        (s.created.is_none(), s.created.as_deref(), &s.namespace, &s.name)
    }

    fn key(&self) -> Name {
        (self.0.namespace.as_str().into(), self.0.name.as_str().into())
    }
}

impl Ord for ByAge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.age().cmp(&other.age())
    }
}

impl PartialOrd for ByAge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByAge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for ByAge {}

/// All Services and EndpointSlices, and the model's services that were made of them.
#[derive(Default)]
pub(super) struct Services {
    all: BTreeMap<Name, Known>,
    slices: BTreeMap<Name, Slice>,
    /// The names of a service's slices, in its namespace.
    slices_of: BTreeMap<Name, BTreeSet<Arc<str>>>,
    addresses: HashMap<IpAddr, Few<ByAge>>,
    /// Those of which something else may become. Before anything was made it is of no account, and all are meant.
    due: BTreeSet<Name>,
    made: bool,
    /// Of Services that are gone since `make`.
    gone: BTreeMap<Name, Arc<model::Service>>,
    problems: BTreeMap<Name, Vec<Problem>>,
}

struct Known {
    service: Arc<Service>,
    made: Option<Arc<model::Service>>,
}

impl Services {
    /// Says whether anything is different now.
    pub fn set(&mut self, key: Name, service: Option<Service>) -> bool {
        let before = self.all.get_mut(&key);
        if before.as_ref().map(|k| &*k.service) == service.as_ref() {
            return false;
        }
        if let Some(before) = before.map(|k| k.service.clone()) {
            for ip in before.kind.addresses() {
                if let Some(few) = Few::without(self.addresses.remove(ip), &ByAge(before.clone())) {
                    self.due.extend(few.as_slice().iter().map(ByAge::key));
                    self.addresses.insert(*ip, few);
                }
            }
        }
        match service.map(Arc::new) {
            Some(service) => {
                for ip in service.kind.addresses() {
                    let few = self.addresses.remove(ip);
                    self.due.extend(few.iter().flat_map(Few::as_slice).map(ByAge::key));
                    self.addresses.insert(*ip, Few::with(few, ByAge(service.clone())));
                }
                let made = self.all.remove(&key).and_then(|k| k.made).or_else(|| self.gone.remove(&key));
                self.all.insert(key.clone(), Known { service, made });
            }
            None => {
                let made = self.all.remove(&key).and_then(|k| k.made);
                self.gone.extend(made.map(|made| (key.clone(), made)));
            }
        }
        self.due.insert(key);
        true
    }

    pub fn set_slice(&mut self, key: Name, slice: Option<Slice>) {
        if self.slices.get(&key) == slice.as_ref() {
            return;
        }
        if let Some(service) = self.slices.get(&key).and_then(|s| s.service.clone()) {
            if let Some(of) = self.slices_of.get_mut(&service) {
                of.remove(&key.1);
                if of.is_empty() {
                    self.slices_of.remove(&service);
                }
            }
            self.due.insert(service);
        }
        if let Some(service) = slice.as_ref().and_then(|s| s.service.clone()) {
            self.slices_of.entry(service.clone()).or_default().insert(key.1.clone());
            self.due.insert(service);
        }
        match slice {
            Some(slice) => self.slices.insert(key, slice),
            None => self.slices.remove(&key),
        };
    }

    /// A Service as it is written.
    pub fn written(&self, name: &Name) -> Option<&Service> {
        self.all.get(name).map(|known| &*known.service)
    }

    /// A Service as it is in the model.
    pub fn made(&self, name: &Name) -> Option<Arc<model::Service>> {
        self.all.get(name).and_then(|known| known.made.clone())
    }

    /// Those that a host means.
    pub fn of_host<'a>(&'a self, host: &'a Host, domain: &'a str) -> Box<dyn Iterator<Item = &'a Name> + 'a> {
        match host {
            Host::Service(name) => Box::new(self.all.get_key_value(name).map(|(name, _)| name).into_iter()),
            Host::Foreign(_) | Host::Below(_) => Box::new(self.all.keys().filter(|name| host.holds_for(name, domain))),
        }
    }

    pub fn has(&self, name: &Name) -> bool {
        self.all.contains_key(name)
    }

    pub fn has_slice(&self, name: &Name) -> bool {
        self.slices.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.all.keys()
    }

    pub fn slice_names(&self) -> impl Iterator<Item = &Name> {
        self.slices.keys()
    }

    pub fn due_on_node(&mut self, node: &str) {
        if !self.made {
            return;
        }
        let on_node = |slice: &&Slice| slice.endpoints.iter().any(|b| b.spot.node.as_deref() == Some(node));
        self.due.extend(self.slices.values().filter(on_node).filter_map(|s| s.service.clone()));
    }

    pub fn all_due(&mut self) {
        self.due.extend(self.all.keys().cloned());
    }

    /// Makes those that are due, and tells their names.
    pub fn make(
        &mut self,
        around: &Surroundings<'_>,
        pods: &Pods,
        texts: &mut Texts,
        changes: &mut Changes,
    ) -> BTreeSet<Name> {
        if !self.made {
            self.all_due();
            self.made = true;
        }
        let due = std::mem::take(&mut self.due);
        for name in &due {
            changes.problems |= self.problems.remove(name).is_some();
            let Some(known) = self.all.get(name) else { continue };
            let mut problems = Vec::new();
            let new = self.service(name, &known.service, around, pods, texts, &mut problems);
            if !problems.is_empty() {
                self.problems.insert(name.clone(), problems);
                changes.problems = true;
            }
            if known.made.as_deref() == new.as_ref() {
                continue;
            }
            let new = new.map(Arc::new);
            let known = self.all.get_mut(name).expect("it was there");
            changes.old_services.extend(std::mem::replace(&mut known.made, new.clone()));
            changes.new_services.extend(new);
        }
        changes.old_services.extend(std::mem::take(&mut self.gone).into_values());
        due
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<model::Service>> {
        self.all.values().filter_map(|k| k.made.as_ref())
    }

    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// The addresses behind a service.
    pub fn behind(&self, namespace: &str, name: &str) -> BTreeSet<IpAddr> {
        let made = self.all.get(&(namespace.into(), name.into())).and_then(|k| k.made.as_ref());
        made.into_iter().flat_map(|s| &s.ports).flat_map(|p| &p.endpoints).map(|e| e.address.ip()).collect()
    }

    /// `None` for what is no service of the mesh.
    fn service(
        &self,
        name: &Name,
        service: &Arc<Service>,
        around: &Surroundings<'_>,
        pods: &Pods,
        texts: &mut Texts,
        problems: &mut Vec<Problem>,
    ) -> Option<model::Service> {
        let Kind::Addresses(claimed) = &service.kind else { return None };
        let at = || around.sites.of("Service", &service.namespace, &service.name);
        let mut addresses = Vec::new();
        for ip in claimed {
            let owner = self.addresses.get(ip).map(|few| &few.first().0).filter(|owner| !Arc::ptr_eq(owner, service));
            let Some(owner) = owner else {
                addresses.push(*ip);
                continue;
            };
            let message = format!(
                "Service {}/{} has the address {ip} too and counts: give each an address of its own",
                owner.namespace, owner.name
            );
            problems.push(problem(Severity::Warning, &at(), "spec.clusterIP", message));
        }
        let slices: Vec<&Slice> = match self.slices_of.get(name) {
            Some(names) => names.iter().filter_map(|n| self.slices.get(&(name.0.clone(), n.clone()))).collect(),
            None => Vec::new(),
        };
        let from_pods = slices.is_empty() && around.settings.endpoints_from_pods && !service.selector.is_empty();
        let mut ports = Vec::with_capacity(service.ports.len());
        for port in &service.ports {
            let endpoints = match from_pods {
                true => endpoints_of_pods(service, port, around, pods),
                false => endpoints_of_slices(service, port, &slices, around.nodes, texts),
            };
            ports.push(ServicePort {
                port: port.port,
                name: texts.text(&port.name),
                app_protocol: port.app_protocol.as_deref().map(|p| texts.text(p)),
                endpoints: endpoints.into_values().collect(),
            });
        }
        for (i, port) in service.ports.iter().enumerate() {
            let has_backends = slices.iter().any(|slice| !slice.endpoints.is_empty() && !slice.ports.is_empty());
            let is_named = slices.iter().any(|slice| slice.ports.iter().any(|(name, _)| **name == *port.name));
            if has_backends && !is_named {
                let name = if port.name.is_empty() { "without a name".into() } else { format!("`{}`", port.name) };
                let message = format!(
                    "no EndpointSlice of the service has a port {name}, so it has no endpoints: name the ports alike"
                );
                problems.push(problem(Severity::Warning, &at(), &format!("spec.ports[{i}].name"), message));
            }
        }
        Some(model::Service {
            name: name.1.clone(),
            namespace: name.0.clone(),
            hostname: format!("{}.{}.svc.{}", service.name, service.namespace, around.settings.cluster_domain).into(),
            addresses,
            ports,
            algorithm: service.algorithm,
            scope: service.scope,
        })
    }
}

fn endpoints_of_slices(
    service: &Service,
    port: &Port,
    slices: &[&Slice],
    nodes: &Nodes,
    texts: &mut Texts,
) -> BTreeMap<SocketAddr, Endpoint> {
    let mut endpoints = BTreeMap::new();
    for slice in slices {
        for (_, number) in slice.ports.iter().filter(|(name, _)| **name == *port.name) {
            for backend in &slice.endpoints {
                let endpoint = Endpoint {
                    address: SocketAddr::new(backend.address, *number),
                    ready: backend.ready || service.publish_not_ready,
                    serving: backend.serving || service.publish_not_ready,
                    locality: nodes.place_in(backend.spot.node.as_deref(), backend.spot.zone.as_ref(), texts),
                    node: backend.spot.node.clone(),
                };
                insert(&mut endpoints, endpoint);
            }
        }
    }
    endpoints
}

/// One address may be in two slices while it moves from one to the other: the healthier word counts, as in kube-proxy.
fn insert(endpoints: &mut BTreeMap<SocketAddr, Endpoint>, endpoint: Endpoint) {
    use std::collections::btree_map::Entry;
    match endpoints.entry(endpoint.address) {
        Entry::Vacant(free) => {
            free.insert(endpoint);
        }
        Entry::Occupied(mut known) => {
            let health = |e: &Endpoint| (e.ready, e.serving);
            if health(&endpoint) > health(known.get()) {
                known.insert(endpoint);
            }
        }
    }
}

/// What the endpoints controller of Kubernetes would write.
fn endpoints_of_pods(
    service: &Service,
    port: &Port,
    around: &Surroundings<'_>,
    pods: &Pods,
) -> BTreeMap<SocketAddr, Endpoint> {
    // A service of one family has endpoints of that one.
    let has_family = |ip: &IpAddr| match service.kind.addresses() {
        [] => true,
        own => own.iter().any(|a| a.is_ipv4() == ip.is_ipv4()),
    };
    let mut endpoints = BTreeMap::new();
    for (pod, addresses) in pods.addressed(&service.namespace, around.settings) {
        let Some(own) = pod.own.as_ref().filter(|own| selects(&service.selector, &own.labels)) else { continue };
        let number = match &port.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => own.named_ports.iter().find(|(n, _)| n == name).map(|(_, number)| *number),
        };
        let Some(number) = number else { continue };
        for ip in addresses.into_iter().filter(has_family) {
            let endpoint = Endpoint {
                address: SocketAddr::new(ip, number),
                ready: (own.ready && !pod.terminating) || service.publish_not_ready,
                serving: own.ready || service.publish_not_ready,
                locality: around.nodes.place(&pod.node),
                node: Some(pod.node.clone()).filter(|n| !n.is_empty()),
            };
            insert(&mut endpoints, endpoint);
        }
    }
    endpoints
}

const HTTP: [&str; 6] = ["http", "http2", "grpc", "grpc-web", "kubernetes.io/h2c", "kubernetes.io/ws"];
/// Names, or begins of names before a dash, by which Istio knows what a port speaks.
const OTHERS: [&str; 8] = ["tcp", "tls", "https", "mongo", "mysql", "redis", "udp", "postgres"];

/// What a port is declared to speak, if that is no HTTP that can be read. One that says nothing is taken for HTTP by the
/// rules that are made for it.
pub(super) fn other_protocol(port: &Port) -> Option<&str> {
    if let Some(protocol) = port.app_protocol.as_deref().filter(|p| !p.is_empty()) {
        return (!HTTP.iter().any(|http| protocol.eq_ignore_ascii_case(http))).then_some(protocol);
    }
    let name = port.name.split('-').next().unwrap_or_default();
    OTHERS.contains(&name).then_some(name)
}

/// Why rules for a Service are never asked, where that is so.
pub(super) fn past(service: &Service) -> Option<&'static str> {
    match &service.kind {
        Kind::ExternalName => Some("is an ExternalName, which is no service of the mesh"),
        Kind::Addresses(addresses) if addresses.is_empty() => Some("has no address, and its pods are called at theirs"),
        Kind::Addresses(_) => None,
    }
}
