//! Traffic of pods in a real cluster, and who is in the mesh.

use crate::stage::{Stage, agnhost, peer, servers, service, strict};

const HBONE: u16 = 15008;

/// Calls that went well, and what the others said.
pub fn calls(stage: &Stage, namespace: &str, pod: &str) -> (usize, Vec<String>) {
    let log = stage.kube.log(namespace, pod);
    let failed = log.lines().filter(|line| line.contains("\"ok\":false")).map(str::to_owned).collect();
    (log.matches("\"ok\":true").count(), failed)
}

/// Waits until the pod has made this many calls more, none of which failed.
#[track_caller]
pub fn goes_on(stage: &Stage, namespace: &str, pod: &str, more: usize) {
    let (before, _) = calls(stage, namespace, pod);
    stage.kube.eventually(&format!("{namespace}/{pod} is served"), || calls(stage, namespace, pod).0 >= before + more);
    no_call_failed(stage, namespace, pod);
}

#[track_caller]
pub fn no_call_failed(stage: &Stage, namespace: &str, pod: &str) {
    let (good, failed) = calls(stage, namespace, pod);
    assert!(failed.is_empty(), "of {} calls of {namespace}/{pod} failed: {failed:?}", good + failed.len());
}

/// The connections that a chatting pod has had to make, and its messages.
pub fn chats(stage: &Stage, namespace: &str, pod: &str) -> (u64, usize) {
    let log = stage.kube.log(namespace, pod);
    let lines: Vec<serde_json::Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let connections = lines.iter().filter_map(|l| l["connection"].as_u64()).max().unwrap_or(0);
    (connections, lines.iter().filter(|l| l.get("message").is_some()).count())
}

pub fn running_pods_join_and_leave_by_a_label(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "live";
    stage.namespace(NS, false);
    let call = ["call", "orders.live:80", "--times", "1000000", "--every-ms", "50", "--text", "espresso-by-call"];
    let chat = ["chat", "orders.live:80", "--every-ms", "50", "--text", "tea-by-chat"];
    let server = peer(NS, "orders", "n2", &["echo", "[::]:8080"]) + &service(NS, "orders", "");
    kube.apply(&server);
    kube.ready(NS, "orders");
    kube.apply(&(peer(NS, "caller", "n1", &call) + &peer(NS, "chatter", "n1", &chat)));
    kube.ready(NS, "caller");
    kube.ready(NS, "chatter");

    let wire = kube.capture("n1");
    goes_on(stage, NS, "caller", 10);
    assert!(wire.stop().contains(b"espresso-by-call"), "before, the link shows what is said");

    kube.kubectl(&["label", "namespace", NS, "nodemesh.io/mode=enabled"]).success();
    stage.wait_in_mesh(NS, &["orders", "caller", "chatter"]);
    let wire = kube.capture("n1");
    goes_on(stage, NS, "caller", 20);
    let recording = wire.stop();
    assert!(!recording.contains(b"espresso-by-call"), "the link still shows what is said");
    assert!(recording.on_port(HBONE).count() > 0, "nothing goes to port {HBONE}");
    let connections = kube.meshctl(&["certificates", "--kubernetes"]).success();
    assert!(connections.contains("/ns/live/sa/default"), "{connections}");

    kube.kubectl(&["label", "namespace", NS, "nodemesh.io/mode-"]).success();
    kube.eventually("the pods show that they have left", || stage.status(NS, "caller").is_empty());
    let wire = kube.capture("n1");
    goes_on(stage, NS, "caller", 10);
    assert!(wire.stop().contains(b"espresso-by-call"), "outside of the mesh the link shows what is said");
    let (connections, messages) = chats(stage, NS, "chatter");
    assert_eq!(connections, 1, "the long connection was cut after {messages} messages");
    stage.forget(NS);
}

pub fn a_pod_opts_out_and_in(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "choice";
    stage.namespace(NS, true);
    kube.apply(
        &(peer(NS, "inside", "n1", &["echo", "[::]:8080"]) + &peer(NS, "outside", "n1", &["echo", "[::]:8080"])),
    );
    kube.ready(NS, "outside");
    stage.wait_in_mesh(NS, &["inside", "outside"]);
    kube.kubectl(&["-n", NS, "label", "pod", "outside", "nodemesh.io/mode=disabled"]).success();
    kube.eventually("the pod has left", || stage.status(NS, "outside").is_empty());
    assert!(stage.is_in_mesh(NS, "inside"));
    kube.kubectl(&["-n", NS, "label", "pod", "outside", "nodemesh.io/mode=enabled", "--overwrite"]).success();
    stage.wait_in_mesh(NS, &["outside"]);
    // A slip of the pen lets nobody out.
    let wrong = kube.kubectl(&["label", "namespace", NS, "nodemesh.io/mode=enabledd", "--overwrite"]);
    let refusal = wrong.failure();
    assert!(refusal.contains("`enabledd` is no mode"), "{refusal}");
    stage.forget(NS);
}

/// Fifty pods whose first act is to connect to a server that takes nobody without an identity.
pub fn the_first_packet_of_a_new_pod_is_meshed(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "first";
    stage.namespace(NS, true);
    kube.apply(&(peer(NS, "orders", "n2", &["echo", "[::]:8080"]) + &strict(NS)));
    kube.ready(NS, "orders");
    let to = format!("{}:8080", stage.pod_ip(NS, "orders"));
    let job = format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: hasty, namespace: {NS}}}\nspec:\n  completions: 50\n  \
         parallelism: 10\n  backoffLimit: 0\n  template:\n    spec:\n      restartPolicy: Never\n      containers:\n      - name: main\n        \
         image: nodemesh.invalid/peer:test\n        imagePullPolicy: Never\n        args: [call, \"{to}\"]\n"
    );
    kube.apply(&job);
    let done = kube.kubectl(&[
        "-n",
        NS,
        "wait",
        "--for=condition=Complete",
        "job/hasty",
        "--timeout=180s",
        "--request-timeout=0",
    ]);
    if !done.ok {
        let pods = kube.kubectl(&["-n", NS, "get", "pods", "-o", "wide"]).out;
        let events = kube.kubectl(&["-n", NS, "get", "events"]).out;
        let logs = kube.kubectl(&["-n", NS, "logs", "-l", "job-name=hasty", "--tail=3", "--prefix"]).out;
        panic!("not every first packet came through:\n{pods}\n{logs}\n{events}");
    }
    stage.forget(NS);
}

pub fn probes_of_all_kinds_pass_under_strict(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "probed";
    stage.namespace(NS, true);
    kube.apply(&strict(NS));
    let both = |probe: &str| {
        let of = |failures: u32| format!("{{{probe}, periodSeconds: 1, failureThreshold: {failures}}}");
        // A server that is slow to start on a busy machine is no probe that was refused.
        format!("    startupProbe: {}\n    readinessProbe: {}\n    livenessProbe: {}\n", of(60), of(2), of(2))
    };
    let http = ["netexec", "--http-port=8080"];
    let mut pods = String::new();
    for node in ["n1", "n2"] {
        let mut add = |kind: &str, args: &[&str], probe: &str| {
            pods += &agnhost(NS, &format!("{kind}-{node}"), node, args, &both(probe));
        };
        add("http", &http, "httpGet: {path: /healthz, port: 8080}");
        add("tcp", &http, "tcpSocket: {port: 8080}");
        add("grpc", &["grpc-health-checking", "--port=5000"], "grpc: {port: 5000}");
        add("exec", &http, "exec: {command: [/program, help]}");
    }
    kube.apply(&pods);
    let names: Vec<String> =
        ["http", "tcp", "grpc", "exec"].iter().flat_map(|k| [format!("{k}-n1"), format!("{k}-n2")]).collect();
    for name in &names {
        kube.ready(NS, name);
    }
    stage.wait_in_mesh(NS, &names.iter().map(String::as_str).collect::<Vec<_>>());
    // Long enough for each to have failed twice and been restarted.
    mesh_tests::throughout(std::time::Duration::from_secs(4), "all pods stay ready", || {
        let path = "jsonpath={.items[*].status.containerStatuses[0]['ready','restartCount']}";
        let said = kube.kubectl(&["-n", NS, "get", "pods", "-o", path]).out;
        !said.contains("false") && !said.contains('1')
    });
    // And no other process of the node gets in where a probe does.
    let to = format!("http://{}:8080/healthz", stage.pod_ip(NS, "http-n1"));
    let curl = kube.netns("n1").command("curl").args(["-s", "--max-time", "5", "--noproxy", "*", &to]).output();
    assert!(!curl.expect("curl runs").status.success(), "a process of the node that is no kubelet was let in");
    stage.forget(NS);
}

pub fn names_of_all_kinds_are_served(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "names";
    stage.namespace(NS, true);
    let stateful = "---\napiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: web, namespace: names}\nspec:\n  serviceName: web-all\n  \
                    replicas: 2\n  podManagementPolicy: Parallel\n  selector: {matchLabels: {app: web}}\n  template:\n    metadata: {labels: {app: web}}\n    spec:\n      \
                    terminationGracePeriodSeconds: 1\n      containers:\n      - {name: main, image: \"nodemesh.invalid/peer:test\", imagePullPolicy: Never, args: [echo, \"[::]:8080\"], \
                    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}\n";
    let headless = service(NS, "web", "  clusterIP: None\n").replace("name: web,", "name: web-all,");
    let nodeport = service(NS, "web", "  type: NodePort\n").replace("name: web,", "name: web-out,");
    kube.apply(&(stateful.to_owned() + &service(NS, "web", "") + &headless + &nodeport));
    kube.rolled_out(NS, "statefulset/web");
    stage.wait_in_mesh(NS, &["web-0", "web-1"]);
    let targets = [
        "web.names.svc.cluster.local:80",
        "web-all.names:8080",
        "web-0.web-all.names:8080",
        "web-1.web-all.names:8080",
    ];
    let mut clients = String::new();
    for (i, target) in targets.iter().enumerate() {
        clients +=
            &peer(NS, &format!("client-{i}"), "n1", &["call", target, "--times", "1000000", "--every-ms", "100"]);
    }
    kube.apply(&clients);
    for i in 0..targets.len() {
        kube.ready(NS, &format!("client-{i}"));
        goes_on(stage, NS, &format!("client-{i}"), 10);
    }
    // From outside of the cluster, to a port of a node.
    let path = "jsonpath={.spec.ports[0].nodePort}";
    let port = kube.kubectl(&["-n", NS, "get", "service", "web-out", "-o", path]).success();
    for node in ["10.79.0.11", "10.79.0.12"] {
        let call = kube.start(
            "control",
            &mesh_tests::peer_binary().display().to_string(),
            &["call", &format!("{node}:{port}")],
        );
        kube.eventually(&format!("the port of node {node} is served"), || call.log().contains("\"ok\":true"));
    }
    stage.forget(NS);
}

pub fn applications_see_their_clients_addresses(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "seen";
    stage.namespace(NS, true);
    let http = ["netexec", "--http-port=8080"];
    let mut pods = String::new();
    for (name, node) in [("server", "n2"), ("far", "n1"), ("near", "n2")] {
        pods += &agnhost(
            NS,
            name,
            node,
            &http,
            "    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}\n",
        );
    }
    kube.apply(&pods);
    for name in ["server", "far", "near"] {
        kube.ready(NS, name);
    }
    stage.wait_in_mesh(NS, &["server", "far", "near"]);
    let server = stage.pod_ip(NS, "server");
    for client in ["far", "near"] {
        let ip = stage.pod_ip(NS, client);
        // The client is asked, from a machine outside, to ask the server whom it sees.
        let ask = format!("http://{ip}:8080/dial?request=clientip&protocol=http&host={server}&port=8080&tries=1");
        let said =
            kube.netns("control").command("curl").args(["-s", "--max-time", "10", "--noproxy", "*", &ask]).output();
        let said = String::from_utf8_lossy(&said.expect("curl runs").stdout).into_owned();
        assert!(said.contains(&format!("{ip}:")), "the server sees {said}, and {client} has {ip}");
    }
    stage.forget(NS);
}

pub fn a_rollout_under_traffic_fails_no_request(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "rolled";
    stage.namespace(NS, true);
    kube.apply(&servers(NS, "web", 3));
    kube.rolled_out(NS, "deploy/web");
    let mut clients = String::new();
    for node in ["n1", "n2"] {
        clients += &peer(
            NS,
            &format!("caller-{node}"),
            node,
            &["call", "web.rolled:80", "--times", "1000000", "--every-ms", "10"],
        );
    }
    kube.apply(&clients);
    for node in ["n1", "n2"] {
        let caller = format!("caller-{node}");
        kube.ready(NS, &caller);
        goes_on(stage, NS, &caller, 20);
    }
    kube.kubectl(&["-n", NS, "rollout", "restart", "deploy/web"]).success();
    kube.rolled_out(NS, "deploy/web");
    kube.eventually("the old pods are gone", || stage.pods(NS, "app=web").len() == 3);
    for node in ["n1", "n2"] {
        goes_on(stage, NS, &format!("caller-{node}"), 20);
    }
    stage.forget(NS);
}

pub fn pods_that_cannot_be_in_the_mesh_say_so(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "refused";
    stage.namespace(NS, true);
    let host = peer(NS, "host", "n1", &["keep", "127.0.0.1:0"]).replace("spec:\n", "spec:\n  hostNetwork: true\n");
    kube.apply(&host);
    kube.ready(NS, "host");
    kube.eventually("the pod says that it is refused", || stage.status(NS, "host").starts_with("refused: "));
    assert!(stage.status(NS, "host").contains("host"), "{}", stage.status(NS, "host"));
    kube.eventually("an Event says so", || {
        let events = kube.kubectl(&["-n", NS, "get", "events", "--field-selector", "reason=NodemeshRefused"]).out;
        events.contains("pod/host")
    });
    // The pods cannot start, for the node has no such runtime; that they will not be in the mesh is said all the same.
    for (handler, called) in [("runsc", "gVisor"), ("kata-qemu", "Kata")] {
        let class = format!("refused-{handler}");
        let text = format!(
            "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {{name: {class}}}\nhandler: {handler}\n"
        );
        let runtime = format!("spec:\n  runtimeClassName: {class}\n");
        kube.apply(&(text + &peer(NS, handler, "n1", &["keep", "127.0.0.1:0"]).replace("spec:\n", &runtime)));
        kube.eventually("the pod says why it is refused", || {
            let status = stage.status(NS, handler);
            status.starts_with("refused: ") && status.contains(called)
        });
        kube.eventually("an Event says so", || {
            let fields = format!("reason=NodemeshRefused,involvedObject.name={handler}");
            kube.kubectl(&["-n", NS, "get", "events", "--field-selector", &fields]).out.contains(called)
        });
        kube.kubectl(&["delete", "runtimeclass", &class]).success();
    }
    stage.forget(NS);
}
