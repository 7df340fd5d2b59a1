//! DestinationRules become what holds for the ports of services, and for whose connections.
//!
//! For clients of a namespace, the rules of that namespace count; where none of them is for the service, those of the service's
//! own namespace that are visible to the client; else those of the root namespace. Of these the most special host counts.
//! Rules for one host in one namespace are taken together, the oldest first, as Istio does.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::hosts::{ByHost, Host};
use super::istio::{DestinationRule, Policy};
use super::mesh::{Changes, Sites};
use super::services::Services;
use super::texts::Name;
use super::workloads::Pods;
use super::{Settings, problem};
use crate::model::traffic::{Destination, Destinations, Subset};
use crate::model::{ObjectRef, Problem, Service, ServiceKey, ServicePort, Severity};

#[derive(Default)]
pub(super) struct Traffic {
    all: BTreeMap<Name, Known>,
    by_host: ByHost,
    /// Hosts of which other rules hold than before.
    due_hosts: BTreeSet<Host>,
    made: BTreeMap<Name, Made>,
    /// Services with subsets, by the addresses of their endpoints.
    by_address: HashMap<IpAddr, BTreeSet<Name>>,
    /// Whether a Problem has gone with its rule.
    problem_gone: bool,
}

struct Known {
    rule: Arc<DestinationRule>,
    host: Host,
    problem: Option<Problem>,
}

#[derive(Default)]
struct Made {
    ports: BTreeMap<u16, Arc<Destinations>>,
    /// Of the endpoints whose pods' labels count.
    addresses: BTreeSet<IpAddr>,
    problems: Vec<Problem>,
}

/// The rules for one host in one namespace, the oldest first. Never empty.
type Joined<'a> = Vec<&'a DestinationRule>;

impl Traffic {
    pub fn set(&mut self, name: Name, rule: Option<Arc<DestinationRule>>, settings: &Settings) {
        let before = self.all.get(&name);
        if before.map(|known| &known.rule) == rule.as_ref() {
            return;
        }
        if let Some(Known { rule: _, host, problem }) = self.all.remove(&name) {
            self.by_host.remove(&host, &name);
            self.problem_gone |= problem.is_some();
            self.due_hosts.insert(host);
        }
        if let Some(rule) = rule {
            let host = Host::read(&rule.host, &rule.namespace, &settings.cluster_domain);
            self.by_host.insert(&host, &name);
            self.due_hosts.insert(host.clone());
            self.all.insert(name, Known { rule, host, problem: None });
        }
    }

    /// The settings are others.
    pub fn all_due(&mut self, settings: &Settings) {
        for (name, Known { rule, host, problem: _ }) in &mut self.all {
            self.by_host.remove(host, name);
            self.due_hosts.insert(host.clone());
            *host = Host::read(&rule.host, &rule.namespace, &settings.cluster_domain);
            self.by_host.insert(host, name);
            self.due_hosts.insert(host.clone());
        }
    }

    pub fn has(&self, name: &Name) -> bool {
        self.all.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.all.keys()
    }

    /// What holds for the ports of a service.
    pub fn of(&self, service: &Name, port: u16) -> Option<&Arc<Destinations>> {
        self.made.get(service)?.ports.get(&port)
    }

    /// All that was made, by service and port.
    pub fn destinations(&self) -> impl Iterator<Item = (ServiceKey, Arc<Destinations>)> {
        self.made.iter().flat_map(|(name, made)| {
            made.ports.iter().map(|(port, all)| (ServiceKey::new(name, *port), all.clone())).collect::<Vec<_>>()
        })
    }

    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let of_rules = self.all.values().filter_map(|known| known.problem.as_ref());
        of_rules.chain(self.made.values().flat_map(|made| &made.problems))
    }

    /// Makes anew what is due, and tells for which services. `changed` are services that may be others than before.
    pub fn make(
        &mut self,
        changed: &BTreeSet<Name>,
        services: &Services,
        pods: &mut Pods,
        (settings, sites): (&Settings, &Sites),
        changes: &mut Changes,
    ) -> BTreeSet<Name> {
        changes.problems |= std::mem::take(&mut self.problem_gone);
        let mut due = BTreeSet::new();
        for address in pods.take_relabelled() {
            due.extend(self.by_address.get(&address).into_iter().flatten().cloned());
        }
        let mut hosts = std::mem::take(&mut self.due_hosts);
        for host in &hosts {
            due.extend(services.of_host(host, &settings.cluster_domain).cloned());
        }
        for service in changed {
            if self.made.contains_key(service) || self.rules_of(service, settings).next().is_some() {
                due.insert(service.clone());
                hosts.insert(Host::of(service));
            }
        }
        for host in hosts {
            self.look_for_service(&host, services, (settings, sites), changes);
        }
        for service in &due {
            let made = services.made(service).map(|made| self.service(service, &made, pods, (settings, sites)));
            self.replace(service, made.unwrap_or_default(), changes);
        }
        due
    }

    /// A rule for a host that there is not holds for nothing.
    fn look_for_service(
        &mut self,
        host: &Host,
        services: &Services,
        (settings, sites): (&Settings, &Sites),
        changes: &mut Changes,
    ) {
        if let Host::Below(_) = host {
            return;
        }
        let is_there = services.of_host(host, &settings.cluster_domain).next().is_some();
        for name in self.by_host.of_host(host) {
            let Some(known) = self.all.get_mut(name) else { continue };
            let problem = (!is_there).then(|| {
                let message = format!(
                    "there is no service `{}`, so that the rule holds for nothing: correct the name, and write that of \
                     another namespace in full",
                    known.rule.host
                );
                let at = sites.of("DestinationRule", &known.rule.namespace, &known.rule.name);
                problem(Severity::Warning, &at, "spec.host", message)
            });
            changes.problems |= problem != known.problem;
            known.problem = problem;
        }
    }

    fn replace(&mut self, service: &Name, mut new: Made, changes: &mut Changes) {
        let old = self.made.remove(service).unwrap_or_default();
        changes.problems |= new.problems != old.problems;
        for address in old.addresses.difference(&new.addresses) {
            if let Some(services) = self.by_address.get_mut(address) {
                services.remove(service);
                if services.is_empty() {
                    self.by_address.remove(address);
                }
            }
        }
        for address in new.addresses.difference(&old.addresses) {
            self.by_address.entry(*address).or_default().insert(service.clone());
        }
        let gone = old.ports.keys().filter(|port| !new.ports.contains_key(port));
        changes.traffic.extend(gone.map(|port| (ServiceKey::new(service, *port), None)));
        for (port, all) in &mut new.ports {
            match old.ports.get(port).filter(|old| *old == all) {
                Some(old) => *all = old.clone(),
                None => changes.traffic.push((ServiceKey::new(service, *port), Some(all.clone()))),
            }
        }
        if !new.ports.is_empty() || !new.problems.is_empty() {
            self.made.insert(service.clone(), new);
        }
    }

    fn rules_of<'a>(
        &'a self,
        service: &'a Name,
        settings: &'a Settings,
    ) -> impl Iterator<Item = (&'a Host, &'a DestinationRule)> {
        let names = self.by_host.of_service(service, &settings.cluster_domain);
        names.filter_map(|(host, name)| Some((host, &*self.all.get(name)?.rule)))
    }

    fn service(&self, name: &Name, service: &Service, pods: &Pods, around: (&Settings, &Sites)) -> Made {
        let (settings, sites) = around;
        let candidates: Vec<_> = self.rules_of(name, settings).collect();
        let mut made = Made::default();
        let general = choose(None, name, &candidates, settings);
        let mut slots: BTreeMap<&Arc<str>, Joined<'_>> = BTreeMap::new();
        for namespace in candidates.iter().flat_map(|(_, rule)| rule.visible.named().chain([&rule.namespace])) {
            let own = choose(Some(namespace), name, &candidates, settings);
            if let Some(own) = own.filter(|own| Some(own) != general.as_ref()) {
                slots.insert(namespace, own);
            }
        }
        for joined in general.iter().chain(slots.values()) {
            problems_of(joined, sites, &mut made.problems);
        }
        made.problems.sort();
        made.problems.dedup();
        for port in &service.ports {
            let mut make = |joined: &Joined<'_>| {
                Arc::new(destination(joined, service, port, |subset, address| {
                    made.addresses.insert(address);
                    pods.at(address).is_some_and(|pod| pod.has_labels(subset))
                }))
            };
            let all = Destinations {
                general: general.as_ref().map(&mut make),
                by_namespace: slots.iter().map(|(namespace, joined)| ((*namespace).clone(), make(joined))).collect(),
            };
            if !all.is_empty() {
                made.ports.insert(port.port, Arc::new(all));
            }
        }
        made
    }
}

/// The rules that hold for clients of a namespace; of `None`, of one that has no rules and is not named by any.
fn choose<'a>(
    client: Option<&Arc<str>>,
    (of_service, _): &Name,
    candidates: &[(&Host, &'a DestinationRule)],
    settings: &Settings,
) -> Option<Joined<'a>> {
    let root = &settings.root_namespace;
    let visible = |rule: &DestinationRule| match client {
        Some(client) => rule.visible.to(client),
        None => rule.visible.is_to_all(),
    };
    let places = [client.filter(|client| *client != root), Some(of_service), Some(root)];
    places.into_iter().flatten().find_map(|place| {
        let here = || candidates.iter().filter(|(_, rule)| rule.namespace == *place && visible(rule));
        let rank = here().map(|(host, _)| host.rank()).max()?;
        let mut joined: Joined<'_> = here().filter(|(host, _)| host.rank() == rank).map(|(_, rule)| *rule).collect();
        joined.sort_by_key(|rule| (Reverse(rule.created.is_some()), &rule.created, &rule.name));
        Some(joined)
    })
}

/// The policy of the first that has one counts for all, and of subsets with one name the first.
fn policy_of<'a>(joined: &Joined<'a>) -> (&'a DestinationRule, &'a Policy) {
    let with_policy = joined.iter().find(|rule| !rule.policy.is_empty());
    let rule = with_policy.unwrap_or(&joined[0]);
    (rule, &rule.policy)
}

fn destination(
    joined: &Joined<'_>,
    service: &Service,
    port: &ServicePort,
    mut selects: impl FnMut(&super::report::Labels, IpAddr) -> bool,
) -> Destination {
    let (_, policy) = policy_of(joined);
    let mut subsets = BTreeMap::new();
    for subset in joined.iter().flat_map(|rule| &rule.subsets) {
        subsets.entry(subset.name.clone()).or_insert_with(|| {
            let mut has = |address| subset.labels.is_empty() || selects(&subset.labels, address);
            let endpoints = port.endpoints.iter().map(|e| (e, has(e.address.ip())));
            let endpoints = endpoints.filter(|(_, has)| *has).map(|(endpoint, _)| endpoint.clone()).collect();
            let port = ServicePort { endpoints, ..port.clone() };
            let policy = Arc::new(policy.of_subset(&subset.policy, port.port));
            let service = Service { ports: vec![port], ..service.clone() };
            Arc::new(Subset { policy, service: Arc::new(service) })
        });
    }
    // Without a file: a rule is the same where its text has moved.
    let DestinationRule { namespace, name, .. } = joined[0];
    let object = ObjectRef {
        file: String::new(),
        kind: "DestinationRule".into(),
        namespace: namespace.to_string(),
        name: name.to_string(),
    };
    Destination { object: Arc::new(object), policy: Arc::new(policy.of_port(port.port)), subsets }
}

/// What does not count of rules for one host, beside an older one.
fn problems_of(joined: &Joined<'_>, sites: &Sites, problems: &mut Vec<Problem>) {
    let (with_policy, _) = policy_of(joined);
    let mut known: BTreeMap<&Arc<str>, &DestinationRule> = BTreeMap::new();
    for rule in joined {
        let at = || sites.of("DestinationRule", &rule.namespace, &rule.name);
        if !rule.policy.is_empty() && !std::ptr::eq(*rule, with_policy) {
            let message = format!(
                "DestinationRule {}/{} is for the same host and older, and its trafficPolicy counts: write all in one",
                with_policy.namespace, with_policy.name
            );
            problems.push(problem(Severity::Warning, &at(), "spec.trafficPolicy", message));
        }
        for (i, subset) in rule.subsets.iter().enumerate() {
            let first = *known.entry(&subset.name).or_insert(rule);
            if std::ptr::eq(first, *rule) {
                continue;
            }
            let message = format!(
                "DestinationRule {}/{} has a subset `{}` for the same host and is older, so that counts: give it another name",
                first.namespace, first.name, subset.name
            );
            problems.push(problem(Severity::Warning, &at(), &format!("spec.subsets[{i}].name"), message));
        }
    }
}
