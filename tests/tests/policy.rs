//! Who may talk to whom: mTLS modes, authorization, probes; and that a change holds for connections that are open.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::ring::{Case, Mode, World, meshed_only, run};
use mesh_tests::traffic::{PATIENCE, Refusal, SetOnDrop, accept, call, echo, pair, ping, port, pour, refusal};
use mesh_tests::{Cgroup, Mesh, MeshMode, Pod, eventually, peer_binary, throughout};
use socket2::Domain;

struct Policy {
    world: World,
    alice: Arc<Pod>,
    bob: Arc<Pod>,
    /// Not in the mesh.
    outsider: Arc<Pod>,
    server: Arc<Pod>,
    /// Beside it in its namespace.
    neighbour: Arc<Pod>,
    kubelet: Cgroup,
}

/// The servers' ports, in pods that nobody else uses.
const WEB: u16 = 8080;
const ADMIN: u16 = 9090;

fn build() -> Policy {
    let mesh = Mesh::new().node("n1").node("n2");
    for namespace in ["friends", "shop"] {
        mesh.manifests().label(namespace, MeshMode::Enabled);
    }
    mesh.manifests().label("outside", MeshMode::Unset);
    let alice = mesh.pod("n1", "friends/alice");
    let bob = mesh.pod("n1", "friends/bob");
    let outsider = mesh.pod("n1", "outside/stranger");
    let server = mesh.pod("n2", "shop/server");
    let neighbour = mesh.pod("n2", "shop/neighbour");
    for pod in [&server, &neighbour] {
        for port in [WEB, ADMIN] {
            echo(pod.listen_on(&format!("[::]:{port}")));
        }
    }
    let kubelet = Cgroup::new(&mesh, "kubelet");
    let flag = kubelet.path().display().to_string();
    let world = World::start(mesh, Mode::of_this_run(), &["--probe-cgroup", &flag]);
    world.wait_enrolled(&[&alice, &bob, &server, &neighbour]);
    Policy { world, alice, bob, outsider, server, neighbour, kubelet }
}

const CASES: &[Case<Policy>] = &[
    ("strict_for_the_mesh", strict_for_the_mesh),
    ("strict_for_a_namespace_permissive_for_a_workload", strict_for_a_namespace_permissive_for_a_workload),
    ("strict_but_for_a_port", strict_but_for_a_port),
    ("strict_cuts_open_plaintext_connections", strict_cuts_open_plaintext_connections),
    ("allow_by_principal", allow_by_principal),
    ("deny_by_namespace_and_port", deny_by_namespace_and_port),
    ("allow_by_address", allow_by_address),
    ("case_23_a_policy_judges_the_pods_own_address", case_23_a_policy_judges_the_pods_own_address),
    ("deny_goes_before_allow", deny_goes_before_allow),
    ("audit_lets_pass", audit_lets_pass),
    ("a_rule_with_l7_fields_closes", a_rule_with_l7_fields_closes),
    ("a_broken_policy_keeps_the_last_good_one", a_broken_policy_keeps_the_last_good_one),
    ("what_is_broken_at_a_restart_keeps_its_last_good_state", what_is_broken_at_a_restart_keeps_its_last_good_state),
    ("case_32_a_change_cuts_what_it_forbids_and_only_that", case_32_a_change_cuts_what_it_forbids_and_only_that),
    ("case_33_kubelet_may_probe_under_strict_and_nobody_else", case_33_kubelet_may_probe_under_strict),
    ("case_38_no_verdict_is_torn_in_a_storm_of_updates", case_38_storm_of_updates),
];

fn main() -> ExitCode {
    run(build, |p| &p.world, meshed_only(CASES))
}

/// Policies that are in force until this is dropped.
struct Applied<'p> {
    policy: &'p Policy,
    files: Vec<&'static str>,
}

impl Applied<'_> {
    /// With what `other` has applied: they end together.
    fn and(mut self, mut other: Self) -> Self {
        self.files.append(&mut other.files);
        self
    }
}

impl Policy {
    fn apply(&self, file: &'static str, yaml: &str) -> Applied<'_> {
        self.world.mesh().manifests().apply(file, yaml);
        Applied { policy: self, files: vec![file] }
    }

    fn peer_authentication(&self, file: &'static str, place: &str, spec: &str) -> Applied<'_> {
        let head = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n";
        self.apply(file, &format!("{head}  name: {file}\n  namespace: {place}\nspec:\n{spec}"))
    }

    fn authorization(&self, file: &'static str, spec: &str) -> Applied<'_> {
        self.apply(file, &authorization(file, spec))
    }

    fn at(&self, pod: &Pod, port: u16) -> SocketAddr {
        SocketAddr::new(pod.v4(), port)
    }

    fn may(&self, client: &Pod, pod: &Pod, port: u16) -> bool {
        call(client, self.at(pod, port)).is_ok()
    }

    /// Waits until `client` may, or may not, call; then checks that a refusal is prompt.
    #[track_caller]
    fn becomes(&self, client: &Pod, pod: &Pod, port: u16, allowed: bool) {
        let what = format!("{} may call {}:{port}: {allowed}", client.name(), pod.name());
        eventually(CHANGE, &what, || self.may(client, pod, port) == allowed);
        if !allowed {
            let refused = refusal(client, self.at(pod, port));
            assert!(refused.is_some_and(Refusal::is_prompt), "{what}: {refused:?}");
        }
    }
}

impl Drop for Applied<'_> {
    fn drop(&mut self) {
        for file in &self.files {
            self.policy.world.mesh().manifests().remove(file);
        }
        if !self.files.is_empty() && !thread::panicking() {
            // The next case begins where all is open again.
            for client in [&self.policy.alice, &self.policy.bob, &self.policy.outsider] {
                for (server, port) in [(&self.policy.server, WEB), (&self.policy.neighbour, ADMIN)] {
                    eventually(CHANGE, "all is open again", || self.policy.may(client, server, port));
                }
            }
        }
    }
}

fn authorization(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: {name}\n  namespace: shop\nspec:\n{spec}"
    )
}

/// How long a change may take to be in force: reading the folder, judging anew.
const CHANGE: Duration = Duration::from_secs(3);

fn strict_for_the_mesh(p: &Policy) {
    assert!(p.may(&p.outsider, &p.server, WEB), "PERMISSIVE is the default");
    let _strict = p.peer_authentication("mesh-strict", "istio-system", "  mtls: {mode: STRICT}\n");
    p.becomes(&p.outsider, &p.server, WEB, false);
    p.becomes(&p.outsider, &p.neighbour, WEB, false);
    assert!(p.may(&p.alice, &p.server, WEB), "members speak mTLS");
    assert!(p.may(&p.neighbour, &p.server, WEB), "on one node too");
}

fn strict_for_a_namespace_permissive_for_a_workload(p: &Policy) {
    let strict = p.peer_authentication("shop-strict", "shop", "  mtls: {mode: STRICT}\n");
    p.becomes(&p.outsider, &p.server, WEB, false);
    p.becomes(&p.outsider, &p.neighbour, WEB, false);
    let selector = "  selector: {matchLabels: {app: neighbour}}\n  mtls: {mode: PERMISSIVE}\n";
    let _both = strict.and(p.peer_authentication("neighbour-permissive", "shop", selector));
    p.becomes(&p.outsider, &p.neighbour, WEB, true);
    assert!(!p.may(&p.outsider, &p.server, WEB), "the exception is for one workload");
}

fn strict_but_for_a_port(p: &Policy) {
    let spec = format!(
        "  selector: {{matchLabels: {{app: server}}}}\n  mtls: {{mode: STRICT}}\n  portLevelMtls:\n    {ADMIN}: {{mode: PERMISSIVE}}\n"
    );
    let _strict = p.peer_authentication("server-strict", "shop", &spec);
    p.becomes(&p.outsider, &p.server, WEB, false);
    p.becomes(&p.outsider, &p.server, ADMIN, true);
}

fn strict_cuts_open_plaintext_connections(p: &Policy) {
    let (plain, _plain_far) = pair(&p.outsider, &p.server);
    let member = p.alice.connect(p.at(&p.server, WEB)).unwrap();
    let _strict = p.peer_authentication("cut-plain", "shop", "  mtls: {mode: STRICT}\n");
    eventually(CHANGE, "the plaintext connection is cut", || is_cut(&plain));
    ping(&member, b"still open").unwrap();
}

fn allow_by_principal(p: &Policy) {
    let rule = "  action: ALLOW\n  rules:\n  - from:\n    - source:\n        principals: [cluster.local/ns/friends/sa/alice]\n";
    let _allow = p.authorization("allow-alice", rule);
    p.becomes(&p.bob, &p.server, WEB, false);
    p.becomes(&p.outsider, &p.server, WEB, false);
    p.becomes(&p.neighbour, &p.server, WEB, false);
    assert!(p.may(&p.alice, &p.server, WEB));
}

fn deny_by_namespace_and_port(p: &Policy) {
    let rule = format!(
        "  action: DENY\n  rules:\n  - from:\n    - source:\n        namespaces: [friends]\n    to:\n    - operation:\n        ports: [\"{ADMIN}\"]\n"
    );
    let _deny = p.authorization("deny-admin", &rule);
    p.becomes(&p.alice, &p.server, ADMIN, false);
    assert!(p.may(&p.alice, &p.server, WEB), "another port");
    assert!(p.may(&p.neighbour, &p.server, ADMIN), "another namespace, on the same node");
    assert!(p.may(&p.outsider, &p.server, ADMIN), "no identity, so no namespace");
}

fn allow_by_address(p: &Policy) {
    let bob = p.bob.v4();
    let rule = format!("  action: ALLOW\n  rules:\n  - from:\n    - source:\n        ipBlocks: [\"{bob}/32\"]\n");
    let _allow = p.authorization("allow-bobs-address", &rule);
    p.becomes(&p.alice, &p.server, WEB, false);
    assert!(p.may(&p.bob, &p.server, WEB));
}

/// An address that is not a pod's own, on its loopback device, as who administers the pod's network can put it there.
struct Borrowed<'p>(&'p Pod, IpAddr);

impl<'p> Borrowed<'p> {
    fn new(pod: &'p Pod, address: IpAddr) -> Self {
        pod.netns().ip(&[&format!("addr add {address}/32 dev lo")]);
        Self(pod, address)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.0.netns().ip(&[&format!("addr del {}/32 dev lo", self.1)]);
    }
}

/// Connects and talks with a source that the client has chosen.
fn call_from(client: &Pod, source: IpAddr, to: SocketAddr) -> std::io::Result<()> {
    let socket = client.socket(Domain::IPV4);
    socket.bind(&SocketAddr::new(source, 0).into()).expect("the pod has this address");
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    ping(&TcpStream::from(socket), b"who am I?")
}

fn case_23_a_policy_judges_the_pods_own_address(p: &Policy) {
    let block = |addresses: &[IpAddr]| {
        let blocks: Vec<String> = addresses.iter().map(|address| format!("\"{address}/32\"")).collect();
        format!("  action: ALLOW\n  rules:\n  - from:\n    - source:\n        ipBlocks: [{}]\n", blocks.join(", "))
    };
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let lender = p.world.mesh().pod("n1", "friends/lender");
    p.world.wait_enrolled(&[&lender]);
    let to = p.at(&p.server, WEB);
    // On the server's node, and on another.
    for client in [&p.neighbour, &p.alice] {
        let _borrowed = Borrowed::new(client, lender.v4());
        let sources = [loopback, lender.v4()];
        {
            let _allow = p.authorization("allow-forged", &block(&sources));
            p.becomes(client, &p.server, WEB, false);
            for source in sources {
                let error = call_from(client, source, to).expect_err("an address that is not the pod's opens nothing");
                let prompt = Refusal::Afterwards(Some(error.kind())).is_prompt();
                assert!(prompt, "{} from {source}: {error}", client.name());
            }
            assert!(p.may(&lender, &p.server, WEB), "the true owner of the address");
        }
        let _allow = p.authorization("allow-own", &block(&[client.v4()]));
        p.becomes(&lender, &p.server, WEB, false);
        for source in sources {
            let result = call_from(client, source, to);
            result.unwrap_or_else(|e| panic!("{} from {source}, allowed by its own address: {e}", client.name()));
            // And the server is told the same that the policy was.
            let listener = p.server.listen();
            let socket = client.socket(Domain::IPV4);
            socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
            let to = SocketAddr::new(p.server.v4(), port(&listener));
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
            assert_eq!(accept(&listener).1.ip().to_canonical(), client.v4(), "{} from {source}", client.name());
        }
    }
    p.world.mesh().delete(lender);
}

fn deny_goes_before_allow(p: &Policy) {
    let allow = "  action: ALLOW\n  rules:\n  - from:\n    - source:\n        namespaces: [friends]\n";
    let deny = "  action: DENY\n  rules:\n  - from:\n    - source:\n        serviceAccounts: [friends/bob]\n";
    let _both = p.authorization("allow-friends", allow).and(p.authorization("deny-bob", deny));
    p.becomes(&p.bob, &p.server, WEB, false);
    p.becomes(&p.outsider, &p.server, WEB, false);
    p.becomes(&p.alice, &p.server, WEB, true);
}

fn audit_lets_pass(p: &Policy) {
    let rule = "  action: AUDIT\n  rules:\n  - from:\n    - source:\n        namespaces: [friends]\n";
    let _audit = p.authorization("audit-friends", rule);
    let named = || p.world.agent("n2").meshctl_json(&["policies"]).to_string().contains("audit-friends");
    eventually(CHANGE, "the policy is in force", named);
    assert!(p.may(&p.alice, &p.server, WEB));
    eventually(CHANGE, "the access log names it", || p.world.agent("n2").log().contains("shop/audit-friends"));
}

fn a_rule_with_l7_fields_closes(p: &Policy) {
    // ALLOW of a path: nothing here can see the path, so nothing is allowed.
    let allow = "  action: ALLOW\n  rules:\n  - to:\n    - operation:\n        paths: [/open]\n";
    {
        let _allow = p.authorization("allow-path", allow);
        p.becomes(&p.alice, &p.server, WEB, false);
    }
    // DENY of a path: it might be that path, so all of the rule is denied.
    let deny = "  action: DENY\n  rules:\n  - to:\n    - operation:\n        methods: [DELETE]\n";
    let _deny = p.authorization("deny-method", deny);
    p.becomes(&p.alice, &p.server, WEB, false);
}

fn what_is_broken_at_a_restart_keeps_its_last_good_state(p: &Policy) {
    let manifests = p.world.mesh().manifests();
    let deny = "  action: DENY\n  rules:\n  - from:\n    - source:\n        serviceAccounts: [friends/bob]\n";
    let applied = p.authorization("restarted", deny);
    p.becomes(&p.bob, &p.server, WEB, false);
    let kept = p.world.mesh().dir().join("state-n2/last-good-node.json");
    eventually(PATIENCE, "the policy is kept", || {
        std::fs::read_to_string(&kept).is_ok_and(|text| text.contains("restarted"))
    });
    // Both break while nobody looks: the policy as an object, the namespace with its label as a whole file.
    p.world.agent("n2").kill();
    manifests.apply("restarted", &authorization("restarted", "  action: DENNY\n  rules: [{}]\n"));
    manifests.apply("namespace-shop", "kind: [\n");
    p.world.agent("n2").restart();
    let problems = p.world.agent("n2").meshctl_json(&["problems"]).to_string();
    for told in ["the last good version stays in force", "namespace-shop.yaml", "the last good state of the file stays"]
    {
        assert!(problems.contains(told), "{told}: {problems}");
    }
    for pod in [&p.server, &p.neighbour] {
        assert!(p.world.agent("n2").is_enrolled(pod), "the namespace is still in the mesh");
    }
    // The client's agent has to find that its tunnels are dead.
    p.becomes(&p.alice, &p.server, WEB, true);
    p.becomes(&p.bob, &p.server, WEB, false);
    manifests.label("shop", MeshMode::Enabled);
    drop(applied);
}

fn a_broken_policy_keeps_the_last_good_one(p: &Policy) {
    let deny = "  action: DENY\n  rules:\n  - from:\n    - source:\n        serviceAccounts: [friends/bob]\n";
    let applied = p.authorization("edited", deny);
    p.becomes(&p.bob, &p.server, WEB, false);
    p.world.mesh().manifests().apply("edited", &authorization("edited", "  action: DENNY\n  rules: [{}]\n"));
    let told = || {
        let problems = p.world.agent("n2").meshctl_json(&["problems"]).to_string();
        problems.contains("edited") && problems.contains("action")
    };
    eventually(CHANGE, "the problem names object and field", told);
    assert!(!p.may(&p.bob, &p.server, WEB), "the last good version is in force");
    assert!(p.may(&p.alice, &p.server, WEB), "and nothing else");
    drop(applied);
}

/// Whether the peer or the mesh has ended a connection on which nothing is said.
fn is_cut(stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    match (&*stream).read(&mut [0; 1]) {
        Ok(0) => true,
        Ok(_) => panic!("bytes on a quiet connection"),
        Err(e) => !matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
    }
}

fn case_32_a_change_cuts_what_it_forbids_and_only_that(p: &Policy) {
    let talk = |client: &Pod| {
        let stream = client.connect(p.at(&p.server, WEB)).unwrap();
        ping(&stream, b"before").unwrap();
        stream
    };
    let (alice, idle, outsider, near) = (talk(&p.alice), talk(&p.bob), talk(&p.outsider), talk(&p.neighbour));
    // And one in the middle of a transfer.
    let (busy, far) = pair(&p.bob, &p.server);
    let stopped = AtomicBool::new(false);
    thread::scope(|s| {
        s.spawn(|| while (&far).read(&mut [0; 65536]).is_ok_and(|n| n > 0) {});
        let _stop = SetOnDrop(&stopped);
        let writer = s.spawn(|| pour(&busy, &stopped));
        let deny = "  action: DENY\n  rules:\n  - from:\n    - source:\n        serviceAccounts: [friends/bob]\n";
        let start = Instant::now();
        let _deny = p.authorization("cut-bob", deny);
        let took = eventually(Duration::from_secs(2), "the idle connection is cut", || is_cut(&idle));
        assert!(took < Duration::from_secs(1), "cut only after {took:?}");
        eventually(Duration::from_secs(1), "the busy connection is cut", || writer.is_finished());
        let took = writer.join().unwrap() - start;
        assert!(took < Duration::from_secs(1), "the transfer was cut only after {took:?}");
        throughout(Duration::from_millis(500), "the others live", || {
            [&alice, &outsider, &near].iter().all(|stream| {
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                ping(stream, b"after").is_ok()
            })
        });
        p.becomes(&p.bob, &p.server, WEB, false);
    });
}

fn case_33_kubelet_may_probe_under_strict(p: &Policy) {
    let _strict = p.peer_authentication("probe-strict", "istio-system", "  mtls: {mode: STRICT}\n");
    p.becomes(&p.outsider, &p.server, WEB, false);
    let node = p.world.mesh().get_node("n2");
    let peer = peer_binary().display().to_string();
    for address in [SocketAddr::new(p.server.v4(), WEB), SocketAddr::new(p.server.v6(), WEB)] {
        let to = address.to_string();
        // From kubelet's cgroup, on the pod's own node: to the application, with the node's own address.
        let mut probe = p.kubelet.within(node.netns().command("sh"), &peer, &["call", &to]);
        let output = probe.output().unwrap();
        assert!(output.status.success(), "probe {to}: {}", String::from_utf8_lossy(&output.stdout));
        // From any other process of the node: as any plaintext.
        let output = node.netns().command(&peer).args(["call", &to]).output().unwrap();
        assert!(!output.status.success(), "a process that is not kubelet reached {to}");
    }
}

fn case_38_storm_of_updates(p: &Policy) {
    const UPDATES: usize = 1000;
    // Both versions deny Bob and allow Alice, in different words: a mixture of the two might not.
    let versions = [
        "  action: ALLOW\n  rules:\n  - from:\n    - source:\n        principals: [cluster.local/ns/friends/sa/alice]\n",
        "  action: ALLOW\n  rules:\n  - from:\n    - source:\n        namespaces: [friends]\n        notPrincipals: [cluster.local/ns/friends/sa/bob]\n",
    ];
    let policy = p.authorization("storm", versions[0]);
    p.becomes(&p.bob, &p.server, WEB, false);
    let done = AtomicBool::new(false);
    thread::scope(|s| {
        let stop = SetOnDrop(&done);
        let calls = |client: Arc<Pod>, allowed: bool| {
            let (done, to) = (&done, p.at(&p.server, WEB));
            s.spawn(move || {
                let mut count = 0;
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(call(&client, to).is_ok(), allowed, "call {count} of {}", client.name());
                    count += 1;
                }
                count
            })
        };
        let (alice, bob) = (calls(Arc::clone(&p.alice), true), calls(Arc::clone(&p.bob), false));
        for n in 0..UPDATES {
            p.world.mesh().manifests().apply("storm", &authorization("storm", versions[n % 2]));
            // Two cores: without a breath the agent would see a few of the thousand only.
            thread::yield_now();
        }
        // The last of them is in force when a policy that follows it is.
        let _both = policy.and(p.authorization("storm-mark", "  action: AUDIT\n  rules: [{}]\n"));
        let named = || p.world.agent("n2").meshctl_json(&["policies"]).to_string().contains("storm-mark");
        eventually(CHANGE, "the storm is over", named);
        drop(stop);
        assert!(alice.join().unwrap() > 10 && bob.join().unwrap() > 10, "calls were made meanwhile");
    });
}
