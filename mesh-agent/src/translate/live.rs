//! A mesh of which changes are heard: objects come and go one by one, and each snapshot is the one before with what has
//! changed. At any time it is what `translate` makes of the same objects.
//!
//! No object is kept as it came, only what is needed of it: the mesh may have a hundred thousand pods, and this node a
//! hundred of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::gateway::GROUP;
use super::mesh::Mesh;
use super::object::Object;
use super::report::Report;
use super::texts::Name;
use super::{Broken, Settings, Table, parse_object, with_outcome};
use crate::model::{NodePods, ObjectRef, Problem, Snapshot};

pub struct Live {
    mesh: Mesh,
    /// What was found in each object that is not quite as it should be.
    found: BTreeMap<(Table, Name), Found>,
    /// Whether there may be other Problems than were told last.
    new_problems: bool,
}

struct Found {
    problems: Vec<Problem>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Some version of it is in force.
    Good,
    /// It never was good. What closes in its place, if anything does, is no good version either.
    Never,
}

impl Live {
    pub fn new(settings: Settings) -> Self {
        Self { mesh: Mesh::new(settings), found: BTreeMap::new(), new_problems: true }
    }

    /// An object has come, or is another now.
    pub fn put(&mut self, object: &Object) {
        let Some(table) = Table::of(object.group(), object.kind()) else { return };
        let at = object.reference();
        let mut report = Report::of(object);
        let outcome = parse_object(object, &mut report);
        let found = report.into_problems();
        if found.is_empty() && self.found.is_empty() {
            // As good as always.
            if let Some(Ok(parsed)) = outcome {
                self.mesh.put(at, &parsed);
            }
            return;
        }
        let name = name(at);
        let known = self.found.get(&(table, name.clone())).map(|f| f.state);
        let (problems, state) = match outcome {
            None => (found, State::Never),
            Some(Ok(parsed)) => {
                self.mesh.put(at, &parsed);
                (found, State::Good)
            }
            Some(Err(Broken { outcome, stand_in })) => {
                let was_good = match known {
                    Some(state) => state == State::Good,
                    None => self.mesh.has(table, &name),
                };
                if was_good {
                    (with_outcome(found, "the last good version stays in force").collect(), State::Good)
                } else {
                    match stand_in {
                        Some(stand_in) => self.mesh.put(at, &stand_in),
                        None => self.mesh.remove(table, name.clone()),
                    }
                    (with_outcome(found, outcome).collect(), State::Never)
                }
            }
        };
        self.new_problems |= known.is_some() || !problems.is_empty();
        match problems.is_empty() {
            true => drop(self.found.remove(&(table, name))),
            false => drop(self.found.insert((table, name), Found { problems, state })),
        }
    }

    /// An object is gone.
    pub fn remove(&mut self, table: Table, name: Name) {
        self.new_problems |= self.found.remove(&(table, name.clone())).is_some();
        self.mesh.remove(table, name);
    }

    /// From now on all means what it means with these. What is kept of objects was chosen by the first ones: node and
    /// trust domain must be the same.
    pub fn set_settings(&mut self, settings: Settings) {
        self.mesh.set_settings(settings);
    }

    pub fn has(&self, table: Table, name: &Name) -> bool {
        self.mesh.has(table, name)
    }

    /// The pods of this node, as of the last snapshot.
    pub fn node_pods(&self) -> NodePods {
        self.mesh.node_pods()
    }

    /// All objects of a kind that have come and not gone.
    pub fn names(&self, table: Table) -> BTreeSet<Name> {
        let mut names = self.mesh.names(table);
        names.extend(self.found.keys().filter(|(t, _)| *t == table).map(|(_, name)| name.clone()));
        names
    }

    /// `before` with what has changed since it was made, or `None` if nothing has.
    pub fn snapshot(&mut self, before: &Snapshot) -> Option<Snapshot> {
        let changes = self.mesh.make();
        self.new_problems |= changes.problems;
        let settings = self.mesh.mesh_settings();
        let same_settings = settings == *before.settings();
        (!changes.is_empty() || !same_settings).then(|| changes.apply(before, settings))
    }

    /// All Problems, sorted, each once; `None` where they are those that were told last.
    pub fn problems(&mut self) -> Option<Vec<Problem>> {
        if !std::mem::take(&mut self.new_problems) {
            return None;
        }
        let of_objects = self.found.values().flat_map(|f| &f.problems);
        let mut problems: Vec<_> = of_objects.chain(self.mesh.problems()).cloned().collect();
        problems.sort();
        problems.dedup();
        Some(problems)
    }
}

/// The group of Istio's objects for traffic.
const ISTIO: &str = "networking.istio.io";

impl Table {
    /// `None` for kinds that are not ours.
    pub fn of(group: &str, kind: &str) -> Option<Self> {
        Some(match (group, kind) {
            ("", "Namespace") => Self::Namespace,
            ("", "Node") => Self::Node,
            ("", "Pod") => Self::Pod,
            ("node.k8s.io", "RuntimeClass") => Self::RuntimeClass,
            ("", "Service") => Self::Service,
            ("discovery.k8s.io", "EndpointSlice") => Self::EndpointSlice,
            ("security.istio.io", "PeerAuthentication") => Self::PeerAuthentication,
            ("security.istio.io", "AuthorizationPolicy") => Self::AuthorizationPolicy,
            (GROUP, "HTTPRoute") => Self::HttpRoute,
            (GROUP, "GRPCRoute") => Self::GrpcRoute,
            (GROUP, "ReferenceGrant") => Self::ReferenceGrant,
            (ISTIO, "VirtualService") => Self::VirtualService,
            (ISTIO, "DestinationRule") => Self::DestinationRule,
            _ => return None,
        })
    }
}

fn name(at: &Arc<ObjectRef>) -> Name {
    (at.namespace.as_str().into(), at.name.as_str().into())
}
