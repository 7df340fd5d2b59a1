//! The mesh comes, and goes without a trace.

use std::time::{Duration, Instant};

use crate::stage::{MESH, NODES, Stage, node_state};

pub fn installs_from_nothing_and_twice_is_once(stage: &Stage) {
    let kube = &stage.kube;
    // Before: what was not looked at is said, and a pod on each node looks.
    let check = kube.meshctl(&["check"]).success();
    assert!(check.contains("skipped") && check.contains("check --nodes"), "{check}");
    let values = stage.values();
    let check = kube.meshctl(&[&["check", "--nodes"], values.as_slice()].concat()).success();
    for word in ["takes all 8 programs", "cgroup2 at", "a bpffs at", "CNI: bridge", "the clock goes with"] {
        assert!(check.contains(word), "{word} is not in {check}");
    }
    assert!(check.lines().all(|line| line.len() <= 80), "{check}");
    assert!(kube.get(&["namespace", "nodemesh-check"]).is_null(), "the check leaves nothing");
    // A node that does not have what is needed.
    let wrong = kube.meshctl(&[&["check", "--nodes"], values.as_slice(), &["--set", "agent.cgroup=/proc"]].concat());
    assert!(wrong.out.contains("programs cannot be attached at /proc"), "{}", wrong.out);
    assert!(wrong.out.contains("set agent.cgroup"), "{}", wrong.out);
    wrong.failure();
    let wrong = kube.meshctl(&[&["check", "--nodes"], values.as_slice(), &["--set", "cni.confDir=/nowhere"]].concat());
    assert!(wrong.out.contains("/nowhere is not a directory"), "{}", wrong.out);
    wrong.failure();
    for node in NODES {
        assert_eq!(stage.before[node], node_state(kube, node), "the check leaves something on {node}");
    }
    // A label that means nothing is found out here where no webhook has refused it.
    stage.namespace("early", false);
    kube.kubectl(&["label", "namespace", "early", "nodemesh.io/mode=on"]).success();
    let wrong = kube.meshctl(&["check"]);
    assert!(wrong.out.contains("namespace early has nodemesh.io/mode=on"), "{}", wrong.out);
    wrong.failure();
    stage.forget("early");
    let first = kube.meshctl(&stage.install_with(&[])).success();
    stage.is_installed();
    assert!(first.contains("nodemesh-agent") && first.contains("nodemesh-controller"), "{first}");
    let agents = kube.get(&["-n", MESH, "daemonset", "nodemesh-agent"]);
    assert_eq!(agents["status"]["numberReady"], 2, "install waits until every node is ready");
    let generation = |kind: &str, name: &str| kube.get(&["-n", MESH, kind, name])["metadata"]["generation"].clone();
    let before = (generation("daemonset", "nodemesh-agent"), generation("deployment", "nodemesh-controller"));
    kube.meshctl(&stage.install_with(&[])).success();
    assert_eq!(before, (generation("daemonset", "nodemesh-agent"), generation("deployment", "nodemesh-controller")));
    let check = kube.meshctl(&["check"]).success();
    for word in
        ["agents are", "takes all 8 programs", "mesh-cni is the last plugin", "the root certificate is good for"]
    {
        assert!(check.contains(word), "{word} is not in {check}");
    }
    let version = kube.meshctl(&["version"]).success();
    assert!(version.contains("nodemesh"), "{version}");
    let status = kube.meshctl(&["status", "--kubernetes"]).success();
    assert!(NODES.iter().all(|node| status.contains(node)), "{status}");
    one_at_a_time(stage);
    bad_values(stage);
}

/// Who else changes the installation is told; one that has died is waited for no longer than its Lease lasts.
fn one_at_a_time(stage: &Stage) {
    let kube = &stage.kube;
    let lease = |renewed: &str| {
        format!(
            "apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata:\n  name: nodemesh-meshctl\n  namespace: {MESH}\n  \
             annotations: {{nodemesh.io/command: meshctl upgrade}}\nspec: {{holderIdentity: jo@pc, leaseDurationSeconds: 60, \
             acquireTime: \"{renewed}\", renewTime: \"{renewed}\"}}\n"
        )
    };
    // Far ahead of every clock.
    kube.apply(&lease("2999-01-01T00:00:00.000000Z"));
    for command in [stage.install_with(&[]), vec!["upgrade"], vec!["uninstall", "--kubernetes"]] {
        let said = kube.meshctl(&command).failure();
        assert!(said.contains("jo@pc runs `meshctl upgrade` on this mesh"), "{said}");
    }
    assert!(!kube.get(&["-n", MESH, "daemonset", "nodemesh-agent"]).is_null(), "nothing was changed");
    kube.apply(&lease("2000-01-01T00:00:00.000000Z"));
    kube.meshctl(&stage.install_with(&[])).success();
    assert!(kube.get(&["-n", MESH, "lease", "nodemesh-meshctl"]).is_null(), "the turn is given back");
}

/// What is wrong changes nothing, and is told in a sentence.
fn bad_values(stage: &Stage) {
    let kube = &stage.kube;
    let wrong = kube.meshctl(&["install", "--set", "agent.cgruop=/x"]).failure();
    assert!(wrong.contains("cgruop"), "{wrong}");
    let wrong = kube.meshctl(&["install", "--profile", "producton"]).failure();
    assert!(wrong.contains("there is no profile `producton`"), "{wrong}");
    for (value, word) in [
        ("agent.resources.requests.cpu=lots", "quantities"),
        ("agent.updateStrategy.rollingUpdate.maxSurge=x", "maxSurge"),
    ] {
        let wrong = kube.meshctl(&stage.install_with(&["--set", value, "--set", "settings.accessLog=json"])).failure();
        assert!(wrong.contains("refuses the DaemonSet nodemesh-agent") && wrong.contains(word), "{wrong}");
        let settings = kube.get(&["-n", MESH, "configmap", "nodemesh"])["data"].to_string();
        assert!(!settings.contains("json"), "half of it was installed: {settings}");
    }
    // An image that does not run is found out before anything was changed.
    let wrong = kube.meshctl(&stage.install_with(&["--set", "image.tag=nowhere"])).failure();
    assert!(wrong.contains("the new image does not run on node") && wrong.contains("ErrImageNeverPull"), "{wrong}");
    let agent = kube.get(&["-n", MESH, "daemonset", "nodemesh-agent"])["spec"]["template"].to_string();
    assert!(!agent.contains("nowhere"), "{agent}");
    // A label that means nothing.
    stage.namespace("slip", false);
    let wrong = kube.kubectl(&["label", "namespace", "slip", "nodemesh.io/mode=on"]).failure();
    assert!(wrong.contains("`on` is no mode: use enabled or disabled"), "{wrong}");
    // Who may only look sees what he may, and changes nothing.
    let viewer = stage.viewer("slip");
    let as_viewer = |args: &[&str]| kube.meshctl(&[args, &["--kubeconfig", &viewer]].concat());
    let check = as_viewer(&["check"]).success();
    for word in ["DaemonSet nodemesh-agent: 2 of 2 ready", "since you may not list nodes", "pods/exec"] {
        assert!(check.contains(word), "{word} is not in {check}");
    }
    for command in [stage.install_with(&[]), vec!["upgrade"], vec!["uninstall", "--kubernetes"]] {
        let said = as_viewer(&command).failure();
        assert!(said.contains("you may change nothing"), "{said}");
    }
    kube.kubectl(&["delete", "clusterrolebinding", "test-viewer"]).success();
    stage.forget("slip");
}

pub fn uninstalling_leaves_the_nodes_as_they_were(stage: &Stage) {
    let kube = stage.installed();
    // A pod that is in the mesh when the mesh goes keeps its network.
    stage.namespace("left", true);
    kube.apply(&crate::stage::peer("left", "web", "n1", &["echo", "[::]:8080"]));
    kube.ready("left", "web");
    stage.wait_in_mesh("left", &["web"]);
    // Agents that drain since the upgrade, where that case ran, hold connections that never end: nobody waits for them.
    let begun = Instant::now();
    kube.meshctl(&["uninstall", "--kubernetes", "--purge"]).success();
    assert!(begun.elapsed() < Duration::from_secs(120), "it took {:?}", begun.elapsed());
    kube.kubectl(&["delete", "namespace", "upgraded", "--ignore-not-found", "--wait=false"]).success();
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
                std::thread::sleep(Duration::from_millis(500));
            }
            before == now
        });
    }
}

/// Routes to pods come and go.
fn without_pods(state: &str) -> String {
    let lines = state.lines().filter(|line| ![" dev veth", " dev cni0"].iter().any(|device| line.contains(device)));
    lines.map(|line| format!("{}\n", line.trim_end())).collect()
}

fn difference(before: &str, now: &str) -> String {
    let lines = |a: &str, b: &str, mark: char| {
        a.lines().filter(|l| !b.lines().any(|other| other == *l)).map(|l| format!("{mark} {l}\n")).collect::<String>()
    };
    lines(before, now, '-') + &lines(now, before, '+')
}
