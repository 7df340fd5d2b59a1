//! Laws of the translation that hold for all manifests.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::{Action, Snapshot};

fn object(value: Value) -> Object {
    Object::from_value("t.yaml", value).unwrap().remove(0)
}

fn pod(name: &str, ip: &str) -> Object {
    object(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
        "status": {"podIP": ip},
    }))
}

/// A policy whose rule has one random field more than it should, in a random place.
fn spoiled_policies() -> impl Strategy<Value = (&'static str, Value)> {
    let action = prop::sample::select(&["ALLOW", "DENY", "AUDIT", "CUSTOM"][..]);
    let good = prop::sample::select(&[("principals", "cluster.local/ns/a/sa/b"), ("ipBlocks", "10.0.0.0/8")][..]);
    let spoil = prop::sample::select(
        &[
            ("from", "requestPrincipals", "x"),
            ("from", "remoteIpBlocks", "10.0.0.0/8"),
            ("from", "trustDomains", "x"),
            ("from", "princpals", "x"),
            ("from", "ipBlocks", "10.0.0.0/99"),
            ("from", "principals", "spiffe://x"),
            ("from", "namespaces", "a*b"),
            ("to", "methods", "GET"),
            ("to", "notPaths", "/x"),
            ("to", "hosts", "x"),
            ("to", "ports", "0"),
            ("when", "request.auth.claims[x]", "y"),
            ("when", "experimental.x", "y"),
            ("when", "connection.sni", "y"),
        ][..],
    );
    (action, good, spoil, any::<bool>()).prop_map(|(action, (key, value), (place, field, text), beside)| {
        let mut rule = if beside { json!({"from": [{"source": {key: [value]}}]}) } else { json!({}) };
        let one = json!({field: [text]});
        match place {
            "from" => rule["from"] = json!([{"source": one}]),
            "to" => rule["to"] = json!([{"operation": one}]),
            _ => rule["when"] = json!([{"key": field, "values": [text]}]),
        }
        let policy = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "shop"},
            "spec": {"action": action, "rules": [rule]},
        });
        (action, policy)
    })
}

fn json_values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-zA-Z0-9./*:-]{0,12}".prop_map(Value::from),
    ];
    const KEYS: &[&str] = &[
        "apiVersion",
        "kind",
        "metadata",
        "name",
        "namespace",
        "labels",
        "annotations",
        "spec",
        "status",
        "podIP",
        "podIPs",
        "ip",
        "rules",
        "from",
        "source",
        "principals",
        "ipBlocks",
        "to",
        "operation",
        "ports",
        "when",
        "key",
        "values",
        "selector",
        "matchLabels",
        "mtls",
        "mode",
        "portLevelMtls",
        "items",
        "endpoints",
        "addresses",
        "addressType",
        "clusterIP",
        "clusterIPs",
        "port",
        "targetPort",
        "ownerReferences",
        "targetRefs",
        "action",
        "hostNetwork",
        "matches",
        "path",
        "value",
        "type",
        "headers",
        "queryParams",
        "method",
        "service",
        "filters",
        "requestHeaderModifier",
        "set",
        "requestMirror",
        "backendRef",
        "backendRefs",
        "weight",
        "group",
        "requestRedirect",
        "cors",
        "timeouts",
        "request",
        "retry",
        "codes",
        "sessionPersistence",
        "hosts",
        "http",
        "route",
        "destination",
        "host",
        "subset",
        "subsets",
        "trafficPolicy",
        "loadBalancer",
        "connectionPool",
        "outlierDetection",
    ];
    leaf.prop_recursive(5, 64, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(prop::sample::select(KEYS).prop_map(str::to_owned), inner, 0..6)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

const KINDS: &[(&str, &str)] = &[
    ("v1", "Namespace"),
    ("v1", "Node"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("v1", "ServiceAccount"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    ("security.istio.io/v1", "PeerAuthentication"),
    ("security.istio.io/v1beta1", "AuthorizationPolicy"),
    ("networking.istio.io/v1", "VirtualService"),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"),
    ("networking.istio.io/v1", "VirtualService"),
    ("networking.istio.io/v1", "DestinationRule"),
    ("gateway.networking.k8s.io/v1beta1", "ReferenceGrant"),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// What cannot be judged closes: an ALLOW lets nobody in, a DENY refuses all that its readable part matches.
    #[test]
    fn a_policy_that_cannot_be_judged_never_opens((action, policy) in spoiled_policies()) {
        let t = translate(&settings(), &[pod("app", "10.0.0.9"), object(policy)], &Memory::default());
        prop_assert!(!t.problems.is_empty());
        let policies = &t.parts.workloads[0].rules.as_ref().unwrap().policies;
        prop_assert_eq!(policies.len(), 1);
        match action {
            "ALLOW" => {
                prop_assert_eq!(policies[0].action, Action::Allow);
                prop_assert!(policies[0].rules.is_empty());
            }
            "AUDIT" => prop_assert_eq!(policies[0].action, Action::Audit),
            _ => {
                prop_assert_eq!(policies[0].action, Action::Deny);
                prop_assert_eq!(policies[0].rules.len(), 1);
                // The condition that could not be judged is gone, so that the rule matches everybody.
                let rule = &policies[0].rules[0];
                let all = |list: &[crate::model::Match]| list.iter().all(|m| *m == Default::default());
                prop_assert!(all(&rule.to) && all(&rule.when));
            }
        }
    }

    #[test]
    fn whatever_stands_in_an_object_it_is_read_or_reported(
        which in prop::sample::select(KINDS), mut value in json_values(), spec in json_values(), status in json_values(),
    ) {
        if !value.is_object() { value = json!({}) }
        value["apiVersion"] = which.0.into();
        value["kind"] = which.1.into();
        value["metadata"] = json!({"name": "x", "namespace": "shop", "labels": value["labels"].clone()});
        value["spec"] = spec;
        value["status"] = status;
        if which.1.ends_with("Route") && value["spec"].is_object() {
            // Or it would be none of this mesh, and not be read at all.
            value["spec"]["parentRefs"] = json!([{"group": "", "kind": "Service", "name": "x"}]);
        }
        let Ok(objects) = Object::from_value("t", value) else { return Ok(()) };
        let first = translate(&settings(), &objects, &Memory::default());
        let again = translate(&settings(), &objects, &first.memory);
        prop_assert_eq!(&first.parts, &again.parts);
        prop_assert_eq!(&first.problems, &again.problems);
        Snapshot::new(1, first.parts);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse("t.yaml", text.as_bytes());
        let _ = parse("t.yaml", &bytes);
    }
}

#[test]
fn pods_with_equal_policies_share_one_list() {
    let mut objects: Vec<_> = (0..200).map(|i| pod(&format!("p{i}"), &format!("10.0.1.{i}"))).collect();
    let policy = |name: &str, spec: Value| {
        object(json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
        }))
    };
    objects.push(policy("all", json!({"rules": [{}]})));
    objects.push(policy("one", json!({"selector": {"matchLabels": {"app": "p7"}}, "rules": [{}]})));
    let t = translate(&settings(), &objects, &Memory::default());
    let lists: std::collections::BTreeSet<_> =
        t.parts.workloads.iter().map(|w| Arc::as_ptr(w.rules.as_ref().unwrap())).collect();
    assert_eq!(t.parts.workloads.len(), 200);
    assert_eq!(lists.len(), 2);
}

#[test]
fn a_bomb_of_aliases_is_refused_quickly() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for i in 1..30 {
        let before = format!("*a{}", i - 1);
        text.push_str(&format!("a{i}: &a{i} [{}]\n", vec![before; 9].join(", ")));
    }
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep = (0..5000).map(|i| format!("{}a:\n", " ".repeat(i))).collect::<String>();
    let json = format!("{{\"a\":{nested}}}");
    for bomb in [&text, &nested, &deep, &json] {
        let start = Instant::now();
        assert!(parse("bomb.yaml", bomb.as_bytes()).is_err());
        assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
    }
}

#[test]
fn ten_thousand_pods_are_translated_again_in_no_time() {
    let mut objects: Vec<_> =
        (0..10_000u32).map(|i| pod(&format!("p{i}"), &std::net::Ipv4Addr::from(0x0a00_0100 + i).to_string())).collect();
    let first = translate(&settings(), &objects, &Memory::default());
    objects.push(pod("new", "10.9.9.9"));
    let second = translate(&settings(), &objects, &first.memory);
    assert_eq!(second.parts.workloads.len(), 10_001);
    // Unchanged objects are not parsed again.
    let same = |key: &Key| Arc::ptr_eq(&first.memory.good[key].parsed, &second.memory.good[key].parsed);
    assert!(first.memory.good.keys().all(same));
}
