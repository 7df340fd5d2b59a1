//! Routes become tables: which rules hold for a port of a Service, in the order in which they are asked, and for whom.
//!
//! First each route is looked at with the Services that it speaks of: where its requests can go, and to which ports it is
//! attached. Then each Service's tables are made of the routes that are attached to it. A route in the Service's own namespace
//! (the producer's) holds for clients of all namespaces; one in another (a consumer's) for clients of its own namespace,
//! in place of the producer's.
//!
//! A backend in another namespace must be granted there, but for one that is a parent of the route too: its clients have
//! called that very Service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::gateway::{Grant, Rank, Referent, Route, RouteKind};
use super::kubernetes::{Kind, Port};
use super::mesh::{Changes, Sites};
use super::problem;
use super::services::{Services, other_protocol, past};
use super::texts::Name;
use super::virtual_services::VirtualServices;
use crate::model::http::{Action, Backend, HttpRoutes, HttpRule, Mirror, RouteTable, Target};
use crate::model::{ObjectRef, Problem, ServiceKey, Severity};

type Key = (RouteKind, Name);

/// All routes and grants, and the tables that were made of them.
#[derive(Default)]
pub(super) struct Routes {
    all: BTreeMap<Key, Known>,
    grants: BTreeMap<Name, Grant>,
    of_parent: BTreeMap<Name, BTreeSet<Key>>,
    of_backend: BTreeMap<Name, BTreeSet<Key>>,
    /// Those of which something else may become.
    due: BTreeSet<Key>,
    /// The Services whose tables may be others.
    due_tables: BTreeSet<Name>,
    made: BTreeMap<Name, Made>,
    /// Whether a Problem has gone with its route.
    problem_gone: bool,
}

struct Known {
    route: Arc<Route>,
    meaning: Meaning,
}

/// What a route means beside the Services that there are.
#[derive(Default, PartialEq)]
struct Meaning {
    /// Which of two routes comes first.
    created: Option<String>,
    rules: Vec<Entry>,
    attached: Vec<Attached>,
    problems: Vec<Problem>,
}

/// A rule with one of its matches.
#[derive(Clone, PartialEq)]
struct Entry {
    rank: Rank,
    rule: Arc<HttpRule>,
}

#[derive(PartialEq)]
struct Attached {
    service: Name,
    port: u16,
    /// The place of the reference.
    field: String,
}

#[derive(Default)]
struct Made {
    ports: BTreeMap<u16, Arc<HttpRoutes>>,
    problems: Vec<Problem>,
}

impl Routes {
    pub fn set(&mut self, key: Key, route: Option<Arc<Route>>) {
        let before = self.all.get(&key).map(|known| known.route.clone());
        if before == route {
            return;
        }
        if let Some(before) = before {
            for (index, names) in [(&mut self.of_parent, parents(&before)), (&mut self.of_backend, backends(&before))] {
                for name in names {
                    if let Some(keys) = index.get_mut(name) {
                        keys.remove(&key);
                        if keys.is_empty() {
                            index.remove(name);
                        }
                    }
                }
            }
        }
        match route {
            Some(route) => {
                for name in parents(&route) {
                    self.of_parent.entry(name.clone()).or_default().insert(key.clone());
                }
                for name in backends(&route) {
                    self.of_backend.entry(name.clone()).or_default().insert(key.clone());
                }
                // What it meant stays until it is made again, so that what does not change is known.
                let meaning = self.all.remove(&key).map(|known| known.meaning).unwrap_or_default();
                self.all.insert(key.clone(), Known { route, meaning });
                self.due.insert(key);
            }
            None => {
                if let Some(Known { meaning, .. }) = self.all.remove(&key) {
                    self.problem_gone |= !meaning.problems.is_empty();
                    self.due_tables.extend(meaning.attached.into_iter().map(|a| a.service));
                }
                self.due.remove(&key);
            }
        }
    }

    pub fn set_grant(&mut self, name: Name, grant: Option<Grant>) {
        if self.grants.get(&name) == grant.as_ref() {
            return;
        }
        // It is about Services of its own namespace.
        let first = (name.0.clone(), Arc::from(""));
        let to_here = self.of_backend.range(first..).take_while(|((namespace, _), _)| *namespace == name.0);
        self.due.extend(to_here.flat_map(|(_, keys)| keys).cloned());
        match grant {
            Some(grant) => self.grants.insert(name, grant),
            None => self.grants.remove(&name),
        };
    }

    /// A Service has come, gone or is another.
    pub fn due_of_service(&mut self, name: &Name) {
        for index in [&self.of_parent, &self.of_backend] {
            self.due.extend(index.get(name).into_iter().flatten().cloned());
        }
    }

    pub fn has(&self, kind: RouteKind, name: &Name) -> bool {
        self.all.contains_key(&(kind, name.clone()))
    }

    pub fn has_grant(&self, name: &Name) -> bool {
        self.grants.contains_key(name)
    }

    pub fn names(&self, kind: RouteKind) -> impl Iterator<Item = &Name> {
        self.all.keys().filter(move |(k, _)| *k == kind).map(|(_, name)| name)
    }

    pub fn grant_names(&self) -> impl Iterator<Item = &Name> {
        self.grants.keys()
    }

    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let of_routes = self.all.values().flat_map(|known| &known.meaning.problems);
        of_routes.chain(self.made.values().flat_map(|made| &made.problems))
    }

    /// All that was made, by Service and port.
    pub fn tables(&self) -> impl Iterator<Item = (ServiceKey, Arc<HttpRoutes>)> {
        let of = |(name, made): (&Name, &Made)| {
            let name = name.clone();
            let with_key =
                move |(port, routes): (&u16, &Arc<HttpRoutes>)| (ServiceKey::new(&name, *port), routes.clone());
            made.ports.iter().map(with_key).collect::<Vec<_>>()
        };
        self.made.iter().flat_map(of)
    }

    /// Makes those that are due.
    ///
    /// `others` are the Services for which VirtualServices say something else than before.
    pub fn make(
        &mut self,
        services: &Services,
        virtual_services: &VirtualServices,
        others: BTreeSet<Name>,
        sites: &Sites,
        changes: &mut Changes,
    ) {
        self.due_tables.extend(others);
        changes.problems |= std::mem::take(&mut self.problem_gone);
        for key in std::mem::take(&mut self.due) {
            let Some(known) = self.all.get(&key) else { continue };
            let mut new = self.meaning(&known.route, services, sites);
            let old = &known.meaning;
            changes.problems |= new.problems != old.problems;
            if new.rules != old.rules || new.attached != old.attached || new.created != old.created {
                let all = old.attached.iter().chain(&new.attached);
                self.due_tables.extend(all.map(|a| a.service.clone()));
            }
            for (new, old) in new.rules.iter_mut().zip(&old.rules).filter(|(new, old)| new == old) {
                *new = old.clone();
            }
            self.all.get_mut(&key).expect("it was there").meaning = new;
        }
        for service in std::mem::take(&mut self.due_tables) {
            let mut new = self.tables_of(&service, virtual_services, sites);
            let old = self.made.remove(&service).unwrap_or_default();
            changes.problems |= new.problems != old.problems;
            let gone = old.ports.keys().filter(|port| !new.ports.contains_key(port));
            changes.http.extend(gone.map(|port| (ServiceKey::new(&service, *port), None)));
            for (port, routes) in &mut new.ports {
                match old.ports.get(port).filter(|old| *old == routes) {
                    Some(old) => *routes = old.clone(),
                    None => changes.http.push((ServiceKey::new(&service, *port), Some(routes.clone()))),
                }
            }
            if !new.ports.is_empty() || !new.problems.is_empty() {
                self.made.insert(service, new);
            }
        }
    }

    fn meaning(&self, route: &Route, services: &Services, sites: &Sites) -> Meaning {
        let mut problems =
            Problems { at: sites.of(route.kind.name(), &route.namespace, &route.name), found: Vec::new() };
        let attached = attached(route, services, &mut problems);
        let mut rules = Vec::new();
        for rule in &route.rules {
            let mut made = rule.rule.clone();
            let backends = rule.backends.iter().map(|backend| {
                let target = match &backend.closed {
                    Some(reason) => Target::Broken { reason: reason.clone() },
                    None => self.target(route, &backend.referent, services).unwrap_or_else(|(reason, next)| {
                        let message = format!("{reason}, so that its share is answered with 500: {next}");
                        problems.warn(&backend.referent.field, message);
                        Target::Broken { reason: reason.into() }
                    }),
                };
                let (request, response) = (backend.request.clone(), backend.response.clone());
                Backend { weight: backend.weight, target, request, response }
            });
            let backends: Vec<_> = backends.collect();
            if let Action::Forward(to) = &mut made.action {
                *to = backends;
            }
            for (referent, mirror) in &rule.mirrors {
                match self.target(route, referent, services) {
                    Ok(target) => made.mirrors.push(Mirror { target, share: mirror.share }),
                    Err((reason, next)) => {
                        problems.warn(&referent.field, format!("{reason}, so that no copies are sent: {next}"));
                    }
                }
            }
            rules.extend(rule.matches.iter().map(|(rank, one)| {
                let rule = HttpRule { matches: vec![one.clone()], ..made.clone() };
                Entry { rank: *rank, rule: Arc::new(rule) }
            }));
        }
        Meaning { created: route.created.clone(), rules, attached, problems: problems.found }
    }

    /// Where requests go; else why they cannot, and what to do.
    fn target(&self, route: &Route, to: &Referent, services: &Services) -> Result<Target, (String, &'static str)> {
        let Referent { field: _, foreign, service: (namespace, name), port } = to;
        if let Some(kind) = foreign {
            return Err((format!("{kind} is no backend that the mesh can reach"), "use a Service"));
        }
        let granted = || {
            let first = (namespace.clone(), Arc::from(""));
            let here = self.grants.range(first..).take_while(|((ns, _), _)| ns == namespace);
            here.into_iter().any(|(_, grant)| grant.allows(route.kind, &route.namespace, name))
        };
        let is_parent = route.parents.iter().any(|parent| parent.service == to.service);
        if *namespace != route.namespace && !is_parent && !granted() {
            let reason = format!("no ReferenceGrant in namespace {namespace} lets this route use Service {name}");
            return Err((reason, "make one there"));
        }
        let Some(service) = services.written(&to.service) else {
            return Err((format!("there is no Service {namespace}/{name}"), "make it, or correct the name"));
        };
        if service.kind == Kind::ExternalName {
            let reason = format!("Service {namespace}/{name} is an ExternalName, which is no service of the mesh");
            return Err((reason, "use a Service with endpoints"));
        }
        if !service.ports.iter().any(|p| p.port == *port) {
            let reason = format!("Service {namespace}/{name} has no port {port}");
            return Err((reason, "use one of its TCP ports"));
        }
        Ok(Target::Service { namespace: namespace.clone(), name: name.clone(), port: *port, subset: None })
    }

    /// The tables of a Service, of the routes that are attached to it.
    fn tables_of(&self, service: &Name, virtual_services: &VirtualServices, sites: &Sites) -> Made {
        type Group<'a> = BTreeMap<RouteKind, Vec<(&'a Known, &'a Attached)>>;
        // The producer's under no namespace.
        let mut ports: BTreeMap<u16, BTreeMap<Option<&Arc<str>>, Group<'_>>> = BTreeMap::new();
        for key in self.of_parent.get(service).into_iter().flatten() {
            let Some(known) = self.all.get(key) else { continue };
            let consumer = Some(&known.route.namespace).filter(|namespace| **namespace != service.0);
            let mut seen = BTreeSet::new();
            for attached in known.meaning.attached.iter().filter(|a| a.service == *service && seen.insert(a.port)) {
                let groups = ports.entry(attached.port).or_default();
                groups.entry(consumer).or_default().entry(key.0).or_default().push((known, attached));
            }
        }
        let mut made = Made::default();
        let mut winners = BTreeMap::new();
        for (port, groups) in ports {
            let mut routes = HttpRoutes::default();
            for (namespace, group) in groups {
                let mut kinds = group.into_values();
                let Some(first) = kinds.next() else { continue };
                let winner = &first[0].0.route;
                for (loser, attached) in kinds.flatten() {
                    let message = format!(
                        "{} {}/{} holds for port {port} of the Service too, and only routes of one kind can: remove one of the two",
                        winner.kind.name(),
                        winner.namespace,
                        winner.name
                    );
                    let route = &loser.route;
                    let at = sites.of(route.kind.name(), &route.namespace, &route.name);
                    made.problems.push(problem(Severity::Warning, &at, &attached.field, message));
                }
                winners.insert((port, namespace), winner);
                let table = Arc::new(table(first.iter().map(|(known, _)| *known).collect()));
                match namespace {
                    None => routes.general = Some(table),
                    Some(namespace) => drop(routes.by_namespace.insert(namespace.clone(), table)),
                }
            }
            made.ports.insert(port, Arc::new(routes));
        }
        for (port, slots) in virtual_services.of(service).into_iter().flatten() {
            let mut routes = made.ports.remove(port).map(Arc::unwrap_or_clone).unwrap_or_default();
            let general = slots.general.iter().map(|held| (None, held));
            let own = slots.by_namespace.iter().map(|(namespace, held)| (Some(namespace), held));
            for (namespace, held) in general.chain(own) {
                // A route of the Gateway API that holds for these clients comes first.
                let winner = winners.get(&(*port, namespace)).or_else(|| winners.get(&(*port, None)));
                match (winner, namespace) {
                    (Some(winner), _) => {
                        let message = format!(
                            "{} {}/{} holds for port {port} of Service {}/{} too and comes first, so that this one does not \
                             hold there: remove one of the two",
                            winner.kind.name(),
                            winner.namespace,
                            winner.name,
                            service.0,
                            service.1
                        );
                        let at = sites.of("VirtualService", &held.owner.0, &held.owner.1);
                        made.problems.push(problem(Severity::Warning, &at, "spec.hosts", message));
                    }
                    (None, None) => routes.general = Some(held.table.clone()),
                    (None, Some(namespace)) => drop(routes.by_namespace.insert(namespace.clone(), held.table.clone())),
                }
            }
            if !routes.is_empty() {
                made.ports.insert(*port, Arc::new(routes));
            }
        }
        made
    }
}

/// Rules of several routes as they are asked: by what they ask for, then by the age of their routes, then as written.
fn table(mut routes: Vec<&Known>) -> RouteTable {
    // One without a time of creation counts as new: its age is not known.
    routes.sort_by_key(|known| {
        let route = &*known.route;
        (route.created.is_none(), route.created.as_deref(), &route.namespace, &route.name)
    });
    let mut entries: Vec<&Entry> = routes.into_iter().flat_map(|known| &known.meaning.rules).collect();
    entries.sort_by_key(|entry| entry.rank);
    RouteTable { rules: entries.into_iter().map(|entry| entry.rule.clone()).collect() }
}

struct Problems {
    at: Arc<ObjectRef>,
    found: Vec<Problem>,
}

impl Problems {
    fn warn(&mut self, field: &str, message: impl Into<String>) {
        self.found.push(problem(Severity::Warning, &self.at, field, message));
    }
}

/// The ports of Services that a route holds for.
fn attached(route: &Route, services: &Services, problems: &mut Problems) -> Vec<Attached> {
    let mut attached = Vec::new();
    for parent in &route.parents {
        let (namespace, name) = &parent.service;
        let Some(service) = services.written(&parent.service) else {
            let message = format!(
                "there is no Service {namespace}/{name}, so that nothing is in force for it: make it, or correct the name"
            );
            problems.warn(&parent.field, message);
            continue;
        };
        if let Some(past) = past(service) {
            let message =
                format!("Service {namespace}/{name} {past}, so that no rule is asked: use one with an address");
            problems.warn(&parent.field, message);
            continue;
        }
        let section = &parent.section;
        let is_meant = |port: &&Port| {
            section.port.is_none_or(|number| number == port.port)
                && section.name.as_ref().is_none_or(|name| *name == port.name)
        };
        let (meant, other): (Vec<&Port>, Vec<&Port>) =
            service.ports.iter().filter(is_meant).partition(|port| other_protocol(port).is_none());
        attached.extend(meant.iter().map(|port| {
            let (service, field) = (parent.service.clone(), parent.field.clone());
            Attached { service, port: port.port, field }
        }));
        let is_named = section.port.is_some() || section.name.is_some();
        // Where no port is named, it is enough that there is one.
        match other.first().filter(|_| is_named || meant.is_empty()) {
            Some(port) => {
                let protocol = other_protocol(port).unwrap_or_default();
                let message = format!(
                    "port {} of the Service speaks `{protocol}`, so that no rule is asked: set its appProtocol to http, or use another",
                    port.port
                );
                problems.warn(&parent.field, message);
            }
            None if meant.is_empty() => {
                let message =
                    format!("Service {namespace}/{name} has no such TCP port, so that nothing is in force: correct it");
                problems.warn(&parent.field, message);
            }
            None => {}
        }
    }
    attached
}

fn parents(route: &Route) -> BTreeSet<&Name> {
    route.parents.iter().map(|parent| &parent.service).collect()
}

fn backends(route: &Route) -> BTreeSet<&Name> {
    let of_rules = route.rules.iter().flat_map(|rule| {
        let backends = rule.backends.iter().map(|backend| &backend.referent);
        backends.chain(rule.mirrors.iter().map(|(referent, _)| referent))
    });
    of_rules.map(|referent| &referent.service).collect()
}
