//! Foreign objects become the internal model. Pure: (settings, objects, what was good before) -> (parts, Problems).
//!
//! Comes in: objects of Kubernetes, the Gateway API and Istio as plain JSON values, from whichever source. Each is parsed
//! alone; one that is broken is reported, and its last good version stays in force. Then all that parsed are put together
//! by `mesh`: `workloads` decides who is in the mesh, `policies` which rules hold for whom, `services` what is behind a
//! name, `routes` which rules hold for a request to it.
//! Goes out: `SnapshotParts` for the data path, every Problem, and the memory for the next translation. `translate` does
//! that for all objects at once, `live` for one change after the other, to the same end.

mod candidate;
mod gateway;
mod hosts;
mod istio;
mod kubernetes;
mod live;
mod manifest;
mod mesh;
mod object;
mod pod;
mod policies;
mod report;
mod routes;
mod schema;
mod services;
mod texts;
mod traffic;
mod virtual_services;
mod workloads;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use candidate::{Candidate, NamespaceMode, NoCandidate};
pub use live::Live;
pub use manifest::{Unreadable, closed, parse};
pub use object::{Key, Object};
pub use texts::Name;

use crate::model::{NodePods, ObjectRef, OutboundPolicy, Problem, Severity, SnapshotParts, TrustDomain};
use gateway::{Grant, Route};
use istio::{AuthorizationPolicy, DestinationRule, PeerAuthentication, VirtualService};
use kubernetes::{EndpointSlice, Namespace, Node, Pod, RuntimeClass, Service};
use mesh::Mesh;
use report::Report;

/// What the translation needs to know of the mesh besides its objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub trust_domain: TrustDomain,
    /// The end of service names: `cluster.local`.
    pub cluster_domain: Arc<str>,
    /// The name of this cluster, for metrics.
    pub cluster: Arc<str>,
    /// Policies in this namespace hold for the whole mesh.
    pub root_namespace: Arc<str>,
    /// Whether `istio.io/dataplane-mode` is read too.
    pub istio_labels: bool,
    pub outbound: OutboundPolicy,
    /// The node whose pods are judged here, and told of in `NodePods`; `None` means that all are judged. Of other pods less
    /// is kept, and no rules are made.
    pub node: Option<Arc<str>>,
    /// Whether a pod counts that has no address yet: for one who asks where identities run, and sends no traffic.
    pub without_address: bool,
    /// Standalone mode: the node whose pods must name their network namespace.
    pub standalone_node: Option<Arc<str>>,
    /// Standalone mode, where no controller makes EndpointSlices: a Service that has none gets its endpoints from the
    /// Pods that its selector names.
    pub endpoints_from_pods: bool,
}

impl Settings {
    /// The settings of a mesh that says nothing but its trust domain.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            cluster_domain: "cluster.local".into(),
            cluster: "Kubernetes".into(),
            root_namespace: "istio-system".into(),
            istio_labels: false,
            outbound: OutboundPolicy::AllowAny,
            node: None,
            without_address: false,
            standalone_node: None,
            endpoints_from_pods: false,
        }
    }

    /// Whether connections to the pods of `node` are judged here.
    fn judges(&self, node: &str) -> bool {
        self.node.as_deref().is_none_or(|own| own == node)
    }
}

/// The last good version of every object, parsed. An object whose value is the very same is not parsed again.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    good: BTreeMap<Key, Good>,
}

impl Memory {
    /// The last good version of every object, as its source gave it.
    pub fn good(&self) -> impl Iterator<Item = &Object> {
        self.good.values().map(|good| &good.object)
    }
}

#[derive(Debug, Clone)]
struct Good {
    object: Object,
    parsed: Arc<Parsed>,
    warnings: Vec<Problem>,
}

#[derive(Debug)]
pub struct Translation {
    pub parts: SnapshotParts,
    pub node_pods: NodePods,
    /// Sorted, each once.
    pub problems: Vec<Problem>,
    pub memory: Memory,
}

/// One object that could be read.
#[derive(Debug)]
enum Parsed {
    Namespace(Namespace),
    Node(Node),
    Pod(Pod),
    RuntimeClass(RuntimeClass),
    Service(Service),
    EndpointSlice(EndpointSlice),
    PeerAuthentication(PeerAuthentication),
    AuthorizationPolicy(AuthorizationPolicy),
    Route(Arc<Route>),
    ReferenceGrant(Grant),
    DestinationRule(Arc<DestinationRule>),
    VirtualService(Arc<VirtualService>),
    /// A kind that is checked for its shape only.
    Nothing,
}

/// The kinds of which a mesh is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    Namespace,
    Node,
    Pod,
    RuntimeClass,
    Service,
    EndpointSlice,
    PeerAuthentication,
    AuthorizationPolicy,
    HttpRoute,
    GrpcRoute,
    ReferenceGrant,
    DestinationRule,
    VirtualService,
}

/// Makes the model out of `objects`. The order of `objects` changes nothing but which of two equal names is the second.
/// `Live` does the same change by change.
pub fn translate(settings: &Settings, objects: &[Object], before: &Memory) -> Translation {
    let mut problems = Vec::new();
    let mut memory = Memory::default();
    let mut mesh = Mesh::new(settings.clone());
    for object in unique(objects, &mut problems) {
        let key = object.key();
        let known = before.good.get(&key);
        if let Some(same) = known.filter(|g| g.object.is_same(object)) {
            problems.extend(same.warnings.iter().cloned());
            memory.good.insert(key, same.clone());
            continue;
        }
        let mut report = Report::of(object);
        let Some(outcome) = parse_object(object, &mut report) else {
            problems.extend(report.into_problems());
            continue;
        };
        let found = report.into_problems();
        match (outcome, known) {
            (Ok(parsed), _) => {
                let good = Good { object: object.clone(), parsed: Arc::new(parsed), warnings: found.clone() };
                problems.extend(found);
                memory.good.insert(key, good);
            }
            (Err(_), Some(good)) => {
                problems.extend(with_outcome(found, "the last good version stays in force"));
                memory.good.insert(key, good.clone());
            }
            (Err(broken), None) => {
                problems.extend(with_outcome(found, broken.outcome));
                // It holds for this translation only, in place of an object that was never good.
                if let Some(stand_in) = broken.stand_in {
                    mesh.put(object.reference(), &stand_in);
                }
            }
        }
    }
    for good in memory.good.values() {
        mesh.put(good.object.reference(), &good.parsed);
    }
    mesh.make();
    problems.extend(mesh.problems().cloned());
    problems.sort();
    problems.dedup();
    Translation { parts: mesh.parts(), node_pods: mesh.node_pods(), problems, memory }
}

/// What is wrong with an object by itself. Nothing is said of what is in force in its place: that depends on what was good.
pub fn judge(object: &Object) -> Vec<Problem> {
    let mut report = Report::of(object);
    let _ = parse_object(object, &mut report);
    report.into_problems()
}

/// What becomes of an object that cannot be read and never could.
struct Broken {
    /// End of the sentence of its Problem.
    outcome: &'static str,
    /// What closes in its place.
    stand_in: Option<Parsed>,
}

impl Broken {
    const LEFT_OUT: Self = Self { outcome: "the object is left out", stand_in: None };
}

/// `None`: an object that is none of ours, or a kind that is not honoured yet (which has been reported).
fn parse_object(object: &Object, report: &mut Report) -> Option<Result<Parsed, Broken>> {
    fn plain<T>(parsed: Option<T>, make: impl Fn(T) -> Parsed) -> Option<Result<Parsed, Broken>> {
        Some(parsed.map(make).ok_or(Broken::LEFT_OUT))
    }
    let known_version = |good: &[&str], report: &mut Report| {
        if !good.contains(&object.version()) {
            report.error(
                "apiVersion",
                format!("version `{}` of this kind is not known: use {}", object.version(), good[0]),
            );
        }
    };
    let route = |route: Option<Route>, report: &Report| {
        let route = route.and_then(|route| report.unless_broken(route));
        route.map(|route| Parsed::Route(Arc::new(route))).ok_or(gateway::GO_ON)
    };
    match (object.group(), object.kind()) {
        ("", "Namespace") => plain(kubernetes::namespace(object, report), Parsed::Namespace),
        ("", "Node") => plain(kubernetes::node(object, report), Parsed::Node),
        ("", "Pod") => plain(kubernetes::pod(object, report), Parsed::Pod),
        ("", "Service") => plain(kubernetes::service(object, report), Parsed::Service),
        ("", "ServiceAccount") => plain(kubernetes::service_account(object, report), |()| Parsed::Nothing),
        ("node.k8s.io", "RuntimeClass") => plain(kubernetes::runtime_class(object, report), Parsed::RuntimeClass),
        ("discovery.k8s.io", "EndpointSlice") => {
            known_version(&["v1"], report);
            plain(kubernetes::endpoint_slice(object, report), Parsed::EndpointSlice)
        }
        ("security.istio.io", "PeerAuthentication") => {
            known_version(&["v1", "v1beta1"], report);
            let parsed = istio::peer_authentication(object, report);
            Some(parsed.map(Parsed::PeerAuthentication).ok_or_else(|| istio::closed_peer_authentication(object)))
        }
        ("security.istio.io", "AuthorizationPolicy") => {
            known_version(&["v1", "v1beta1"], report);
            let parsed = istio::authorization_policy(object, report);
            Some(parsed.map(Parsed::AuthorizationPolicy).ok_or_else(|| istio::closed_authorization_policy(object)))
        }
        ("networking.istio.io", "DestinationRule") => {
            known_version(&["v1", "v1beta1", "v1alpha3"], report);
            let parsed = istio::destination_rule(object, report);
            Some(parsed.map(|rule| Parsed::DestinationRule(Arc::new(rule))).ok_or(istio::GO_ON))
        }
        ("networking.istio.io", "VirtualService") => {
            known_version(&["v1", "v1beta1", "v1alpha3"], report);
            let parsed = istio::virtual_service(object, report);
            Some(parsed.map(|service| Parsed::VirtualService(Arc::new(service))).ok_or(istio::GO_ON))
        }
        (gateway::GROUP, "HTTPRoute") => {
            known_version(&["v1", "v1beta1"], report);
            Some(route(gateway::http_route(object, report), report))
        }
        (gateway::GROUP, "GRPCRoute") => {
            known_version(&["v1"], report);
            Some(route(gateway::grpc_route(object, report), report))
        }
        (gateway::GROUP, "ReferenceGrant") => {
            known_version(&["v1", "v1beta1"], report);
            plain(gateway::reference_grant(object, report), Parsed::ReferenceGrant)
        }
        (gateway::GROUP, "TLSRoute" | "TCPRoute" | "UDPRoute") => {
            gateway::not_honoured(object, report);
            None
        }
        (group, kind) if object::is_mesh_api(group) => {
            report.warning("", format!("kind {kind} of {group} is not honoured yet: nothing of it is in force"));
            None
        }
        // Deployments, ConfigMaps and the like belong to others.
        _ => None,
    }
}

/// Each object once; of two with the same name the first counts, in the order of their files.
fn unique<'a>(objects: &'a [Object], problems: &mut Vec<Problem>) -> Vec<&'a Object> {
    let mut seen: BTreeMap<Key, &Object> = BTreeMap::new();
    for object in objects {
        match seen.entry(object.key()) {
            std::collections::btree_map::Entry::Vacant(free) => {
                free.insert(object);
            }
            std::collections::btree_map::Entry::Occupied(first) => {
                let at = &first.get().reference().file;
                let message = format!("this object is already in {at}, which counts: remove one of the two");
                problems.push(problem(Severity::Error, object.reference(), "", message));
            }
        }
    }
    seen.into_values().collect()
}

fn with_outcome(problems: Vec<Problem>, outcome: &str) -> impl Iterator<Item = Problem> {
    problems.into_iter().map(move |mut p| {
        if p.severity == Severity::Error {
            p.message = format!("{}; {outcome}", p.message);
        }
        p
    })
}

fn problem(severity: Severity, object: &Arc<ObjectRef>, field: &str, message: impl Into<String>) -> Problem {
    Problem { severity, object: object.clone(), field: field.into(), message: message.into() }
}

#[cfg(test)]
mod tests;
