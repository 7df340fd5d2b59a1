//! `cargo xtask demo --kubernetes`: the same story in a real cluster, with the commands that a user types.
//!
//! In comes a machine with root; out comes nothing, unless it is to be kept. Every address is inside namespaces of its own.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mesh_tests::{Kube, cgroup2_mount, eventually, meshctl_binary};

use super::{HBONE, PATIENCE, SAYS, chapter, command, line, quote, show_link, strong, tls_records};
use crate::cluster::stage::{PEER_IMAGE, Stage};
use crate::setup;

const NODES: [&str; 2] = ["n1", "n2"];
const INSTALLED: Duration = Duration::from_secs(180);

pub fn run(keep: bool) -> Result<()> {
    setup::run_for_demo()?;
    let stage = Stage::for_demo()?;
    let kube = Kube::at(stage.folder());
    std::panic::set_hook(Box::new(|panic| {
        if let Some(text) = panic.payload_as_str() {
            eprintln!("error: {text}");
        }
    }));
    let told = thread::scope(|scope| scope.spawn(|| tell(&kube)).join());
    if told.is_err() {
        bail!("the demo ended early; everything it had made is removed");
    }
    if !keep {
        line("`cargo xtask demo --kubernetes --keep` leaves the cluster running to play with.");
        line("Everything that was made is removed now.");
        return Ok(());
    }
    line("It keeps running. In another terminal, as root:");
    quote(&format!("export KUBECONFIG={} PATH={}:$PATH", stage.kubeconfig().display(), stage.bin().display()));
    quote("kubectl get pods --all-namespaces");
    quote(&format!("{} {} workloads --kubernetes", stage.enter(), meshctl_binary().display()));
    quote("cargo xtask cluster --name demo down     # ends it");
    stage.keep();
    Ok(())
}

fn tell(kube: &Kube) {
    let early = before(kube);
    install(kube, early);
    label(kube, early);
    identities(kube);
    policy(kube, early);
    remove(kube);
}

/// Returns how many of frontend's calls had failed by then: its first ones may come before kube-proxy knows the Service.
fn before(kube: &Kube) -> usize {
    chapter("A cluster of two nodes, and a shop in it that knows nothing of meshes");
    kube.apply(SHOP);
    let call = format!("[call, \"orders.shop:80\", --times, \"1000000\", --every-ms, \"100\", --text, {SAYS:?}]");
    for (name, node, args) in [("orders", "n2", "[echo, \"[::]:8080\"]"), ("frontend", "n1", call.as_str())] {
        kube.apply(&pod(name, node, args));
        kube.ready("shop", name);
    }
    calls_go_on(kube);
    let early = failed_calls(kube);
    quote(&kube.kubectl(&["-n", "shop", "get", "pods", "-o", "wide"]).success());
    line("frontend, on n1, calls orders.shop, on n2, ten times a second.");
    let recording = record(kube);
    assert!(recording.contains(SAYS.as_bytes()), "the link does not show the client's plaintext");
    show_link(&recording);
    line(&format!("Anyone on the network between the nodes reads: {}", strong(&format!("\"{SAYS}\""))));
    early
}

fn install(kube: &Kube, early: usize) {
    chapter("Install the mesh");
    let cgroup = format!("agent.cgroup={}", cgroup2_mount().display());
    let values = ["image.tag=test", "image.pullPolicy=Never", cgroup.as_str()];
    let sets: Vec<&str> = values.iter().flat_map(|value| ["--set", value]).collect();
    line(&command(&format!("meshctl install --profile demo {}", sets.join(" "))));
    let args = [&["install", "--profile", "demo", "--timeout", "150s"], sets.as_slice()].concat();
    let start = Instant::now();
    quote(&kube.meshctl(&args).success());
    line(&format!(
        "Installed in {} s. No pod of the shop was touched, and none is in the mesh.",
        start.elapsed().as_secs()
    ));
    no_call_failed(kube, early);
}

fn label(kube: &Kube, early: usize) {
    chapter("A label, and nothing else");
    line(&command("kubectl label namespace shop nodemesh.io/mode=enabled"));
    kube.kubectl(&["label", "namespace", "shop", "nodemesh.io/mode=enabled"]).success();
    let in_mesh = |pod: &str| {
        let path = r"jsonpath={.metadata.annotations.nodemesh\.io/status}";
        kube.kubectl(&["-n", "shop", "get", "pod", pod, "-o", path]).out == "enabled"
    };
    let took = eventually(INSTALLED, "the pods are in the mesh", || ["orders", "frontend"].iter().all(|p| in_mesh(p)));
    line(&format!(
        "The two running pods show that they are in the mesh after {} ms. None was restarted:",
        took.as_millis()
    ));
    quote(&kube.kubectl(&["-n", "shop", "get", "pods"]).success());
    let recording = record(kube);
    assert!(!recording.contains(SAYS.as_bytes()), "the link still shows the client's plaintext");
    assert!(tls_records(&recording) > 0, "the link shows no TLS");
    show_link(&recording);
    line(&format!(
        "The same calls, and {}",
        strong(&format!("no byte of them can be read: mutual TLS 1.3 on port {HBONE}."))
    ));
    no_call_failed(kube, early);
    line("Not one call of frontend has failed meanwhile.");
}

fn identities(kube: &Kube) {
    chapter("What the mesh knows");
    for view in [["workloads", "-n"], ["certificates", "-n"]] {
        line(&command(&format!("meshctl {} -n shop", view[0])));
        quote(&kube.meshctl(&[view[0], view[1], "shop", "--kubernetes"]).success());
    }
}

fn policy(kube: &Kube, early: usize) {
    chapter("A policy cuts one client off, live");
    line(
        "A third pod comes: it starts when it is in the mesh, and its first packet is protected. It keeps one connection open.",
    );
    kube.apply(&pod("mallory", "n1", "[chat, \"orders.shop:80\"]"));
    kube.ready("shop", "mallory");
    line(&command("meshctl connections -n shop"));
    quote(&kube.meshctl(&["connections", "-n", "shop", "--kubernetes"]).success());
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-mallory, namespace: shop}\nspec:\n  \
                  selector: {matchLabels: {app: orders}}\n  action: DENY\n  rules:\n  - from:\n    - source:\n        \
                  principals: [cluster.local/ns/shop/sa/mallory]\n";
    quote(policy);
    let cut = || kube.log("shop", "mallory").contains("\"error\"");
    assert!(!cut(), "mallory was cut before");
    kube.apply(policy);
    let took = eventually(PATIENCE, "mallory is cut off", cut);
    let took = strong(&format!("{} ms", took.as_millis()));
    line(&format!("mallory's open connection was cut {took} after `kubectl apply`."));
    calls_go_on(kube);
    no_call_failed(kube, early);
    line("frontend has not noticed.");
}

fn remove(kube: &Kube) {
    chapter("And away with it");
    line(&command("meshctl uninstall --kubernetes"));
    quote(&kube.meshctl(&["uninstall", "--kubernetes"]).success());
    calls_go_on(kube);
    line("The shop runs on as before the mesh came.");
}

/// What passes between the nodes during ten calls.
fn record(kube: &Kube) -> mesh_tests::Recording {
    let capture = kube.capture(NODES[0]);
    calls_go_on(kube);
    capture.stop()
}

fn calls_go_on(kube: &Kube) {
    let answered = || kube.log("shop", "frontend").matches("\"ok\":true").count();
    let before = answered();
    eventually(PATIENCE, "frontend is served", || answered() >= before + 10);
}

fn failed_calls(kube: &Kube) -> usize {
    kube.log("shop", "frontend").matches("\"ok\":false").count()
}

fn no_call_failed(kube: &Kube, early: usize) {
    let failed = failed_calls(kube);
    assert!(failed == early, "{} calls have failed: {}", failed - early, kube.log("shop", "frontend"));
}

const SHOP: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\napiVersion: v1\nkind: Service\nmetadata: \
                    {name: orders, namespace: shop}\nspec:\n  selector: {app: orders}\n  ports: [{port: 80, targetPort: 8080}]\n";

/// A pod with an account of its own name.
fn pod(name: &str, node: &str, args: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: shop}}\n---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\nspec:\n  nodeName: {node}\n  \
         serviceAccountName: {name}\n  terminationGracePeriodSeconds: 1\n  containers:\n  \
         - {{name: main, image: \"{PEER_IMAGE}\", imagePullPolicy: Never, args: {args}}}\n"
    )
}
