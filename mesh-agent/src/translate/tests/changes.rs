//! `Live` and `translate` mean the same: whatever comes, changes and goes, in whatever order, the snapshot that changes made
//! is the one that all objects together make.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::{Snapshot, Target};

const NAMESPACES: [&str; 2] = ["istio-system", "shop"];
const NAMES: [&str; 3] = ["a", "b", "c"];
const NODES: [&str; 2] = ["n1", "n2"];
const PORTS: [u16; 2] = [80, 81];
/// Few, so that they are claimed twice.
const PODS: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1"];
const SERVICES: [&str; 3] = ["10.96.0.1", "10.96.0.2", "None"];

/// One thing that is heard: an object is as `digits` say, or gone.
#[derive(Debug, Clone)]
struct Heard {
    kind: usize,
    gone: bool,
    digits: [u8; 12],
}

fn heard() -> impl Strategy<Value = Heard> {
    // Mostly pods and slices, as in a cluster, and routes with the services that they speak of.
    let kind = prop_oneof![6 => Just(2), 3 => Just(3), 3 => Just(4), 3 => Just(8), 4 => 11..13usize, 8 => 0..13usize];
    (kind, prop::bool::weighted(0.2), any::<[u8; 12]>()).prop_map(|(kind, gone, digits)| Heard { kind, gone, digits })
}

impl Heard {
    fn of<'a, T: ?Sized>(&self, digit: usize, values: &[&'a T]) -> &'a T {
        values[self.digits[digit] as usize % values.len()]
    }

    fn yes(&self, digit: usize, one_in: u8) -> bool {
        self.digits[digit].is_multiple_of(one_in)
    }

    fn object(&self) -> Object {
        let (namespace, name) = (self.of(0, &NAMESPACES), self.of(1, &NAMES));
        let labels = match self.digits[2] % 6 {
            0 => json!({"nodemesh.io/mode": "enabled", "app": "x"}),
            1 => json!({"nodemesh.io/mode": "disabled"}),
            2 => json!({"nodemesh.io/mode": "wrong", "app": "y"}),
            3 => json!({"app": "x", "version": "2"}),
            _ => json!({"app": "y"}),
        };
        let created = self.of(3, &["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "soon"]);
        let mut metadata = json!({"name": name, "namespace": namespace, "labels": labels});
        if !self.yes(3, 4) {
            metadata["creationTimestamp"] = created.into();
        }
        let of_kind = |api: &str, kind: &str| json!({"apiVersion": api, "kind": kind, "metadata": metadata.clone()});
        let mut value = match self.kind {
            0 => {
                let mut value = of_kind("v1", "Namespace");
                value["metadata"]["name"] = namespace.into();
                value
            }
            1 => {
                let mut value = of_kind("v1", "Node");
                value["metadata"]["name"] = self.of(1, &NODES).into();
                value["metadata"]["labels"] = json!({"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": self.of(4, &["y", "z"])});
                value
            }
            2 => self.pod(of_kind("v1", "Pod")),
            3 => self.service(of_kind("v1", "Service")),
            4 => self.slice(of_kind("discovery.k8s.io/v1", "EndpointSlice")),
            5 => {
                let mut value = of_kind("security.istio.io/v1", "PeerAuthentication");
                value["spec"] = json!({"mtls": {"mode": self.of(4, &["STRICT", "PERMISSIVE", "BROKEN"])}});
                if self.yes(5, 2) {
                    value["spec"]["selector"] = json!({"matchLabels": {"app": self.of(6, &["x", "y"])}});
                }
                value
            }
            6 => {
                let mut value = of_kind("node.k8s.io/v1", "RuntimeClass");
                value["handler"] = self.of(4, &["runsc", "runc"]).into();
                value
            }
            8 => self.route(of_kind("gateway.networking.k8s.io/v1", "HTTPRoute")),
            9 => self.route(of_kind("gateway.networking.k8s.io/v1", "GRPCRoute")),
            10 => {
                let mut value = of_kind("gateway.networking.k8s.io/v1", "ReferenceGrant");
                let from = json!({"group": "gateway.networking.k8s.io", "kind": self.of(4, &["HTTPRoute", "GRPCRoute"]),
                    "namespace": self.of(5, &NAMESPACES)});
                let name = self.of(6, &["", "a", "b"]);
                value["spec"] = json!({"from": [from], "to": [{"group": "", "kind": "Service", "name": name}]});
                value
            }
            11 => self.virtual_service(of_kind("networking.istio.io/v1", "VirtualService")),
            12 => self.destination_rule(of_kind("networking.istio.io/v1", "DestinationRule")),
            _ => {
                let mut value = of_kind("security.istio.io/v1", "AuthorizationPolicy");
                value["spec"] = json!({"action": self.of(4, &["ALLOW", "DENY", "BROKEN"]), "rules": [{}]});
                match self.digits[5] % 3 {
                    0 => value["spec"]["selector"] = json!({"matchLabels": {"app": self.of(6, &["x", "y"])}}),
                    1 => value["spec"]["targetRefs"] = json!([{"kind": "Service", "name": self.of(6, &NAMES)}]),
                    _ => {}
                }
                value
            }
        };
        if matches!(self.kind, 0 | 1 | 6) {
            value["metadata"].as_object_mut().unwrap().remove("namespace");
        }
        Object::from_value("", value).unwrap().remove(0)
    }

    fn pod(&self, mut value: Value) -> Value {
        let uid = self.of(4, &["u1", "u2", "u3", "u4", ""]);
        value["metadata"]["uid"] = uid.into();
        if self.yes(5, 5) {
            value["metadata"]["deletionTimestamp"] = "2026-02-01T00:00:00Z".into();
        }
        if self.yes(6, 3) {
            value["metadata"]["annotations"] = json!({"nodemesh.io/netns": self.of(7, &["/run/a", "/run/b"])});
        }
        let port = json!([{"ports": [{"name": "http", "containerPort": PORTS[0]}]}]);
        value["spec"] = json!({"nodeName": self.of(8, &NODES), "hostNetwork": self.yes(9, 8), "containers": port,
            "serviceAccountName": self.of(9, &["one", "two"])});
        if self.yes(4, 4) {
            value["spec"]["runtimeClassName"] = self.of(5, &NAMES).into();
        }
        value["status"] = json!({"phase": if self.yes(10, 7) { "Succeeded" } else { "Running" }});
        match self.digits[11] % 8 {
            0 => {}
            1 => value["status"]["podIP"] = "broken".into(),
            _ => value["status"]["podIPs"] = json!([{"ip": self.of(10, &PODS)}, {"ip": self.of(11, &PODS)}]),
        }
        if self.yes(2, 2) {
            value["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        }
        value
    }

    fn service(&self, mut value: Value) -> Value {
        let named =
            json!([{"name": "http", "port": PORTS[0]}, {"name": "other", "port": PORTS[1], "targetPort": "http"}]);
        let one = json!([{"port": if self.yes(5, 9) { 0 } else { PORTS[0] }}]);
        let ports = if self.yes(6, 2) { named } else { one };
        value["spec"] = json!({"clusterIP": self.of(4, &SERVICES), "selector": {"app": "x"}, "ports": ports});
        if self.yes(7, 8) {
            value["spec"]["type"] = "ExternalName".into();
        }
        if self.yes(8, 8) {
            value["spec"]["ports"][0]["appProtocol"] = "tcp".into();
        }
        value
    }

    fn route(&self, mut value: Value) -> Value {
        let mut parent =
            json!({"group": "", "kind": "Service", "name": self.of(4, &NAMES), "namespace": self.of(5, &NAMESPACES)});
        if self.yes(6, 2) {
            parent["port"] = PORTS[self.digits[7] as usize % 2].into();
        }
        let backend = json!({"name": self.of(7, &NAMES), "namespace": self.of(8, &NAMESPACES), "port": PORTS[0]});
        let header = json!([{"name": "x", "value": self.of(9, &["1", "2"])}]);
        let copy = json!({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": self.of(10, &NAMES), "port": PORTS[0]}}});
        let mut rules = json!([{"backendRefs": [backend], "matches": [{"headers": header}, {}]}]);
        if self.yes(10, 3) {
            rules[0]["filters"] = json!([copy]);
        }
        if self.yes(11, 6) {
            rules[0]["backends"] = json!([]);
        }
        let more = json!({"group": "", "kind": "Service", "name": self.of(2, &NAMES), "port": PORTS[1]});
        let parents = if self.yes(2, 4) { json!([parent, more]) } else { json!([parent]) };
        let gateway = json!([{"name": "gateway"}]);
        value["spec"] = json!({"parentRefs": if self.yes(3, 9) { gateway } else { parents }, "rules": rules});
        value
    }

    fn host(&self, digit: usize) -> String {
        let (name, namespace) = (self.of(digit, &NAMES), self.of(digit + 1, &NAMESPACES));
        match self.digits[digit] % 7 {
            0 => "*".into(),
            1 => format!("*.{namespace}.svc.cluster.local"),
            2 | 3 => format!("{name}.{namespace}.svc.cluster.local"),
            _ => name.into(),
        }
    }

    fn virtual_service(&self, mut value: Value) -> Value {
        let mut to = json!({"host": self.of(5, &NAMES)});
        if self.yes(6, 2) {
            to["subset"] = self.of(7, &["one", "two"]).into();
        }
        let delegate = json!({"name": self.of(7, &NAMES), "namespace": self.of(8, &NAMESPACES)});
        let asked = json!([{"uri": {"prefix": self.of(9, &["/", "/a", "/a/b"])}}]);
        let first = match self.digits[10] % 3 {
            0 => json!({"match": asked, "delegate": delegate}),
            1 => json!({"match": asked, "redirect": {"uri": "/b"}}),
            _ => json!({"match": asked, "route": [{"destination": {"host": self.host(8).replace('*', "a")}}]}),
        };
        value["spec"] = json!({"hosts": [self.host(4)], "exportTo": self.export_to(11),
            "http": [first, {"route": [{"destination": to}]}]});
        if self.yes(6, 3) {
            value["spec"]["hosts"] = json!([]);
        }
        if self.yes(3, 9) {
            value["spec"]["http"][0]["wrong"] = true.into();
        }
        value
    }

    fn destination_rule(&self, mut value: Value) -> Value {
        let subsets = json!([
            {"name": "one", "labels": {"app": self.of(5, &["x", "y"])}},
            {"name": self.of(6, &["one", "two"]), "labels": {"version": "2"},
                "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}},
        ]);
        value["spec"] = json!({"host": self.host(7), "exportTo": self.export_to(9), "subsets": subsets});
        if self.yes(10, 2) {
            value["spec"]["trafficPolicy"] = json!({"portLevelSettings": [{"port": {"number": PORTS[0]},
                "outlierDetection": {"consecutive5xxErrors": self.digits[11]}}]});
        }
        value
    }

    fn export_to(&self, digit: usize) -> Value {
        match self.digits[digit] % 5 {
            0 => json!(["."]),
            1 => json!([self.of(digit - 1, &NAMESPACES)]),
            2 => json!(["*"]),
            _ => Value::Null,
        }
    }

    fn slice(&self, mut value: Value) -> Value {
        value["metadata"]["labels"] = json!({"kubernetes.io/service-name": self.of(4, &NAMES)});
        value["addressType"] = self.of(5, &["IPv4", "IPv4", "IPv4", "broken"]).into();
        value["ports"] = json!([{"name": self.of(6, &["", "http"]), "port": self.of(7, &[&PORTS[0], &PORTS[1]])}]);
        let mut endpoint = json!({"addresses": [self.of(8, &PODS[..3])], "nodeName": self.of(9, &NODES)});
        if self.yes(10, 2) {
            endpoint["zone"] = "z".into();
        }
        endpoint["conditions"] = json!({"ready": self.yes(11, 2)});
        let other = json!({"addresses": [self.of(10, &PODS[..3])]});
        value["endpoints"] = json!([endpoint, other]);
        value
    }
}

/// All that can be asked of a snapshot.
fn answers(snapshot: &Snapshot) -> Vec<String> {
    let addresses = PODS.iter().chain(&SERVICES[..2]).map(|a| a.parse::<IpAddr>().unwrap());
    let mut answers = Vec::new();
    for address in addresses.flat_map(|a| PORTS.map(|p| SocketAddr::new(a, p))) {
        let name = |s: &Arc<Service>| format!("{}/{}", s.namespace, s.name);
        let target = match snapshot.resolve(address) {
            Target::Service { service, port } => format!("{} {port}", name(&service)),
            Target::NoSuchPort { service } => format!("{} no port", name(&service)),
            Target::Workload { workload, service } => format!("{workload:?} {:?}", service.as_ref().map(name)),
            Target::Outside => "outside".into(),
        };
        answers.push(format!("{address}: {target} {:?}", snapshot.service_of_endpoint(address).map(name)));
    }
    let mut judged: Vec<_> = snapshot.judged().map(|w| format!("judged {}", w.uid)).collect();
    judged.sort();
    answers.extend(judged);
    let mut http: Vec<_> = snapshot.http_ports().map(|(key, routes)| format!("{key:?} {routes:?}")).collect();
    http.sort();
    answers.extend(http);
    let mut traffic: Vec<_> = snapshot.traffic_ports().map(|(key, all)| format!("{key:?} {all:?}")).collect();
    traffic.sort();
    answers.extend(traffic);
    answers.push(format!("{} {}", snapshot.count_workloads(), snapshot.count_services()));
    answers
}

fn any_settings() -> impl Strategy<Value = Settings> {
    (0..3u8, any::<bool>(), any::<bool>()).prop_map(|(node, from_pods, without_address)| {
        let mut settings = settings();
        match node {
            0 => settings.node = Some(NODES[0].into()),
            1 => settings.standalone_node = Some(NODES[0].into()),
            _ => {}
        }
        settings.endpoints_from_pods = from_pods;
        settings.without_address = without_address;
        settings
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changes_lead_to_what_all_objects_together_mean(
        settings in any_settings(), all in prop::collection::vec((heard(), prop::bool::weighted(0.3)), 1..60),
    ) {
        let mut live = Live::new(settings.clone());
        let mut snapshot = Snapshot::empty(Mesh::new(settings.clone()).mesh_settings());
        let mut told = Vec::new();
        let (mut objects, mut memory) = (BTreeMap::new(), Memory::default());
        let last = all.len() - 1;
        for (i, (heard, look)) in all.into_iter().enumerate() {
            let object = heard.object();
            let key = object.key();
            if heard.gone {
                objects.remove(&key);
                let at = object.reference();
                let name = (at.namespace.as_str().into(), at.name.as_str().into());
                live.remove(Table::of(object.group(), object.kind()).unwrap(), name);
            } else {
                live.put(&object);
                objects.insert(key, object);
            }
            let present: Vec<_> = objects.values().cloned().collect();
            let together = translate(&settings, &present, &memory);
            memory = together.memory;
            if !look && i < last {
                continue;
            }
            let next = live.snapshot(&snapshot);
            let changed = next.is_some();
            let next = next.unwrap_or_else(|| snapshot.next(snapshot.settings().clone()));
            let before = std::mem::replace(&mut snapshot, next);
            prop_assert_eq!(changed, before != snapshot, "what is as it was is no change");
            let expected = Snapshot::new(0, together.parts);
            prop_assert!(snapshot == expected, "{:#?}\n is not \n{:#?}", snapshot, expected);
            prop_assert_eq!(answers(&snapshot), answers(&expected));
            for workload in snapshot.workloads() {
                let same = before.workload(&workload.uid).filter(|w| *w == workload);
                prop_assert!(same.is_none_or(|w| Arc::ptr_eq(w, workload)), "{} is made anew", workload.uid);
            }
            for (key, routes) in snapshot.http_ports() {
                let same = before.http(key).filter(|r| *r == routes);
                prop_assert!(same.is_none_or(|r| Arc::ptr_eq(r, routes)), "{key:?} is made anew");
            }
            prop_assert_eq!(&live.node_pods(), &together.node_pods);
            told = live.problems().unwrap_or(told);
            prop_assert_eq!(&told, &together.problems);
            let names: Vec<_> = live.names(Table::Pod).into_iter().collect();
            let pods = objects.keys().filter(|key| key.kind() == "Pod").count();
            prop_assert_eq!(names.len(), pods);
        }
    }
}

/// Of a pod elsewhere no more is kept than it takes to reach it and to name it.
#[test]
fn a_pod_of_another_node_has_no_rules_and_is_never_judged() {
    let mut settings = settings();
    settings.node = Some("n1".into());
    let pod = |name: &str, node: &str, ip: &str| {
        let value = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop"},
            "spec": {"nodeName": node}, "status": {"podIP": ip}});
        Object::from_value("", value).unwrap().remove(0)
    };
    let t = translate(&settings, &[pod("here", "n1", "10.0.0.1"), pod("there", "n2", "10.0.0.2")], &Memory::default());
    let snapshot = Snapshot::new(1, t.parts);
    let judge = |name: &str| {
        let workload = snapshot.workloads().find(|w| *w.name == *name).unwrap();
        let (source, destination) = ("10.0.0.3:1".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let connection = crate::proxy::policy::Connection { identity: None, source, destination };
        crate::proxy::policy::authorize(workload, &connection).result
    };
    assert!(judge("here").is_ok());
    assert_eq!(judge("there"), Err(crate::proxy::policy::Denied::Elsewhere));
    assert_eq!(snapshot.judged().count(), 1);
}

/// The same words at another age: nothing of the route itself is different.
#[test]
fn a_route_that_was_deleted_and_made_again_is_the_youngest() {
    let object = |value: Value| Object::from_value("", value).unwrap().remove(0);
    let route = |name: &str, created: &str| {
        object(json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": name, "namespace": "shop", "creationTimestamp": created},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
                "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}}))
    };
    let mut live = Live::new(settings());
    live.put(&object(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}})));
    live.put(&route("a", "2026-01-01T00:00:00Z"));
    live.put(&route("b", "2026-01-02T00:00:00Z"));
    let order = |snapshot: &Snapshot| -> Vec<String> {
        let (_, routes) = snapshot.http_ports().next().unwrap();
        routes.general.as_ref().unwrap().rules.iter().map(|rule| rule.object.name.clone()).collect()
    };
    let first = live.snapshot(&Snapshot::empty(Mesh::new(settings()).mesh_settings())).unwrap();
    assert_eq!(order(&first), ["a", "b"]);
    live.put(&route("a", "2026-01-03T00:00:00Z"));
    assert_eq!(order(&live.snapshot(&first).unwrap()), ["b", "a"]);
}
