//! VirtualServices become tables: which rules hold for requests to a port of a service, for the clients of which namespaces.
//!
//! One VirtualService speaks for a service: the one whose host is the most special, then the one that is shown to the fewest
//! (to the client's own namespace alone, to some, to all), then the oldest. Its rules are asked as written. What a table is
//! made of, beside it, are the VirtualServices that it delegates to and the services that it sends to.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::hosts::{ByHost, Host};
use super::istio::{Destination, Route, To, VirtualService};
use super::kubernetes;
use super::mesh::Sites;
use super::services::{Services, other_protocol, past};
use super::texts::Name;
use super::traffic::Traffic;
use super::{Settings, problem};
use crate::model::http::{Action, RouteTable, Target};
use crate::model::{Problem, Severity};

#[derive(Default)]
pub(super) struct VirtualServices {
    all: BTreeMap<Name, Known>,
    by_host: ByHost,
    by_destination: ByHost,
    /// Those that delegate to one.
    by_delegate: BTreeMap<Name, BTreeSet<Name>>,
    /// Those that are others than before, or depend on what is.
    due: BTreeSet<Name>,
    due_hosts: BTreeSet<Host>,
    compiled: BTreeMap<(Name, u16), Compiled>,
    made: BTreeMap<Name, Made>,
    problem_gone: bool,
}

struct Known {
    service: Arc<VirtualService>,
    hosts: Vec<Host>,
    destinations: BTreeSet<Host>,
    problems: Vec<Problem>,
}

#[derive(Clone)]
struct Compiled {
    table: Arc<RouteTable>,
    problems: Vec<Problem>,
}

#[derive(Default)]
struct Made {
    ports: BTreeMap<u16, Slots>,
    problems: Vec<Problem>,
}

/// What VirtualServices say for one port, as `HttpRoutes` has it.
#[derive(Default, PartialEq)]
pub(super) struct Slots {
    pub general: Option<Held>,
    pub by_namespace: BTreeMap<Arc<str>, Held>,
}

#[derive(PartialEq)]
pub(super) struct Held {
    pub table: Arc<RouteTable>,
    /// Whose it is.
    pub owner: Name,
}

/// What tables are made with, beside VirtualServices.
pub(super) struct Around<'a> {
    pub settings: &'a Settings,
    pub sites: &'a Sites,
    pub services: &'a Services,
    pub traffic: &'a Traffic,
}

impl VirtualServices {
    pub fn set(&mut self, name: Name, service: Option<Arc<VirtualService>>, settings: &Settings) {
        if self.all.get(&name).map(|known| &known.service) == service.as_ref() {
            return;
        }
        self.due.extend(self.by_delegate.get(&name).into_iter().flatten().cloned());
        if let Some(known) = self.all.remove(&name) {
            self.problem_gone |= !known.problems.is_empty();
            self.index(&name, &known, false);
            self.due_hosts.extend(known.hosts);
        }
        self.due.insert(name.clone());
        if let Some(service) = service {
            let known = Known::new(service, settings);
            self.index(&name, &known, true);
            self.all.insert(name, known);
        }
    }

    /// The settings are others.
    pub fn all_due(&mut self, settings: &Settings) {
        for (name, known) in std::mem::take(&mut self.all) {
            self.index(&name, &known, false);
            self.due_hosts.extend(known.hosts);
            self.set(name, Some(known.service), settings);
        }
    }

    pub fn has(&self, name: &Name) -> bool {
        self.all.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.all.keys()
    }

    pub fn of(&self, service: &Name) -> Option<&BTreeMap<u16, Slots>> {
        self.made.get(service).map(|made| &made.ports)
    }

    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let of_objects = self.all.values().flat_map(|known| &known.problems);
        of_objects.chain(self.made.values().flat_map(|made| &made.problems))
    }

    /// Makes anew what is due, and tells for which services. `changed` are services that may be others than before, or whose
    /// subsets may be. `problems` is set where there may be others.
    pub fn make(&mut self, changed: &BTreeSet<Name>, around: &Around<'_>, problems: &mut bool) -> BTreeSet<Name> {
        *problems |= std::mem::take(&mut self.problem_gone);
        if self.all.is_empty() && self.made.is_empty() {
            self.due.clear();
            self.due_hosts.clear();
            return BTreeSet::new();
        }
        let domain = &*around.settings.cluster_domain;
        let mut due_services = BTreeSet::new();
        for service in changed {
            self.due.extend(self.by_destination.of_service(service, domain).map(|(_, name)| name.clone()));
            let mut hosts = self.by_host.of_service(service, domain).peekable();
            if hosts.peek().is_some() || self.made.contains_key(service) {
                due_services.insert(service.clone());
                self.due.extend(hosts.map(|(_, name)| name.clone()));
            }
        }
        let due = std::mem::take(&mut self.due);
        let roots = due.iter().flat_map(|name| self.by_delegate.get(name)).flatten().cloned();
        let due: BTreeSet<Name> = roots.chain(due.iter().cloned()).collect();
        let mut hosts = std::mem::take(&mut self.due_hosts);
        for name in &due {
            let ports = (name.clone(), 0)..=(name.clone(), u16::MAX);
            let stale: Vec<_> = self.compiled.range(ports).map(|(key, _)| key.clone()).collect();
            stale.iter().for_each(|key| drop(self.compiled.remove(key)));
            hosts.extend(self.all.get(name).into_iter().flat_map(|known| known.hosts.iter().cloned()));
        }
        for host in &hosts {
            due_services.extend(around.services.of_host(host, domain).cloned());
        }
        for name in &due {
            let Some(known) = self.all.get(name) else { continue };
            let found = self.problems_of(name, known, around);
            *problems |= found != known.problems;
            self.all.get_mut(name).expect("it was there").problems = found;
        }
        let mut others = BTreeSet::new();
        for service in due_services {
            let made = self.service(&service, around);
            let before = self.made.remove(&service).unwrap_or_default();
            *problems |= made.problems != before.problems;
            if made.ports != before.ports {
                others.insert(service.clone());
            }
            if !made.ports.is_empty() || !made.problems.is_empty() {
                self.made.insert(service, made);
            }
        }
        others
    }

    fn index(&mut self, name: &Name, known: &Known, enter: bool) {
        let put = |index: &mut ByHost, host: &Host| match enter {
            true => index.insert(host, name),
            false => index.remove(host, name),
        };
        known.hosts.iter().for_each(|host| put(&mut self.by_host, host));
        known.destinations.iter().for_each(|host| put(&mut self.by_destination, host));
        for delegate in known.service.http.iter().filter_map(delegate_of) {
            // Whether anybody delegates to it, its Problems say.
            self.due.insert(delegate.clone());
            let roots = self.by_delegate.entry(delegate.clone()).or_default();
            match enter {
                true => drop(roots.insert(name.clone())),
                false => drop(roots.remove(name)),
            }
            if roots.is_empty() {
                self.by_delegate.remove(&delegate);
            }
        }
    }

    /// What is wrong with it whichever service it is asked for.
    fn problems_of(&self, name: &Name, known: &Known, around: &Around<'_>) -> Vec<Problem> {
        let mut found = Vec::new();
        let at = around.sites.of("VirtualService", &name.0, &name.1);
        let mut warn = |field: &str, message: String| found.push(problem(Severity::Warning, &at, field, message));
        if !known.service.is_for_mesh {
            return found;
        }
        for (i, (host, text)) in known.hosts.iter().zip(&known.service.hosts).enumerate() {
            let field = format!("spec.hosts[{i}]");
            let mut services = around.services.of_host(host, &around.settings.cluster_domain).peekable();
            let Some(first) = services.peek() else {
                if !matches!(host, Host::Below(_)) {
                    let message = format!(
                        "there is no service `{text}`, so that no rule holds for it: correct the name, and write that of \
                         another namespace in full"
                    );
                    warn(&field, message);
                }
                continue;
            };
            if matches!(host, Host::Below(_)) || known.service.http.is_empty() {
                continue;
            }
            let Some(written) = around.services.written(first) else { continue };
            if let Some(past) = past(written) {
                warn(&field, format!("service `{text}` {past}, so that no rule is asked: use one with an address"));
            } else if written.ports.iter().all(|port| other_protocol(port).is_some()) {
                let message = format!(
                    "no port of service `{text}` speaks HTTP, so that no rule is asked: set the appProtocol of one to http"
                );
                warn(&field, message);
            }
        }
        if known.service.hosts.is_empty() && !self.by_delegate.contains_key(name) {
            let message =
                "it has no hosts, and no other VirtualService delegates to it: name a host, or delegate to it";
            warn("spec.hosts", message.to_owned());
        }
        if known.service.hosts.is_empty() && known.service.http.iter().any(|route| delegate_of(route).is_some()) {
            let message =
                "one that is delegated to cannot delegate further, so that the route is left out: write it here";
            warn("spec.http", message.to_owned());
        }
        for delegate in known.service.http.iter().filter_map(|route| Some((route, delegate_of(route)?))) {
            let (route, (namespace, name)) = delegate;
            let field = format!("{}.delegate", route.place());
            match self.all.get(&(namespace.clone(), name.clone())) {
                None => warn(
                    &field,
                    format!("there is no VirtualService {namespace}/{name}, so that the route is left out: make it"),
                ),
                Some(other) if !other.service.hosts.is_empty() => {
                    let message = format!(
                        "VirtualService {namespace}/{name} has hosts of its own, so that the route is left out: remove them"
                    );
                    warn(&field, message);
                }
                Some(other) if !other.service.visible.to(&known.service.namespace) => {
                    let message = format!(
                        "VirtualService {namespace}/{name} is not shown to namespace {}, so that the route is left out: \
                         add it to its exportTo",
                        known.service.namespace
                    );
                    warn(&field, message);
                }
                Some(other) => {
                    let lost = other.service.http.iter().filter(|inner| inner.below(route).is_none());
                    for lost in lost {
                        let message = format!(
                            "no request is what this route and {} of VirtualService {namespace}/{name} ask for, so that the \
                             latter is left out: let it ask for a part of what this one does",
                            lost.place()
                        );
                        warn(&field, message);
                    }
                }
            }
        }
        found
    }

    fn service(&mut self, name: &Name, around: &Around<'_>) -> Made {
        let mut made = Made::default();
        let Some(service) = around.services.written(name) else { return made };
        if past(service).is_some() {
            return made;
        }
        let domain = &*around.settings.cluster_domain;
        let candidates: Vec<(usize, Arc<VirtualService>)> = self
            .by_host
            .of_service(name, domain)
            .filter_map(|(host, object)| Some((host.rank(), self.all.get(object)?.service.clone())))
            .filter(|(_, service)| service.is_for_mesh && !service.http.is_empty())
            .collect();
        if candidates.is_empty() {
            return made;
        }
        let general = choose(None, &candidates);
        let mut chosen: Vec<(Option<Arc<str>>, Arc<VirtualService>)> = Vec::new();
        chosen.extend(general.iter().map(|one| (None, (*one).clone())));
        let named: BTreeSet<_> = candidates.iter().flat_map(|(_, one)| one.visible.named()).collect();
        for namespace in named {
            let own = choose(Some(namespace), &candidates);
            if let Some(own) = own.filter(|own| general.is_none_or(|general| !Arc::ptr_eq(own, general))) {
                chosen.push((Some(namespace.clone()), own.clone()));
            }
        }
        for (client, winner) in &chosen {
            for loser in beside(client.as_ref(), winner, &candidates) {
                let message = format!(
                    "VirtualService {}/{} is for the same host and older, and holds: write all in one",
                    winner.namespace, winner.name
                );
                let at = around.sites.of("VirtualService", &loser.namespace, &loser.name);
                made.problems.push(problem(Severity::Warning, &at, "spec.hosts", message));
            }
        }
        for port in service.ports.iter().filter(|port| other_protocol(port).is_none()) {
            let mut slots = Slots::default();
            for (client, service) in &chosen {
                let Compiled { table, problems } = self.compiled(service, port.port, around);
                made.problems.extend(problems);
                subsets(client.as_ref(), service, &table, around, &mut made.problems);
                let held = Held { table, owner: (service.namespace.clone(), service.name.clone()) };
                match client {
                    None => slots.general = Some(held),
                    Some(client) => drop(slots.by_namespace.insert(client.clone(), held)),
                }
            }
            made.ports.insert(port.port, slots);
        }
        made.problems.sort();
        made.problems.dedup();
        made
    }

    /// Its rules for requests that ask a port.
    fn compiled(&mut self, service: &VirtualService, port: u16, around: &Around<'_>) -> Compiled {
        let key = ((service.namespace.clone(), service.name.clone()), port);
        if let Some(known) = self.compiled.get(&key) {
            return known.clone();
        }
        let mut problems = Vec::new();
        let mut rules = Vec::new();
        for route in &service.http {
            let delegate = delegate_of(route).and_then(|name| self.all.get(&name)).map(|known| &known.service);
            let delegate = delegate.filter(|d| d.hosts.is_empty() && d.visible.to(&service.namespace));
            let routes: Vec<Route> = match (&route.to, delegate) {
                (To::Delegate(..), None) => continue,
                (To::Delegate(..), Some(delegate)) => {
                    let inner = delegate.http.iter().filter(|inner| delegate_of(inner).is_none());
                    inner.filter_map(|inner| inner.below(route)).collect()
                }
                _ => vec![route.clone()],
            };
            let owner = delegate.map_or(service, |delegate| delegate);
            let at = around.sites.of("VirtualService", &owner.namespace, &owner.name);
            for route in routes {
                let rule = route.rule(port, |destination| {
                    target(destination, port, around).unwrap_or_else(|(reason, next)| {
                        let message = format!("{reason}, so that its share is answered with an error: {next}");
                        problems.push(problem(Severity::Warning, &at, &destination.field, message));
                        Target::Broken { reason: reason.into() }
                    })
                });
                rules.extend(rule.map(Arc::new));
            }
        }
        let compiled = Compiled { table: Arc::new(RouteTable { rules }), problems };
        self.compiled.insert(key, compiled.clone());
        compiled
    }
}

impl Known {
    fn new(service: Arc<VirtualService>, settings: &Settings) -> Self {
        let read = |host: &Arc<str>, namespace: &Arc<str>| Host::read(host, namespace, &settings.cluster_domain);
        let hosts = service.hosts.iter().map(|host| read(host, &service.namespace)).collect();
        let destinations = service.http.iter().flat_map(Route::destinations);
        let destinations = destinations.map(|to| read(&to.host, &to.namespace)).collect();
        Self { service, hosts, destinations, problems: Vec::new() }
    }
}

/// The one that holds for clients of a namespace; of `None`, of one that none names.
fn choose<'a>(
    client: Option<&Arc<str>>,
    candidates: &'a [(usize, Arc<VirtualService>)],
) -> Option<&'a Arc<VirtualService>> {
    let visible = candidates.iter().filter_map(|one| Some((circle(client, &one.1)?, one)));
    let first = visible.min_by_key(|(circle, (rank, service))| (Reverse(*rank), *circle, age(service)));
    first.map(|(_, (_, service))| service)
}

/// Those that would hold for the client if `winner` were not there, and were not meant to give way to it.
fn beside<'a>(
    client: Option<&'a Arc<str>>,
    winner: &'a Arc<VirtualService>,
    candidates: &'a [(usize, Arc<VirtualService>)],
) -> impl Iterator<Item = &'a Arc<VirtualService>> {
    let rank = candidates.iter().find(|(_, service)| Arc::ptr_eq(service, winner)).map(|(rank, _)| *rank);
    let like = candidates.iter().filter(move |(other, service)| {
        Some(*other) == rank && !Arc::ptr_eq(service, winner) && circle(client, service) == circle(client, winner)
    });
    like.map(|(_, service)| service)
}

/// How many it is shown to: 0 where it is the client's namespace alone, 1 some, 2 all. `None`: not to the client.
fn circle(client: Option<&Arc<str>>, service: &VirtualService) -> Option<u8> {
    match client {
        _ if service.visible.is_to_all() => Some(2),
        Some(client) if service.visible.to(client) => {
            Some(u8::from(service.namespace != *client || service.visible.named().count() > 1))
        }
        _ => None,
    }
}

fn age(service: &VirtualService) -> impl Ord {
    (service.created.is_none(), service.created.clone(), service.namespace.clone(), service.name.clone())
}

/// Where requests go; else why they cannot, and what to do. `asked` is the port that the client asked.
fn target(to: &Destination, asked: u16, around: &Around<'_>) -> Result<Target, (String, &'static str)> {
    let domain = &*around.settings.cluster_domain;
    let host = Host::read(&to.host, &to.namespace, domain);
    let Some(name) = around.services.of_host(&host, domain).next() else {
        let next = "correct the name, and write that of another namespace in full";
        return Err((format!("there is no service `{}`", to.host), next));
    };
    let Some(service) = around.services.written(name) else {
        return Err((format!("there is no service `{}`", to.host), "make it"));
    };
    if let kubernetes::Kind::ExternalName = service.kind {
        let reason = format!("service `{}` is an ExternalName, which is no service of the mesh", to.host);
        return Err((reason, "use a Service with endpoints"));
    }
    let port = to.port.unwrap_or(match service.ports.as_slice() {
        [only] => only.port,
        _ => asked,
    });
    if !service.ports.iter().any(|p| p.port == port) {
        return Err((format!("service `{}` has no port {port}", to.host), "name one of its TCP ports"));
    }
    Ok(Target::Service { namespace: name.0.clone(), name: name.1.clone(), port, subset: to.subset.clone() })
}

/// Whether the subsets are there that a table sends to.
fn subsets(
    client: Option<&Arc<str>>,
    service: &VirtualService,
    table: &RouteTable,
    around: &Around<'_>,
    problems: &mut Vec<Problem>,
) {
    for rule in &table.rules {
        let to = if let Action::Forward(backends) = &rule.action { backends.as_slice() } else { &[] };
        let all = to.iter().map(|backend| &backend.target).chain(rule.mirrors.iter().map(|mirror| &mirror.target));
        for target in all {
            let Target::Service { namespace, name, port, subset: Some(subset) } = target else { continue };
            let all = around.traffic.of(&(namespace.clone(), name.clone()), *port);
            // Where all clients are meant, some of them may have a rule of their own.
            let known = all.is_some_and(|all| match client {
                Some(client) => all.of(client).is_some_and(|one| one.subsets.contains_key(subset)),
                None => all.general.iter().chain(all.by_namespace.values()).any(|one| one.subsets.contains_key(subset)),
            });
            if known {
                continue;
            }
            let at = around.sites.of("VirtualService", &service.namespace, &service.name);
            let message = format!(
                "no DestinationRule has a subset `{subset}` for {name} in namespace {namespace}, so that its share is answered \
                 with an error: make one"
            );
            problems.push(problem(Severity::Warning, &at, &rule.place, message));
        }
    }
}

fn delegate_of(route: &Route) -> Option<Name> {
    match &route.to {
        To::Delegate(namespace, name) => Some((namespace.clone(), name.clone())),
        _ => None,
    }
}
