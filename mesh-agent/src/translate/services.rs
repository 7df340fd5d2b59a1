//! Services and what is behind them. In two steps, since policies ask which pods are behind a service before the
//! workloads are made that its endpoints point to: drafts first, then the model.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::kubernetes::{EndpointSlice, Kind, Port, Service, TargetPort};
use super::report::selects;
use super::workloads::{Member, Places};
use super::{In, Objects, Settings, problem};
use crate::model::{self, Endpoint, Locality, Problem, ServicePort, Severity, Workload};

/// A service whose endpoints do not yet point to workloads.
pub(super) struct Draft<'a> {
    service: &'a Service,
    hostname: Arc<str>,
    addresses: Vec<IpAddr>,
    /// Beside each port of the service.
    endpoints: Vec<BTreeMap<SocketAddr, Endpoint>>,
}

impl Draft<'_> {
    pub fn is_named(&self, namespace: &str, name: &str) -> bool {
        self.service.namespace == namespace && self.service.name == name
    }

    pub fn backends(&self) -> impl Iterator<Item = IpAddr> {
        self.endpoints.iter().flat_map(|port| port.keys()).map(SocketAddr::ip)
    }
}

pub(super) fn drafts<'a>(
    settings: &Settings,
    all: &Objects<'a>,
    members: &[Member<'a>],
    places: &Places<'_>,
    problems: &mut Vec<Problem>,
) -> Vec<Draft<'a>> {
    let mut slices: HashMap<(&str, &str), Vec<&EndpointSlice>> = HashMap::new();
    for slice in &all.slices {
        if let Some(service) = &slice.is.service {
            slices.entry((&slice.is.namespace, service)).or_default().push(slice.is);
        }
    }
    let addresses = virtual_addresses(all, problems);
    let mut drafts = Vec::new();
    for (service, addresses) in all.services.iter().zip(addresses) {
        let Some(addresses) = addresses else { continue };
        let s = service.is;
        let endpoints = match slices.get(&(s.namespace.as_str(), s.name.as_str())) {
            Some(slices) => from_slices(service, slices, places, problems),
            None if settings.endpoints_from_pods && !s.selector.is_empty() => from_pods(s, members, places),
            None => s.ports.iter().map(|_| BTreeMap::new()).collect(),
        };
        let hostname = format!("{}.{}.svc.{}", s.name, s.namespace, settings.cluster_domain).into();
        drafts.push(Draft { service: s, hostname, addresses, endpoints });
    }
    drafts
}

/// Beside each service its addresses, `None` for those that are no services of the mesh. The oldest keeps an address
/// that two claim: the newer one is more likely the mistake.
fn virtual_addresses(all: &Objects<'_>, problems: &mut Vec<Problem>) -> Vec<Option<Vec<IpAddr>>> {
    let mut order: Vec<_> = (0..all.services.len()).collect();
    order.sort_by_key(|&i| {
        let s = all.services[i].is;
        (s.created.is_none(), s.created.as_deref(), &s.namespace, &s.name)
    });
    let mut owners: HashMap<IpAddr, &Service> = HashMap::new();
    let mut result = vec![None; all.services.len()];
    for i in order {
        let service = &all.services[i];
        let Kind::Addresses(addresses) = &service.is.kind else { continue };
        let mut own = Vec::new();
        for &ip in addresses {
            let owner = *owners.entry(ip).or_insert(service.is);
            if std::ptr::eq(owner, service.is) {
                own.push(ip);
                continue;
            }
            let message = format!(
                "Service {}/{} has the address {ip} too and counts: give each an address of its own",
                owner.namespace, owner.name
            );
            problems.push(problem(Severity::Warning, service.at, "spec.clusterIP", message));
        }
        result[i] = Some(own);
    }
    result
}

fn from_slices(
    service: &In<'_, Service>,
    slices: &[&EndpointSlice],
    places: &Places<'_>,
    problems: &mut Vec<Problem>,
) -> Vec<BTreeMap<SocketAddr, Endpoint>> {
    let s = service.is;
    let mut found: Vec<BTreeMap<SocketAddr, Endpoint>> = Vec::with_capacity(s.ports.len());
    for (i, port) in s.ports.iter().enumerate() {
        let mut endpoints = BTreeMap::new();
        for slice in slices {
            for (_, number) in slice.ports.iter().filter(|(name, _)| *name == port.name) {
                for backend in &slice.endpoints {
                    let (node, zone) = (backend.node.as_deref(), backend.zone.as_deref());
                    let endpoint = Endpoint {
                        address: SocketAddr::new(backend.address, *number),
                        ready: backend.ready || s.publish_not_ready,
                        serving: backend.serving || s.publish_not_ready,
                        locality: locality(node, zone, places),
                        node: node.map(Into::into),
                        workload: None,
                    };
                    insert(&mut endpoints, endpoint);
                }
            }
        }
        let has_backends = slices.iter().any(|slice| !slice.endpoints.is_empty() && !slice.ports.is_empty());
        if has_backends && !slices.iter().any(|slice| slice.ports.iter().any(|(name, _)| *name == port.name)) {
            let name = if port.name.is_empty() { "without a name".into() } else { format!("`{}`", port.name) };
            let message = format!(
                "no EndpointSlice of the service has a port {name}, so it has no endpoints: name the ports alike"
            );
            problems.push(problem(Severity::Warning, service.at, &format!("spec.ports[{i}].name"), message));
        }
        found.push(endpoints);
    }
    found
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
fn from_pods(service: &Service, members: &[Member<'_>], places: &Places<'_>) -> Vec<BTreeMap<SocketAddr, Endpoint>> {
    let behind: Vec<_> = members
        .iter()
        .filter(|m| m.pod.namespace == service.namespace && selects(&service.selector, &m.pod.labels))
        .collect();
    let number = |port: &Port, member: &Member<'_>| match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => member.pod.named_ports.iter().find(|(n, _)| n == name).map(|(_, number)| *number),
    };
    // A service of one family has endpoints of that one.
    let has_family = |ip: &IpAddr| match &service.kind {
        Kind::Addresses(own) if !own.is_empty() => own.iter().any(|a| a.is_ipv4() == ip.is_ipv4()),
        Kind::Addresses(_) | Kind::ExternalName => true,
    };
    let endpoints = |port: &Port| {
        let mut endpoints = BTreeMap::new();
        for member in &behind {
            let Some(number) = number(port, member) else { continue };
            let pod = member.pod;
            let node = Some(pod.node.as_str()).filter(|n| !n.is_empty());
            for ip in member.addresses.iter().copied().filter(has_family) {
                let endpoint = Endpoint {
                    address: SocketAddr::new(ip, number),
                    ready: (pod.ready && !pod.terminating) || service.publish_not_ready,
                    serving: pod.ready || service.publish_not_ready,
                    locality: locality(node, None, places),
                    node: node.map(Into::into),
                    workload: None,
                };
                insert(&mut endpoints, endpoint);
            }
        }
        endpoints
    };
    service.ports.iter().map(endpoints).collect()
}

/// The slice knows the zone, only the node knows the region.
fn locality(node: Option<&str>, zone: Option<&str>, places: &Places<'_>) -> Locality {
    let of_node = node.and_then(|n| places.get(n)).copied().cloned().unwrap_or_default();
    match zone {
        Some(zone) if *of_node.zone != *zone => Locality { zone: zone.into(), ..of_node },
        _ => of_node,
    }
}

pub(super) fn build(drafts: Vec<Draft<'_>>, workloads: &[Arc<Workload>]) -> Vec<Arc<model::Service>> {
    let by_address: HashMap<IpAddr, &Arc<Workload>> =
        workloads.iter().flat_map(|w| w.addresses.iter().map(move |a| (*a, w))).collect();
    let mut names: BTreeSet<Arc<str>> = BTreeSet::new();
    let mut shared = |text: &str| -> Arc<str> {
        if let Some(known) = names.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        names.insert(new.clone());
        new
    };
    let mut services = Vec::with_capacity(drafts.len());
    for Draft { service, hostname, addresses, endpoints } in drafts {
        let mut ports = Vec::with_capacity(service.ports.len());
        for (port, endpoints) in service.ports.iter().zip(endpoints) {
            let endpoints = endpoints.into_values().map(|mut e| {
                e.workload = by_address.get(&e.address.ip()).map(|w| Arc::clone(w));
                e
            });
            ports.push(ServicePort {
                port: port.port,
                name: shared(&port.name),
                app_protocol: port.app_protocol.as_deref().map(&mut shared),
                endpoints: endpoints.collect(),
            });
        }
        services.push(Arc::new(model::Service {
            name: shared(&service.name),
            namespace: shared(&service.namespace),
            hostname,
            addresses,
            ports,
            algorithm: service.algorithm,
            scope: service.scope,
        }));
    }
    services
}
