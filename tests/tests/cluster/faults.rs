//! What goes wrong around the mesh: wrong objects, pods that come again under a name, programs of the node that are restarted.

use serde_json::json;

use crate::stage::{MESH, NODES, Stage, peer, service, strict};
use crate::traffic::{calls, chats, goes_on};

/// A CA that is wrong is told on its Secret, and the last good one signs on.
pub fn a_broken_ca_changes_nothing(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "broken-ca";
    stage.namespace(NS, true);
    let write = |key: &str| {
        let patch = json!({"data": {"ca-key.pem": key}}).to_string();
        kube.kubectl(&["-n", MESH, "patch", "secret", "nodemesh-ca", "--type=merge", "--patch", &patch]).success();
    };
    let secret = kube.get(&["-n", MESH, "secret", "nodemesh-ca"]);
    let good = secret["data"]["ca-key.pem"].as_str().expect("the CA has a key").to_owned();
    // "no key" in base64.
    write("bm8ga2V5");
    let said = || {
        let fields = "involvedObject.name=nodemesh-ca,reason=NodemeshCaRefused";
        kube.kubectl(&["-n", MESH, "get", "events", "--field-selector", fields]).out
    };
    kube.eventually("an Event says what is wrong", || said().contains("ca-key.pem"));
    // Nobody has a certificate of this identity yet.
    kube.apply(&format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: new, namespace: {NS}}}\n"));
    let web = peer(NS, "web", "n1", &["echo", "[::]:8080"]).replace("spec:\n", "spec:\n  serviceAccountName: new\n");
    kube.apply(&web);
    kube.ready(NS, "web");
    stage.wait_in_mesh(NS, &["web"]);
    write(&good);
    stage.forget(NS);
}

/// Pods of one name, one after the other, each of another account: a call is judged by who makes it now.
pub fn a_name_that_is_used_again_is_another_pod(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "again";
    stage.namespace(NS, true);
    let mut objects = strict(NS) + &peer(NS, "server", "n2", &["echo", "[::]:8080"]) + &service(NS, "server", "");
    for account in ["right", "wrong"] {
        objects +=
            &format!("---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}, namespace: {NS}}}\n");
    }
    objects += &format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: right, namespace: {NS}}}\n\
         spec: {{rules: [{{from: [{{source: {{principals: [cluster.local/ns/{NS}/sa/right]}}}}]}}]}}\n"
    );
    kube.apply(&objects);
    kube.ready(NS, "server");
    stage.wait_in_mesh(NS, &["server"]);
    let call = ["call", "server.again:80", "--times", "1000000", "--every-ms", "20"];
    for turn in 0..3 {
        let account = if turn % 2 == 0 { "right" } else { "wrong" };
        let spec = format!("spec:\n  serviceAccountName: {account}\n");
        kube.apply(&peer(NS, "client", NODES[turn % 2], &call).replace("spec:\n", &spec));
        kube.ready(NS, "client");
        if turn == 0 {
            // The policy may come to a node after the pod.
            kube.eventually("the first is served", || calls(stage, NS, "client").0 > 10);
        } else {
            kube.eventually("it calls", || {
                let (good, failed) = calls(stage, NS, "client");
                good + failed.len() > 10
            });
            let (good, failed) = calls(stage, NS, "client");
            let wrong = if account == "right" { failed.len() } else { good };
            assert_eq!(wrong, 0, "pod {turn} of this name is `{account}`: {good} calls were served, {failed:?} not");
        }
        kube.kubectl(&["-n", NS, "delete", "pod", "client", "--grace-period=1", "--wait=true"]).success();
    }
    stage.forget(NS);
}

/// The container runtime and kubelet of a node are killed and started anew: no call fails, no connection is cut, and
/// probes pass afterwards.
pub fn programs_of_a_node_may_be_restarted(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "restarted";
    stage.namespace(NS, true);
    let probe = "    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 1}\n";
    let serve = |name: &str| peer(NS, name, "n1", &["echo", "[::]:8080"]);
    // A kubelet that starts takes what it probes for not ready, mesh or not: the one that is called is not probed.
    kube.apply(&(strict(NS) + &serve("server") + &service(NS, "server", "") + &serve("probed") + probe));
    kube.ready(NS, "server");
    kube.ready(NS, "probed");
    let call = ["call", "server.restarted:80", "--times", "1000000", "--every-ms", "20"];
    let chat = ["chat", "server.restarted:80", "--every-ms", "50"];
    kube.apply(&(peer(NS, "caller", "n2", &call) + &peer(NS, "chatter", "n2", &chat)));
    kube.ready(NS, "caller");
    goes_on(stage, NS, "caller", 10);
    for program in ["containerd", "kubelet"] {
        kube.restart("n1", program);
        goes_on(stage, NS, "caller", 50);
    }
    // Started anew, it probes what it starts.
    kube.apply(&(serve("late") + probe));
    kube.ready(NS, "late");
    stage.wait_in_mesh(NS, &["late"]);
    kube.ready(NS, "probed");
    goes_on(stage, NS, "caller", 50);
    assert_eq!(chats(stage, NS, "chatter").0, 1, "a long connection was cut");
    stage.forget(NS);
}
