//! The mesh comes, and goes without a trace.

use crate::stage::{MESH, NODES, Stage, node_state};

pub fn installs_from_nothing_and_twice_is_once(stage: &Stage) {
    let kube = &stage.kube;
    // Before: what is missing is said.
    kube.meshctl(&["check"]).success();
    let first = kube.meshctl(&stage.install_with(&[])).success();
    stage.is_installed();
    assert!(first.contains("nodemesh-agent") && first.contains("nodemesh-controller"), "{first}");
    let agents = kube.get(&["-n", MESH, "daemonset", "nodemesh-agent"]);
    assert_eq!(agents["status"]["numberReady"], 2, "install waits until every node is ready");
    let generation = |kind: &str, name: &str| kube.get(&["-n", MESH, kind, name])["metadata"]["generation"].clone();
    let before = (generation("daemonset", "nodemesh-agent"), generation("deployment", "nodemesh-controller"));
    kube.meshctl(&stage.install_with(&[])).success();
    assert_eq!(before, (generation("daemonset", "nodemesh-agent"), generation("deployment", "nodemesh-controller")));
    kube.meshctl(&["check"]).success();
    let version = kube.meshctl(&["version"]).success();
    assert!(version.contains("nodemesh"), "{version}");
    let status = kube.meshctl(&["status", "--kubernetes"]).success();
    assert!(NODES.iter().all(|node| status.contains(node)), "{status}");
    // Values that are wrong change nothing.
    let wrong = kube.meshctl(&["install", "--set", "agent.cgruop=/x"]).failure();
    assert!(wrong.contains("cgruop"), "{wrong}");
}

pub fn uninstalling_leaves_the_nodes_as_they_were(stage: &Stage) {
    let kube = stage.installed();
    // A pod that is in the mesh when the mesh goes keeps its network.
    stage.namespace("left", true);
    kube.apply(&crate::stage::peer("left", "web", "n1", &["echo", "[::]:8080"]));
    kube.ready("left", "web");
    stage.wait_in_mesh("left", &["web"]);
    kube.meshctl(&["uninstall", "--kubernetes"]).success();
    let all = "daemonsets,deployments,services,configmaps,secrets,serviceaccounts,roles,rolebindings,leases,poddisruptionbudgets";
    for (kinds, args) in [
        (all, vec!["--all-namespaces", "-l", "app.kubernetes.io/part-of=nodemesh"]),
        (
            "clusterroles,clusterrolebindings,validatingwebhookconfigurations,validatingadmissionpolicies,\
             validatingadmissionpolicybindings,customresourcedefinitions",
            vec!["-l", "app.kubernetes.io/part-of=nodemesh"],
        ),
    ] {
        let left = kube.kubectl(&[&["get", kinds, "-o", "name"], args.as_slice()].concat()).success();
        assert_eq!(left.trim(), "", "objects are left");
    }
    assert!(kube.get(&["namespace", MESH]).is_null(), "the mesh's namespace is left");
    let maps = kube.kubectl(&["get", "configmaps", "--all-namespaces", "-o", "name"]).success();
    assert!(!maps.contains("nodemesh-ca-root"), "{maps}");
    let call = kube.start(
        "n1",
        &mesh_tests::peer_binary().display().to_string(),
        &["call", &format!("{}:8080", stage.pod_ip("left", "web"))],
    );
    kube.eventually("a pod that was in the mesh is served in plaintext", || call.log().contains("\"ok\":true"));
    kube.kubectl(&["delete", "namespace", "left"]).success();
    for node in NODES {
        kube.eventually(&format!("node {node} is as it was"), || {
            let (before, now) = (&stage.before[node], node_state(kube, node));
            let (before, now) = (without_pods(before), without_pods(&now));
            if before != now {
                eprintln!("{}", difference(&before, &now));
                std::thread::sleep(std::time::Duration::from_millis(500));
            }
            before == now
        });
    }
}

/// Routes to pods come and go.
fn without_pods(state: &str) -> String {
    let lines = state.lines().filter(|line| !line.contains(" dev veth"));
    lines.map(|line| format!("{}\n", line.trim_end())).collect()
}

fn difference(before: &str, now: &str) -> String {
    let lines = |a: &str, b: &str, mark: char| {
        a.lines().filter(|l| !b.lines().any(|other| other == *l)).map(|l| format!("{mark} {l}\n")).collect::<String>()
    };
    lines(before, now, '-') + &lines(now, before, '+')
}
