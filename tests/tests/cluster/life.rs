//! Agents, controllers and the API server come and go while pods talk.

use std::time::Duration;

use mesh_tests::{Kube, throughout};

use crate::stage::{MESH, NODES, Stage, peer, servers, service, strict};
use crate::traffic::{calls, chats, goes_on, no_call_failed};

/// Pods of both nodes that call and chat with a server on each.
struct Load {
    namespace: &'static str,
    callers: Vec<String>,
    chatters: Vec<String>,
}

impl Load {
    fn start(stage: &Stage, namespace: &'static str, every_ms: &str) -> Self {
        let kube = stage.installed();
        stage.namespace(namespace, true);
        let mut pods = strict(namespace);
        for node in NODES {
            let server = format!("server-{node}");
            pods += &(peer(namespace, &server, node, &["echo", "[::]:8080"]) + &service(namespace, &server, ""));
        }
        kube.apply(&pods);
        NODES.iter().for_each(|node| kube.ready(namespace, &format!("server-{node}")));
        let (mut callers, mut chatters, mut pods) = (Vec::new(), Vec::new(), String::new());
        for from in NODES {
            for to in NODES {
                let target = format!("server-{to}.{namespace}:80");
                callers.push(format!("caller-{from}-{to}"));
                chatters.push(format!("chatter-{from}-{to}"));
                let call = ["call", &target, "--times", "1000000", "--every-ms", every_ms];
                let chat = ["chat", &target, "--every-ms", every_ms];
                pods += &peer(namespace, &callers[callers.len() - 1], from, &call);
                pods += &peer(namespace, &chatters[chatters.len() - 1], from, &chat);
            }
        }
        kube.apply(&pods);
        let load = Self { namespace, callers, chatters };
        load.callers.iter().chain(&load.chatters).for_each(|pod| kube.ready(namespace, pod));
        load.goes_on(stage, 10);
        load
    }

    #[track_caller]
    fn goes_on(&self, stage: &Stage, more: usize) {
        self.callers.iter().for_each(|pod| goes_on(stage, self.namespace, pod, more));
    }

    /// How many calls were made; no call has failed and no connection was cut.
    #[track_caller]
    fn unharmed(&self, stage: &Stage) -> usize {
        for pod in &self.callers {
            no_call_failed(stage, self.namespace, pod);
        }
        for pod in &self.chatters {
            let (connections, messages) = chats(stage, self.namespace, pod);
            assert_eq!(connections, 1, "{pod} was cut; it has sent {messages} messages");
        }
        self.callers.iter().map(|pod| calls(stage, self.namespace, pod).0).sum()
    }
}

/// The pod of the agent of a node.
fn agent(kube: &Kube, node: &str) -> String {
    let fields = format!("spec.nodeName={node}");
    let path = "jsonpath={.items[?(@.status.phase==\"Running\")].metadata.name}";
    kube.kubectl(&["-n", MESH, "get", "pods", "-l", "app=nodemesh-agent", "--field-selector", &fields, "-o", path])
        .success()
}

pub fn an_agent_that_is_deleted_comes_back_and_opens_nothing(stage: &Stage) {
    let kube = stage.installed();
    const NS: &str = "deleted";
    stage.namespace(NS, true);
    let call = ["call", "server.deleted:80", "--times", "1000000", "--every-ms", "20", "--text", "never-to-be-read"];
    kube.apply(&(strict(NS) + &peer(NS, "server", "n2", &["echo", "[::]:8080"]) + &service(NS, "server", "")));
    kube.ready(NS, "server");
    kube.apply(&peer(NS, "caller", "n1", &call));
    kube.ready(NS, "caller");
    goes_on(stage, NS, "caller", 10);
    let wire = kube.capture("n1");
    kube.kubectl(&["-n", MESH, "delete", "pod", &agent(kube, "n1"), "--wait=true"]).success();
    kube.rolled_out(MESH, "daemonset/nodemesh-agent");
    let (before, failed) = calls(stage, NS, "caller");
    kube.eventually("calls are served by the new agent", || calls(stage, NS, "caller").0 > before + 10);
    let recording = wire.stop();
    assert!(!recording.contains(b"never-to-be-read"), "while the agent was away, something was said in plaintext");
    println!("an agent that is deleted: {} calls failed, {before} did not", failed.len());
    stage.forget(NS);
}

/// New pods outside of the mesh start without an agent; those in it wait, and start when it is back.
pub fn without_an_agent_only_the_mesh_waits(stage: &Stage) {
    let kube = stage.installed();
    stage.namespace("inside", true);
    stage.namespace("outside", false);
    // No agent fits on n1. That of n2 is not replaced for it: two rollouts one after the other would be, and Kubernetes 1.36
    // may leave the second of these half done for five minutes.
    let strategy = ["-n", MESH, "get", "daemonset", "nodemesh-agent", "-o", "jsonpath={.spec.updateStrategy}"];
    let strategy = kube.kubectl(&strategy).success();
    let nowhere = "{\"spec\":{\"updateStrategy\":{\"type\":\"OnDelete\",\"rollingUpdate\":null},\"template\":{\"spec\":{\"affinity\":{\"nodeAffinity\":{\"requiredDuringSchedulingIgnoredDuringExecution\":\
                   {\"nodeSelectorTerms\":[{\"matchExpressions\":[{\"key\":\"kubernetes.io/hostname\",\"operator\":\"NotIn\",\"values\":[\"n1\"]}]}]}}}}}}}";
    kube.kubectl(&["-n", MESH, "patch", "daemonset", "nodemesh-agent", "--patch", nowhere]).success();
    kube.eventually("the agent of n1 is gone", || agent(kube, "n1").is_empty());
    kube.apply(
        &(peer("inside", "waits", "n1", &["echo", "[::]:8080"])
            + &peer("outside", "starts", "n1", &["echo", "[::]:8080"])),
    );
    kube.ready("outside", "starts");
    kube.eventually("an Event says what the pod waits for", || {
        kube.kubectl(&["-n", "inside", "get", "events", "--field-selector", "involvedObject.name=waits"])
            .out
            .contains("nodemesh")
    });
    let phase = || kube.kubectl(&["-n", "inside", "get", "pod", "waits", "-o", "jsonpath={.status.phase}"]).out;
    assert_eq!(phase(), "Pending");
    let back = format!(
        "[{{\"op\":\"remove\",\"path\":\"/spec/template/spec/affinity\"}},\
         {{\"op\":\"replace\",\"path\":\"/spec/updateStrategy\",\"value\":{strategy}}}]"
    );
    kube.kubectl(&["-n", MESH, "patch", "daemonset", "nodemesh-agent", "--type=json", "--patch", &back]).success();
    kube.rolled_out(MESH, "daemonset/nodemesh-agent");
    kube.ready("inside", "waits");
    stage.wait_in_mesh("inside", &["waits"]);
    stage.forget("inside");
    stage.forget("outside");
}

pub fn a_cni_configuration_that_is_overwritten_is_mended(stage: &Stage) {
    let kube = stage.installed();
    let on_node = |script: &str| {
        let output = kube.on_node("n1", "sh").args(["-c", script]).output().expect("a node runs sh");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let file = on_node("ls /etc/cni/net.d/*.conflist | head -n 1").trim().to_owned();
    let ours = || on_node(&format!("cat {file}"));
    assert!(ours().contains("nodemesh-cni") || ours().contains("mesh-cni"), "{}", ours());
    // As the agent of the cluster's network does when it starts: it writes its own list anew.
    on_node(&format!("cp /run/node/state/cni.conflist {file}.tmp && mv {file}.tmp {file}"));
    kube.eventually("the plugin is in the list again", || ours().contains("mesh-cni"));
    let list: serde_json::Value = serde_json::from_str(&ours()).expect("the list is JSON");
    let kinds: Vec<_> =
        list["plugins"].as_array().expect("a list has plugins").iter().map(|p| p["type"].clone()).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == "mesh-cni").count(), 1, "{kinds:?}");
    assert_eq!(kinds.last().map(|k| k == "mesh-cni"), Some(true), "{kinds:?}");
}

/// For a minute neither the API server nor a controller answers.
pub fn api_server_and_controller_may_be_away(stage: &Stage) {
    let kube = stage.installed();
    let load = Load::start(stage, "alone", "50");
    // Kubernetes's own controllers would take both nodes for dead when they see how old their leases are; where they
    // elect a leader, they have ended by then.
    let ids = ["kube-apiserver", "kube-controller-manager"].map(|program| {
        let record = std::fs::read_to_string(kube.place("control").join(format!("{program}.pid"))).expect("it runs");
        record.split(' ').next().expect("a record begins with an id").to_owned()
    });
    // kubectl needs the API server: the logs are read where kubelet keeps them.
    let count = |what: &str| -> usize {
        let script = format!("cat /var/log/pods/alone_caller-*/main/*.log | grep -c '\"ok\":{what}'");
        let on_node = |node: &&str| {
            let output = kube.on_node(node, "sh").args(["-c", &script]).output().expect("a node runs sh");
            String::from_utf8_lossy(&output.stdout).trim().parse::<usize>().unwrap_or(0)
        };
        NODES.iter().map(on_node).sum()
    };
    kube.kubectl(&["-n", MESH, "scale", "deployment", "nodemesh-controller", "--replicas=0"]).success();
    kube.eventually("no controller is left", || stage.pods(MESH, "app=nodemesh-controller").is_empty());
    let signal = |name: &str, id: &str| {
        let status = std::process::Command::new("kill").args([name, id]).status();
        assert!(status.expect("kill runs").success());
    };
    ids.iter().for_each(|id| signal("-STOP", id));
    // Whatever fails in between, the cluster must go on.
    struct Resume<F: Fn()>(F);
    impl<F: Fn()> Drop for Resume<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    let resume = Resume(|| {
        signal("-CONT", &ids[0]);
        // The nodes say first that they live.
        std::thread::sleep(Duration::from_secs(12));
        signal("-CONT", &ids[1]);
    });
    let before = count("true");
    throughout(Duration::from_secs(60), "", || {
        std::thread::sleep(Duration::from_secs(1));
        true
    });
    let (after, failed) = (count("true"), count("false"));
    drop(resume);
    assert_eq!(failed, 0, "calls failed in a minute without an API server");
    assert!(after > before + 1000, "{before} calls before, {after} after a minute without an API server");
    kube.eventually("the API server answers", || kube.kubectl(&["get", "--raw", "/readyz"]).ok);
    kube.kubectl(&["-n", MESH, "scale", "deployment", "nodemesh-controller", "--replicas=1"]).success();
    kube.rolled_out(MESH, "deployment/nodemesh-controller");
    // Kubernetes may have taken nodes for dead for a moment, and their endpoints away: that is not of the mesh.
    for pod in &load.callers {
        let before = calls(stage, "alone", pod).0;
        kube.eventually("calls are served", || calls(stage, "alone", pod).0 > before + 10);
    }
    for pod in &load.chatters {
        assert_eq!(chats(stage, "alone", pod).0, 1, "{pod} was cut");
    }
    println!("a minute without API server and controller: {} calls, none failed", after - before);
    // And what happens afterwards is noticed.
    kube.apply(&peer("alone", "late", "n1", &["call", "server-n2.alone:80", "--times", "1000000", "--every-ms", "50"]));
    kube.ready("alone", "late");
    goes_on(stage, "alone", "late", 5);
    stage.forget("alone");
}

pub fn settings_change_while_everything_runs(stage: &Stage) {
    let kube = stage.installed();
    let write = |text: &str| {
        let patch = serde_json::json!({"data": {"nodemesh.yaml": text}}).to_string();
        kube.kubectl(&["-n", MESH, "patch", "configmap", "nodemesh", "--type=merge", "--patch", &patch]).success();
    };
    let text =
        kube.get(&["-n", MESH, "configmap", "nodemesh"])["data"]["nodemesh.yaml"].as_str().expect("a text").to_owned();
    let levels = || kube.meshctl(&["log", "--kubernetes"]).out;
    write(&format!("{text}\nlog: debug\n"));
    let took = kube.eventually("every node logs at debug", || levels().matches("debug").count() == NODES.len());
    println!("a change of settings was live on both nodes after {} ms", took.as_millis());
    write(&format!("{text}\nlog: debug\nworkres: 3\n"));
    kube.eventually("an Event says what is wrong", || {
        let events =
            kube.kubectl(&["-n", MESH, "get", "events", "--field-selector", "involvedObject.name=nodemesh"]).out;
        events.contains("workres")
    });
    assert_eq!(levels().matches("debug").count(), NODES.len(), "the last good settings stay");
    // Agents take pods in by these labels, and controllers sign for them: both have to follow.
    const NS: &str = "ambient";
    stage.namespace(NS, false);
    kube.kubectl(&["label", "namespace", NS, "istio.io/dataplane-mode=ambient"]).success();
    kube.apply(&format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: new, namespace: {NS}}}\n"));
    let web = peer(NS, "web", "n1", &["echo", "[::]:8080"]).replace("spec:\n", "spec:\n  serviceAccountName: new\n");
    kube.apply(&web);
    kube.ready(NS, "web");
    assert_eq!(stage.status(NS, "web"), "", "Istio's labels are not looked at");
    write(&format!("{text}\nistioLabels: true\n"));
    stage.wait_in_mesh(NS, &["web"]);
    write(&text);
    kube.eventually("the pod has left", || stage.status(NS, "web").is_empty());
    stage.forget(NS);
    kube.eventually("the level is back", || !levels().contains("debug"));
}

/// From one image to another, node by node, under load.
pub fn an_upgrade_loses_no_request_and_no_connection(stage: &Stage) {
    let kube = stage.installed();
    let load = Load::start(stage, "upgraded", "10");
    kube.apply(&servers("upgraded", "web", 2));
    kube.rolled_out("upgraded", "deploy/web");
    let mut args = vec!["upgrade"];
    args.extend(stage.install_with(&["--set", "image.tag=next"]).into_iter().skip(1));
    let said = kube.meshctl(&args).success();
    let image = kube.get(&["-n", MESH, "daemonset", "nodemesh-agent"]);
    let image = image["spec"]["template"]["spec"]["containers"][0]["image"].as_str().unwrap_or_default().to_owned();
    assert!(image.ends_with(":next"), "{image}: {said}");
    load.goes_on(stage, 50);
    let calls = load.unharmed(stage);
    println!("an upgrade: {calls} calls, none failed; {} long connections, none cut", load.chatters.len());
    // The long connections stay, in agents that drain: the check tells them from those that are ill, and an uninstallation
    // must not wait for them.
    load.callers.iter().for_each(|pod| {
        kube.kubectl(&["-n", "upgraded", "delete", "pod", pod, "--wait=false"]).success();
    });
    kube.eventually("the agents before were told to end", || {
        let check = kube.meshctl(&["check"]);
        check.ok && check.out.matches("drains its open connections").count() == NODES.len()
    });
}
