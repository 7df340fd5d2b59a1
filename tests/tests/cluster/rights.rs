//! Who may do what, and what is said to those who may not.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::stage::{MESH, Stage, peer};

/// All that an agent and a controller may do, in the words of RBAC: `verbs resources [names]`, of the cluster and of the
/// mesh's namespace. What is not here must not be there.
const AGENT: &[&str] = &[
    "get,list,watch namespaces,nodes,pods,services",
    "get,list,watch endpointslices.discovery.k8s.io",
    "get,list,watch runtimeclasses.node.k8s.io",
    "get,list,watch authorizationpolicies.security.istio.io,peerauthentications.security.istio.io",
    "get,list,watch virtualservices.networking.istio.io,destinationrules.networking.istio.io",
    "get,list,watch httproutes.gateway.networking.k8s.io,grpcroutes.gateway.networking.k8s.io,\
     referencegrants.gateway.networking.k8s.io",
    "patch pods",
    "create,patch events",
    "in nodemesh-system: get,list,watch configmaps [nodemesh,nodemesh-ca-root]",
];

fn rules(kind: &str, rules: &Value, place: &str) -> BTreeSet<String> {
    let list = |value: &Value| -> Vec<String> {
        value.as_array().map(|a| a.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()).unwrap_or_default()
    };
    let all = rules.as_array().unwrap_or_else(|| panic!("{kind} has rules"));
    all.iter()
        .map(|rule| {
            let group = list(&rule["apiGroups"]).concat();
            let dot = |r: &String| if group.is_empty() { r.clone() } else { format!("{r}.{group}") };
            let resources: Vec<_> = list(&rule["resources"]).iter().map(dot).collect();
            let names = list(&rule["resourceNames"]);
            let names = if names.is_empty() { String::new() } else { format!(" [{}]", names.join(",")) };
            format!("{place}{} {}{names}", list(&rule["verbs"]).join(","), resources.join(","))
        })
        .collect()
}

pub fn accounts_may_do_what_is_written_and_no_more(stage: &Stage) {
    let kube = stage.installed();
    let mut found = rules("the role", &kube.get(&["clusterrole", "nodemesh-agent"])["rules"], "");
    found.extend(rules(
        "the role",
        &kube.get(&["-n", MESH, "role", "nodemesh-agent"])["rules"],
        "in nodemesh-system: ",
    ));
    let written: BTreeSet<String> = AGENT.iter().map(ToString::to_string).collect();
    assert_eq!(found, written);
    // And in the API server's own words.
    let may = |account: &str, verb: &str, what: &str, namespace: &str| {
        let user = format!("system:serviceaccount:{MESH}:{account}");
        let said = kube.kubectl(&["auth", "can-i", verb, what, "-n", namespace, "--as", &user]);
        said.out.trim() == "yes"
    };
    assert!(may("nodemesh-agent", "list", "pods", "default"), "it could do nothing at all");
    for (verb, what) in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods"),
        ("delete", "pods"),
        ("update", "pods"),
        ("create", "pods/exec"),
        ("get", "configmaps"),
        ("create", "serviceaccounts/token"),
        ("patch", "nodes"),
        ("update", "pods/status"),
        ("create", "tokenreviews"),
        ("patch", "daemonsets"),
    ] {
        assert!(!may("nodemesh-agent", verb, what, "default"), "an agent may {verb} {what}");
        assert!(!may("nodemesh-agent", verb, what, MESH), "an agent may {verb} {what} in {MESH}");
    }
    for (verb, what) in
        [("list", "secrets"), ("get", "secrets"), ("create", "pods"), ("patch", "pods"), ("delete", "configmaps")]
    {
        assert!(!may("nodemesh-controller", verb, what, "default"), "a controller may {verb} {what}");
    }
}

/// A token as the agent's pod has it, bound to that pod.
fn token_of_agent(stage: &Stage, node: &str, audience: &[&str]) -> String {
    let kube = &stage.kube;
    let fields = format!("spec.nodeName={node}");
    let pods = kube.get(&["-n", MESH, "pods", "-l", "app=nodemesh-agent", "--field-selector", &fields]);
    // One that drains has a token no more.
    let serves = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
    let pod = pods["items"].as_array().and_then(|all| all.iter().find(serves)).expect("an agent serves the node");
    let pod = pod["metadata"]["name"].as_str().expect("a pod has a name").to_owned();
    let mut args = vec![
        "-n",
        MESH,
        "create",
        "token",
        "nodemesh-agent",
        "--bound-object-kind",
        "Pod",
        "--bound-object-name",
        &pod,
    ];
    args.extend(audience);
    kube.kubectl(&args).success().trim().to_owned()
}

/// With all that an agent of n1 has, it gets nothing of n2, and writes on no pod there.
pub fn an_agent_gets_identities_of_its_own_node_only(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "theirs";
    stage.namespace(NS, true);
    kube.apply(&(peer(NS, "near", "n1", &["echo", "[::]:8080"]) + &peer(NS, "far", "n2", &["echo", "[::]:8080"])));
    kube.ready(NS, "near");
    kube.ready(NS, "far");
    stage.wait_in_mesh(NS, &["near", "far"]);
    let token = token_of_agent(stage, "n1", &[]);
    let annotate = |pod: &str, what: &str| {
        let patch = format!("{{\"metadata\":{{\"annotations\":{{\"{what}\":\"x\"}}}}}}");
        kube.kubectl(&[
            "--token",
            &token,
            "--kubeconfig",
            &stage.anonymous(),
            "-n",
            NS,
            "patch",
            "pod",
            pod,
            "--type=merge",
            "-p",
            &patch,
        ])
    };
    let far = annotate("far", "nodemesh.io/status").failure();
    assert!(far.contains("only to pods of its own node"), "{far}");
    let other = annotate("near", "example.com/other").failure();
    assert!(other.contains("no annotation but nodemesh.io/status"), "{other}");
    annotate("near", "nodemesh.io/status").success();
    let event = |name: &str, node: &str| {
        kube.apply(&format!(
            "{{apiVersion: v1, kind: Event, metadata: {{name: {name}, namespace: {NS}}}, type: Warning, reason: NodemeshFailed, \
             message: m, count: 1, involvedObject: {{apiVersion: v1, kind: Pod, namespace: {NS}, name: {name}}}, \
             source: {{component: nodemesh-agent, host: {node}}}}}\n"
        ));
    };
    event("near", "n1");
    event("far", "n2");
    // Applied at the server: `kubectl patch` would read it first, which an agent may not.
    let patch = |name: &str, fields: &str| {
        let anonymous = stage.anonymous();
        let as_agent = ["--token", &token, "--kubeconfig", &anonymous, "-n", NS];
        let apply = ["apply", "--server-side", "--force-conflicts", "--validate=false", "-f", "-"];
        let text = format!(
            "{{apiVersion: v1, kind: Event, metadata: {{name: {name}, namespace: {NS}}}, involvedObject: {{apiVersion: v1, \
             kind: Pod, namespace: {NS}, name: {name}}}, {fields}}}\n"
        );
        kube.kubectl_with(&[&as_agent[..], &apply].concat(), &text)
    };
    patch("near", "count: 2").success();
    let far = patch("far", "count: 2").failure();
    assert!(far.contains("only to Events of agents of its own node"), "{far}");
    let other = patch("near", "message: all is well").failure();
    assert!(other.contains("nothing of an Event but how often and when"), "{other}");
    stage.forget(NS);
}

pub fn what_is_wrong_is_refused_in_a_sentence(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "wrong";
    stage.namespace(NS, false);
    let policy = |rules: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {NS}}}\nspec: {rules}\n"
        )
    };
    let refused = |text: &str| kube.kubectl_with(&["apply", "-f", "-"], text).failure();
    let said = refused(&policy("{action: ALLOW, rules: [{from: [{source: {ipBlocks: [10.0.0.300]}}]}]}"));
    assert!(said.contains("10.0.0.300"), "{said}");
    let said = refused(&policy("{action: PERHAPS}"));
    assert!(said.contains("PERHAPS"), "{said}");
    let wrong =
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NS}, labels: {{nodemesh.io/mode: \"on\"}}}}\n");
    let said = refused(&wrong);
    assert!(said.contains("`on` is no mode: use enabled or disabled"), "{said}");
    // A pod with a wrong label starts, as its namespace has it; whoever looks at it sees why.
    let odd = peer(NS, "odd", "n1", &["keep", "127.0.0.1:0"]);
    kube.apply(&odd.replace("{app: odd}", "{app: odd, nodemesh.io/mode: \"on\"}"));
    kube.eventually("an Event tells of the label", || {
        let fields = "reason=NodemeshLabel,involvedObject.name=odd";
        kube.kubectl(&["-n", NS, "get", "events", "--field-selector", fields]).out.contains("use enabled or disabled")
    });
    kube.apply(&policy("{action: DENY, rules: [{from: [{source: {namespaces: [other]}}]}]}"));
    kube.eventually("the policy shows that it is in force", || {
        let object = kube.get(&["-n", NS, "authorizationpolicy", "p"]);
        object["status"]["conditions"].as_array().is_some_and(|all| all.iter().any(|c| c["status"] == "True"))
    });
    stage.forget(NS);
}
