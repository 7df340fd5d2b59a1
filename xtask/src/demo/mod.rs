//! `cargo xtask demo`: the story of a mesh, told with real traffic on two nodes made of network namespaces.
//!
//! In comes a machine with root; out comes nothing: all that it makes is removed at its end, on Ctrl-C too.

mod kubernetes;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    Agent, Controller, Mesh, MeshMode, Pod, Process, Recording, agent_binary, eventually, meshctl_binary, peer_binary,
    sweep_own,
};

use crate::run::is_root;
use crate::{build, setup};

/// The servers' port, in pods that are ours alone.
const PORT: u16 = 8080;
/// What the client says; looked for on the link.
const SAYS: &str = "order 1 espresso, card 4929-1234";
const HBONE: u16 = 15008;
const PATIENCE: Duration = Duration::from_secs(15);

pub fn run(keep: bool, in_kubernetes: bool) -> Result<()> {
    if !is_root() {
        bail!("the demo makes network namespaces and loads eBPF programs: run `sudo -E cargo xtask demo`");
    }
    if in_kubernetes {
        return kubernetes::run(keep);
    }
    setup::run_for_demo()?;
    build::unless_named()?;
    build::peer()?;
    crate::sweep();
    ctrlc::set_handler(|| {
        println!("\ninterrupted: removing everything");
        sweep_own();
        std::process::exit(130);
    })
    .context("cannot watch for Ctrl-C")?;
    // What goes wrong from here on is a panic of the harness with a sentence; the stage is removed while it unwinds.
    std::panic::set_hook(Box::new(|panic| {
        if let Some(text) = panic.payload_as_str() {
            eprintln!("error: {text}");
        }
    }));
    let told = thread::spawn(move || Stage::set().tell(keep)).join();
    if told.is_err() {
        bail!("the demo ended early; everything it had made is removed");
    }
    Ok(())
}

/// Everything that runs. Dropped in this order: programs, agents, the mesh.
struct Stage {
    programs: Vec<Process>,
    agents: Vec<Agent>,
    _controller: Controller,
    cast: Cast,
    mesh: Mesh,
}

/// The pods.
struct Cast {
    frontend: Arc<Pod>,
    mallory: Arc<Pod>,
    orders: Arc<Pod>,
    stock: Arc<Pod>,
    legacy: Arc<Pod>,
}

impl Cast {
    fn all(&self) -> [&Arc<Pod>; 5] {
        [&self.frontend, &self.mallory, &self.orders, &self.stock, &self.legacy]
    }
}

impl Stage {
    fn set() -> Self {
        chapter("Two nodes, five pods");
        let mesh = Mesh::new().node("n1").node("n2");
        mesh.manifests().label("shop", MeshMode::Unset);
        mesh.manifests().label("old", MeshMode::Unset);
        let cast = Cast {
            frontend: mesh.pod("n1", "shop/frontend"),
            mallory: mesh.pod("n1", "shop/mallory"),
            orders: mesh.pod("n2", "shop/orders"),
            stock: mesh.pod("n2", "shop/stock"),
            legacy: mesh.pod("n1", "old/legacy"),
        };
        for pod in cast.all() {
            line(&format!(
                "{:14} on {}  {:12} {}",
                format!("{}/{}", pod.namespace(), pod.name()),
                pod.node(),
                pod.v4(),
                pod.v6()
            ));
        }
        let mut programs = Vec::new();
        for server in [&cast.orders, &cast.stock] {
            let mut program = server.start(&peer_binary().display().to_string(), &["echo", &format!("[::]:{PORT}")]);
            program.wait_for("listening", PATIENCE);
            programs.push(program);
        }
        let controller = mesh.start_controller(&[]);
        let agents: Vec<Agent> = ["n1", "n2"].map(|node| mesh.start_agent(node, &[])).into();
        line("A controller, which is the certificate authority, and an agent on each node are running.");
        line("No pod is in the mesh yet.");
        Self { programs, agents, _controller: controller, cast, mesh }
    }

    fn tell(mut self, keep: bool) {
        let client = self.before();
        self.enrol(client);
        self.identities();
        self.policy(client);
        self.look_further(keep);
    }

    /// Starts a client and shows what it says on the link. Its place among the programs.
    fn before(&mut self) -> usize {
        chapter("Before: a client talks to a server on the other node");
        let to = SocketAddr::new(self.cast.orders.v4(), PORT).to_string();
        let call = ["call", &to, "--times", "1000000", "--every-ms", "100", "--text", SAYS];
        let program = self.cast.frontend.start(&peer_binary().display().to_string(), &call);
        line(&format!("frontend calls orders at {to}, ten times a second. It is process {}.", program.id()));
        self.programs.push(program);
        let client = self.programs.len() - 1;
        let recording = self.record(client);
        show_link(&recording);
        assert!(recording.contains(SAYS.as_bytes()), "the link does not show the client's plaintext");
        line(&format!("Anyone on the network reads: {}", strong(&format!("\"{SAYS}\""))));
        client
    }

    fn enrol(&mut self, client: usize) {
        chapter("A label, and nothing else");
        line(&command("kubectl label namespace shop nodemesh.io/mode=enabled"));
        line("(here: the same label, written into the folder of manifests that the agents watch)");
        self.mesh.manifests().label("shop", MeshMode::Enabled);
        let mut slowest = Duration::ZERO;
        for pod in self.cast.all().into_iter().filter(|pod| pod.namespace() == "shop") {
            let agent = self.agent(pod.node());
            slowest += eventually(PATIENCE, "the pods are in the mesh", || agent.is_enrolled(pod));
        }
        line(&format!("The four pods of shop are in the mesh after {} ms.", slowest.as_millis()));
        let program = &mut self.programs[client];
        let id = program.id();
        assert!(program.is_running() && !program.log().contains("\"ok\":false"), "the client has noticed");
        line(&format!("The client is still process {id}: not restarted, not configured, no call of it has failed."));
        let recording = self.record(client);
        show_link(&recording);
        assert!(!recording.contains(SAYS.as_bytes()), "the link still shows the client's plaintext");
        assert!(tls_records(&recording) > 0, "the link shows no TLS");
        line(&format!("The same calls, and {}", strong("no byte of them can be read: mutual TLS 1.3 on port 15008.")));
    }

    /// What passes between the nodes during ten calls of the client.
    fn record(&mut self, client: usize) -> Recording {
        let capture = self.mesh.capture("n1");
        let answered = |program: &Process| program.log().matches("\"ok\":true").count();
        let program = &self.programs[client];
        let before = answered(program);
        eventually(PATIENCE, "the client is served", || answered(program) >= before + 10);
        capture.stop()
    }

    fn identities(&mut self) {
        chapter("Who is there? Both ends have proved it");
        let to = SocketAddr::new(self.cast.orders.v4(), PORT).to_string();
        let chat = self.cast.mallory.start(&peer_binary().display().to_string(), &["chat", &to]);
        self.programs.push(chat);
        line("mallory, another pod of n1, opens a connection to orders and keeps it.");
        for (node, proves) in [("n1", &self.cast.orders), ("n2", &self.cast.mallory)] {
            let agent = self.agent(node);
            let id = proves.spiffe_id();
            eventually(PATIENCE, "the connection is listed with the peer's identity", || {
                agent.meshctl_json(&["connections"]).to_string().contains(&id)
            });
            line(&command(&format!("meshctl connections -o wide     # on {node}, whose peer is {id}")));
            quote(&agent.meshctl(&["connections", "-o", "wide"]).success());
        }
    }

    fn policy(&mut self, client: usize) {
        chapter("A policy cuts one client off, live");
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: no-mallory\n  \
                      namespace: shop\nspec:\n  selector: {matchLabels: {app: orders}}\n  action: DENY\n  rules:\n  - from:\n    \
                      - source:\n        principals: [cluster.local/ns/shop/sa/mallory]\n";
        quote(policy);
        let chat = self.programs.last().expect("mallory's program was started");
        self.mesh.manifests().apply("no-mallory", policy);
        let took = eventually(PATIENCE, "mallory is cut off", || chat.log().contains("\"error\""));
        line(&format!(
            "mallory's open connection was cut {} after the file was written.",
            strong(&format!("{} ms", took.as_millis()))
        ));
        let program = &self.programs[client];
        let before = program.log().lines().count();
        eventually(PATIENCE, "the frontend is served", || program.log().lines().count() > before + 5);
        assert!(!program.log().contains("\"ok\":false"), "the frontend has noticed");
        line("frontend has not noticed: not one of its calls has failed, before, during or after all this.");
        let log = self.agent("n2").log();
        if let Some(denied) = log.lines().rev().find(|entry| entry.contains("mallory")) {
            line("What the access log of n2 says of it:");
            quote(denied);
        }
    }

    fn look_further(self, keep: bool) {
        chapter("Look further");
        quote(&self.agent("n1").meshctl(&["status"]).success());
        if !keep {
            line("`cargo xtask demo --keep` leaves all this running to play with. README.md has the next steps.");
            line("Everything that was made is removed now.");
            return;
        }
        let meshctl = format!("{} --socket {}", meshctl_binary().display(), self.agent("n1").admin_socket().display());
        let peer = peer_binary().display().to_string();
        let orders = SocketAddr::new(self.cast.orders.v4(), PORT);
        let in_pod = |pod: &Pod| format!("ip netns exec {}", pod.netns().name());
        line("It keeps running. In another terminal, as root:");
        for (what, text) in [
            (
                "what an agent knows",
                format!("{meshctl} workloads     # or services, policies, certificates, connections"),
            ),
            ("call from a pod in the mesh", format!("{} {peer} call {orders}", in_pod(&self.cast.frontend))),
            ("and from one outside", format!("{} {peer} call {orders}", in_pod(&self.cast.legacy))),
            ("and from mallory", format!("{} {peer} call {orders}", in_pod(&self.cast.mallory))),
            ("watch the link", format!("ip netns exec {} tcpdump -ni n1 -A", self.mesh.fabric().name())),
            ("change policies, pods, labels", format!("ls {}", self.mesh.manifests().folder().display())),
            (
                "metrics",
                format!("ip netns exec {} curl -s 127.0.0.1:15020/metrics", self.agent("n1").node().netns().name()),
            ),
            ("another agent's help", format!("{} node --help", agent_binary().display())),
        ] {
            line(&format!("{what}:"));
            line(&command(&text));
        }
        line("Ctrl-C removes everything.");
        loop {
            thread::park();
        }
    }

    fn agent(&self, node: &str) -> &Agent {
        self.agents.iter().find(|agent| agent.node().name() == node).expect("each node has an agent")
    }
}

fn show_link(recording: &Recording) {
    let hbone = recording.on_port(HBONE).count();
    let plain = recording.on_port(PORT).count();
    line(&format!(
        "On the link between the nodes: {plain} segments on port {PORT}, {hbone} on port {HBONE}, {} TLS records.",
        tls_records(recording)
    ));
}

/// TLS records between pods; the agents' own talk with the controller is left out.
fn tls_records(recording: &Recording) -> usize {
    recording.on_port(HBONE).filter(|segment| segment.payload.starts_with(&[23, 3, 3])).count()
}

fn is_terminal() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn styled(text: &str, code: &str) -> String {
    if is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

fn strong(text: &str) -> String {
    styled(text, "1")
}

fn command(text: &str) -> String {
    styled(&format!("  $ {text}"), "36")
}

fn chapter(title: &str) {
    println!("\n{}", styled(&format!("=== {title}"), "1;32"));
}

fn line(text: &str) {
    println!("{text}");
}

fn quote(text: &str) {
    for quoted in text.trim_end().lines() {
        println!("    {quoted}");
    }
}
