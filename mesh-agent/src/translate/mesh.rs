//! All objects in force, put together: they come and go one by one, and `make` makes again what a change touches.
//!
//! Each part knows what is due: `workloads` the pods that changed, those that claim the same address, those of a Namespace
//! or Node that changed; `services` the Services that changed or whose slices did, `routes` those that changed or that speak of a Service that did. A policy that changes makes the pods due
//! that are judged here. What is made again and is as it was stays the very same, so that nobody sees a change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::gateway::RouteKind;
use super::kubernetes::{self, Mode};
use super::pod::Pod;
use super::policies::Policies;
use super::routes::Routes;
use super::services::{Services, Slice};
use super::texts::{Name, Texts};
use super::traffic::Traffic;
use super::virtual_services::{self, VirtualServices};
use super::workloads::Pods;
use super::{Parsed, Settings, Table};
use crate::model::http::HttpRoutes;
use crate::model::traffic::Destinations;
use crate::model::{
    Locality, MeshSettings, NodePods, ObjectRef, Problem, Service, ServiceKey, Snapshot, SnapshotParts, Workload,
};

pub(super) struct Mesh {
    settings: Settings,
    texts: Texts,
    sites: Sites,
    namespaces: BTreeMap<Arc<str>, Mode>,
    nodes: Nodes,
    classes: Classes,
    pods: Pods,
    services: Services,
    traffic: Traffic,
    virtual_services: VirtualServices,
    routes: Routes,
    policies: Policies,
}

/// What a pod or service is made with, besides itself.
pub(super) struct Surroundings<'a> {
    pub settings: &'a Settings,
    pub sites: &'a Sites,
    pub namespaces: &'a BTreeMap<Arc<str>, Mode>,
    pub nodes: &'a Nodes,
    pub classes: &'a Classes,
    pub policies: &'a Policies,
}

/// The container runtime's name of each RuntimeClass.
pub(super) type Classes = BTreeMap<Arc<str>, Arc<str>>;

/// What was made anew, and what of it was there before.
#[derive(Default)]
pub(super) struct Changes {
    pub old_workloads: Vec<Arc<Workload>>,
    pub new_workloads: Vec<Arc<Workload>>,
    pub old_services: Vec<Arc<Service>>,
    pub new_services: Vec<Arc<Service>>,
    /// `None` where there are none any more.
    pub http: Vec<(ServiceKey, Option<Arc<HttpRoutes>>)>,
    /// `None` where there are none any more.
    pub traffic: Vec<(ServiceKey, Option<Arc<Destinations>>)>,
    /// Whether there may be other Problems.
    pub problems: bool,
}

/// Where objects were read that come from files.
#[derive(Default)]
pub(super) struct Sites(HashMap<ObjectRef, Arc<ObjectRef>>);

impl Sites {
    fn set(&mut self, at: &Arc<ObjectRef>) {
        if !at.file.is_empty() {
            self.0.insert(ObjectRef { file: String::new(), ..(**at).clone() }, at.clone());
        }
    }

    /// The name of an object for its Problems.
    pub fn of(&self, kind: &str, namespace: &str, name: &str) -> Arc<ObjectRef> {
        let at = ObjectRef { file: String::new(), kind: kind.into(), namespace: namespace.into(), name: name.into() };
        self.0.get(&at).cloned().unwrap_or_else(|| Arc::new(at))
    }
}

/// Where each node is.
#[derive(Default)]
pub(super) struct Nodes {
    places: BTreeMap<Arc<str>, Arc<Locality>>,
    nowhere: Arc<Locality>,
}

impl Nodes {
    pub fn place(&self, node: &str) -> Arc<Locality> {
        self.places.get(node).unwrap_or(&self.nowhere).clone()
    }

    /// A slice knows the zone, only the node knows the region.
    pub fn place_in(&self, node: Option<&str>, zone: Option<&Arc<str>>, texts: &mut Texts) -> Arc<Locality> {
        let of_node = self.place(node.unwrap_or_default());
        match zone {
            Some(zone) if of_node.zone != *zone => {
                texts.place(&Locality { zone: zone.clone(), region: of_node.region.clone() })
            }
            _ => of_node,
        }
    }
}

impl Mesh {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            texts: Texts::default(),
            sites: Sites::default(),
            namespaces: BTreeMap::new(),
            nodes: Nodes::default(),
            classes: Classes::new(),
            pods: Pods::default(),
            services: Services::default(),
            traffic: Traffic::default(),
            virtual_services: VirtualServices::default(),
            routes: Routes::default(),
            policies: Policies::default(),
        }
    }

    /// An object has come, or is another now.
    pub fn put(&mut self, at: &Arc<ObjectRef>, parsed: &Parsed) {
        self.sites.set(at);
        let name = self.texts.name(&at.namespace, &at.name);
        match parsed {
            Parsed::Namespace(n) => self.set_namespace(&name.1, Some(n.mode)),
            Parsed::Node(n) => self.set_node(&name.1, Some(&n.locality)),
            Parsed::Pod(pod) => {
                let pod = Pod::new(pod, &self.settings, &mut self.texts);
                // One copy of the name.
                let name = (pod.namespace.clone(), pod.name.clone());
                self.pods.set(name, Some(pod), &self.settings);
            }
            Parsed::RuntimeClass(c) => self.set_class(&name.1, Some(c.handler.as_str().into())),
            Parsed::Service(s) => self.set_service(name, Some(s.clone())),
            Parsed::EndpointSlice(s) => self.services.set_slice(name, Some(Slice::new(s, &mut self.texts))),
            Parsed::PeerAuthentication(p) => self.policies.set_peer(name, Some(p.clone())),
            Parsed::AuthorizationPolicy(p) => self.policies.set_authorization(name, Some(p.clone())),
            Parsed::Route(r) => self.routes.set((r.kind, name), Some(r.clone())),
            Parsed::VirtualService(v) => self.virtual_services.set(name, Some(v.clone()), &self.settings),
            Parsed::DestinationRule(r) => self.traffic.set(name, Some(r.clone()), &self.settings),
            Parsed::ReferenceGrant(g) => self.routes.set_grant(name, Some(g.clone())),
            Parsed::Nothing => {}
        }
    }

    /// An object is gone.
    pub fn remove(&mut self, table: Table, name: Name) {
        match table {
            Table::Namespace => self.set_namespace(&name.1, None),
            Table::Node => self.set_node(&name.1, None),
            Table::Pod => self.pods.set(name, None, &self.settings),
            Table::RuntimeClass => self.set_class(&name.1, None),
            Table::Service => self.set_service(name, None),
            Table::EndpointSlice => self.services.set_slice(name, None),
            Table::PeerAuthentication => self.policies.set_peer(name, None),
            Table::AuthorizationPolicy => self.policies.set_authorization(name, None),
            Table::HttpRoute => self.routes.set((RouteKind::Http, name), None),
            Table::GrpcRoute => self.routes.set((RouteKind::Grpc, name), None),
            Table::ReferenceGrant => self.routes.set_grant(name, None),
            Table::DestinationRule => self.traffic.set(name, None, &self.settings),
            Table::VirtualService => self.virtual_services.set(name, None, &self.settings),
        }
    }

    pub fn has(&self, table: Table, name: &Name) -> bool {
        match table {
            Table::Namespace => self.namespaces.contains_key(&name.1),
            Table::Node => self.nodes.places.contains_key(&name.1),
            Table::Pod => self.pods.has(name),
            Table::RuntimeClass => self.classes.contains_key(&name.1),
            Table::Service => self.services.has(name),
            Table::EndpointSlice => self.services.has_slice(name),
            Table::PeerAuthentication => self.policies.has_peer(name),
            Table::AuthorizationPolicy => self.policies.has_authorization(name),
            Table::HttpRoute => self.routes.has(RouteKind::Http, name),
            Table::GrpcRoute => self.routes.has(RouteKind::Grpc, name),
            Table::ReferenceGrant => self.routes.has_grant(name),
            Table::DestinationRule => self.traffic.has(name),
            Table::VirtualService => self.virtual_services.has(name),
        }
    }

    /// All that were put and not removed.
    pub fn names(&self, table: Table) -> BTreeSet<Name> {
        let alone = |name: &Arc<str>| -> Name { ("".into(), name.clone()) };
        match table {
            Table::Namespace => self.namespaces.keys().map(alone).collect(),
            Table::Node => self.nodes.places.keys().map(alone).collect(),
            Table::Pod => self.pods.names().collect(),
            Table::RuntimeClass => self.classes.keys().map(alone).collect(),
            Table::Service => self.services.names().cloned().collect(),
            Table::EndpointSlice => self.services.slice_names().cloned().collect(),
            Table::PeerAuthentication => self.policies.peer_names().cloned().collect(),
            Table::AuthorizationPolicy => self.policies.authorization_names().cloned().collect(),
            Table::HttpRoute => self.routes.names(RouteKind::Http).cloned().collect(),
            Table::GrpcRoute => self.routes.names(RouteKind::Grpc).cloned().collect(),
            Table::ReferenceGrant => self.routes.grant_names().cloned().collect(),
            Table::DestinationRule => self.traffic.names().cloned().collect(),
            Table::VirtualService => self.virtual_services.names().cloned().collect(),
        }
    }

    /// Makes again what is due.
    pub fn make(&mut self) -> Changes {
        let Self {
            settings,
            texts,
            sites,
            namespaces,
            nodes,
            classes,
            pods,
            services,
            traffic,
            virtual_services,
            routes,
            policies,
        } = self;
        let mut changes = Changes::default();
        if settings.endpoints_from_pods && pods.any_due() {
            services.all_due();
        }
        let around = Surroundings { settings, sites, namespaces, nodes, classes, policies };
        let made = services.make(&around, pods, texts, &mut changes);
        let shared = traffic.make(&made, services, pods, (settings, sites), &mut changes);
        let others = {
            let changed = made.union(&shared).cloned().collect();
            let around = virtual_services::Around { settings, sites, services, traffic };
            virtual_services.make(&changed, &around, &mut changes.problems)
        };
        routes.make(services, virtual_services, others, sites, &mut changes);
        if policies.have_changed() || made.iter().any(|name| policies.target(name)) {
            policies.make_ready(&settings.root_namespace, sites, |ns, name| services.behind(ns, name));
            pods.due_to_judge();
            changes.problems = true;
        }
        pods.make(&Surroundings { settings, sites, namespaces, nodes, classes, policies }, &mut changes);
        changes
    }

    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
        self.pods.all_due();
        self.services.all_due();
        self.traffic.all_due(&self.settings);
        self.virtual_services.all_due(&self.settings);
        self.policies.touch();
    }

    /// What is to be said of the pods of this node.
    pub fn node_pods(&self) -> NodePods {
        let Self {
            settings,
            texts: _,
            sites,
            namespaces,
            nodes,
            classes,
            pods,
            services: _,
            traffic: _,
            virtual_services: _,
            routes: _,
            policies,
        } = self;
        let istio = settings.istio_labels;
        let enabled = namespaces.iter().filter(|(_, mode)| mode.enabled(istio) == Some(true));
        NodePods {
            enabled_namespaces: enabled.map(|(name, _)| name.clone()).collect(),
            pods: pods.of_node(&Surroundings { settings, sites, namespaces, nodes, classes, policies }),
        }
    }

    /// All that was made, by namespace and name.
    pub fn parts(&self) -> SnapshotParts {
        SnapshotParts {
            settings: self.mesh_settings(),
            workloads: self.pods.workloads().cloned().collect(),
            services: self.services.services().cloned().collect(),
            http: self.routes.tables().collect(),
            traffic: self.traffic.destinations().collect(),
        }
    }

    pub fn mesh_settings(&self) -> MeshSettings {
        MeshSettings { trust_domain: self.settings.trust_domain.clone(), outbound: self.settings.outbound }
    }

    /// What was found when things were put together.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let of_policies = self.policies.problems().iter();
        of_policies
            .chain(self.services.problems())
            .chain(self.routes.problems())
            .chain(self.traffic.problems())
            .chain(self.virtual_services.problems())
            .chain(self.pods.problems())
    }

    fn set_namespace(&mut self, name: &Arc<str>, mode: Option<Mode>) {
        if self.namespaces.get(name).copied() == mode {
            return;
        }
        match mode {
            Some(mode) => self.namespaces.insert(name.clone(), mode),
            None => self.namespaces.remove(name),
        };
        self.pods.due_in_namespace(name);
    }

    /// Routes speak of Services, also of those that are not there yet.
    fn set_service(&mut self, name: Name, service: Option<kubernetes::Service>) {
        if self.services.set(name.clone(), service) {
            self.routes.due_of_service(&name);
        }
    }

    fn set_class(&mut self, name: &Arc<str>, handler: Option<Arc<str>>) {
        if self.classes.get(name) == handler.as_ref() {
            return;
        }
        match handler {
            Some(handler) => self.classes.insert(name.clone(), handler),
            None => self.classes.remove(name),
        };
        self.pods.due_of_class(name);
    }

    fn set_node(&mut self, name: &Arc<str>, place: Option<&Locality>) {
        if self.nodes.places.get(name).map(|known| &**known) == place {
            return;
        }
        match place {
            Some(place) => self.nodes.places.insert(self.texts.text(name), self.texts.place(place)),
            None => self.nodes.places.remove(name),
        };
        self.pods.due_on_node(name);
        self.services.due_on_node(name);
    }
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        let Self { old_workloads, new_workloads, old_services, new_services, http, traffic, problems: _ } = self;
        let no_workloads = old_workloads.is_empty() && new_workloads.is_empty();
        no_workloads && old_services.is_empty() && new_services.is_empty() && http.is_empty() && traffic.is_empty()
    }

    /// `before` with the changes. The old go first: what one gives up another may take.
    pub fn apply(self, before: &Snapshot, settings: MeshSettings) -> Snapshot {
        let mut next = before.next(settings);
        self.old_workloads.iter().for_each(|w| next.remove_workload(w));
        self.old_services.iter().for_each(|s| next.remove_service(s));
        self.new_workloads.into_iter().for_each(|w| next.insert_workload(w));
        self.new_services.into_iter().for_each(|s| next.insert_service(s));
        self.http.into_iter().for_each(|(key, routes)| next.set_http(key, routes));
        self.traffic.into_iter().for_each(|(key, all)| next.set_traffic(key, all));
        next
    }
}
